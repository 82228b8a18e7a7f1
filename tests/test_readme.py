"""What README says can be run and found."""

import re
import shlex

import pytest
from conftest import ROOT

from training import options

FOLDERS = (".", "tests", "tests/dense", "tests/gvt_ops", "tests/training", "segmentation")  # where names may be meant
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    {
        line
        for line in re.findall(r"(?:^|`)((?:python|torchrun|srun) [^`\n]*?main\.py[^`\n#]*)", README, re.M)
        if "..." not in line
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    words = shlex.split(command)
    words = words[words.index("main.py") + 1 :]
    if words != ["--help"]:
        assert not options.without_effect(options.parse_args(words))


def test_the_published_commands_are_there_word_for_word():
    train = (
        "python -m torch.distributed.launch --nproc_per_node=8 --use_env main.py --model alt_gvt_base --batch-size 128 "
    )
    assert train + "--data-path path_to_imagenet --dist-eval --drop-path 0.3" in COMMANDS
    assert (
        "python main.py --eval --resume alt_gvt_large.pth --model alt_gvt_large --data-path path_to_imagenet"
        in COMMANDS
    )
    assert len(COMMANDS) >= 8  # and one for each model


def test_files_and_tests_that_are_named_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`((?:\w+/)?\w+\.py)`", README):
        assert any((ROOT / folder / path).exists() for folder in FOLDERS), path
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", README):
        path = next(path for folder in FOLDERS if (path := ROOT / folder / file).exists())
        assert f"def {name}" in path.read_text(), name


def test_the_published_dense_commands_are_there_word_for_word():
    """And name configs that exist, in the folder that they are said for."""
    commands = re.findall(r"^bash (dist_\w+\.sh) (configs/\S+) (.*)$", README, re.M)
    assert ("dist_train.sh", "configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py", "8") in commands
    assert (
        "dist_test.sh",
        "configs/retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting.py",
        "checkpoint_file 8 --eval mAP",
    ) in commands
    for script, config, _ in commands:
        folder = ROOT / ("segmentation" if "ade20k" in config else "detection")
        assert (folder / script).exists() and (folder / config).exists()


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
