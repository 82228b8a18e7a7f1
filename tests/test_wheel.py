"""What `pip install .` installs: gvt and gvt_ops, and nothing else of ours."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


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
