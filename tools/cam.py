"""Draw which parts of an image speak for a class: python -m tools.cam IMAGE... --weights FILE --output DIR.

Through the library grad-cam, an optional requirement. --method, in any case:

    GradCAM (the default), HiResCAM, GradCAMElementWise, GradCAMPlusPlus, XGradCAM, LayerCAM
    EigenGradCAM             of a class too, but its sign is arbitrary: what is bright may be what is dark
    EigenCAM, KPCA_CAM       of no class: what stands out in the map; their signs are arbitrary too
    ScoreCAM, AblationCAM    a forward pass for each channel, which takes long on a CPU

The map is what a stage gives to the next one, of the last stage with at least 4 x 4 tokens, or of --stage. That of
stage 4 is the final norm's: its mean is all that the classifier sees.
"""

import argparse
import sys
from pathlib import Path

import gvt

# isort: split
import difflib
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tools import views
from tools.extra import need
from tools.trained import Trained
from tools.views import View, overlay
from training import options
from training.errors import UserError, exit_code

LIBRARY = "pytorch_grad_cam"
METHODS = (
    *("GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "EigenGradCAM"),
    *("EigenCAM", "KPCA_CAM", "ScoreCAM", "AblationCAM"),
)
CLASSLESS = ("EigenCAM", "KPCA_CAM")
REFUSED = {
    "FullGrad": "it takes every layer with a bias for a convolution, whose output is (B, C, H, W)",
    "ShapleyCAM": "it needs second derivatives of attention, which PyTorch's fused attention does not have",
}
LEAST_TOKENS = 4  # on a side of the map: fewer show nothing


# ---------------------------------------------------------------- the map


def to_channels_first(tokens: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), which grad-cam expects."""
    return tokens.permute(0, 3, 1, 2)


def heat_map(model: gvt.Twins, x: Tensor, *, target: int, method: str, stage: int) -> np.ndarray:
    """Return (H, W), from 0 to 1, which parts of a normalized image, (1, 3, H, W), raise the logit of class `target`.

    All zeros: none does. stage: 0 to 3. A plain model: gvt_ops.accelerate replaces what grad-cam looks at.
    """
    library = need(LIBRARY)
    layer = model.norm if stage == len(model.blocks) - 1 else model.blocks[stage][-1]
    # Its layer for transformers finds the channels of (B, H, W, C) where the other one would take rows for channels.
    extra = dict(ablation_layer=need(f"{LIBRARY}.ablation_layer").AblationLayerVit()) if method == "AblationCAM" else {}
    with torch.no_grad():
        logit = model(x)[0, target]
    cam = getattr(library, method)(model, [layer], reshape_transform=to_channels_first, **extra)
    try:
        # The logit, moved to 1: AblationCAM divides by it, and a negative one would turn its map around.
        heat = cam(input_tensor=x, targets=[lambda output: output[target] - logit + 1])[0]
    finally:
        cam.activations_and_grads.release()
        model.zero_grad()
    if not np.isfinite(heat).all():
        raise UserError(f"a map that is not finite (--method {method}): use another method")
    return heat


def default_stage(size: tuple[int, int]) -> int:
    """Return the last stage whose map has at least LEAST_TOKENS on each side, for images of H x W pixels."""
    sides = min(size) // np.cumprod(gvt.PATCHES)
    return max(int((sides >= LEAST_TOKENS).sum()) - 1, 0)


# ---------------------------------------------------------------- options


def method_name(text: str) -> str:
    def plain(name: str) -> str:
        return name.lower().replace("++", "plusplus").replace("-", "").replace("_", "")

    found = next((name for name in (*METHODS, *REFUSED) if plain(name) == plain(text)), None)
    if found in REFUSED:
        raise argparse.ArgumentTypeError(f"{found} does not work with these models: {REFUSED[found]}")
    if found is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is none of {', '.join(METHODS)}")
    return found


def class_index(text: str, classes: Sequence[str]) -> int:
    """Return the index of a class given by its name or, where no class has that name, by its index."""
    if text in classes:
        return list(classes).index(text)
    if text.isascii() and text.isdigit() and int(text) < len(classes):
        return int(text)
    near = difflib.get_close_matches(text, classes, n=2, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"a name, or an index from 0 to {len(classes) - 1}"
    raise UserError(f"no such class (--class {text[:60]}): {advice}")


# ---------------------------------------------------------------- the command


def draw(view: View, heat: np.ndarray, title: str) -> Figure:
    width, height = (3.2 * side / max(view.size) for side in view.size)
    figure = Figure(figsize=(max(2 * width + 0.2, 6.5), height + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axis, shown in zip(figure.subplots(1, 2), (None, torch.from_numpy(heat))):
        overlay(axis, view, 0, shown)
        axis.set(xlim=(0, view.size[0]), ylim=(view.size[1], 0), aspect="equal")
        axis.axis("off")
    return figure


def explain(made: Trained, view: View, *, method: str, target: int | None, stage: int | None) -> tuple:
    """Return the heat map and a line about it; by default of the predicted class."""
    with torch.no_grad():
        probabilities = made.model(view.x)[0].softmax(0)
    top = int(probabilities.argmax())
    of = top if target is None else target
    stage = default_stage(view.x.shape[2:]) if stage is None else stage
    heat = heat_map(made.model, view.x, target=of, method=method, stage=stage)
    what = f"{method} at stage {stage + 1}"
    if method not in CLASSLESS:
        what += f" for {made.classes[of]}" + (f" ({probabilities[of]:.1%})" if of != top else "")
    if not heat.any():
        what += ", which finds nothing"
    return heat, f"{made.classes[top]}, {probabilities[top]:.1%}; {what}"


def run(args: argparse.Namespace) -> int:
    if args.target is not None and args.method in CLASSLESS:
        raise UserError(f"no effect (--class {args.target[:60]}): {args.method} is of no class, omit one of both")
    need(LIBRARY)
    made = views.load(args)
    target = None if args.target is None else class_index(args.target, made.classes)
    stage = None if args.stage is None else args.stage - 1
    images = views.Views(args, made, lambda seen: None, program="cam.py")
    views.new_files(args.output, [f"{name}_{args.method}.png" for name in images.names], overwrite=args.overwrite)
    for path, name, seen in images:
        heat, line = explain(made, seen, method=args.method, target=target, stage=stage)
        output = args.output / f"{name}_{args.method}.png"
        views.save_figure(draw(seen, heat, f"{Path(path).name}: {line}"), output)
        print(f"{path}: {line} -> {output}", flush=True)
    return 1 if images.failed else 0


def main(argv: list[str]) -> int:
    parser = options.Parser(prog="cam.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    views.add_options(parser)
    add = parser.add_argument
    add("--method", type=method_name, default="GradCAM", metavar="NAME", help="one of the above (%(default)s)")
    add("--class", dest="target", metavar="NAME", help="a class by its name, or else its index (the predicted one)")
    add("--stage", type=int, choices=(1, 2, 3, 4), metavar="N", help="whose map: 1 to 4 (the last of enough tokens)")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_code("cam.py", main, sys.argv[1:]))
