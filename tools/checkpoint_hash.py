"""Name what checkpoints hold: python -m tools.checkpoint_hash FILE ...

Two runs that are the same to the last bit have the same name: the SHA-256 of weights, averaged weights, optimizer, loss
scale and random states, by name, type, shape and bytes. The files' own bytes also hold paths and times.
"""

import hashlib
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from training import checkpoint
from training.errors import exit_code
from training.options import Parser

PARTS = ("model", "model_ema", "optimizer", "scaler", "random_states")


def digest(payload: Mapping) -> str:
    """Return 64 hexadecimal digits of the parts, or of everything in bare weights."""
    sha = hashlib.sha256()
    parts = {part: payload[part] for part in PARTS if part in payload} or payload
    for name, value in checkpoint.leaves(parts):
        if isinstance(value, Tensor):
            sha.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
            sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            sha.update(f"{name} {value!r} ".encode())
    return sha.hexdigest()


def main(argv: list[str]) -> None:
    parser = Parser(prog="checkpoint_hash.py", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    for file in parser.parse_args(argv).files:
        print(digest(checkpoint.load(file)), "", file)


if __name__ == "__main__":
    sys.exit(exit_code("checkpoint_hash.py", main, sys.argv[1:]))
