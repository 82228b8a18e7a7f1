"""Convert weights from one library's format to another's: python -m tools.convert IN OUT --to FORMAT.

IN is a file or https address of weights or of a training checkpoint: official, timm, mmsegmentation, mmpretrain, or
ours. FORMAT:

    published    {"model": ...}, as main.py and the official code read it
    timm         timm's names in timm's order
    mmseg        {"state_dict": ...} for mmsegmentation's PCPVT and SVT; has no classifier
    mmpretrain   {"state_dict": ...} for mmpretrain's classifiers
    safetensors  official names
    hub          a folder that timm.create_model("local-dir:OUT", pretrained=True), transformers and the hub take, with
                 class names, image size and a model card; under our names, which `import gvt` registers, where timm
                 has no such model or would compute something else at the trained size

Values stay as they are, bit for bit. What the target does not hold is named; --report writes all names as JSON.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import gvt

# isort: split
import torch
from torch import Tensor

from tools import hub
from training import checkpoint, formats
from training.checkpoint import Checkpoint
from training.errors import UserError, exit_code
from training.files import write_text
from training.options import Parser
from training.outputs import writing


def convert(
    source: str, out: Path, fmt: str, *, no_head: bool = False, ema: bool = False, report: Path | None = None
) -> str:
    """Return a line that says what was done. After a UserError OUT was not written, unless only the report failed."""
    check_new(out, report)
    key = "model_ema" if ema else None
    file = Checkpoint.open(source)
    state, found, others = file.read_weights(key)
    variant = formats.variant_of(state, source=source)
    if broken := [name for name, value in state.items() if not checkpoint.all_finite(value)]:
        names = f"{len(broken)} ({', '.join(broken[:3])})"
        raise UserError(f"weights that are not finite ({source}): {names}, use another checkpoint")
    written, not_held, notes = formats.from_official(state, fmt, source=source, no_head=no_head)
    record = {"source": source, "format": found, "written_as": fmt, "tensors": list(written)}
    record |= {"left_out": others + not_held, "notes": notes}
    with writing(out):
        if fmt == "hub":
            name = hub.write(out, owned(written), file, variant=variant, ema=ema)
            notes.append(f"its model is {name}{', import gvt first' if name in gvt.MODEL_NAMES else ''}")
        else:
            write(out, fmt, written)
        if report:
            write_text(report, json.dumps(record, indent=1) + "\n")
    line = f"{source} ({found}, {variant}) -> {out} ({fmt}): {len(written)} tensors"
    for what, names in (("left out with the rest of the model", others), ("not held by it", not_held)):
        if names:
            line += f"; {what}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    return "; ".join([line, *notes])


def check_new(out: Path, report: Path | None) -> None:
    for path in (out, report) if report else (out,):
        if path.exists() or path.is_symlink():
            raise UserError(f"it exists already ({path}): give another name, nothing is overwritten")
        if not path.absolute().parent.is_dir():
            raise UserError(f"no such folder ({path.parent}): make it first")
    if report and report.absolute() == out.absolute():
        raise UserError(f"one name for two files ({out}): give --report another")


def owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors demands."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def write(path: Path, fmt: str, state: Mapping[str, Tensor]) -> None:
    """Write what formats.from_official gave. The file appears whole, or not at all."""
    if fmt == "safetensors":
        checkpoint.save_safetensors(path, owned(state))
    else:
        checkpoint.save(path, {"published": {"model": state}, "timm": dict(state)}.get(fmt, {"state_dict": state}))


def main(argv: list[str]) -> None:
    parser = Parser(prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="IN", help="a file, or an https address")
    add("out", metavar="OUT", type=Path, help="the new file (hub: folder)")
    add("--to", required=True, choices=formats.FORMATS, metavar="FORMAT", help=", ".join(formats.FORMATS))
    add("--no-head", action="store_true", help="write no classifier")
    add("--ema", action="store_true", help="take the averaged weights of a training run with --model-ema")
    add("--report", type=Path, metavar="FILE", help="write all names as JSON to a new file")
    args = parser.parse_args(argv)
    print(convert(args.source, args.out, args.to, no_head=args.no_head, ema=args.ema, report=args.report))


if __name__ == "__main__":
    sys.exit(exit_code("convert.py", main, sys.argv[1:]))
