"""Single flipped bits and truncations of a checkpoint: python tests/faults/corrupt.py

Each damaged file must be refused with one line, or hold exactly what the undamaged one holds (a flipped bit of
padding). Half of the flips fall anywhere, half into the small part that is not tensors: pickles, headers, the zip's
directory.
"""

import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from common import ROOT, command, complain, environment, error_lines, make_data, run_program, words

from training import checkpoint
from training.errors import UserError


def training_state(base: Path) -> Path:
    """A real checkpoint."""
    folder = base / "run"
    if not (folder / "checkpoint.pth").exists():
        line = command(words(make_data(base / "data", train=4, val=2), folder, epochs=1))
        done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT)
        if done.returncode != 0:
            raise RuntimeError(f"the run failed: {done.stderr[-300:]}")
    return folder / "checkpoint.pth"


def structure(path: Path) -> list[range]:
    """The bytes of a zip that are no tensor's."""
    with zipfile.ZipFile(path) as archive:
        data = sorted(
            (record for record in archive.infolist() if "/data/" in record.filename),
            key=lambda record: record.header_offset,
        )
    content = path.read_bytes()
    starts = []
    for record in data:  # the header in front of the bytes ends with a name and padding, whose lengths it gives
        name, padding = struct.unpack("<HH", content[record.header_offset + 26 : record.header_offset + 30])
        starts.append(record.header_offset + 30 + name + padding)
    found, position = [], 0
    for start, record in zip(starts, data):
        found.append(range(position, start))
        position = start + record.file_size
    return [*found, range(position, path.stat().st_size)]


def same(a: dict, b: dict) -> bool:
    first, second = dict(checkpoint.leaves(a)), dict(checkpoint.leaves(b))
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def outcome(path: Path, whole: dict) -> str:
    """ "refused", "harmless", or what went wrong."""
    try:
        return "harmless" if same(checkpoint.load(path), whole) else "WRONG: it was read, and holds something else"
    except UserError as error:
        return "refused" if "\n" not in str(error) and path.name in str(error) else f"WRONG: it said {error}"
    except BaseException as error:
        return f"WRONG: it raised {error!r}"[:200]


def body(table, args, base: Path) -> None:
    good = training_state(base)
    whole, content = checkpoint.load(good), good.read_bytes()
    damaged, draw = base / "damaged.pth", random.Random(args.seed)
    flips, cuts = (40, 10) if args.short else (400, 50)
    special = [position for part in structure(good) for position in part]
    with table.row("flipped bits of a checkpoint", "one bit each, read through checkpoint.load") as row:
        counts = {"refused": 0, "harmless": 0}
        for number in range(flips):
            position = draw.choice(special) if number % 2 else draw.randrange(len(content))
            corrupt = bytearray(content)
            corrupt[position] ^= 1 << draw.randrange(8)
            damaged.write_bytes(corrupt)
            found = outcome(damaged, whole)
            counts[found] = counts.get(found, 0) + 1
            row.check(complain(found in ("refused", "harmless"), f"byte {position}: {found}"))
        row.notes = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    with table.row("truncated checkpoints", "at a byte, read through checkpoint.load") as row:
        for length in [0, 1, 3, 4, 30, len(content) - 1, *(draw.randrange(len(content)) for _ in range(cuts - 6))]:
            damaged.write_bytes(content[:length])
            found = outcome(damaged, whole)
            row.check(complain(found == "refused", f"{length} bytes: {found}"))
    with table.row("damaged files through main.py --eval", "as a program") as row:
        data = make_data(base / "data", train=4, val=2)
        for length in (len(content) // 2,) if args.short else (0, 100, len(content) // 2, len(content) - 1):
            damaged.write_bytes(content[:length])
            line = [
                sys.executable,
                str(ROOT / "main.py"),
                "--eval",
                "--resume",
                str(damaged),
                "--model",
                "alt_gvt_demo",
            ]
            line += ["--input-size", "32", "--device", "cpu", "--data-path", str(data)]
            done = subprocess.run(line, capture_output=True, text=True, env=environment())
            one = len(error_lines(done.stderr)) == len(done.stderr.strip().splitlines()) == 1
            row.check(
                complain(
                    done.returncode == 2 and one, f"{length} bytes: exit {done.returncode}, {done.stderr[-200:]!r}"
                )
            )


if __name__ == "__main__":
    run_program(__doc__, body)
