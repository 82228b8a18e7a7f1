"""tools/extra.py: an optional package that is missing is one line with the command that installs it."""

import ast
import re
import sys

import pytest
from conftest import ROOT

from tools import extra
from training.errors import UserError

FOLDERS = (".", "dense", "detection", "gvt_ops", "segmentation", "tools", "training")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def test_a_module_that_is_there():
    assert extra.need("json") is sys.modules["json"]


def optional_packages() -> list[str]:
    lines = (ROOT / "requirements-extra.txt").read_text().splitlines()
    return [line.partition("==")[0] for line in lines if line and not line.startswith("#")]


MODULES = {package: module for module, package in extra.PIP_NAMES.items()}
OPTIONAL = {MODULES.get(name, name): name for name in optional_packages()}  # by module


@pytest.mark.parametrize("module, package", OPTIONAL.items())
def test_a_missing_package_is_a_line_with_the_pip_command(module, package, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    version = re.search(rf"^{package}==(.+)$", (ROOT / "requirements-extra.txt").read_text(), re.M)[1]
    expected = rf"^an optional package is missing \({package}\): run make extra, or pip install {package}=={version}$"
    with pytest.raises(UserError, match=expected):
        extra.need(module)


def test_a_package_that_lacks_something_itself_says_what(tmp_path, monkeypatch):
    (tmp_path / "onnx.py").write_text("import not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    with pytest.raises(UserError, match=r"cannot import onnx \[No module named 'not_there'\] \(onnx\): run make extra"):
        extra.need("onnx")


def test_every_optional_package_has_an_exact_version():
    names = optional_packages()
    assert all(re.fullmatch(r"[\d.]+", extra.version(name)) for name in names)
    assert set(extra.PIP_NAMES.values()) <= set(names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nobody_imports_an_optional_package_without_a_line_for_its_lack(path):
    """All go by `need`; safetensors comes with timm, and main.py looks for the loggers of --log-... itself."""
    optional = {*OPTIONAL, "tensorboard", "wandb"} - {"safetensors"}
    if path.stem == "loggers":
        optional.remove("wandb")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not {name.partition(".")[0] for name in names} & optional


def test_make_extra_is_there_and_the_tests_have_it():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^extra: \$\(EXTRA\)$", makefile, re.M)
    assert re.search(r"^test: dense extra$", makefile, re.M)
    assert '"make extra ' in makefile
