"""The command line: every published option with its default, one-line errors, and answers before torch is imported."""

import resource
import subprocess
import sys

import pytest
from conftest import ROOT

from training import options, recipe_options

# Read off the published main.py: 58 options. --model alone differs: its published default, pvt_small, is registered
# nowhere.
PUBLISHED = {
    "batch_size": 64,
    "epochs": 300,
    "model": "alt_gvt_small",
    "input_size": 224,
    "drop": 0.0,
    "drop_path": 0.1,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,
    "clip_grad": 5,
    "momentum": 0.9,
    "weight_decay": 0.05,
    "sched": "cosine",
    "lr": 5e-4,
    "lr_noise": None,
    "lr_noise_pct": 0.67,
    "lr_noise_std": 1.0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "decay_epochs": 30,
    "warmup_epochs": 5,
    "cooldown_epochs": 10,
    "patience_epochs": 10,
    "decay_rate": 0.1,
    "color_jitter": 0.4,
    "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1,
    "train_interpolation": "bicubic",
    "repeated_aug": False,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "resplit": False,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "finetune": "",
    "data_path": "/datasets01/imagenet_full_size/061417/",
    "data_set": "IMNET",
    "use_mcloader": False,
    "inat_category": "name",
    "output_dir": "",
    "device": "cuda",
    "seed": 0,
    "resume": "",
    "start_epoch": 0,
    "eval": False,
    "dist_eval": False,
    "num_workers": 10,
    "pin_mem": True,
    "world_size": 1,
    "dist_url": "env://",
    "throughout": False,
}
PUBLISHED_FLAGS = ["--no-repeated-aug", "--no-pin-mem"]  # with the 56 above, 58
OURS = {
    "amp_dtype": None,
    "residual_dtype": "float32",
    "fast_augment": False,  # off: its images differ from the published ones by rounding
    "grad_accum_steps": 1,
    "torchcompile": None,
    "channels_last": False,
    "grad_checkpointing": False,
    "model_ema": False,
    "model_ema_decay": 0.9998,
    "model_ema_warmup": True,
    "hflip": 0.5,
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "eval_crop_ratio": 0.875,
    "alpha": "white",
    "exif": "ignore",
    "max_pixels": 178_956_970,
    "train_split": "train",
    "val_split": "val",
    "val_fraction": 0.0,
    "val_labels": "",
    "class_map": "",
    "overwrite": False,
    "resume_changed": False,
    "checkpoint_interval": 0,
    "checkpoint_hist": 2,
    "keep_going": False,
    "report": "",
    "per_class": "",
    "predictions": "",
    "deterministic": False,
    "dist_timeout": 1800,
    "loader_timeout": 1800,
    "local_rank": None,
}
# Stored only where they are used, so that a run without them has the options and the recipe of one before them.
RECIPE = {
    "config": "",
    "pretrained": False,
    "in_chans": 3,
    "mean": None,
    "std": None,
    "model_kwargs": {},
    "layer_decay": None,
    "freeze": "",
    "head_lr_scale": 1.0,
    "class_weights": "",
    "balanced_sampling": False,
    "early_stop": None,
    "eval_interval": 1,
    "mixup_off_epoch": 0,
    "unscale_lr": False,
    "global_batch": None,
    "dry_run": False,
    "bad_images": "error",
    "max_bad": 100,
    "log_tensorboard": False,
    "log_wandb": False,
}


def parse(*words):
    return options.parse_args(list(words))


def test_published_options_are_frozen():
    assert len(PUBLISHED) + len(PUBLISHED_FLAGS) == 58
    args = parse()
    assert vars(args) == PUBLISHED | OURS | RECIPE and args.given == set()
    assert args.stored == PUBLISHED | OURS and recipe_options.defaults() == RECIPE
    parse(*PUBLISHED_FLAGS, "--dr", "0.1")


def test_dashes_and_underscores_are_alike():
    for name in PUBLISHED.keys() | OURS.keys() | RECIPE.keys():
        action = next(a for a in options.get_parser()._actions if a.dest == name)
        several = action.nargs == 2 or name == "cutmix_minmax"
        text = "0.5" if name == "val_fraction" else "1"
        if action.metavar == "KEY=VALUE" or name in ("freeze", "config"):
            continue
        value = (
            [] if action.nargs == 0 else [str(action.choices[0])] if action.choices else [text] * (2 if several else 1)
        )
        if name in options.REFUSED:
            continue
        for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
            args = parse(spelling, *value)
            assert args.given == {name}, spelling
    assert parse("--batch_size=8").batch_size == 8
    assert parse("--output-dir", "a_b-c").output_dir == "a_b-c"


def test_throughput_is_an_alias():
    assert parse("--throughput").throughout and parse("--throughout").throughout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batchsize", "8"], "unknown option (command line, --batchsize): did you mean --batch-size?"),
        (["--zzz"], "unknown option (command line, --zzz): --help lists the options"),
        (["--epochs", "many"], "'many' is not a number from 1 up"),
        (["--batch-size", "0"], "'0' is not a number from 1 up"),
        (["--seed", "1" + "0" * 100], "' is not a number"),
        (["--lr", "nan"], "'nan' is not a number from 0 up"),
        (["--opt-eps", "inf"], "'inf' is not a number above 0"),
        (["--input-size", "1000000"], "'1000000' is not a number of pixels from 1 to 16384"),
        (["--loader-timeout", "100000000000"], "is not a number of seconds from 0 up"),
        (["--drop-path", "1.5"], "'1.5' is not between 0 and 1"),
        (["--data-set", "MNIST"], "invalid choice"),
        (["--use-mcloader"], "cannot be used (--use-mcloader): "),
        (["--resplit"], "cannot be used (--resplit): "),
        (["--model"], "expected one argument"),
        (["--eval-crop-ratio", "0"], "'0' is not above 0 and up to 1"),
        (["--val-fraction", "1"], "'1' is not above 0 and below 1"),
        (["--train-split", "../train"], "'../train' is not a name"),
        (["--train-interpolation", "cubic"], "invalid choice"),
        (["--scale", "1", "0.5"], "argument --scale: expected two numbers above 0, the smaller first"),
        (["--cutmix-minmax", "0.2"], "argument --cutmix-minmax: expected two numbers"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(words, says, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("main.py: error: ") and says in error
    assert error.count("\n") == 1 and len(error) < 300


@pytest.mark.parametrize(
    ("words", "silent"),
    [
        (["--color-jitter", "0.4"], ["--color-jitter", "0.4", "--aa", ""]),
        (["--cooldown-epochs", "5"], []),
        (["--decay-epochs", "5"], ["--decay-epochs", "5", "--sched", "step"]),
        (["--momentum", "0.9"], ["--momentum", "0.9", "--opt", "sgd"]),
        (["--recount", "2", "--reprob", "0"], ["--recount", "2"]),
        (["--mixup-mode", "elem", "--mixup", "0", "--cutmix", "0"], ["--mixup-mode", "elem"]),
        (["--inat-category", "genus"], ["--inat-category", "genus", "--data-set", "INAT"]),
        (["--world_size", "8"], []),
        (["--model-ema-decay", "0.9"], ["--model-ema-decay", "0.9", "--model-ema"]),
        (["--finetune", "a", "--eval", "--resume", "b"], ["--finetune", "a"]),
        (["--resume", "a", "--throughput"], ["--resume", "a"]),
        (["--max-bad", "5"], ["--max-bad", "5", "--bad-images", "skip"]),
        (["--val-fraction", "0.1", "--data-set", "CIFAR"], ["--val-fraction", "0.1"]),
    ],
)
def test_options_without_effect_are_named_once(words, silent):
    name = words[0].removeprefix("--").replace("-", "_")
    assert list(options.without_effect(parse(*words))) == [name]
    assert not options.without_effect(parse(*silent))


@pytest.mark.parametrize("words", [["--help"], ["--batchsize", "3"]])
def test_answers_without_importing_torch(words):
    """Within half a second of the processor's time, which other processes do not change."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "main.py"), *words]
    before = children_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    took = children_seconds() - before
    assert done.returncode == (0 if words == ["--help"] else 2)
    assert "torch" not in [line.split("|")[-1].strip() for line in done.stderr.splitlines()]
    assert took < 0.5


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---------------------------------------------------------------- hints, warnings, and what --eval takes


@pytest.mark.parametrize("word", ["--val-spli", "--predict", "--split", "--patience", "--mcloader", "--cooldown"])
def test_a_hint_is_never_an_option_that_does_nothing(word, capsys):
    """Three of them were answered with --resplit, --patience-epochs and --use-mcloader."""
    with pytest.raises(SystemExit):
        parse(word, "3")
    error = capsys.readouterr().err
    assert not any(name in error for name in ("--resplit", "--patience-epochs", "--use-mcloader", "--cooldown-epochs"))


def test_other_hints_stay(capsys):
    with pytest.raises(SystemExit):
        parse("--color-jiter", "0.3")
    assert "did you mean --color-jitter?" in capsys.readouterr().err


def test_a_rate_that_rises_and_a_long_warm_up_are_warned_of():
    """Batch 8 on one device: the rate is scaled, its least value is not."""
    rises, warm = options.schedule_warnings(parse("--epochs", "10"), 5e-4 * 8 / 512)
    assert "after warm-up it is 7.8125e-06, and --min-lr is 1e-05; raise --lr" in rises and "lower --min-lr" in rises
    assert "warm-up takes 5 of 10 epochs" in warm and "raise --epochs, or lower --warmup-epochs" in warm
    assert not options.schedule_warnings(parse("--epochs", "11"), 5e-4)
    assert not options.schedule_warnings(parse("--min-lr", "0"), 1e-6)
    assert not options.schedule_warnings(parse("--sched", "step"), 1e-6)


def test_what_is_stored_is_taken_unless_given():
    args = parse("--eval-crop-ratio", "0.9", "--exif", "apply")
    stored = {"model": "alt_gvt_demo", "input_size": 32, "eval_crop_ratio": 1.0, "exif": "apply", "lr": 1.0, "alpha": 3}
    assert options.take_stored(args, stored) == [
        "from the checkpoint: --model alt_gvt_demo, --input-size 32",
        "--eval-crop-ratio 0.9 as given, where the checkpoint has 1.0",
    ]
    assert (args.model, args.input_size, args.eval_crop_ratio, args.lr) == ("alt_gvt_demo", 32, 0.9, 5e-4)
    assert args.alpha == "white" and options.take_stored(args, {}) == []


def test_which_images_were_held_out_is_taken_and_usual_names_are_not_mentioned():
    args = parse()
    stored = {"val_fraction": 0.25, "train_split": "all", "val_split": "val"}
    assert options.take_stored(args, stored) == ["from the checkpoint: --train-split all, --val-fraction 0.25"]
    assert (args.train_split, args.val_split, args.val_fraction) == ("all", "val", 0.25)
    for bad in ({"val_fraction": 0.0}, {"val_fraction": 2.0}, {"val_split": "../x"}, {"train_split": 3}):
        assert options.take_stored(parse(), bad) == []


@pytest.mark.parametrize("size", [None, True, [3, 224, 224], 0, 10**9, "224"])
def test_a_stored_size_that_is_none_is_not_taken(size):
    args = parse()
    assert options.take_stored(args, {"input_size": size}) == [] and args.input_size == 224
