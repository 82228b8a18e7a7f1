"""A name for what a checkpoint holds: two runs that are the same to the last bit have the same. python
tools/checkpoint_hash.py FILE ...

The SHA-256 of weights, averaged weights, optimizer, loss scale and random states, by name, type, shape and bytes. The
files' own bytes say less: they also hold paths and times.
"""

import hashlib
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from training import checkpoint
from training.errors import UserError
from training.options import Parser

PARTS = ("model", "model_ema", "optimizer", "scaler", "random_states")


def digest(payload: Mapping) -> str:
    """64 hexadecimal digits."""
    sha = hashlib.sha256()
    parts = {part: payload[part] for part in PARTS if part in payload} or payload  # of bare weights, all
    for name, value in checkpoint.leaves(parts):
        if isinstance(value, Tensor):
            sha.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
            sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            sha.update(f"{name} {value!r} ".encode())
    return sha.hexdigest()


def main() -> int:
    parser = Parser(prog="checkpoint_hash.py", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    for file in parser.parse_args().files:
        try:
            print(digest(checkpoint.load(file)), "", file)
        except UserError as error:
            print(f"checkpoint_hash.py: error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
