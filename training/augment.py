"""RandAugment on the device: timm draws in a worker what it would do to each image, and a batch is transformed here.

So an image gets the operations and strengths that it would get there, for any number of processes, and differs by
rounding alone: geometric operations (rotation, shear, translation) by one gray level at most, in less than one pixel
of a thousand, all others not at all.
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import Tensor

Operation = tuple[str, float]  # the name of timm's function and its argument, 0.0 where it has none
Color = tuple[int, int, int]


class RecordedRandAugment:
    """Draw as timm's RandAugment does, and return the operations that it would do to an image.

    fill: the color of what comes in from outside an image.
    """

    def __init__(self, augment):
        self.augment, self.fill = copy.copy(augment), augment.ops[0].kwargs["fillcolor"]
        self.augment.ops = [copy.copy(operation) for operation in augment.ops]
        for operation in self.augment.ops:
            operation.aug_fn = functools.partial(note, operation.aug_fn.__name__)

    def __call__(self) -> list[Operation]:
        return self.augment([])


def note(name: str, found: list[Operation], argument: float = 0.0, **_) -> list[Operation]:
    return [*found, (name, float(argument))]


def unsupported_reason(augment) -> str | None:
    """Return why this RandAugment of timm's cannot be done here, or None if it can."""
    unknown = sorted({op.name for op in augment.ops if op.aug_fn.__name__ not in (OPERATIONS | MATRICES)})
    if unknown:
        return f"it has {', '.join(unknown)}"
    bicubic = all(op.kwargs["resample"] == Resampling.BICUBIC for op in augment.ops)
    return None if bicubic else "its geometric operations interpolate otherwise than bicubic"


@dataclass
class Plan:
    """What is done to a batch: one operation after the other, each to some of its images.

    steps: (name, how many images); numbers (N,): theirs in the batch, one step's after the other's; arguments (N, 6):
    the operation's in the first column, or the matrix of a geometric one.
    """

    steps: list[tuple[str, int]]
    numbers: Tensor
    arguments: Tensor
    fill: Color

    @classmethod
    def of(cls, drawn: Sequence[Sequence[Operation]], fill: Color, height: int, width: int) -> "Plan":
        """Make a plan from the operations of each image, which are done in their order."""
        groups = {}
        for number, operations in enumerate(drawn):
            for turn, (name, argument) in enumerate(operations):
                matrix = MATRICES[name](argument, height, width) if name in MATRICES else (argument, *[0.0] * 5)
                groups.setdefault((turn, name), []).append((number, matrix))
        groups = dict(sorted(groups.items()))
        chosen = [each for group in groups.values() for each in group]
        numbers = torch.tensor([number for number, _ in chosen], dtype=torch.int64)
        arguments = torch.tensor([matrix for _, matrix in chosen], dtype=torch.float64).view(-1, 6)
        return cls([(name, len(group)) for (_, name), group in groups.items()], numbers, arguments, fill)

    def pin_memory(self) -> "Plan":
        return replace(self, numbers=self.numbers.pin_memory(), arguments=self.arguments.pin_memory())

    def apply(self, images: Tensor, *, non_blocking: bool = False) -> None:
        """Transform images (B, 3, H, W) uint8 in place."""
        sizes = [size for _, size in self.steps]
        numbers = self.numbers.to(images.device, non_blocking=non_blocking).split(sizes)
        arguments = self.arguments.to(images.device, non_blocking=non_blocking).split(sizes)
        for (name, _), some, values in zip(self.steps, numbers, arguments):
            if name in MATRICES:
                done = bend(images[some], values, self.fill)
            else:
                done = OPERATIONS[name](images[some], values[:, 0].view(-1, 1, 1, 1))
            images[some] = done.to(torch.uint8)


# ---------------------------------------------------------------- what changes levels
# x (N, 3, H, W) uint8, value (N, 1, 1, 1) float64


def invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


def solarize(x: Tensor, least: Tensor) -> Tensor:
    return torch.where(x < least, x, 255 - x)


def solarize_add(x: Tensor, more: Tensor) -> Tensor:
    return torch.where(x < 128, (x + more).clamp(max=255), x)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    unit = 2 ** (8 - bits).int()
    return x.int() // unit * unit


def auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0 and 255."""
    levels = torch.arange(256, device=x.device)
    low, high = (edge(x, dim=(2, 3))[..., None].double() for edge in (torch.amin, torch.amax))
    scale = torch.full_like(low, 255.0) / (high - low)  # not 255.0 / x, which torch rounds twice; 255 / 0 is not used
    table = (levels * scale + -low * scale).clamp(0, 255).int()
    return look_up(torch.where(high > low, table, levels.int()), x)


def equalize(x: Tensor, _: Tensor) -> Tensor:
    """Give each channel a level histogram as even as it can be."""
    pixels, levels = x.flatten(2).long(), torch.arange(256, device=x.device)
    counts = pixels.new_zeros(*x.shape[:2], 256).scatter_add_(2, pixels, torch.ones_like(pixels))
    below = counts.cumsum(2) - counts
    step = below.gather(2, pixels.amax(2, keepdim=True)) // 255  # all pixels but those of the brightest level
    table = (step // 2 + below) // step.clamp(min=1)
    return look_up(torch.where(step > 0, table.clamp(max=255), levels), x)


def look_up(table: Tensor, x: Tensor) -> Tensor:
    """Map levels x (N, 3, H, W) by a table (N, 3, 256)."""
    return table.gather(2, x.flatten(2).long()).view(x.shape)


def gray(x: Tensor) -> Tensor:
    """-> (N, 1, H, W): ITU-R 601 luma, in integers as Pillow has it."""
    red, green, blue = x.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) // 2**16


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Go from `other` (factor 0) through x (1) beyond, in float32, rounded down."""
    return (other + factor.float() * (x.float() - other)).clamp(0, 255)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, torch.zeros((), device=x.device), factor)


def color(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, gray(x).float(), factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = gray(x).double().mean((1, 2, 3), keepdim=True)
    return blend(x, (mean + 0.5).floor().float(), factor)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smooth image: each pixel five times, its neighbors once; the border stays as it is."""
    smooth, inside = x.float(), (..., slice(1, -1), slice(1, -1))
    total = F.avg_pool2d(smooth, 3, stride=1, divisor_override=1) + 4 * smooth[inside]
    smooth = smooth.clone()
    smooth[inside] = (total / 13 + 0.5).floor()
    return blend(x, smooth, factor)


LEVELS = (invert, solarize, solarize_add, posterize, auto_contrast, equalize, brightness, color, contrast, sharpness)
OPERATIONS = {operation.__name__: operation for operation in LEVELS} | {"posterize_or_black": posterize}


# ---------------------------------------------------------------- geometric operations


def rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    cos, sin, x, y = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# From where a pixel comes: x' = a x + b y + c, y' = d x + e y + f.
MATRICES = {
    "rotate": rotation,
    "shear_x": lambda factor, height, width: (1.0, factor, 0.0, 0.0, 1.0, 0.0),
    "shear_y": lambda factor, height, width: (1.0, 0.0, 0.0, factor, 1.0, 0.0),
    "translate_x_rel": lambda share, height, width: (1.0, 0.0, share * width, 0.0, 1.0, 0.0),
    "translate_y_rel": lambda share, height, width: (1.0, 0.0, 0.0, 0.0, 1.0, share * height),
}


def bend(x: Tensor, matrices: Tensor, fill: Color) -> Tensor:
    """Take each pixel of x (N, 3, H, W) from where its matrix (N, 6) says, bicubic with a = -1 as Pillow does."""
    n, _, height, width = x.shape
    a, b, c, d, e, f = matrices.view(n, 6, 1, 1).unbind(1)
    # Positions in float64: at a border, rounding would decide between the image and the fill.
    across, down = (torch.arange(length, device=x.device, dtype=torch.float64) + 0.5 for length in (width, height))
    across, down = across.view(1, 1, -1), down.view(1, -1, 1)
    xs, ys = a * across + b * down + c, d * across + e * down + f
    inside = (xs >= 0) & (xs < width) & (ys >= 0) & (ys < height)
    left, top = (xs - 0.5).floor(), (ys - 0.5).floor()
    after_x, after_y = (xs - 0.5 - left).float()[:, None], (ys - 0.5 - top).float()[:, None]
    columns = [(left + i).clamp(0, width - 1).long() for i in range(-1, 3)]
    pixels, lines = x.flatten(2).float(), []
    for j in range(-1, 3):
        row = (top + j).clamp(0, height - 1).long() * width
        places = [(row + column).view(n, 1, -1).expand(-1, 3, -1) for column in columns]
        lines.append(cubic(*(pixels.gather(2, place).view(x.shape) for place in places), after_x))
    return torch.where(inside[:, None], cubic(*lines, after_y).clamp(0, 255), color_tensor(fill, x.device))


def cubic(a: Tensor, b: Tensor, c: Tensor, d: Tensor, t: Tensor) -> Tensor:
    """Interpolate four in a line, at t (0 to 1) between b and c. Equal ones stay what they are, without rounding."""
    return b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a + d - c)))


@functools.cache
def color_tensor(fill: Color, device: torch.device) -> Tensor:
    return torch.tensor(fill, device=device).view(3, 1, 1)
