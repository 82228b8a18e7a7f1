"""Checkpoints that were made to do harm: python tests/faults/hostile.py

Each is read as --resume, --finetune, --eval and the tools read files. No code of it may run (a marker file must not
appear), memory must stay within 300 MB of what the process had, and the answer is one line and exit code 2.
"""

import argparse
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from common import ROOT, complain, environment, make_data, run_program  # first: the project's path

# isort: split
import gvt  # noqa: F401  registers the model, and lets timm be imported

# isort: split
import timm
import torch
from one_save import payload
from torch import nn

from training import checkpoint, resume
from training.checkpoint import Checkpoint
from training.errors import UserError

MOST_MB, MOST_S = 300, 20
GB = 2**30


def network() -> nn.Module:
    return timm.create_model("alt_gvt_demo", num_classes=4)


class Call:
    """Pickled, it is a call of anything with anything."""

    def __init__(self, function: Callable, *args: object):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def as_torch(value: object, path: Path, **how: object) -> None:
    torch.save(value, path, **how)


def with_pickle(
    path: Path, pickled: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> None:
    """A file as torch.save makes it, around a pickle of one's own."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in ({"version": b"3\n", "byteorder": b"little"} | (records or {})).items():
            archive.writestr(f"archive/{name}", content)


def tensor_pickle(size: str, stride: str, *, numel: int, key: str = "0", copies: int = 1) -> bytes:
    """Protocol 2, by hand: a dictionary of `copies` tensors of a shape and stride over one storage that claims `numel`
    floats.
    """

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def numbers(values: str) -> bytes:
        return b"(" + b"".join(number(int(part)) for part in values.split()) + b"t"

    one = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(key)
        + text("cpu")
        + number(numel)
        + b"tQ"
    )
    one += number(0) + numbers(size) + numbers(stride) + b"\x89" + b"ccollections\nOrderedDict\n)R" + b"tR"
    return b"\x80\x02}(" + b"".join(text(f"w{i}") + one for i in range(copies)) + b"u."


def bomb_of_references(depth: int) -> bytes:
    """Lists of the list before, twice: small in a file, and without end for whoever walks through it."""
    made = b"\x80\x02}(X\x01\x00\x00\x00w](]q\x00"
    for level in range(1, depth):
        before = b"h" + bytes([level - 1])
        made += b"](" + before + before + b"eq" + bytes([level])
    return made + b"eu."


def make(folder: Path, marker: Path) -> dict[str, Callable[[Path], None]]:
    """What each file is, and how it is made."""
    touch = f"touch {marker}"
    chain = Call(getattr, Call(__import__, "os"), "system")
    nested = io.BytesIO()
    torch.save({"model": Call(os.system, touch)}, nested, _use_new_zipfile_serialization=False)
    good = payload(1)["model"]
    own = network().state_dict()

    def tar(path: Path) -> None:
        pickled = pickle.dumps(Call(os.system, touch), 2)
        with tarfile.open(path, "w") as archive:
            for name in ("storages", "tensors", "pickle"):
                member = tarfile.TarInfo(name)
                member.size = len(pickled)
                archive.addfile(member, io.BytesIO(pickled))

    def overlapping(path: Path) -> None:
        """Many names for the same bytes."""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
            archive.writestr("archive/data/0", bytes(2**20))
            first = archive.getinfo("archive/data/0")
            for number in range(1, 4000):
                copy = zipfile.ZipInfo(f"archive/data/{number}")
                copy.header_offset, copy.CRC, copy.file_size, copy.compress_size = (
                    first.header_offset,
                    first.CRC,
                    2**20,
                    2**20,
                )
                archive.filelist.append(copy)
                archive.NameToInfo[copy.filename] = copy
            archive._didModify = True

    def safetensors(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", 2**40) + b'{"a":')

    def deep_safetensors(path: Path) -> None:
        header = b'{"a":' + b"[" * 10**6
        path.write_bytes(struct.pack("<Q", len(header)) + header)

    def torchscript(path: Path) -> None:
        code = b"def forward(self, x):\n  return x\n"
        with_pickle(path, pickle.dumps({}, 2), {"constants.pkl": pickle.dumps((), 2), "code/__torch__.py": code})

    def legacy(value: object) -> Callable[[Path], None]:
        return lambda path: as_torch(value, path, _use_new_zipfile_serialization=False)

    def zipped(value: object) -> Callable[[Path], None]:
        return lambda path: as_torch(value, path)

    corrupt = {name: value.clone() for name, value in own.items()}
    corrupt["norm.weight"][3] = float("nan")
    long_list = b"\x80\x02}(X\x01\x00\x00\x00w](" + b"]" * 5_000_000 + b"eu."
    return {
        "os.system": zipped({"model": Call(os.system, touch)}),
        "os.system in the older format": legacy({"model": Call(os.system, touch)}),
        "os.system as the optimizer": zipped(
            {"model": good, "optimizer": Call(os.system, touch), "lr_scheduler": {}, "epoch": 1}
        ),
        "os.system as the average": zipped({"model": good, "model_ema": Call(os.system, touch)}),
        "os.system in meta": zipped({"state_dict": good, "meta": {"config": Call(os.system, touch)}}),
        "subprocess in args": zipped(
            {"model": good, "args": argparse.Namespace(model=Call(subprocess.call, ["touch", str(marker)]))}
        ),
        "eval": zipped({"model": Call(eval, f"__import__('os').system({touch!r})")}),
        "exec": zipped({"model": Call(exec, f"open({str(marker)!r}, 'w')")}),
        "a chain of getattr": zipped({"model": Call(chain.__reduce__()[0], *chain.__reduce__()[1])}),
        "a load inside a load": zipped({"model": Call(torch.storage._load_from_bytes, nested.getvalue())}),
        "the tar format": tar,
        "pickle protocol 4": lambda path: with_pickle(path, pickle.dumps({"model": Call(os.system, touch)}, 4)),
        "names by INST": lambda path: with_pickle(path, f"(S'{touch}'\nios\nsystem\n.".encode()),
        "TorchScript": torchscript,
        "a compressed bomb of 1 GB": lambda path: with_pickle(
            path, pickle.dumps({}, 2), {"data/0": bytes(GB)}, zipfile.ZIP_DEFLATED
        ),
        "4,000 records in the same bytes": overlapping,
        "a bytearray of 10 GB": zipped({"model": Call(bytearray, 10 * GB)}),
        "five million lists": lambda path: with_pickle(path, long_list),
        "lists of lists, 2 to the 200": lambda path: with_pickle(path, bomb_of_references(200)),
        "a tensor of 4 TB in 4 bytes": lambda path: with_pickle(
            path, tensor_pickle("1000000 1000000", "0 0", numel=1), {"data/0": bytes(4)}
        ),
        "a storage larger than its record": lambda path: with_pickle(
            path, tensor_pickle("300000000", "1", numel=300_000_000), {"data/0": bytes(4)}
        ),
        "10,000 tensors of one storage": lambda path: with_pickle(
            path, tensor_pickle("1000000", "1", numel=10**6, copies=10_000), {"data/0": bytes(4 * 10**6)}
        ),
        "a pickle in a value of 1 GB": lambda path: with_pickle(path, b"\x80\x02X" + struct.pack("<I", GB) + b"x"),
        "weights that are not numbers": zipped({"model": corrupt}),
        "weights in whole numbers": zipped({"model": {name: value.long() for name, value in own.items()}}),
        "weights of other shapes": zipped({"model": {name: value.reshape(-1)[:1] for name, value in own.items()}}),
        "complex weights": zipped({"model": {name: value.to(torch.complex64) for name, value in own.items()}}),
        "sparse weights": zipped({"model": {"head.weight": torch.zeros(4, 4).to_sparse()}}),
        "names that are tuples": zipped({"model": {("a", 1): torch.zeros(1)}}),
        "a safetensors header of 1 TB": safetensors,
        "a safetensors header of a million brackets": deep_safetensors,
        "a text": lambda path: path.write_text("#!/bin/sh\n" + touch),
    }


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def in_child(path: Path, work: Callable[[Path], None]) -> tuple[str, float, float]:
    """`work` on the file in a copy of this process: what it answered, by how many MB its memory grew, seconds."""
    read, write = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = peak_mb()
        try:
            work(path)
            answer = "it was taken"
        except UserError as error:
            answer = (
                "refused"
                if "\n" not in str(error) and len(str(error)) < 400
                else f"refused in {len(str(error))} characters"
            )
        except BaseException as error:
            answer = f"it raised {error!r}"[:200]
        os.write(write, f"{peak_mb() - before:.0f} {answer}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        grown, _, answer = pipe.read().partition(" ")
    os.waitpid(child, 0)
    return answer or "it ended the process", float(grown or -1), time.perf_counter() - start


def use(path: Path) -> None:
    """As main.py does before it trusts a file."""
    found, model = checkpoint.load(path), network()
    Checkpoint(found, path).load_into(model)
    if set(found) >= resume.COMPLETE:
        resume.optimizer_state(found, model)


def body(table, args, base: Path) -> None:
    marker, path = base / "marker", base / "hostile.pth"
    torch.set_num_threads(1)
    cases, largest, slowest = make(base, marker), 0.0, 0.0
    cases["os.system"](path)
    in_child(path, lambda path: torch.load(path, weights_only=False))
    if not marker.exists():
        raise RuntimeError("the hostile files do no harm where they are read without care: they prove nothing")
    marker.unlink()
    with table.row("hostile files", f"read in a process of their own, memory within {MOST_MB} MB") as row:
        for what, create in cases.items():
            create(path)
            sys.stdout.flush()
            answer, grown, took = in_child(path, use)
            largest, slowest = max(largest, grown), max(slowest, took)
            row.check(
                complain(answer == "refused", f"{what}: {answer}"),
                complain(not marker.exists(), f"{what}: its code ran"),
                complain(grown <= MOST_MB, f"{what}: memory grew by {grown:.0f} MB"),
                complain(took <= MOST_S, f"{what}: it took {took:.0f} s"),
            )
            marker.unlink(missing_ok=True)
        row.notes = f"{len(cases)} files; memory grew by {largest:.0f} MB at most, the slowest took {slowest:.1f} s"
    with table.row(
        "hostile files through the programs", "main.py --eval, --resume, --finetune; tools.convert; an https cache"
    ) as row:
        data, cache = make_data(base / "data", train=4, val=2), base / "hub"
        (cache / "hub" / "checkpoints").mkdir(parents=True)
        plain = [
            str(ROOT / "main.py"),
            "--model",
            "alt_gvt_demo",
            "--input-size",
            "32",
            "--device",
            "cpu",
            "--data-path",
            str(data),
        ]
        train = [*plain, "--batch-size", "2", "--epochs", "1", "--output_dir", str(base / "run"), "--num_workers", "0"]
        url = "https://localhost:1/cached.pth"
        ways = {
            "--eval": [*plain, "--eval", "--resume", str(path)],
            "--resume": [*train, "--resume", str(path)],
            "--finetune": [*train, "--finetune", str(path)],
            "a cached address": [*plain, "--eval", "--resume", url],
            "convert.py": ["-m", "tools.convert", str(path), str(base / "out.pth"), "--to", "timm"],
        }
        for way, line in list(ways.items())[: 2 if args.short else None]:
            for what in (
                ("os.system",)
                if args.short
                else ("os.system", "os.system in the older format", "os.system as the optimizer")
            ):
                cases[what](path)
                cases[what](cache / "hub" / "checkpoints" / "cached.pth")
                env = environment() | {"TORCH_HOME": str(cache)}
                done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=env, cwd=ROOT)
                said = done.stderr.strip()
                row.check(
                    complain(
                        done.returncode == 2 and ": error: " in said and "\n" not in said,
                        f"{way}, {what}: exit {done.returncode} {said[-200:]!r}",
                    ),
                    complain(not marker.exists(), f"{way}, {what}: its code ran"),
                    complain(
                        not (base / "run").exists() and not (base / "out.pth").exists(), f"{way}, {what}: it left files"
                    ),
                )


if __name__ == "__main__":
    run_program(__doc__, body)
