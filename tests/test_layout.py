"""The shape of the tree: imports point one way, one door for checkpoints, no prints in modules, no code of others'
machines.
"""

import ast
import sys

import pytest
from conftest import ROOT

# What each file may import of ours. main.py alone knows all the others, and nobody imports it.
ARROWS = {
    "torchvision_cpu": set(),
    "products": set(),
    "window_kernel": set(),
    "window_attention": {"window_kernel"},
    "gvt": {"torchvision_cpu", "products", "window_attention"},
    "options": set(),
    "lifecycle": set(),
    "utils": {"lifecycle"},
    "samplers": set(),
    "losses": {"torchvision_cpu"},
    "augment": set(),  # what a device does to pictures: beside datasets, which draws in loading processes what is to be done
    "datasets": {"torchvision_cpu", "augment", "lifecycle", "utils"},
    "engine": {"utils"},
    "formats": {"gvt", "utils"},
    "checkpoint": {"formats", "lifecycle", "utils"},
    "resume": {"checkpoint", "utils"},
    "main": {
        *("torchvision_cpu", "gvt", "options", "lifecycle", "utils", "samplers", "losses"),
        *("datasets", "engine", "checkpoint", "resume"),
    },
    "dense/__init__": set(),
    "dense/libraries": {"torchvision_cpu", "utils"},
    "dense/models": {"gvt"},
    "dense/backbone": {"gvt", "checkpoint"},
    "dense/segmentor": {"gvt"},
    "dense/randomness": {"utils"},
    "dense/pictures": {"utils"},
    "dense/labels": {"utils"},
    "dense/runner": {"checkpoint", "utils"},
    "dense/checks": {"utils"},
    "dense/cli": {"checkpoint", "lifecycle", "options", "utils"},
}
OPENMMLAB = {"mmcv", "mmengine", "mmseg", "mmdet"}


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def imported(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_every_file_is_listed():
    files = {
        str(path.relative_to(ROOT).with_suffix(""))
        for folder in (".", "dense")
        for path in (ROOT / folder).glob("*.py")
    }
    assert files == set(ARROWS)


@pytest.mark.parametrize("name", ARROWS)
def test_imports_point_one_way(name):
    assert set(imported(name)) & {arrow.split("/")[0] for arrow in ARROWS} - {"dense"} == ARROWS[name]
    assert name.startswith("dense/") or not set(imported(name)) & {"dense", *OPENMMLAB}


@pytest.mark.parametrize("folder", ["segmentation", "detection"])
def test_no_file_of_a_task_hides_one_of_ours(folder):
    """A script's own folder is the first in which Python looks for modules: a second gvt.py there would be taken for
    the model.
    """
    assert not {path.stem for path in (ROOT / folder).glob("*.py")} & set(ARROWS)


@pytest.mark.parametrize("name", ["options", "lifecycle"])
def test_what_main_asks_first_needs_the_standard_library_only(name):
    assert set(imported(name)) <= sys.stdlib_module_names


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


SOURCES = [path for folder in (".", "dense", "tools") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_checkpoint_opens_checkpoints_and_never_unsafely(path):
    for name, keywords in calls(path):
        if name in ("torch.load", "torch.save", "torch.hub.load_state_dict_from_url"):
            assert path.stem == "checkpoint"
            assert name == "torch.save" or keywords["weights_only"] == "True"
        assert name not in ("pickle.load", "pickle.loads", "eval", "exec", "yaml.load"), name
        assert "shell" not in keywords


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_shim_comes_before_timm_and_torchvision(path):
    """In the order of the lines, so that each file can be the first that a program imports."""
    modules = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module.split(".")[0])
    shim = min(modules.index(name) if name in modules else len(modules) for name in ("torchvision_cpu", "gvt"))
    assert not {"timm", "torchvision"} & set(modules[:shim])


@pytest.mark.parametrize("name", sorted(ARROWS.keys() - {"main", "utils", "dense/libraries", "dense/cli"}))
def test_modules_do_not_print(name):
    assert "print" not in [function for function, _ in calls(ROOT / f"{name}.py")]
