"""Compile the LSA kernels for a GPU that is not here and count what comes out: python -m tools.kernel_report.

For each pass and number of warps: machine instructions of a program's code (all of it runs once, without loops, for
windows of up to 64 tokens), times its warps; registers of a thread; bytes that spill; shared memory. No time is
measured.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gvt  # noqa: F401

# isort: split
import torch

from tools.measurement import environment, progress, text_table, write_record
from training.errors import UserError, exit_code
from training.options import Parser, positive

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def compile_kernel(name: str, *, capability: int, dtype: str, window: int, channels: int, warps: int | None = None):
    """Return "forward" or "backward" compiled by Triton for heads of `channels`, and for tensors at multiples of 16
    bytes, as torch's are. warps: if not the kernel's first choice.
    """
    import triton

    from gvt_ops import window_kernel

    kernel = getattr(window_kernel, name)
    sizes = window_kernel.sizes(heads=2, window=window, channels=3 * 2 * channels)
    config = window_kernel.CONFIGS[sizes["KEYS"] > 64][0]
    kinds = dict(H="i32", W="i32", heads="i32", scale="fp32") | dict.fromkeys(sizes, "constexpr")
    source = triton.compiler.ASTSource(
        kernel,
        {argument: kinds.get(argument, f"*{dtype}") for argument in kernel.arg_names},
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in sizes.items()},
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, argument in enumerate(kernel.arg_names)
            if argument not in kinds
        },
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = dict(num_warps=warps or config.num_warps, num_stages=config.num_stages)
    return triton.compile(source, target=target, options=options)


def count(program) -> dict[str, int]:
    """Return what the compiled code takes: instructions of a thread but for padding, registers, bytes of spills."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(program.asm["cubin"])
        code, usage = (
            subprocess.run([tools / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", code, re.M)
    registers, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "LOCAL"))
    return {"instructions": sum(name != "NOP" for name in names), "registers": registers, "spilled": local}


def main(argv: list[str]) -> None:
    parser = Parser(prog="kernel_report.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--capability", type=positive, default=90, metavar="N", help="of the GPU, 10 times (%(default)s: H100)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")
    add("--window", type=positive, default=7, metavar="N", help="side of a window (%(default)s)")
    add("--channels", type=positive, default=32, metavar="N", help="of a head (%(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="write results.json, results.csv and table.txt there")
    args = parser.parse_args(argv)
    try:
        import triton
    except ImportError as error:
        raise UserError("Triton is missing (python -m tools.kernel_report): run make install") from error
    rows = []
    kwargs = dict(capability=args.capability, dtype=DTYPES[args.dtype], window=args.window, channels=args.channels)
    for name in ("forward", "backward"):
        for warps in (8, 4, 2, 1):
            progress(f"{name}, {warps} warps")
            try:
                program = compile_kernel(name, warps=warps, **kwargs)
                found = count(program)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                raise UserError(f"cannot compile ({name}, --capability {args.capability}): {error}") from error
            total = {"all warps": found["instructions"] * warps, "shared bytes": program.metadata.shared}
            rows.append({"pass": name, "warps": warps} | found | total)
    table = text_table(rows)
    print(table)
    if args.output:
        record = environment(torch.device("cpu")) | {"triton": triton.__version__, "kernel": kwargs, "rows": rows}
        write_record(args.output, "results", record, rows, shown=table)


if __name__ == "__main__":
    sys.exit(exit_code("kernel_report.py", main, sys.argv[1:]))
