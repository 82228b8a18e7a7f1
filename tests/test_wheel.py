"""What `pip install .` installs: gvt and gvt_ops, and nothing else of ours."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT

import gvt


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, for building writes into its folder. Without a network: by the setuptools that is here."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "output", "data", "logs", "__pycache__", "build", "*.egg-info", "work_dirs")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    program = "import setuptools.build_meta as build; build.build_wheel('..')"
    command = dict(args=[sys.executable, "-c", program], capture_output=True, text=True, cwd=folder / "source")
    result = subprocess.run(**command)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_gvt_and_gvt_ops_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {"gvt.py", *(f"gvt_ops/{path.name}" for path in (ROOT / "gvt_ops").glob("*.py"))}
    (top_level,) = (name for name in names if name.endswith("top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top_level).decode().split() == ["gvt", "gvt_ops"]


def test_the_installed_model_works_from_another_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    program = "import gvt, timm; print(len(timm.create_model('alt_gvt_small').state_dict()), gvt.__file__)"
    command = dict(args=[sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path / "elsewhere")
    result = subprocess.run(**command, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert result.stdout == f"290 {tmp_path / 'site' / 'gvt.py'}\n", result.stderr


def test_the_installed_package_loads_a_classifier(wheel, tmp_path):
    """By gvt and gvt_ops alone: nothing else of ours can be imported there."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    model = gvt.Twins(gvt.VARIANTS["alt_gvt_demo"], num_classes=2)
    args = dict(model="alt_gvt_demo", input_size=32, eval_crop_ratio=0.875)
    torch.save({"model": model.state_dict(), "args": args, "class_names": ["cat", "dog"]}, tmp_path / "x.pth")
    program = """
import sys, gvt
from PIL import Image
model, transform, classes = gvt.load("x.pth")
probabilities = model(transform(Image.new("RGB", (50, 40)))[None]).softmax(1)
print(gvt.__file__, list(probabilities.shape), classes, {"training", "tools", "datasets", "utils"} & set(sys.modules))
"""
    command = dict(args=[sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    result = subprocess.run(**command, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert result.stdout == f"{tmp_path / 'site' / 'gvt.py'} [1, 2] ['cat', 'dog'] set()\n", result.stderr
