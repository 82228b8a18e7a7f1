"""The shape of the tree: imports point one way, one door for checkpoints, no prints in modules, no code of others'
machines.
"""

import ast
import sys

import pytest
from conftest import ROOT

# What each file may import of ours, from the ground up: a file imports only files that stand above it here. Files of
# training that need the standard library alone lie below utils, for main.py asks them before torch is imported.
ARROWS = {
    "gvt_ops/torchvision_cpu": set(),
    "gvt_ops/window_kernel": set(),
    "gvt_ops/torch_private": set(),
    "gvt_ops/onednn": {"gvt_ops/torch_private"},
    "gvt_ops/attention": {"gvt_ops/onednn"},
    "gvt_ops/window_attention": {"gvt_ops/attention", "gvt_ops/window_kernel"},
    "gvt_ops/modules": {"gvt_ops/attention", "gvt_ops/onednn", "gvt_ops/torch_private"},
    "gvt_ops/compiling": {"gvt_ops/modules"},
    "gvt_ops/__init__": {"gvt_ops/compiling", "gvt_ops/modules", "gvt_ops/torchvision_cpu"},
    "gvt_ops/transforms": {"gvt_ops/torchvision_cpu"},
    "gvt_ops/loading": {"gvt_ops/torchvision_cpu", "gvt_ops/transforms"},
    "gvt": {"gvt_ops/__init__", "gvt_ops/attention", "gvt_ops/loading", "gvt_ops/window_attention"},
    "training/threads": set(),
    "training/__init__": {"training/threads"},
    "training/errors": set(),
    "training/command_line": set(),
    "training/config": {"training/command_line"},
    "training/recipe_options": {"training/command_line", "training/errors"},
    "training/options": {f"training/{name}" for name in ("command_line", "config", "recipe_options", "threads")},
    "training/files": {"training/errors"},
    "training/launcher": {"training/errors"},
    "training/devices": {"training/errors"},
    "training/progress": set(),
    "training/rendezvous": {"training/errors"},
    "utils": {"training/rendezvous", *(f"training/{name}" for name in ("devices", "errors", "launcher", "progress"))},
    "engine": {"training/errors", "utils"},
    "samplers": set(),
    "losses": {"gvt_ops/__init__", "training/errors", "training/options"},
    "training/precision": {"gvt", "training/errors", "training/options"},
    "training/processes": {"training/errors", "training/launcher", "utils"},
    "training/augment": set(),  # what a device does to a batch, drawn in training/batches
    "training/images": {"training/command_line", "training/errors", "utils"},
    "training/folders": {"training/errors", "training/images", "utils"},
    "training/archives": {"training/errors", "training/files", "training/folders", "utils"},
    "training/bad_images": {"training/errors", "training/files", "utils"},
    "training/batches": {
        *(f"training/{name}" for name in ("augment", "bad_images", "errors", "processes")),
        "gvt_ops/__init__",
    },
    "training/formats": {"gvt", "training/errors"},
    "training/checkpoint": {"gvt_ops/loading", "training/errors", "training/files", "training/formats", "utils"},
    "training/optimizer": {"gvt_ops/__init__", "training/errors", "training/options", "utils"},
    "training/network": {
        *(f"training/{name}" for name in ("checkpoint", "errors", "optimizer", "options", "precision", "threads")),
        *("engine", "gvt", "gvt_ops/__init__", "gvt_ops/loading", "utils"),
    },
    "training/resume": {"training/checkpoint", "training/errors", "training/recipe_options"},
    "training/outputs": {"training/errors", "training/files"},
    "training/sources": {
        *(f"training/{name}" for name in ("archives", "errors", "files", "folders", "options", "outputs")),
        "utils",
    },
    "training/run_folder": {
        *(f"training/{name}" for name in ("errors", "files", "outputs", "processes")),
        "utils",
    },
    "training/curves": set(),
    "training/loggers": {
        *(f"training/{name}" for name in ("curves", "errors", "files", "options", "run_folder")),
        "utils",
    },
    "training/reports": {"samplers", "training/errors", "training/options", "training/outputs", "utils"},
    "training/state": {
        *(f"training/{name}" for name in ("checkpoint", "config", "errors", "files", "options", "processes", "resume")),
        *("gvt_ops/__init__", "training/run_folder", "utils"),
    },
    "training/dry_run": {
        *(f"training/{name}" for name in ("options", "outputs", "state")),
        *("gvt_ops/loading", "utils"),
    },
    "datasets": {
        *("gvt_ops/__init__", "gvt_ops/loading", "gvt_ops/transforms", "samplers", "training/batches"),
        *("training/bad_images", "training/files"),
        *("training/archives", "training/errors", "training/folders", "training/images", "training/options"),
        *("training/sources", "utils"),
    },
    "dense/__init__": {"training/__init__"},
    "dense/libraries": {"gvt_ops/__init__", "training/errors"},
    "dense/models": {"gvt"},
    "dense/backbone": {"gvt", "gvt_ops/__init__", "training/checkpoint", "training/optimizer"},
    "dense/segmentor": {"gvt", "training/images"},
    "dense/randomness": {"utils"},
    "dense/transforms": {"training/errors", "training/images"},
    "dense/data_checks": {"dense/transforms", "training/errors", "training/folders"},
    "dense/label_files": {"dense/data_checks", "dense/transforms", "training/folders"},
    "dense/coco": {"dense/data_checks", "training/errors"},
    "dense/coco_files": {
        *("dense/coco", "dense/data_checks", "dense/transforms", "training/errors", "training/images"),
    },
    "dense/checks": {"dense/data_checks", "training/errors", "utils"},
    "dense/drawing": {"dense/transforms", "training/images"},
    "dense/work_folder": {"training/errors", "training/files", "training/run_folder"},
    "dense/stopping": {
        *("dense/work_folder", "engine", "training/errors", "training/files", "training/processes", "utils"),
    },
    "dense/resume": {"training/errors", "training/resume"},
    "dense/runner": {
        *(f"dense/{name}" for name in ("checks", "libraries", "randomness", "resume", "stopping", "transforms")),
        *("training/checkpoint", "training/errors"),
    },
    "dense/cli": {
        *(f"dense/{name}" for name in ("checks", "coco_files", "drawing", "label_files", "libraries", "runner")),
        *(f"training/{name}" for name in ("checkpoint", "errors", "files", "launcher", "options", "processes")),
        *("dense/segmentor", "dense/stopping", "dense/transforms", "dense/work_folder", "utils"),
    },
    "dense/demo": {
        *("dense/cli", "dense/libraries", "dense/runner"),
        *(f"training/{name}" for name in ("checkpoint", "errors", "folders", "options", "outputs")),
        "utils",
    },
    "main": {
        *("gvt", "gvt_ops/__init__", "utils", "losses", "datasets", "engine"),
        *(f"training/{name}" for name in ("checkpoint", "errors", "files", "launcher", "options", "processes")),
        *("training/network", "training/optimizer", "training/precision", "training/reports", "training/resume"),
        *("training/run_folder", "training/state", "training/dry_run", "training/loggers", "training/progress"),
        "training/recipe_options",
    },
}
FOLDERS = ("gvt_ops", "training", "dense")
OPENMMLAB = {"mmcv", "mmengine", "mmseg", "mmdet"}
BEFORE_TORCH = [f"training/{name}" for name in ("__init__", "errors", "files", "launcher", "threads")]
BEFORE_TORCH += [f"training/{name}" for name in ("command_line", "config", "options", "recipe_options")]


def imports(path):
    """The modules that a file imports, with dots, from anywhere in it; names that are no modules are left away."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = [alias.name for alias in node.names if (ROOT / node.module / f"{alias.name}.py").is_file()]
            yield from [f"{node.module}.{name}" for name in inner] or [node.module]


def ours(path):
    """Those of ARROWS among them; a package by its __init__."""
    for name in imports(path):
        name = name.replace(".", "/")
        yield from {name, f"{name}/__init__"} & ARROWS.keys()


def outside(path):
    return {name.split(".")[0] for name in imports(path)}


def test_the_top_level_has_the_files_that_were_ordered_and_no_others():
    names = {"main", "gvt", "engine", "datasets", "samplers", "losses", "utils"}
    assert {path.stem for path in ROOT.glob("*.py")} == names


def test_every_file_is_listed():
    files = {path.relative_to(ROOT) for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.py")}
    assert {str(path.with_suffix("")) for path in files} == set(ARROWS)


@pytest.mark.parametrize("name", ARROWS)
def test_imports_point_one_way(name):
    found, order = set(ours(ROOT / f"{name}.py")), list(ARROWS)
    assert found == ARROWS[name]
    assert all(order.index(each) < order.index(name) for each in found)
    assert name.startswith("dense/") or not outside(ROOT / f"{name}.py") & OPENMMLAB


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_nothing_is_above_the_tools_and_main(path):
    """Tools import main no more than others do."""
    assert "main" not in outside(path)


@pytest.mark.parametrize("name", ARROWS)
def test_nobody_imports_a_tool_or_a_task(name):
    assert not outside(ROOT / f"{name}.py") & {"tools", "segmentation", "detection", "tests"}


@pytest.mark.parametrize("folder", ["segmentation", "detection"])
def test_no_file_of_a_task_hides_one_of_ours(folder):
    """A script's own folder is the first in which Python looks for modules: a second gvt.py there would be taken for
    the model.
    """
    assert not {path.stem for path in (ROOT / folder).glob("*.py")} & {name.split("/")[0] for name in ARROWS}


@pytest.mark.parametrize("name", BEFORE_TORCH)
def test_what_main_asks_first_needs_the_standard_library_only(name):
    files = {"yaml"} if name == "training/config" else set()  # imported where there is a file to read or write
    assert outside(ROOT / f"{name}.py") <= sys.stdlib_module_names | {"training"} | files
    assert set(ours(ROOT / f"{name}.py")) <= set(BEFORE_TORCH)


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


SOURCES = [path for folder in (".", *FOLDERS, "tools") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_checkpoint_opens_checkpoints_and_never_unsafely(path):
    for name, keywords in calls(path):
        if name in ("torch.load", "torch.save", "torch.hub.load_state_dict_from_url"):
            # gvt.load has to work without training/.
            assert path.stem == "checkpoint" or (path.stem, name) == ("loading", "torch.load")
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
    shim = min(modules.index(name) if name in modules else len(modules) for name in ("gvt_ops", "gvt"))
    assert not {"timm", "torchvision"} & set(modules[:shim])


PRINTS = {"main", "utils", "dense/libraries", "dense/cli", "training/errors"}


@pytest.mark.parametrize("name", sorted(ARROWS.keys() - PRINTS))
def test_modules_do_not_print(name):
    assert "print" not in [function for function, _ in calls(ROOT / f"{name}.py")]
