"""The shim: only beside a CPU build of torch whose torchvision cannot load its own library."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from gvt_ops import torchvision_cpu


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_transforms_data_sets_and_timm_work():
    import timm
    from torchvision import datasets, transforms

    assert transforms.Resize and datasets.ImageFolder and timm.create_model


@pytest.mark.slow
@pytest.mark.skipif(torchvision_cpu.LIBRARY is None, reason="torchvision's own library loads here")
def test_without_it_torchvision_cannot_be_imported():
    """If this fails, torchvision has fixed it and the shim can go."""
    plain = python("import torchvision")
    assert plain.returncode != 0 and "torchvision::nms" in plain.stderr
    assert python("import gvt_ops, torchvision").returncode == 0


@pytest.mark.parametrize("build", ["cuda", "hip"])
def test_it_does_nothing_beside_a_gpu_build(build, monkeypatch):
    monkeypatch.setattr(torch.version, build, "13.0")
    monkeypatch.setattr(torchvision_cpu, "library_loads", lambda: False)
    assert torchvision_cpu.declare_operators() is None


def test_it_does_nothing_where_the_library_loads(monkeypatch):
    monkeypatch.setattr(torchvision_cpu, "library_loads", lambda: True)
    assert torchvision_cpu.declare_operators() is None


@pytest.mark.slow
def test_the_library_is_tried_without_importing_torchvision():
    shim = "import runpy, sys; runpy.run_path('gvt_ops/torchvision_cpu.py')"
    done = python(f"{shim}; assert 'torchvision' not in sys.modules")
    assert done.returncode == 0, done.stderr
