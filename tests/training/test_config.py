"""--config: strict, beaten by the command line, and the args.yaml of a run."""

import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_RUN, log_lines

import main
from training import checkpoint, options


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def parse(*words):
    return options.parse_args([str(word) for word in words])


def test_a_file_gives_options_and_the_command_line_wins(tmp_path):
    path = write(
        tmp_path,
        "lr: 5e-4\nmodel: alt_gvt_demo\nepochs: 7\nbatch-size: 16\nscale: [0.2, 1]\npin_mem: false\nno-repeated-aug: "
        "true\naa: ''\ngrad_checkpointing: true\ntorchcompile: eager\nseed: -3\nmixup: 0\nmodel_ema: false\n",
    )
    args = parse("--epochs", 9, "--config", path)
    assert (args.lr, args.model, args.epochs, args.batch_size, args.scale) == (5e-4, "alt_gvt_demo", 9, 16, [0.2, 1.0])
    assert (args.pin_mem, args.repeated_aug, args.aa, args.grad_checkpointing) == (False, False, "", "block")
    assert (args.torchcompile, args.seed, args.mixup, args.model_ema) == ("eager", -3, 0.0, False)
    assert {"lr", "epochs", "pin_mem"} <= args.given


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch: 3", "unknown option (FILE, epoch): did you mean epochs?"),
        ("learning_rate: 3", "unknown option (FILE, learning_rate): "),
        ("config: a.yaml", "unknown option (FILE, config): "),
        ("epochs: many", "not a whole number (FILE, epochs: many): expected a whole number"),
        ("epochs: 3.0", "not a whole number (FILE, epochs: 3.0)"),
        ("epochs: true", "not a whole number (FILE, epochs: True)"),
        ("epochs: '3'", "not a whole number (FILE, epochs: 3)"),
        ("epochs: 0", "'0' is not a number from 1 up (FILE, epochs)"),
        ("epochs: [3, 4]", "not a whole number (FILE, epochs: [3, 4])"),
        ("lr: fast", "not a number (FILE, lr: fast)"),
        ("lr: .nan", "'nan' is not a number from 0 up (FILE, lr)"),
        ("model: 3", "not text (FILE, model: 3)"),
        ("model:", "not text (FILE, model: None)"),
        ("overwrite: 1", "not true or false (FILE, overwrite: 1)"),
        ("scale: 0.5", "expected 2 arguments (FILE, scale)"),
        ("data_set: MNIST", "invalid choice: 'MNIST'"),
        ("lr: 1\nlr: 2", "an option is there twice (FILE, lr): remove one"),
        ("- lr", "no options (--config FILE): expected lines of NAME: VALUE"),
        ("", "no options (--config FILE)"),
        ("lr: [", "not YAML (--config FILE)"),
        ("lr: !!python/object:os.system 1", "not YAML (--config FILE)"),
        ("use_mcloader: true", "cannot be used (--use-mcloader)"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_2(text, says, tmp_path, capsys):
    path = write(tmp_path, text)
    with pytest.raises(SystemExit) as end:
        parse("--config", path)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("main.py: error: ") and says.replace("FILE", path) in error
    assert error.count("\n") == 1


def test_a_missing_file_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--config", tmp_path / "none.yaml")
    assert end.value.code == 2 and "none.yaml): No such file" in capsys.readouterr().err


def test_a_wrong_file_is_answered_before_torch_is_imported(tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "main.py"), "--config", write(tmp_path, "epoch: 3")]
    done = subprocess.run(command, capture_output=True, text=True)
    modules = [line.split("|")[-1].strip() for line in done.stderr.splitlines()]
    assert done.returncode == 2 and "yaml" in modules and "torch" not in modules


def test_what_is_written_is_read_back_to_the_same_values(tmp_path):
    words = ["--lr", "1e-7", "--scale", "0.1", "0.9", "--finetune", "5e-4", "--no-pin-mem", "--aa", "", "--seed", "-1"]
    words += ["--torchcompile", "--output_dir", "x", "--overwrite", "--resume", "auto", "--model", "null"]
    args = parse(*words)
    again = parse("--config", write(tmp_path, args.as_yaml))
    assert again.given - {"config"} == args.given - {"output_dir", "overwrite", "resume"}
    names = again.given - {"config"}
    assert [getattr(args, name) for name in names] == [getattr(again, name) for name in names]
    assert "output_dir" not in args.as_yaml and "epochs" not in args.as_yaml


@pytest.mark.slow
def test_the_file_of_a_run_repeats_it_bit_for_bit(toy, tmp_path):
    for folder, words in (
        ("a", [*SMALL_RUN, "--data-path", toy, "--lr", "1e-2", "--warmup-epochs", 0, "--scale", 0.3, 1]),
        ("b", ["--config", tmp_path / "a" / "args.yaml"]),
    ):
        assert main.run(parse(*words, "--output_dir", tmp_path / folder)) == 0
    a, b = (checkpoint.load(str(tmp_path / name / "checkpoint.pth")) for name in "ab")
    assert all(value.equal(b["model"][name]) for name, value in a["model"].items()) and a["recipe"] == b["recipe"]
    assert (tmp_path / "a" / "args.yaml").read_text() == (tmp_path / "b" / "args.yaml").read_text()
    assert log_lines(tmp_path / "a")[1]["test_loss"] == log_lines(tmp_path / "b")[1]["test_loss"]
