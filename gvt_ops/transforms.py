"""How an image is prepared for evaluation and prediction."""

from gvt_ops import torchvision_cpu  # noqa: F401  lets torchvision be imported beside a CPU build of torch

# isort: split
from collections.abc import Sequence

from PIL import Image, ImageOps
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms

SMALL = 32  # pixels: images up to this size are fitted, not resized and cropped, as the official code does for CIFAR


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of images of --input-size, one number for squares."""
    return (size, size) if isinstance(size, int) else tuple(size)


class FitSquare:
    """Resize and crop to a square, or to (height, width); an image of this size stays as it is."""

    def __init__(self, size: int | Sequence[int]):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        wanted = sides(self.size)[::-1]
        return image if image.size == wanted else ImageOps.fit(image, wanted, Image.Resampling.BICUBIC)


def resized_sides(size: int | Sequence[int], crop: float) -> tuple[int, int]:
    """Return what an image is resized to cover before its center, `crop` of it, is cut out."""
    height, width = sides(size)
    return (height, width) if max(height, width) <= SMALL else (int(height / crop), int(width / crop))


def eval_transform(
    size: int | Sequence[int], crop: float, mean: Sequence[float], std: Sequence[float]
) -> transforms.Compose:
    """Return RGB image -> (channels, height, width), normalized: a center crop of `crop` times the resized sides.

    One mean: the image is turned gray.
    """
    bicubic, (height, width) = transforms.InterpolationMode.BICUBIC, resized_sides(size, crop)
    resize = transforms.Resize(height, interpolation=bicubic)
    if height != width:  # timm's, as its own evaluation of such models
        resize = ResizeKeepRatio((height, width), interpolation="bicubic")
    fit = [FitSquare(size)] if max(sides(size)) <= SMALL else [resize, transforms.CenterCrop(size)]
    gray = [transforms.Grayscale()] if len(mean) == 1 else []
    return transforms.Compose([*fit, *gray, transforms.ToTensor(), transforms.Normalize(mean, std)])
