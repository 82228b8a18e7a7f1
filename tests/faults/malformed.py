"""Malformed command lines and values: python tests/faults/malformed.py

Each must end with exit code 2 and one line of at most 300 characters, without a traceback, and leave the output folder
as it was. Drawn by hypothesis: a valid command line of a training or an evaluation, into which one wrong value, or a
combination that cannot be, is put.
"""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from common import ROOT, complain, contents, environment, make_data, run_program
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import main
from training import options

INTEGERS = (
    "--batch-size",
    "--epochs",
    "--input-size",
    "--grad-accum-steps",
    "--recount",
    "--checkpoint-hist",
    "--world_size",
)
COUNTS = (
    "--warmup-epochs",
    "--cooldown-epochs",
    "--patience-epochs",
    "--start_epoch",
    "--num_workers",
    "--checkpoint-interval",
    "--loader-timeout",
)
SHARES = (
    "--drop",
    "--drop-path",
    "--reprob",
    "--mixup-prob",
    "--mixup-switch-prob",
    "--hflip",
    "--smoothing",
    "--model-ema-decay",
    "--momentum",
    "--val-fraction",
)
AMOUNTS = (
    "--lr",
    "--warmup-lr",
    "--min-lr",
    "--clip-grad",
    "--weight-decay",
    "--mixup",
    "--cutmix",
    "--color-jitter",
    "--decay-rate",
    "--opt-eps",
)
CHOICES = ("--data-set", "--remode", "--mixup-mode", "--train-interpolation", "--amp-dtype", "--inat-category")
NAMES = ("--model", "--opt", "--sched", "--device", "--torchcompile", "--aa")
FILES = ("--resume", "--finetune", "--data-path", "--class-map", "--val-labels")

LETTERS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
WORDS = LETTERS.filter(lambda text: not text.startswith("-"))
# No name of a model, an optimizer, a schedule, a device or a policy begins so.
NONSENSE = WORDS.map(lambda text: "zq" + text)
NOT_NUMBERS = st.one_of(
    NONSENSE, st.sampled_from(["", "nan", "inf", "-inf", "1e400", "0x10", "1,5", "--", "1 2", "\u221e"])
)
NOT_INTEGERS = st.one_of(NOT_NUMBERS, st.floats(0.1, 0.9).map(str), st.integers(2**62, 10**100).map(str))


def one_wrong(names: tuple[str, ...], values: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(st.sampled_from(names), values).map(list)


@st.composite
def combinations(draw) -> list[str]:
    """Values that are right alone, and not together."""
    number = str(draw(st.integers(1, 10**6)))
    odd, large = str(draw(st.integers(0, 3)) * 2 + 1), str(draw(st.integers(50, 10**9)))
    return draw(
        st.sampled_from(
            [
                ["--eval"],
                ["--eval", "--resume", "auto"],
                ["--batch-size", odd],
                ["--batch-size", large],
                ["--grad-accum-steps", large],
                ["--input-size", str(draw(st.integers(1, 31)))],
                ["--scale", "0.9", "0.1"],
                ["--ratio", "2", "1"],
                ["--scale", number],
                ["--cutmix-minmax", "0.8", "0.2"],
                ["--cutmix-minmax", number],
                ["--opt-betas", "0.9"],
                ["--opt-betas", "2", "3"],
                ["--sched", "plateau"],
                ["--use-mcloader"],
                ["--resplit"],
                ["--start_epoch", str(draw(st.integers(2, 10**6)))],  # of two epochs
                ["--device", "cuda:" + large],
                ["--dist_url"],
                ["--report", "/nowhere/at/all/report.json", "--finetune", "/nowhere.pth"],
                ["--lr-noise-pct", "0"],
                ["--dist-timeout", "0"],
            ]
        )
    )


BAD = st.one_of(
    one_wrong(INTEGERS, st.one_of(NOT_INTEGERS, st.integers(-(10**12), 0).map(str))),
    one_wrong(COUNTS, st.one_of(NOT_INTEGERS, st.integers(-(10**12), -1).map(str))),
    one_wrong(SHARES, st.one_of(NOT_NUMBERS, st.floats(1.001, 1e9).map(str), st.floats(-1e9, -0.001).map(str))),
    one_wrong(AMOUNTS, st.one_of(NOT_NUMBERS, st.floats(-1e9, -1e-9).map(str))),
    one_wrong(CHOICES, st.one_of(NONSENSE, st.just(""))),
    one_wrong(NAMES, NONSENSE),
    one_wrong(
        FILES,
        st.one_of(
            NONSENSE,
            st.sampled_from(
                ["/", "/dev/null", "/proc/self/mem", "https://", "https://localhost:1/a.pth", "x" * 300, "x/" * 2500]
            ),
        ),
    ),
    one_wrong(("--seed",), NOT_INTEGERS),
    LETTERS.map(lambda text: ["--" + "z" + text]),
    WORDS.map(lambda text: [text]),
    combinations(),
)


def body(table, args, base: Path) -> None:
    data = make_data(base / "data", train=4, val=2)
    folder = base / "run"
    folder.mkdir(exist_ok=True)
    (folder / "note.txt").write_text("mine")
    before = contents(folder)
    valid = [
        "--model",
        "alt_gvt_demo",
        "--input-size",
        "32",
        "--batch-size",
        "4",
        "--epochs",
        "2",
        "--num_workers",
        "0",
        "--device",
        "cpu",
    ]
    valid += ["--data-path", str(data), "--output_dir", str(folder)]

    free = dict(phases=[Phase.generate], suppress_health_check=list(HealthCheck))

    def answer(words: list[str]) -> tuple[object, str]:
        """main.py inside this process: the exit code, or the error that came out; and its error stream."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main.run(options.parse_args([*valid, *words]))
            except SystemExit as end:
                code = end.code
            except BaseException as error:
                code = repr(error)[:200]
        return code, err.getvalue()

    def problems(words: list[str], code: object, said: str) -> tuple[str, ...]:
        lines, words = said.splitlines(), [word[:60] for word in words]
        return (
            complain(code == 2, f"{words}: exit {code}"),
            complain(len(lines) == 1 and ": error: " in said, f"{words}: it said {said[:200]!r}"),
            complain(len(said) <= 301, f"{words}: a line of {len(said)} characters"),
            complain(contents(folder) == before and not list(base.glob("alt_gvt*")), f"{words}: files changed"),
        )

    with table.row("malformed command lines and values", "hypothesis, inside one process") as row:

        @settings(max_examples=40 if args.short else 300, derandomize=True, deadline=None, database=None, **free)
        @given(BAD)
        def attempt(words: list[str]) -> None:
            row.check(*problems(words, *answer(words)))

        attempt()
        row.notes = "one wrong value, or values that do not go together"
    if args.short:
        return
    with table.row("malformed command lines and values", "as programs") as row:
        for words in (
            ["--lr", "nan"],
            ["--batch-size", "3"],
            ["--opt", "zq"],
            ["--resume", "/dev/null"],
            ["--data-path", "/nowhere"],
            ["--eval"],
        ):
            done = subprocess.run(
                [sys.executable, str(ROOT / "main.py"), *valid, *words],
                capture_output=True,
                text=True,
                env=environment(),
            )
            row.check(*problems(words, done.returncode, done.stderr))


if __name__ == "__main__":
    run_program(__doc__, body)
