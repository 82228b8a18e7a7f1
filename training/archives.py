"""Read members of tar and zip archives in any order: an index of where each one is, and one read by its offset.

The index is cached beside the archive, as lines of JSON. Neither is trusted: no member is ever written to disk, names
are only names, and an index that does not belong to the archive is made again.
"""

import copy
import functools
import itertools
import json
import os
import stat
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.errors import UserError, short_reason
from training.files import atomic_write
from training.folders import is_ignored
from utils import log

FORMAT = "twins index of an archive, 1"
LARGEST = 2**27  # bytes of a member: an image file has fewer
HEADER, DIRECTORY, LINE = 2**20, 2**28, 2**16  # bytes: of a tar's header, a zip's directory, a line of an index
OPEN = 64  # archives at a time
LONGEST = 1000  # characters of a label
LOCAL = 30  # bytes of the fixed part of a zip member's own header


class Archive(NamedTuple):
    """An archive as it was when it was indexed."""

    path: str
    size: int
    mtime: int  # nanoseconds


class Member(NamedTuple):
    """A regular file in an archive: `packed` bytes at `offset`, which are `size` bytes, deflated or as they are.

    crc: of the unpacked bytes, -1 in a tar. text: of a shard's KEY.cls, or the label in its KEY.json.
    """

    name: str
    offset: int
    packed: int
    size: int
    crc: int
    deflated: int
    text: str


# ---------------------------------------------------------------- the index


def index(path: Path) -> tuple[Archive, list[Member]]:
    """Return an archive and its files; raise UserError for a member that no archive of images should have."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read an archive ({path}): {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"not a regular file ({path}): replace or remove it")
    archive, cached = Archive(str(path), status.st_size, status.st_mtime_ns), path.with_name(f".{path.name}.index")
    if (members := read_index(cached, archive)) is not None:
        return archive, members
    log_once(f"indexing the archives in {path.parent}")
    try:
        members = checked(zip_members(path) if path.suffix.lower() == ".zip" else tar_members(path), archive)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of damaged archives, the standard library raises anything
        advice = "is it complete, and without compression?" if path.suffix == ".tar" else "is it complete?"
        raise UserError(f"cannot read an archive ({path}): {advice} [{short_reason(error, 80)}]") from error
    write_index(cached, archive, members)
    return archive, members


log_once = functools.cache(log)  # a line for a folder, not for each of its shards


def checked(members: Iterable[Member], archive: Archive) -> list[Member]:
    """Return members with their names as a/b/c; raise UserError for one outside the archive or of a name seen before.

    Leaves out what other programs put there.
    """
    found, names = [], set()
    for member in members:
        where = f"{archive.path}!/{member.name}"
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if not parts or member.name.startswith("/") or ".." in parts:
            raise UserError(f"a name that leads out of its archive ({where}): make the archive again")
        if min(member.offset, member.packed, member.size) < 0 or member.offset + member.packed > archive.size:
            raise UserError(f"a member that ends outside its archive ({where}): copy or make the archive again")
        if any(map(is_ignored, parts)):
            continue
        if (name := "/".join(parts)) in names:
            raise UserError(f"a member that is there twice ({where}): make the archive again")
        names.add(name)
        found.append(member._replace(name=name))
    return found


class Bounded:
    """A file for tarfile or zipfile that refuses to read more at once than the headers of an honest archive need."""

    def __init__(self, file, most: int):
        self.file, self.most = file, most
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        data = b"" if size > self.most else self.file.read(size if size >= 0 else self.most + 1)
        if max(size, len(data)) > self.most:
            raise ValueError(f"a header of more than {self.most} bytes")
        return data


def tar_members(path: Path) -> Iterator[Member]:
    with open(path, "rb") as file, tarfile.open(fileobj=Bounded(file, HEADER), mode="r:") as tar:
        last = -1
        while (info := tar.next()) is not None:
            tar.members = []  # of which tarfile keeps every one
            if info.offset <= last:
                raise ValueError("headers in a circle")
            last = info.offset
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                what = f"({path}!/{info.name})"
                advice = "make it again with tar --dereference --hard-dereference"
                raise UserError(f"a link, device or sparse file in an archive {what}: {advice}")
            text = ""
            if info.name.endswith((".cls", ".json")) and info.size <= HEADER:
                text = label_in(info.name, os.pread(file.fileno(), info.size, info.offset_data))
            yield Member(info.name, info.offset_data, info.size, info.size, -1, 0, text)
        file.seek(tar.offset)
        if file.read(HEADER).strip(b"\0"):
            raise ValueError("there is more after its end; tar --concatenate joins archives")


def label_in(name: str, data: bytes) -> str:
    """Return the text of a .cls file, or the label in a .json file; empty if it has none."""
    try:
        label = data.decode().strip() if name.endswith(".cls") else json.loads(data)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    valid = isinstance(label, (str, int)) and not isinstance(label, bool) and len(str(label)) <= LONGEST
    return str(label) if valid else ""


def zip_members(path: Path) -> Iterator[Member]:
    with open(path, "rb") as file, zipfile.ZipFile(Bounded(file, DIRECTORY)) as archive:
        for info in archive.infolist():
            name, mode = info.filename.replace("\\", "/"), info.external_attr >> 16
            if info.is_dir():
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise UserError(f"a link or device in an archive ({path}!/{name}): make it again from the files")
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                advice = "make it again with zip -0"
                raise UserError(f"an encrypted or unusually compressed member ({path}!/{name}): {advice}")
            header = os.pread(file.fileno(), LOCAL, info.header_offset)
            if header[:4] != b"PK\3\4" or len(header) < LOCAL:
                raise UserError(f"a member without a header ({path}!/{name}): copy or make the archive again")
            start = info.header_offset + LOCAL + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            deflated = int(info.compress_type == zipfile.ZIP_DEFLATED)
            yield Member(name, start, info.compress_size, info.file_size, info.CRC, deflated, "")


def head_of(archive: Archive, count: int) -> list:
    return [FORMAT, archive.size, archive.mtime, count]


def read_index(path: Path, archive: Archive) -> list[Member] | None:
    """Return the members that an index lists, or None if it is none of this archive as it is now."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            head = json.loads(file.readline(LINE))
            if not isinstance(head, list) or head != head_of(archive, head[-1]):
                return None
            found = checked(members_in(file), archive)
    except (OSError, ValueError, IndexError, RecursionError, UserError):
        return None
    return found if len(found) == head[-1] else None


def members_in(file) -> Iterator[Member]:
    kinds = [str, int, int, int, int, int, str]
    lines = iter(lambda: file.readline(LINE), b"")
    while some := list(itertools.islice(lines, 1000)):  # at a time, which is faster
        for values in json.loads(b"[" + b",".join(some) + b"]"):
            if not isinstance(values, list) or list(map(type, values)) != kinds:
                raise ValueError("not a member")
            member = Member._make(values)
            if not member.deflated and member.packed != member.size:
                raise ValueError("a stored member of another size")
            yield member


def write_index(path: Path, archive: Archive, members: list[Member]) -> None:
    """Write an index where that is possible; without one, the archive is indexed at every start."""

    def write(file) -> None:
        for row in (head_of(archive, len(members)), *members):
            file.write(json.dumps(row).encode() + b"\n")

    try:
        atomic_write(path, write)
    except OSError as error:
        log_once(f"indexes cannot be kept in {path.parent} ({error.strerror}): they are made at every start")


# ---------------------------------------------------------------- the bytes of a member


class Place(NamedTuple):
    """Where the bytes of a member are: see Member."""

    archive: Archive
    offset: int
    packed: int
    size: int
    crc: int
    deflated: int


class Members:
    """Members of archives by number, in an array: workers share its memory, where objects would be copied."""

    def __init__(self, places: Sequence[Place]):
        self.archives = list(dict.fromkeys(place.archive for place in places))
        number = {archive: index for index, archive in enumerate(self.archives)}
        self.rows = np.array([(number[place.archive], *place[1:]) for place in places], np.int64).reshape(-1, 6)

    def __getitem__(self, number: int) -> Place:
        archive, *row = self.rows[number].tolist()
        return Place(self.archives[archive], *row)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: np.ndarray) -> "Members":
        part = copy.copy(self)
        part.rows = self.rows[numbers]
        return part


def check_size(place: Place, name: str) -> None:
    """Raise UserError for a member that is too large, or says so, to be read into memory."""
    if max(place.packed, place.size) > LARGEST:
        size = f"{max(place.packed, place.size)} bytes, an image has at most {LARGEST}"
        raise UserError(f"too large a member ({name}): {size}; remove it")


def read(place: Place, name: str) -> bytes:
    """Return the bytes of a member; raise UserError with its name if they are not those that were packed."""
    data = os.pread(handle(place.archive), place.packed, place.offset)
    if place.deflated:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.size + 1)
        except zlib.error:
            data = b""
    if len(data) != place.size or (place.crc >= 0 and zlib.crc32(data) != place.crc):
        raise UserError(f"a corrupt member ({name}): copy or make the archive again")
    return data


_handles: OrderedDict[Archive, int] = OrderedDict()  # the file descriptors of this process
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_handles.clear)


def handle(archive: Archive) -> int:
    """Return a descriptor of an archive, opened once in each process; raise UserError if the file has changed."""
    if (known := _handles.get(archive)) is not None:
        _handles.move_to_end(archive)
        return known
    try:
        opened = os.open(archive.path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot read an archive ({archive.path}): {error.strerror}") from None
    status = os.fstat(opened)
    if (status.st_size, status.st_mtime_ns) != archive[1:]:
        os.close(opened)
        raise UserError(f"an archive that has changed ({archive.path}): start again")
    if len(_handles) >= OPEN:
        os.close(_handles.popitem(last=False)[1])
    _handles[archive] = opened
    return opened
