"""Checkpoints: written whole, read safely, loaded only where every name and shape fits."""

import argparse
import json
import pickle
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tools.checkpoint_hash import digest
from training import checkpoint
from training.checkpoint import Checkpoint
from training.errors import UserError


class Runs:
    """What a hostile file would hold: opening it without care makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_there_and_back(tmp_path):
    payload = {
        "model": nn.Linear(2, 3).state_dict(),
        "epoch": 4,
        "args": {"lr": 5e-4, "scale": (0.08, 1.0)},
        "class_names": ["a", "b"],
    }
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
    assert Checkpoint.open(path).weights()["w"] == 1
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
        Checkpoint({"epoch": 3}, "x.pth").weights()
    with pytest.raises(UserError, match=r"no averaged weights \(x.pth\)"):
        Checkpoint({"model": {}}, "x.pth").weights("model_ema")


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}]
)
def test_weights_are_found_however_they_are_wrapped(wrap):
    state = nn.Linear(2, 3).state_dict()
    assert Checkpoint(wrap(state), "x").weights().keys() == state.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_files_of_others_hold_becomes_plain_values(tmp_path, zipped):
    """Namespace, paths, numpy's scalars and arrays, parameters, ordered dictionaries, types, the history in mmengine's
    files.
    """
    args = argparse.Namespace(lr=5e-4, output_dir=Path("a") / "b", betas=None, scale=(0.08, 1.0))
    shared = torch.arange(6.0).reshape(2, 3)
    payload = {
        "model": OrderedDict(w=nn.Parameter(torch.ones(2)), part=shared[:, 1:], again=shared),
        "args": args,
        "max_accuracy": np.float64(81.25),
        "epoch": np.int64(7),
        "small": np.float32(0.5),
        "history": np.arange(3),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "milestones": Counter([8, 11]),
        "names": {"a": [1, None, True, "x", 2**70, b"bytes"]},
    }
    path = tmp_path / "x.pth"
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    loaded = checkpoint.load(path)
    assert loaded["args"] == {"lr": 5e-4, "output_dir": "a/b", "betas": None, "scale": (0.08, 1.0)}
    assert (loaded["max_accuracy"], loaded["epoch"], loaded["small"], loaded["history"]) == (81.25, 7, 0.5, None)
    assert type(loaded["max_accuracy"]) is float and type(loaded["epoch"]) is int and loaded["size"] == (1, 2)
    assert loaded["names"] == payload["names"] and loaded["dtype"] == "torch.float16"
    assert loaded["milestones"] == {8: 1, 11: 1} and type(loaded["milestones"]) is dict
    assert type(loaded["model"]) is dict and type(loaded["model"]["w"]) is torch.Tensor
    assert torch.equal(loaded["model"]["part"], shared[:, 1:]) and loaded["model"]["part"].is_contiguous()


def test_what_was_read_is_not_tied_to_the_file(tmp_path):
    """Files are mapped while they are checked; the tensors are copies."""
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(5000)}, path)
    loaded = checkpoint.load(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert (loaded["w"] == 1).all()


def test_the_same_tensor_under_two_names(tmp_path):
    """Twice in the file's names, once in its bytes: no bomb. Views that overlap in other ways are refused."""
    w = torch.arange(1000.0)
    torch.save({"model": {"w": w}, "model_ema": {"w": w.detach()}}, tmp_path / "x.pth")
    loaded = checkpoint.load(tmp_path / "x.pth")
    assert torch.equal(loaded["model"]["w"], w) and torch.equal(loaded["model_ema"]["w"], w)
    torch.save({f"w{i}": w[i:] for i in range(10)}, tmp_path / "y.pth")
    with pytest.raises(UserError, match="claims more than the file has"):
        checkpoint.load(tmp_path / "y.pth")


@pytest.mark.parametrize("names", [5, "abc", [1, 2], {"a": 1}])
def test_class_names_are_a_list_of_names(names):
    with pytest.raises(UserError, match="class names"):
        print(Checkpoint({"class_names": names}, "x").class_names)
    assert Checkpoint({}, "x").class_names is None
    assert Checkpoint({"class_names": ["a"]}, "x").class_names == ["a"]


def test_types_that_no_weights_have_are_refused(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="a tensor of torch.float8_e4m3fn"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_safetensors_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {name: value.contiguous() for name, value in nn.Linear(3, 2).state_dict().items()}
    safetensors.torch.save_file(state, path)
    loaded = Checkpoint.open(path).weights()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_an_address_is_read_through_the_hubs_cache(tmp_path, monkeypatch):
    """With the same care as a file; without a network, what is there still serves."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    checkpoint.save(cache / "w-12345678.pth", {"w": torch.ones(1000)})
    url = "https://localhost:1/some/w-12345678.pth"
    assert (checkpoint.load(url)["w"] == 1).all()
    content = bytearray((cache / "w-12345678.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (cache / "w-12345678.pth").write_bytes(content)
    with pytest.raises(
        UserError, match=r"not a readable checkpoint \(https://localhost:1/some/w-12345678.pth\): damaged"
    ):
        checkpoint.load(url)
    with pytest.raises(UserError, match=r"cannot download \(https://localhost:1/other.pth\)"):
        checkpoint.load("https://localhost:1/other.pth")
    assert not (cache / "other.pth").exists()


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state", "model_ema", "state_dict_ema"])
def test_every_wrapper_is_known(key):
    state = nn.Linear(2, 3).state_dict()
    assert Checkpoint({"epoch": 3, key: dict(state)}, "x").weights().keys() == state.keys()


def test_the_backbone_of_a_dense_checkpoint_is_taken():
    state = {"backbone.patch_embeds.0.proj.weight": torch.ones(1), "decode_head.conv_seg.weight": torch.ones(2)}
    weights, fmt, left_out = Checkpoint({"meta": {"config": "import os"}, "state_dict": state}, "x").read_weights()
    assert (
        list(weights) == ["patch_embeds.0.proj.weight"]
        and fmt == "dense"
        and left_out == ["decode_head.conv_seg.weight"]
    )


def test_a_report_lists_every_name(tmp_path, monkeypatch):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    state = {f"x{name}": value for name, value in model.state_dict().items()} | {
        "0.weight": torch.full((2, 2), float("nan"))
    }
    report = tmp_path / "report.json"
    with pytest.raises(UserError) as caught:
        checkpoint.load_into(model, state, source="x.pth", report=str(report))
    assert (
        "11 missing (0.bias, 1.weight, 1.bias); 12 unknown (x0.weight, x0.bias, x1.weight); 1 not finite (0.weight)"
        in str(caught.value)
    )
    found = json.loads(report.read_text())
    assert (
        len(found["missing"]) == 11
        and len(found["unknown"]) == 12
        and found["not finite"] == ["0.weight"]
        and found["loaded"] == []
    )
    monkeypatch.setenv("TWINS_DEBUG", "1")
    with pytest.raises(UserError, match="5.bias"):
        checkpoint.load_into(model, state, source="x.pth")
    checkpoint.load_into(model, model.state_dict(), source="x.pth", report=str(report))
    assert len(json.loads(report.read_text())["loaded"]) == 12
    with pytest.raises(UserError, match="cannot write the report"):
        checkpoint.load_into(model, model.state_dict(), source="x.pth", report=str(tmp_path / "no" / "r.json"))


def test_surplus_is_dropped_only_where_it_was_named():
    model = nn.Linear(2, 2)
    state = model.state_dict() | {"norm_list.0.weight": torch.ones(2)}
    with pytest.raises(UserError, match=r"1 unknown \(norm_list.0.weight\)"):
        checkpoint.load_into(model, state, source="x")
    assert checkpoint.load_into(model, state, source="x", may_have=("norm_list.",)) == {
        "missing": [],
        "unknown": ["norm_list.0.weight"],
    }


def test_leaves_and_digest(tmp_path):
    payload = {
        "model": {"b": torch.ones(2), "a": torch.zeros(1)},
        "optimizer": {"state": {0: {"step": 3}}},
        "args": {"lr": 1.0},
    }
    assert [name for name, _ in checkpoint.leaves(payload["model"])] == ["/a", "/b"]
    same = {"optimizer": payload["optimizer"], "model": {"a": torch.zeros(1), "b": torch.ones(2)}, "args": {"lr": 2.0}}
    assert digest(payload) == digest(same)
    others = [{"b": torch.ones(2).double()}, {"b": torch.ones(1, 2)}, {"b": torch.tensor([1.0, 1.0000001])}]
    digests = {digest(payload | {"model": payload["model"] | other}) for other in others} | {
        digest(payload | {"optimizer": {}})
    }
    assert len(digests | {digest(payload)}) == 5
    assert digest({"w": torch.ones(1)}) != digest({"w": torch.zeros(1)})  # bare weights


def test_every_difference_is_an_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    own = model.state_dict()
    wrong = {
        "0.weight": own["0.weight"],
        "0.bias": torch.zeros(4),
        "1.weight": own["1.weight"],
        "2.weight": torch.zeros(1),
    }
    before = {name: value.clone() for name, value in own.items()}
    with pytest.raises(UserError) as caught:
        checkpoint.load_into(model, wrong, source="x.pth")
    for part in ("(x.pth)", "1 missing (1.bias)", "1 unknown (2.weight)", "1 of another shape (0.bias)"):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    checkpoint.load_into(model, {name: own[name] for name in ("0.weight", "0.bias")}, source="x.pth", may_lack=("1.",))
