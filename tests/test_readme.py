"""The pages: every command parses, every link leads somewhere, and named files and tests exist."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from dense import cli, demo
from tools import export_dense
from training import options

PAGES = sorted(
    path
    for pattern in ("README.md", "docs/*.md", "segmentation/*.md", "detection/*.md", "logs/*.md", "logs/*/*.md")
    for path in ROOT.glob(pattern)
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
# Where a test or a file may be that is named without its folder.
FOLDERS = (".", "tests", "tests/dense", "tests/gvt_ops", "tests/training", "tests/tools", "segmentation", "detection")
STARTS = "python |torchrun |srun |sbatch |bash |make |cd |pip "
OWN = ("configs/mine.py", "sharded.py")  # the reader's own files
RECORD = re.compile(r"<!-- table: speed.*?<!-- end table -->", re.S)  # commands of records: as they were typed then


def commands(text: str) -> list[str]:
    """The lines of bash blocks, and the commands of the same kinds in the text, without comments."""
    text = RECORD.sub("", text)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    spans = re.findall(rf"`((?:{STARTS})[^`]+)`", prose.replace("\n", " "))
    # In the text, a script may be named without what it needs.
    return [line for line in lines if line] + [span for span in spans if len(span.split()) > 2 or "make" in span]


COMMANDS = sorted({(page, command) for page, text in TEXTS.items() for command in commands(text)})
ALL = [command for _, command in COMMANDS]


class Parsed(BaseException):
    """Raised instead of a tool's work; no tool catches it."""


def parse_only(path, words, monkeypatch):
    """Run a tool until its command line is parsed."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args, **kwargs):
        real(parser, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


def check_main(words):
    words = words[words.index("main.py") + 1 :]
    if "--config" in words:  # a file of the reader's
        at = words.index("--config")
        words = words[:at] + words[at + 2 :]
    if words != ["--help"]:
        assert not options.without_effect(options.parse_args(words))


def check_dense(page, script, words):
    folder = (ROOT / page).parent
    if folder.name not in ("segmentation", "detection"):
        of_segmentation = "ade20k" in words[0] or "fpn_alt_gvt_demo" in " ".join(words)
        folder = ROOT / ("segmentation" if of_segmentation else "detection")
    library = {"segmentation": "mmseg", "detection": "mmdet"}[folder.name]
    if script == "image_demo.py":
        args = demo.demo_parser(library).parse_args(words)
        assert (folder / script).is_file() and (folder / args.words[-2]).is_file()
        return
    if script == "export.py":
        args = export_dense.get_parser(library).parse_args(words)
        assert (folder / script).is_file() and (folder / args.config).is_file()
        return
    kind = "train" if "train" in script else "test"
    if script.startswith("dist_"):  # the script moves the number of processes
        number = words.pop(1 if kind == "train" else 2)
        assert number.isdigit()
    parser = cli.train_parser() if kind == "train" else cli.test_parser(library)
    args = parser.parse_args(words)
    assert (folder / script).is_file() and (folder / args.config).is_file()


@pytest.mark.parametrize("page, command", COMMANDS)
def test_every_command_parses(page, command, monkeypatch, capsys):
    words = shlex.split(command)
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]  # variables of the environment
    words[0] = words[0].removeprefix(".venv/bin/")
    if "main.py" in words:
        check_main(words)
    elif words[:2] == ["python", "-m"] and words[2].startswith(("tools.", "tests.")):
        if words[2] != "tools.NAME":
            parse_only(ROOT / f"{words[2].replace('.', '/')}.py", words[3:], monkeypatch)
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in words[1:])
    elif words[0] in ("bash", "python") and re.fullmatch(
        r"(dist_)?(train|test)\.(sh|py)|(image_demo|export)\.py", words[1]
    ):
        check_dense(page, words[1], words[2:])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "sbatch":
        script = next(word for word in words[1:] if not word.startswith("-"))
        assert (ROOT / script).is_file()
        check_main(["main.py", *words[words.index(script) + 1 :]])
    elif words[0] == "torchrun":
        assert all(word.startswith("-") or word == OWN[1] for word in words[1:])
    else:
        assert words == ["pip", "install", "."], command


def test_the_official_commands_are_there_word_for_word():
    launch = "python -m torch.distributed.launch --nproc_per_node=8 --use_env main.py --model alt_gvt_base"
    assert f"{launch} --batch-size 128 --data-path path_to_imagenet --dist-eval --drop-path 0.3" in ALL
    assert "python main.py --eval --resume alt_gvt_large.pth --model alt_gvt_large --data-path path_to_imagenet" in ALL
    upernet = "configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py"
    assert f"bash dist_train.sh {upernet} 8" in ALL
    assert f"bash dist_test.sh {upernet} checkpoint_file 8 --eval mIoU" in ALL
    assert f"bash dist_test.sh {upernet} checkpoint_file 8 --eval mIoU --aug-test" in ALL
    retinanet = "configs/retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting.py"
    assert f"bash dist_test.sh {retinanet} checkpoint_file 8 --eval mAP" in ALL
    assert len([command for command in ALL if "main.py" in command]) >= 14  # and one for each model
    assert {command.split()[1] for command in ALL if command.startswith("make ")} >= {"demo", "demo-dense", "test"}


def anchors(text: str) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_no_link_inside_the_repository_is_dead(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_tests_that_are_named_exist(page):
    for name in re.findall(r"`((?:[\w.-]+/)*\w+\.(?:py|sh))`", TEXTS[page]):
        if name not in OWN:
            assert any((ROOT / folder / name).exists() for folder in FOLDERS), name
    for name in re.findall(r"`((?:[\w.-]+/)+)`", TEXTS[page]):
        assert name.split("/")[0] in ("val", "work_dirs") or (ROOT / name).is_dir(), name
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", TEXTS[page]):
        path = next(path for folder in FOLDERS if (path := ROOT / folder / file).exists())
        assert f"def {name}" in path.read_text(), name


@pytest.mark.parametrize("page", ["README.md", "docs/using.md"])
def test_the_python_of_the_pages_runs(page, classifier, tmp_path, monkeypatch, capsys):
    """One block after the other, without a download, with a checkpoint and an image where make demo has them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("output/demo", "data/digits/val/3"):
        Path(folder).mkdir(parents=True)
    shutil.copy(classifier, "output/demo/checkpoint_best.pth")
    Image.new("RGB", (50, 40)).save("data/digits/val/3/0045.png")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.S):
        if "pytorch_grad_cam" in block:
            pytest.importorskip("pytorch_grad_cam", reason="Grad-CAM needs its library: make extra")
            names["images"] = names["image"][None]
        exec(block.replace("pretrained=True", "pretrained=False"), names)
    assert capsys.readouterr().out.strip() in ("ant", "bee", "cat", "dog")
    if page == "README.md":
        assert [list(each.shape[2:]) for each in names["maps"]] == [[28, 28], [14, 14], [7, 7]]
    else:
        assert names["heat"].shape == (1, 32, 32) and 0 <= names["heat"].min() <= names["heat"].max() <= 1


def test_the_readme_is_short():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 14 * 1024


def test_images_are_there_and_small():
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXTS["README.md"])
    shown = {ROOT / "docs" / name for text in TEXTS.values() for name in re.findall(r"\]\((images/[^)]+)\)", text)}
    assert {ROOT / name for name in named} | shown == set((ROOT / "docs" / "images").iterdir()) and len(named) == 4
    for name in named:
        assert (ROOT / name).stat().st_size <= 300 * 1024
        with Image.open(ROOT / name) as image:
            assert image.format == "PNG" and image.width >= 1200
