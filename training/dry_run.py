"""--dry-run: what a run would do, with its first batch as an image, and nothing else written."""

import collections
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gvt_ops.loading import normalization
from training.options import Options
from training.outputs import check_new, make_folder, write_file
from training.state import TrainingState
from utils import in_main_process, log

NAME = "augmented.png"
SHOWN, COLUMNS, MOST_LISTED = 32, 8, 20  # images drawn, side by side; classes whose images are counted one by one
LEAST, LINES, LINE = 112, 3, 13  # pixels of a drawn image's width, lines of text below it, pixels of a line
OPTION = "--dry-run"


def output_path(args: Options) -> Path:
    return Path(args.output_dir) / NAME


def check_output(args: Options) -> None:
    """Raise UserError, before anything is read, if the image cannot be written."""
    made = Path(args.output_dir) if args.output_dir else None
    in_main_process(lambda: check_new(output_path(args), OPTION, overwrite=args.overwrite, made=made))


def report(state: TrainingState, loader, mixup, labels: Sequence[int], val: int) -> None:
    """Log what the run would do, and write its first batch, which the run draws the same.

    labels: of the training images. val: number of validation images.
    """
    normal = normalization(vars(state.args), state.args.model)
    args, names, per_class = state.args, state.classes, collections.Counter(labels)
    log(f"dry run: {len(labels)} training images, {val} validation images, {len(names)} classes")
    log(class_line([(names[label], per_class[label]) for label in range(len(names))]))
    sides = " x ".join(map(str, args.sides))
    log(f"images: {len(normal[0])} channels, {sides} pixels; mean {normal[0]}, std {normal[1]}")
    updates = state.updates_per_epoch
    whole = f"{updates * args.epochs} updates and {updates * args.epochs * state.recipe['global_batch']} images in all"
    log(f"steps: {updates} updates an epoch, {args.epochs} epochs: {whole}")
    rates = [max(group["lr"] for group in state.optimizer.param_groups)]
    for epoch in range(args.epochs - 1):  # set after each epoch
        state.scheduler.step(epoch)
        rates.append(max(group["lr"] for group in state.optimizer.param_groups))
    log(f"learning rate: {rates[0]:.4g} in the first epoch, at most {max(rates):.4g}, {rates[-1]:.4g} in the last")
    images, targets = first_batch(state, loader, mixup)
    figure = in_main_process(lambda: draw(images, shares(targets, args, names), normal).save)
    log(memory_line(state))
    path = output_path(args)

    def write() -> None:
        make_folder(path.parent, OPTION)
        write_file(path, OPTION, lambda file: figure(file, format="PNG"))

    in_main_process(write)
    log(f"dry run: the first batch is drawn in {path}; nothing else was written")


def class_line(counts: list[tuple[str, int]]) -> str:
    """Return the images of each class, or of many classes the smallest, the median and the largest."""
    if len(counts) <= MOST_LISTED:
        return f"images per class: {', '.join(f'{name} {number}' for name, number in counts)}"
    ordered = sorted(counts, key=lambda each: each[1])
    (least, few), (_, middle), (most, many) = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return f"images per class: {few} ({least}) to {many} ({most}), median {middle}"


def memory_line(state: TrainingState) -> str:
    """Return bytes of parameters, gradients and optimizer state, which one step with gradients of 0 makes.

    The weights are not those of the start afterwards.
    """
    trained = [each for each in state.model.parameters() if each.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    entries = [value for entry in state.optimizer.state.values() for value in entry.values()]
    sizes = {
        "parameters": state.model.parameters(),
        "gradients": trained,
        "optimizer": [value for value in entries if isinstance(value, Tensor)],
    }
    megabytes = {name: sum(each.numel() * each.element_size() for each in part) / 2**20 for name, part in sizes.items()}
    words = ", ".join(f"{name} {value:.1f} MiB" for name, value in megabytes.items())
    return f"memory: {words}, beside activations"


def first_batch(state: TrainingState, loader, mixup) -> tuple[Tensor, Tensor]:
    """Return the images (B, C, H, W) and labels (B,), or Mixup's targets (B, classes), of the run's first batch."""
    loader.sampler.set_epoch(state.epoch + 1, 0)
    images, targets = next(iter(loader))
    images, targets = images.to(state.device), targets.to(state.device)
    if mixup is not None:
        images, targets = mixup(images, targets)
    return images.float().cpu(), targets.cpu()


def shares(targets: Tensor, args: Options, names: Sequence[str]) -> list[str]:
    """Return each image's label, or the labels that Mixup mixed with their shares before smoothing."""
    if targets.ndim == 1:
        return [names[label] for label in targets.tolist()]
    rest = args.smoothing / len(names)
    parts = ((targets - rest) / (1 - args.smoothing)) if args.smoothing < 1 else targets
    found = []
    for row in parts:
        top = row.topk(min(2, len(names)))
        pairs = [(names[label], share) for share, label in zip(*map(Tensor.tolist, top)) if share > 0.005]
        found.append(", ".join(f"{name} {100 * share:.0f}%" for name, share in pairs))
    return found


def draw(images: Tensor, labels: list[str], normal: tuple[Sequence[float], Sequence[float]]) -> Image.Image:
    """Return a sheet of images as the network sees them, scaled back to colors, with labels below."""
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in normal)
    pixels = ((images[:SHOWN] * std + mean).clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    number, height, width, _ = pixels.shape
    scale = -(-LEAST // width)
    height, width, columns = height * scale, width * scale, min(COLUMNS, number)
    text = LINES * LINE + 4
    sheet = Image.new("RGB", (columns * (width + 6), -(-number // columns) * (height + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (each, label) in enumerate(zip(pixels, labels)):
        left, top = place % columns * (width + 6), place // columns * (height + text)
        sheet.paste(Image.fromarray(each.numpy()).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for line, words in enumerate(textwrap.wrap(label, max(8, width // 7))[:LINES]):
            pen.text((left, top + height + 2 + line * LINE), words, fill="black")
    return sheet
