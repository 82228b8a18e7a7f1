"""Checkpoints: written whole, read safely, loaded only where every name and shape fits."""

import argparse
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
from utils import UserError


class Runs:
    """What a hostile file would hold: opening it without care makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_there_and_back(tmp_path):
    payload = {"model": nn.Linear(2, 3).state_dict(), "epoch": 4, "args": {"lr": 5e-4, "scale": (0.08, 1.0)}, "class_names": ["a", "b"]}
    checkpoint.save(tmp_path / "c.pth", payload)
    loaded = checkpoint.load(str(tmp_path / "c.pth"))
    assert loaded["args"] == payload["args"] and torch.equal(loaded["model"]["weight"], payload["model"]["weight"])
    torch.load(tmp_path / "c.pth", weights_only=True)  # without an allow-list
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.save(path, {"epoch": 1})
    before = path.read_bytes()
    with pytest.raises(Exception, match="(?i)pickle"):
        checkpoint.save(path, {"epoch": 2, "bad": lambda: None})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_published_checkpoint_loads_and_its_types_are_allowed_only_then(tmp_path):
    path = tmp_path / "published.pth"
    torch.save({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1.0, output_dir=Path("x"))}, path)
    assert checkpoint.weights(checkpoint.load(str(path)), source="x")["w"] == 1
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_runs(tmp_path, zipped):
    path, marker = tmp_path / "hostile.pth", tmp_path / "marker"
    torch.save({"model": Runs(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(str(path))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and no more"])
def test_other_files_are_one_line(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        checkpoint.load(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_bit_is_found(tmp_path):
    """torch.load would give the wrong weights in silence."""
    path = tmp_path / "c.pth"
    checkpoint.save(path, {"model": {"w": torch.zeros(1000)}})
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[record.header_offset + 1000] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model"]["w"].any()
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(str(path))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(str(tmp_path / "missing.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="it holds a list"):
        checkpoint.load(str(tmp_path / "list.pth"))
    with pytest.raises(UserError, match=r"no weights \(x.pth\)"):
        checkpoint.weights({"epoch": 3}, source="x.pth")
    with pytest.raises(UserError, match=r"no averaged weights \(x.pth\)"):
        checkpoint.weights({"model": {}}, source="x.pth", key="model_ema")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_weights_are_found_however_they_are_wrapped(wrap):
    state = nn.Linear(2, 3).state_dict()
    assert checkpoint.weights(wrap(state), source="x").keys() == state.keys()


def test_every_difference_is_an_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    own = model.state_dict()
    wrong = {"0.weight": own["0.weight"], "0.bias": torch.zeros(4), "1.weight": own["1.weight"], "2.weight": torch.zeros(1)}
    before = {name: value.clone() for name, value in own.items()}
    with pytest.raises(UserError) as caught:
        checkpoint.load_into(model, wrong, source="x.pth")
    for part in ("(x.pth)", "1 missing (1.bias)", "1 unknown (2.weight)", "1 of another shape (0.bias)"):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    checkpoint.load_into(model, {name: own[name] for name in ("0.weight", "0.bias")}, source="x.pth", may_lack=("1.",))
