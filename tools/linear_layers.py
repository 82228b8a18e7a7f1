"""Time linear layers through PyTorch and through oneDNN: python -m tools.linear_layers [--models NAME ...].

The layers are those of a model at 224 x 224, each as often as the model has it; an MLP's first layer is timed with its
GELU, which oneDNN fuses. Both are timed in turns; a ratio is the median of the rounds' ratios, above 1 where oneDNN is
faster. gvt_ops.accelerate takes oneDNN for all: the last column is what that costs against the faster of both for each
kind of layer.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gvt

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from gvt_ops import onednn
from tools.measurement import environment, progress, run_rounds, seconds, text_table, write_record
from training.errors import UserError, exit_code
from training.options import Parser, positive

Layer = tuple[int, int, int, int]  # rows, inputs, outputs, how often
KINDS = ("qkv", "proj", "fc1 + GELU", "fc2")


def layers_of(name: str, batch: int) -> dict[str, list[Layer]]:
    """Return the linear layers of a model's blocks; q with kv counts as qkv, without GSA's shorter map of keys."""
    variant, found = gvt.VARIANTS[gvt.MODEL_NAMES[name]], {kind: [] for kind in KINDS}
    for stage, (dim, ratio, depth) in enumerate(zip(variant.dims, variant.mlp_ratios, variant.depths)):
        rows = batch * (56 >> stage) ** 2
        for kind, (inputs, outputs) in zip(KINDS, ((dim, 3 * dim), (dim, dim), (dim, ratio * dim), (ratio * dim, dim))):
            found[kind].append((rows, inputs, outputs, depth))
    return found


def steps(layers: list[Layer], dtype: torch.dtype, *, gelu: bool) -> dict[str, Callable[[], None]]:
    data = [
        ([torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,))], often)
        for rows, inputs, outputs, often in layers
    ]

    def run(linear: Callable[..., Tensor]) -> None:
        for tensors, often in data:
            for _ in range(often):
                linear(*tensors)

    plain = (lambda *tensors: F.gelu(F.linear(*tensors))) if gelu else F.linear
    return {"PyTorch": lambda: run(plain), "oneDNN": lambda: run(onednn.linear_gelu if gelu else onednn.linear)}


@torch.inference_mode()
def measure(name: str, dtype: str, batch: int, repeats: int) -> dict[str, object]:
    """Return a row: how many times as fast as PyTorch each kind of layer is, and what taking oneDNN for all costs."""
    ratios, spent = {}, {}
    for kind, layers in layers_of(name, batch).items():
        both = steps(layers, getattr(torch, dtype), gelu="GELU" in kind)
        timed = {key: lambda _, step=step: seconds(step, torch.device("cpu")) for key, step in both.items()}
        rounds = run_rounds(timed, repeats=repeats, warmup=2, label="")
        ratios[kind] = median(a / b for a, b in zip(*rounds.values()))
        spent[kind] = median(rounds["oneDNN"])
    best = sum(spent[kind] * min(1, ratios[kind]) for kind in KINDS)
    row = {"Model": name, "dtype": dtype, "Batch": batch} | {kind: f"{ratio:.2f}" for kind, ratio in ratios.items()}
    return row | {"Cost": f"{sum(spent.values()) / best - 1:.1%}"}


def main(argv: list[str]) -> None:
    parser = Parser(prog="linear_layers.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    names = [name for name, official in gvt.MODEL_NAMES.items() if gvt.VARIANTS[official].timm]
    add("--models", nargs="+", choices=names, default=names, metavar="NAME", help="(the six of the paper)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"], help="(both)")
    add("--batch-size", nargs="+", type=positive, default=[1, 8], metavar="N", help="(1 8)")
    add("--repeats", type=positive, default=15, metavar="N", help="rounds (%(default)s)")
    add("--threads", type=positive, metavar="N", help="of this process (PyTorch's own choice)")
    add("--output", type=Path, metavar="FOLDER", help="write linear_layers.json, linear_layers.csv and table.txt there")
    args = parser.parse_args(argv)
    if not onednn.AVAILABLE:
        raise UserError("this torch has no oneDNN for this processor: there is nothing to choose from")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for name, dtype, batch in itertools.product(args.models, args.dtype, args.batch_size):
        progress(f"{name} {dtype} {batch}")
        rows.append(measure(name, dtype, batch, args.repeats))
    table = text_table(rows)
    print(table)
    if args.output:
        record = environment(torch.device("cpu")) | {"threads": torch.get_num_threads(), "rows": rows}
        write_record(args.output, "linear_layers", record, rows, shown=table)


if __name__ == "__main__":
    sys.exit(exit_code("linear_layers.py", main, sys.argv[1:]))
