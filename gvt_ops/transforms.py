"""How an image is prepared for evaluation and prediction."""

from gvt_ops import torchvision_cpu  # noqa: F401  lets torchvision be imported beside a CPU build of torch

# isort: split
from collections.abc import Sequence

from PIL import Image, ImageOps
from torchvision import transforms

SMALL = 32  # pixels: images up to this size are fitted, not resized and cropped, as the official code does for CIFAR


class FitSquare:
    """Resize and crop to a square; an image of this size stays as it is."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        square = (self.size, self.size)
        return image if image.size == square else ImageOps.fit(image, square, Image.Resampling.BICUBIC)


def eval_transform(size: int, crop: float, mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    """Return RGB image -> (3, size, size), normalized: a center crop of `crop` times the shorter side."""
    bicubic = transforms.InterpolationMode.BICUBIC
    fit = [transforms.Resize(int(size / crop), interpolation=bicubic), transforms.CenterCrop(size)]
    if size <= SMALL:
        fit = [FitSquare(size)]
    return transforms.Compose([*fit, transforms.ToTensor(), transforms.Normalize(mean, std)])
