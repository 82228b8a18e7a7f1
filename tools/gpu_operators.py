"""Time single operators of Twins-SVT-Small on a GPU, beside the bytes they must move: python -m tools.gpu_operators

One line for each number of channels and operator, in bfloat16: the median of its time, and the rate at which it moves
its inputs and outputs, each once.
"""

import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from gvt_ops.window_attention import attend_in_windows
from training.errors import UserError, exit_code
from training.options import Parser, positive

SIDES = {64: 56, 128: 28, 256: 14, 512: 7}  # of the map with so many channels, at 224 pixels
HEAD, WINDOW = 32, 7

Step = Callable[[], object]


def operators(dim: int, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Step, int]]:
    """Yield name, step, and how many maps of `dim` channels are read or written."""
    options = dict(device=device, dtype=dtype)
    x, norm = torch.randn(batch, SIDES[dim], SIDES[dim], dim, **options), torch.ones(dim, **options)
    qkv = torch.randn(*x.shape[:3], 3 * dim, **options, requires_grad=True)
    out = attend_in_windows(qkv, dim // HEAD, WINDOW)
    plain = qkv.detach()
    yield "LSA forward", lambda: attend_in_windows(plain, dim // HEAD, WINDOW), 4
    yield "LSA backward", lambda: torch.autograd.grad(out, qkv, x, retain_graph=True), 7
    yield "LayerNorm", lambda: F.layer_norm(x, (dim,), norm, norm), 2
    yield "GELU", lambda: F.gelu(x), 2
    peg = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **options)
    image = x.permute(0, 3, 1, 2).detach().requires_grad_()
    y = peg(image)
    yield "PEG forward", lambda: peg(image), 2
    yield "PEG backward", lambda: torch.autograd.grad(y, (image, peg.weight), y.detach(), retain_graph=True), 5


def get_parser() -> Parser:
    parser = Parser(prog="gpu_operators.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dims", nargs="+", type=int, choices=SIDES, default=list(SIDES), metavar="C", help="channels (all stages)")
    add("--batch-size", type=positive, default=256, metavar="N", help="(%(default)s)")
    return parser


def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError(f"no CUDA device (torch {torch.__version__}): run it on a machine with a GPU")
    from triton.testing import do_bench

    for dim in args.dims:
        size = args.batch_size * SIDES[dim] ** 2 * dim * 2
        for name, step, maps in operators(dim, args.batch_size, torch.device("cuda"), torch.bfloat16):
            ms = do_bench(step, return_mode="median")
            print(f"{dim:4} {name:13} {ms:8.4f} ms {maps * size / ms / 1e6:7,.0f} GB/s", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code("gpu_operators.py", main, sys.argv[1:]))
