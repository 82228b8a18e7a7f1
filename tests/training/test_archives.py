"""Archives and indexes that nobody should trust: nothing is written, nothing runs, little memory is used, one line."""

import io
import json
import os
import pickle
import random
import stat
import struct
import tarfile
import time
import tracemalloc
import zlib

import pytest

from training import archives, sources
from training.errors import UserError

MOST = 300 * 2**20  # bytes of memory
ZEROS = 2**30  # bytes of a bomb


def write_tar(path, *members, form=tarfile.PAX_FORMAT):
    """Members: (name, bytes), or a TarInfo without data."""
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def entry(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_zip(path, *members):
    """Byte by byte, as the standard library would not: dicts of name, data, and what to say of them."""
    body, directory = b"", b""
    for each in members:
        name, data, packed = each["name"].encode(), each.get("data", b"x"), each.get("packed")
        packed = data if packed is None else packed
        method, size = each.get("method", 0), each.get("size", len(data))
        said = struct.pack(
            "<HHHHIII",
            each.get("flags", 0),
            method,
            0,
            0,
            each.get("crc", zlib.crc32(data)),
            each.get("said", len(packed)),
            size,
        )
        head = struct.pack("<HH", len(name), 0)
        directory += b"PK\1\2" + struct.pack("<HH", 0x314, 20) + said + head
        directory += struct.pack("<HHHII", 0, 0, 0, each.get("mode", 0o100644) << 16, len(body)) + name
        body += each.get("magic", b"PK\3\4") + struct.pack("<H", 20) + said + head + name + packed
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(body), 0)
    path.write_bytes(body + directory + end)


def bomb():
    """A gigabyte of zeros, deflated: one block, written again and again."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (ZEROS // 2**20) + packer.flush()


@pytest.fixture
def small():
    """Little memory: of Python's objects, which everything here is read into."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MOST


def tree(folder):
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refused(path):
    """Return the line that refuses an archive of class folders, which leaves nothing behind."""
    before = tree(path.parent.parent)
    with pytest.raises(UserError) as caught:
        sources.find(path.parent, path.stem)
    assert tree(path.parent.parent) == before
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    return line


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# ---------------------------------------------------------------- hostile members


@pytest.mark.parametrize("name", ["../evil.png", "cat/../../evil.png", "/tmp/evil.png", "cat/..", "./../x.png"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_out(name, kind, data):
    path = data / f"train.{kind}"
    write_tar(path, ("cat/a.png", b"x"), (name, b"x")) if kind == "tar" else write_zip(path, dict(name=name))
    assert f"a name that leads out of its archive ({path}!/{name})" in refused(path)


def test_names_of_windows(data):
    write_zip(data / "train.zip", dict(name="cat\\1.png"), dict(name="dog\\1.png"))
    assert sources.find(data, "train").classes == ["cat", "dog"]
    write_zip(data / "train.zip", dict(name="..\\..\\evil.png"))
    assert "a name that leads out" in refused(data / "train.zip")


@pytest.mark.parametrize(
    "member",
    [
        entry("cat/1.png", tarfile.SYMTYPE, "/etc/passwd"),
        entry("cat/1.png", tarfile.LNKTYPE, "cat/0.png"),
        entry("cat", tarfile.SYMTYPE, "/"),
        entry("cat/1.png", tarfile.CHRTYPE),
        entry("cat/1.png", tarfile.BLKTYPE),
        entry("cat/1.png", tarfile.FIFOTYPE),
    ],
    ids=["link", "hard link", "folder's link", "character device", "block device", "pipe"],
)
def test_links_and_devices_in_a_tar(member, data):
    write_tar(data / "train.tar", ("cat/0.png", b"x"), member)
    line = refused(data / "train.tar")
    assert f"a link, device or sparse file in an archive ({data / 'train.tar'}!/{member.name})" in line


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip(kind, data):
    write_zip(data / "train.zip", dict(name="cat/1.png", mode=kind | 0o777, data=b"/etc/passwd"))
    assert f"a link or device in an archive ({data / 'train.zip'}!/cat/1.png)" in refused(data / "train.zip")


@pytest.mark.parametrize("second", ["cat/1.png", "./cat//1.png"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_that_is_there_twice(second, kind, data):
    path = data / f"train.{kind}"
    if kind == "tar":
        write_tar(path, ("cat/1.png", b"x"), (second, b"y"))
    else:
        write_zip(path, dict(name="cat/1.png"), dict(name=second))
    assert f"a member that is there twice ({path}!/{second})" in refused(path)


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (dict(flags=1), "an encrypted or unusually compressed member"),
        (dict(method=12), "an encrypted or unusually compressed member"),
        (dict(method=99), "an encrypted or unusually compressed member"),
        (dict(magic=b"PK\0\0"), "a member without a header"),
        (dict(said=2**31, size=2**31), "a member that ends outside its archive"),
    ],
)
def test_members_of_a_zip_that_cannot_be_read(member, says, data):
    write_zip(data / "train.zip", dict(name="cat/1.png") | member)
    assert f"{says} ({data / 'train.zip'}!/cat/1.png)" in refused(data / "train.zip")


# ---------------------------------------------------------------- bombs


def test_a_gigabyte_of_zeros_in_a_zip(data, small):
    write_zip(data / "train.zip", dict(name="cat/1.png", packed=bomb(), method=8, size=ZEROS, crc=0))
    line = str(pytest.raises(UserError, sources.find, data, "train").value)
    assert f"too large a member ({data / 'train.zip'}!/cat/1.png): 1073741824 bytes" in line


def test_a_gigabyte_of_zeros_that_says_it_is_small(data, small):
    write_zip(
        data / "train.zip", dict(name="cat/1.png", packed=bomb(), method=8, size=1000, crc=zlib.crc32(bytes(1000)))
    )
    found = sources.find(data, "train")
    with pytest.raises(UserError, match=r"a corrupt member \(.*train.zip!/cat/1.png\)"):
        archives.read(found.members[0], found.samples[0][0])


def test_a_gigabyte_of_zeros_in_a_tar(data, small):
    """In a file with a hole, which takes no room."""
    path, info = data / "train.tar", tarfile.TarInfo("cat/1.png")
    info.size = ZEROS
    path.write_bytes(info.tobuf())
    os.truncate(path, 512 + ZEROS + 1024)
    line = str(pytest.raises(UserError, sources.find, data, "train").value)
    assert f"too large a member ({path}!/cat/1.png)" in line


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE])
def test_a_gigabyte_in_a_header_of_a_tar(kind, data, small):
    info = entry("x", kind)
    info.size = ZEROS
    (data / "train.tar").write_bytes(info.tobuf())
    os.truncate(data / "train.tar", ZEROS + 4096)
    assert "a header of more than" in refused(data / "train.tar")


def test_a_directory_of_a_gigabyte_in_a_zip(data, small):
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 9, 9, ZEROS, 0, 0)
    with open(data / "train.zip", "wb") as file:
        file.truncate(ZEROS)
        file.seek(ZEROS)
        file.write(end)
    assert "cannot read an archive" in refused(data / "train.zip")


def test_headers_in_a_circle(data):
    """A negative size leads back to the same header: an endless loop in some versions of tarfile."""
    block = bytearray(entry("cat/1.png", tarfile.REGTYPE).tobuf())
    block[124:136] = (2**96 - 1024).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (data / "train.tar").write_bytes(bytes(block) + bytes(2048))
    start = time.perf_counter()
    assert "a member that ends outside its archive" in refused(data / "train.tar") and time.perf_counter() - start < 5


def test_headers_of_headers(data):
    info = entry("x", tarfile.XHDTYPE)
    (data / "train.tar").write_bytes(info.tobuf() * 5000)
    assert "cannot read an archive" in refused(data / "train.tar")


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_that_are_cut_off_or_something_else(kind, data):
    path = data / f"train.{kind}"
    members = [(f"cat/{number}.png", random.Random(number).randbytes(3000)) for number in range(9)]
    write_tar(path, *members) if kind == "tar" else write_zip(path, *(dict(name=n, data=d) for n, d in members))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x1f\x8b" + whole[:500], b"<!DOCTYPE html>" * 100, bytes(10)):
        path.write_bytes(content)
        assert refused(path).startswith(("cannot read an archive", "a member that ends outside its archive"))
    path.unlink()
    os.mkfifo(path)
    assert "no such data folder" in str(pytest.raises(UserError, sources.find, data, "train").value)


def test_two_tars_in_one_file(data):
    """Of which tarfile reads the first one only."""
    write_tar(data / "a.tar", ("cat/1.png", b"x"))
    write_tar(data / "b.tar", ("dog/1.png", b"x"))
    (data / "train.tar").write_bytes((data / "a.tar").read_bytes() + (data / "b.tar").read_bytes())
    assert "tar --concatenate joins archives" in refused(data / "train.tar")


@pytest.mark.parametrize("method", [0, 8])
def test_a_flipped_bit_in_a_zip(method, data):
    content = random.Random(0).randbytes(5000)
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(content) + packer.flush() if method else content
    path = data / "train.zip"
    write_zip(path, dict(name="cat/1.png", data=content, packed=packed, method=method))
    damaged = bytearray(path.read_bytes())
    damaged[2500] ^= 1
    path.write_bytes(damaged)
    found = sources.find(data, "train")
    with pytest.raises(UserError, match=r"a corrupt member \(.*train.zip!/cat/1.png\): copy or make"):
        archives.read(found.members[0], found.samples[0][0])


def test_an_archive_that_changes_under_a_run(data):
    write_tar(data / "train.tar", ("cat/1.png", b"one"))
    found = sources.find(data, "train")
    write_tar(data / "train.tar", ("cat/1.png", b"two"), ("cat/2.png", b"x" * 20000))
    with pytest.raises(UserError, match="an archive that has changed"):
        archives.read(found.members[0], found.samples[0][0])
    (data / "train.tar").unlink()
    with pytest.raises(UserError, match="cannot read an archive"):
        archives.read(found.members[0], found.samples[0][0])


def test_long_and_odd_names(data):
    long = "cat/" + "/".join("x" * 90 for _ in range(5)) + ".png"
    odd = "cat/\udcff\n.png"
    write_tar(data / "train.tar", (long, b"long"), (odd, b"odd"), form=tarfile.GNU_FORMAT)
    for _ in range(2):  # from the archive, then from its index
        found = sources.find(data, "train")
        names = {path.removeprefix(f"{data / 'train.tar'}!/"): number for number, (path, _) in enumerate(found.samples)}
        assert set(names) == {long, odd}
        assert archives.read(found.members[names[odd]], odd) == b"odd"
    assert (data / ".train.tar.index").is_file()


# ---------------------------------------------------------------- the index


MEMBERS = [
    (f"{name}/{number}.png", random.Random(number).randbytes(700)) for name in ("cat", "dog") for number in (0, 1)
]


def contents(found):
    return {path: archives.read(found.members[number], path) for number, (path, _) in enumerate(found.samples)}


@pytest.fixture(params=["tar", "zip"])
def archive(request, data):
    """An archive that was indexed; its path, its index, and what it holds."""
    path = data / f"train.{request.param}"
    write_tar(path, *MEMBERS) if request.param == "tar" else write_zip(
        path, *(dict(name=n, data=d) for n, d in MEMBERS)
    )
    return path, path.with_name(f".{path.name}.index"), contents(sources.find(data, "train"))


def test_an_index_is_used(archive, monkeypatch, capsys):
    path, index, expected = archive
    assert len(expected) == 4 and len(index.read_text().splitlines()) == 5
    capsys.readouterr()
    monkeypatch.setattr(archives, "tar_members", None)
    monkeypatch.setattr(archives, "zip_members", None)
    assert contents(sources.find(path.parent, "train")) == expected
    assert "indexing" not in capsys.readouterr().out


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARKER"],)


def changed(**values):
    """An index with other values in its second line."""

    def change(text):
        head, first, *rest = (json.loads(line) for line in text.splitlines())
        for place, value in values.items():
            first[archives.Member._fields.index(place)] = value
        return "\n".join(map(json.dumps, [head, first, *rest])) + "\n"

    return change


PLANTED = {
    "empty": lambda text: "",
    "garbage": lambda text: "\0\xff" * 1000,
    "no lines": lambda text: text.splitlines()[0],
    "cut off": lambda text: text[: len(text) // 2],
    "of another size": lambda text: text.replace(str(json.loads(text.splitlines()[0])[1]), "7", 1),
    "older": lambda text: text.replace(str(json.loads(text.splitlines()[0])[2]), "7", 1),
    "of another format": lambda text: text.replace(", 1", ", 2", 1),
    "an object": lambda text: "{}",
    "a number": lambda text: "3",
    "an empty list": lambda text: "[]",
    "deep": lambda text: "[" * 60000,
    "beyond the end": changed(offset=10**9),
    "before the start": changed(offset=-1),
    "more than there is": changed(packed=10**9, size=10**9),
    "huge numbers": changed(offset=10**30),
    "a negative size": changed(packed=-1, size=-1),
    "another size unpacked": changed(size=2**40),
    "a name that leads out": changed(name="../../x.png"),
    "a name twice": changed(name="dog/1.png"),
    "no name": changed(name=3),
    "a flag": changed(deflated=None),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_index_is_made_again(plant, archive, small):
    path, index, expected = archive
    index.write_text(PLANTED[plant](index.read_text()))
    assert contents(sources.find(path.parent, "train")) == expected
    assert len(index.read_text().splitlines()) == 5


def test_an_index_of_a_gigabyte_or_no_file(archive, small):
    path, index, expected = archive
    os.truncate(index, 0)
    os.truncate(index, ZEROS)
    assert contents(sources.find(path.parent, "train")) == expected
    index.unlink()
    os.mkfifo(index)
    assert contents(sources.find(path.parent, "train")) == expected


def test_an_index_of_older_content_is_made_again(archive):
    path, index, expected = archive
    names = [("ant/5.png", b"new"), ("bee/5.png", b"newer")]
    write_tar(path, *names) if path.suffix == ".tar" else write_zip(path, *(dict(name=n, data=d) for n, d in names))
    assert list(contents(sources.find(path.parent, "train")).values()) == [b"new", b"newer"]


def test_a_planted_pickle_is_not_read(archive, tmp_path, monkeypatch):
    path, index, expected = archive
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    for name in ("_tarinfos.pickle", "train_tarinfos.pickle", "class_map.pickle", ".train.tar.index.pickle"):
        (path.parent / name).write_bytes(pickle.dumps(Evil()))
    index.write_bytes(pickle.dumps(Evil()))
    assert contents(sources.find(path.parent, "train")) == expected
    assert not (tmp_path / "marker").exists()


def test_an_index_that_is_a_link_leaves_what_it_names(archive, tmp_path):
    path, index, expected = archive
    other = tmp_path / "other"
    other.write_text("mine")
    index.unlink()
    index.symlink_to(other)
    assert contents(sources.find(path.parent, "train")) == expected
    assert other.read_text() == "mine" and not index.is_symlink()


def test_without_room_for_an_index(archive, monkeypatch, capsys):
    path, index, expected = archive
    index.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives, "atomic_write", full)
    assert contents(sources.find(path.parent, "train")) == expected
    assert "(No space left on device): they are made at every start" in capsys.readouterr().out and not index.exists()


def test_indexing_changes_nothing_else(archive):
    path, index, _ = archive
    content = path.read_bytes()
    assert sorted(each.name for each in path.parent.iterdir()) == sorted([path.name, index.name])
    contents(sources.find(path.parent, "train"))
    assert path.read_bytes() == content
