"""Read and write weights and training states: no other file of the project opens or writes one.

Files are not trusted: checksums first, then what a file's pickles name against a short list, then
torch.load(weights_only=True) with stand-ins of ours; the result is tensors and plain values. Nothing in a file can run.
"""

import argparse
import json
import os
import pickletools
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from gvt_ops.loading import WRAPPERS

# isort: split
from timm.models import adapt_input_conv

from training import formats
from training.errors import UserError, did_you_mean, short_reason
from training.files import atomic_write, best_checkpoint, write_text
from utils import log

# Limits of what is read. A training state has about 50,000 pickled objects, of some 50 bytes each; configurations and
# histories stay far below a string of that size; the header of the largest model here has 100 kB.
MOST_OPCODES, MOST_STRING, MOST_HEADER = 2_000_000, 2**24, 2**24
DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
DTYPES |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
SHOWN = 3  # names of each kind in an error's line


# ---------------------------------------------------------------- what pickles may name


class _Dtype:
    """Stand in for numpy.dtype."""

    def __init__(self, kind: str, *_):
        self.text = str(kind)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.text = state[1] + self.text


def _scalar(dtype: _Dtype, data: bytes) -> int | float | bool:
    """Stand in for numpy's function that makes a scalar."""
    kind = np.dtype(dtype.text)
    if kind.kind not in "biuf" or len(data) != kind.itemsize:
        raise ValueError(f"a numpy scalar of type {kind} in {len(data)} bytes")
    return np.frombuffer(data, kind)[0].item()


class _Left:
    """Stand in for objects of no use here (the log history in mmengine's files), and omit whatever they hold."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What files of others hold beside tensors. Allowed only while a file is being read, and each name means the object
# given here.
STAND_INS = [
    (argparse.Namespace, "argparse.Namespace"),
    *(
        (os.path.join, f"pathlib{inner}.{kind}Path")
        for inner in ("", "._local")
        for kind in ("Posix", "PurePosix", "Windows", "PureWindows")
    ),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_Dtype, "numpy.dtype"),
    *((_Left, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_Left, "numpy.ndarray"),
    (_Left, "mmengine.logging.history_buffer.HistoryBuffer"),
]
NAMES = {
    *(name for _, name in STAND_INS),
    "collections.OrderedDict",
    "collections.Counter",  # milestones of PyTorch's and mmengine's schedules
    "_codecs.encode",  # how protocol 2 writes bytes
    "torch.Size",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage.UntypedStorage",
    *(f"torch.{kind}Storage" for kind in STORAGES),
    *map(str, DTYPES),
}


class _Short:
    """A stream for pickletools, which refuses to read one value of any length that a file claims."""

    def __init__(self, file: BinaryIO):
        self.file, self.readline = file, lambda: file.readline(MOST_STRING)

    def read(self, length: int) -> bytes:
        if length > MOST_STRING:
            raise ValueError(f"a value of {length} bytes among its pickled objects")
        return self.file.read(length)


def _scan(file: BinaryIO, opcodes: int = 0) -> int:
    """Refuse a pickle that names anything else, without executing it, read to its end; count its operations."""
    for opcode, argument, _ in pickletools.genops(_Short(file)):
        opcodes += 1
        if opcodes > MOST_OPCODES:
            raise ValueError(f"more than {MOST_OPCODES} pickled objects")
        if opcode.name == "PROTO" and argument != 2:
            raise ValueError(f"pickle protocol {argument}, which torch.save does not write")
        if opcode.name == "GLOBAL":
            name = argument.replace(" ", ".", 1)
            if name not in NAMES:
                raise ValueError(f"it names {name[:60]}, which no weights need: nothing of it was run")
        elif opcode.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it names objects by {opcode.name}, which no weights need: nothing of it was run")
    return opcodes


# ---------------------------------------------------------------- reading


def load(source: str | Path) -> dict:
    """Read a checkpoint or bare weights, from a file or an https address, onto the CPU, as tensors and plain values.

    Zip files (torch.save), the older format of torch.save, and safetensors. Zip files have checksums, which are
    checked; the others have none. Raises UserError with one line for whatever is wrong with the file.
    """
    path = _download(source) if str(source).startswith("https://") else Path(source)
    try:
        if not path.is_file():
            raise UserError(f"no such file ({source}): {did_you_mean(path) or 'expected a checkpoint'}")
        with open(path, "rb") as file:
            start = file.read(9)
        if start[:4] == b"PK\x03\x04":
            payload = _read_zip(path)
        elif start[8:] == b"{":
            payload = _read_safetensors(path, int.from_bytes(start[:8], "little"))
        else:
            payload = _read_legacy(path)
        payload = _Plain(path.stat().st_size).value(payload)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read ({source}): {error.strerror or error}") from error
    except Exception as error:  # a bad file ends in one of many types of error
        raise UserError(f"not a readable checkpoint ({source}): {short_reason(error, 140)}") from error
    if not isinstance(payload, dict):
        raise UserError(f"not a checkpoint ({source}): it holds a {type(payload).__name__}, expected a dictionary")
    return payload


def _download(source: str) -> Path:
    """Return the file in torch.hub's cache, downloaded if it is not there; a hash in its name is checked."""
    name = os.path.basename(urllib.parse.urlparse(source).path)
    if not name:
        raise UserError(f"no file in the address ({source}): expected https://HOST/.../FILE")
    try:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_file():
            found = torch.hub.HASH_REGEX.search(name)
            torch.hub.download_url_to_file(source, str(folder / name), found and found.group(1), progress=False)
    except Exception as error:  # of the network, the hash or the disk
        raise UserError(f"cannot download ({source}): {short_reason(error, 120)}") from error
    return folder / name


def _read_zip(path: Path) -> object:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if archive.start_dir > size or size - archive.start_dir > MOST_HEADER:
            raise ValueError("its directory is too large")
        if any(each.compress_type != zipfile.ZIP_STORED or each.compress_size != each.file_size for each in records):
            raise ValueError("it is compressed, which torch.save never does: not opened")
        names = {record.filename for record in records}
        if sum(record.file_size for record in records) > size or len(names) < len(records):
            raise ValueError("its records overlap: not opened")
        if (damaged := archive.testzip()) is not None:  # torch does not look at the checksums that its files carry
            raise ValueError(f"damaged, the checksum of {damaged[:60]} is wrong: take another copy")
        opcodes = 0
        for record in records:
            if record.filename.endswith("/constants.pkl"):
                raise ValueError("it is a TorchScript program, expected weights")
            if record.filename.endswith(".pkl"):
                with archive.open(record) as file:
                    opcodes = _scan(file, opcodes)
    # Mapped, a storage that claims to be larger than its record ends at the end of the file, not in other memory.
    return _torch_load(path, mmap=True)


def _read_legacy(path: Path) -> object:
    with open(path, "rb") as file:
        opcodes = 0
        for _ in range(5):  # a magic number, a version, the system, the object, the names of its storages
            opcodes = _scan(file, opcodes)
    return _torch_load(path, mmap=False)


def _torch_load(path: Path, *, mmap: bool) -> object:
    with torch.serialization.safe_globals(STAND_INS):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _read_safetensors(path: Path, header: int) -> dict[str, Tensor]:
    if header > min(MOST_HEADER, path.stat().st_size):
        raise ValueError(f"its header claims {header} bytes")
    return safetensors.torch.load_file(path)


class _Plain:
    """Copy the tensors of what a file gave, and make the rest plain values; raise ValueError for what is neither.

    Tensors that claim more than the file has (an expanded or shared storage) are refused before they are copied.
    """

    def __init__(self, file_size: int):
        self.left, self.done, self.kept, self.copies = file_size, {}, [], {}

    def value(self, value: object) -> object:
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return value
        if id(value) not in self.done:  # shared objects stay shared; without this, nested ones could be endless
            self.done[id(value)] = None
            self.kept.append(value)  # an id is good as long as its object lives
            self.done[id(value)] = self.taken_apart(value)
        return self.done[id(value)]

    def taken_apart(self, value: object) -> object:
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, argparse.Namespace):
            return self.value(vars(value))
        if isinstance(value, Mapping):
            return {self.key(name): self.value(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self.value(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value)
        if isinstance(value, _Left):
            return None
        raise ValueError(f"it holds a {type(value).__name__}")

    @staticmethod
    def key(name: object) -> str | int:
        if not isinstance(name, (str, int)):
            raise ValueError(f"a key of type {type(name).__name__}")
        return name

    def tensor(self, value: Tensor) -> Tensor:
        if value.layout is not torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES:
            raise ValueError(f"a tensor of {value.dtype} on {value.device} with layout {value.layout}")
        storage = value.untyped_storage()
        view = storage.data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype
        if view not in self.copies:  # a file may name the same tensor twice, as model and as average
            size = value.numel() * value.element_size()
            self.left -= size
            if size > storage.nbytes() or self.left < 0:
                raise ValueError(f"a tensor of shape {list(value.shape)[:6]} claims more than the file has")
            self.copies[view] = value.detach().clone(memory_format=torch.contiguous_format)
        return self.copies[view]


def all_finite(value: Tensor) -> bool:
    """Return True if no element is infinite or not a number."""
    parts = value.reshape(-1).split(2**22)  # which need little memory
    return not value.is_floating_point() or all(bool(torch.isfinite(part).all()) for part in parts)


# ---------------------------------------------------------------- weights


def number_of_classes(state: Mapping[str, Tensor], source: str) -> int:
    """Return the number of a classifier's outputs; raise UserError for weights without a classifier."""
    head = state.get("head.weight")
    if head is None or head.ndim != 2:
        what = f"no classifier in the weights ({source}): expected head.weight"
        raise UserError(f"{what}, main.py --finetune can add one")
    return len(head)


class Checkpoint:
    """What a file holds, and the file's name for messages. Its weights have their official names, whatever the file
    calls and wraps them; of a segmentor or detector, they are the backbone's.
    """

    def __init__(self, payload: Mapping, source: str | Path):
        self.payload, self.source = payload, str(source)

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """Read a file or an https address, see `load`; of a run's folder, the best checkpoint."""
        source = best_checkpoint(source) if os.path.isdir(source) else source
        return cls(load(source), source)

    @property
    def options(self) -> dict:
        """Return the options of the training run that wrote the file, as far as it holds them."""
        args = self.payload.get("args")
        return args if isinstance(args, dict) else {}

    def weights(self, key: str | None = None) -> dict[str, Tensor]:
        """Return the weights under `key` ("model_ema"), by default wherever files keep them."""
        return self.read_weights(key)[0]

    def read_weights(self, key: str | None = None) -> tuple[dict[str, Tensor], str, list[str]]:
        """Return the weights, the format that their names are in, and the names of other parts, which are left out."""
        if key is not None and key not in self.payload:
            raise UserError(f"no averaged weights ({self.source}): it was trained without --model-ema")
        keys = WRAPPERS if key is None else (key,)
        wrapped = next((self.payload[name] for name in keys if isinstance(self.payload.get(name), dict)), None)
        if wrapped is None and key is None:
            wrapped = self.payload
        items = wrapped.items() if isinstance(wrapped, dict) else ()
        state = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
        if not state:
            raise UserError(f"no weights ({self.source}): expected tensors by name")
        return formats.to_official(state, source=self.source)

    @property
    def class_names(self) -> list[str] | None:
        """Return the names of a classifier's outputs in their order, None if the file does not hold them."""
        names = self.payload.get("class_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise UserError(f"not a training state ({self.source}): its class names are no list of names")
        return names

    def load_into(self, model: nn.Module, *, key: str | None = None, **allowed) -> dict[str, list[str]]:
        """Copy the weights into a model; see the function load_into for `allowed`."""
        return load_into(model, self.weights(key), source=self.source, **allowed)


def differences(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return what keeps `state` from being the model's weights: names by kind."""
    own = model.state_dict()
    shared = [name for name in own if name in state]
    return {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [name for name in shared if own[name].shape != state[name].shape],
        "of another type": [n for n in shared if own[n].is_floating_point() != state[n].is_floating_point()],
        "not finite": [name for name in shared if not all_finite(state[name])],
    }


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    may_lack: tuple[str, ...] = (),
    may_have: tuple[str, ...] = (),
    report: str = "",
    lists_all: str = "--report FILE or TWINS_DEBUG=1",
) -> dict[str, list[str]]:
    """Copy weights into a model and return the names that are on one side only, "missing" and "unknown".

    Those must begin with one of `may_lack` (missing in the file) or `may_have` (unknown to the model). Any other
    difference, also in shape or type, and values that are not finite raise UserError with counts and the first names,
    and the model stays as it is. report: a file for all of the names, whether the weights fit or not.
    """
    kinds = differences(model, state)
    if report:
        fits = [name for name in state if not any(name in names for names in kinds.values())]
        record = {"source": str(source), "loaded": fits, **kinds, "may lack": may_lack, "may have": may_have}
        try:
            write_text(Path(report), json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the report (--report {report}): {error.strerror}") from error
    one_sided = {"missing": kinds["missing"], "unknown": kinds["unknown"]}
    allowed = {"missing": may_lack, "unknown": may_have}
    wrong = {kind: [n for n in names if not n.startswith(allowed.get(kind, ()))] for kind, names in kinds.items()}
    if any(wrong.values()):
        most = None if os.environ.get("TWINS_DEBUG") == "1" else SHOWN
        parts = [f"{len(names)} {kind} ({', '.join(names[:most])})" for kind, names in wrong.items() if names]
        advice = f"are they another model's? {lists_all} lists all"
        raise UserError(f"the weights do not fit the model ({source}): {'; '.join(parts)}: {advice}")
    known = {name: value for name, value in state.items() if name not in kinds["unknown"]}
    model.load_state_dict(known, strict=not kinds["missing"])
    return one_sided


def finetune(model: nn.Module, file: Checkpoint, *, classes: list[str] | None = None, report: str = "") -> str:
    """Load the weights of another run and return a line about them; a head of another number of classes, or of others
    than `classes`, stays as initialized.
    """
    state, current, may_lack, head = file.weights(), model.state_dict(), (), "head.weight"
    differs = ""
    if head in state and state[head].shape != current[head].shape:
        number = "x".join(map(str, state[head].shape[:1]))
        differs = f"the classifier of {file.source} has {number} classes, this data set {len(current[head])}"
    elif head in state and classes and (names := file.class_names) and names != classes:
        which = next((pair for pair in zip(names, classes) if pair[0] != pair[1]), (len(names), len(classes)))
        differs = f"the classifier of {file.source} has other class names ({which[0]}, in this data set {which[1]})"
    if differs:
        log(f"finetune: {differs}: reinitialized")
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    if head not in state:
        may_lack = ("head.",)
    stem = "patch_embeds.0.proj.weight"
    channels = current[stem].shape[1] if stem in current else 0
    if channels and stem in state and state[stem].shape[1] != channels and state[stem].ndim == 4:
        log(f"finetune: {stem} adapted from {state[stem].shape[1]} to {channels} channels as timm does")
        state = state | {stem: adapt_input_conv(channels, state[stem], state[stem].shape[1])}
    # A classifier has no use for the norms of a segmentor's or detector's maps.
    allowed = dict(may_lack=may_lack, may_have=("norm_list.",), report=report)
    lacking, surplus = load_into(model, state, source=file.source, **allowed).values()
    used = f"{len(state) - len(surplus)} of {len(current)} tensors loaded from {file.source}"
    not_loaded, not_used = ", ".join(sorted(lacking)) or "none", ", ".join(surplus) or "none"
    return f"finetune: {used}; not loaded: {not_loaded}; not used: {not_used}"


# ---------------------------------------------------------------- writing


def save(path: Path, payload: dict, *, keep_as: Path | None = None) -> None:
    """Write a checkpoint atomically; raise UserError if it cannot be written, the old file then stays.

    keep_as: another name that the old file gets. Files hold tensors and plain values only, so that
    torch.load(weights_only=True) opens them.
    """
    _write(path, lambda file: torch.save(payload, file), keep_as=keep_as)


def save_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write bare weights, which share no memory, as safetensors."""
    _write(path, lambda file: file.write(safetensors.torch.save(dict(state), metadata={"format": "pt"})))


def _write(path: Path, write: Callable[[BinaryIO], object], *, keep_as: Path | None = None) -> None:
    try:
        atomic_write(path, write, keep_as=keep_as)
    except OSError as error:
        raise UserError(f"cannot write ({path}): {error.strerror}; nothing has changed, fix that and retry") from error


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield the tensors and plain values of a checkpoint, each with its path of keys, in the order of the paths."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from leaves(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    else:
        yield name, value
