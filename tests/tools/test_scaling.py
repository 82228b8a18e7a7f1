"""tools/scaling.py: the projection's arithmetic, and that the measurement measures."""

import csv
import json

import pytest

from tools import scaling
from tools.scaling import Machine, Projection, all_reduce_seconds
from training.errors import exit_code

MB = 2**20


def test_all_reduce_by_hand():
    machine = Machine(gpus=4, inside=100.0, outside=10.0, latency=0.5)
    assert all_reduce_seconds(1000.0, 1, machine) == 0
    assert all_reduce_seconds(1000.0, 2, machine) == pytest.approx(2 * 1 / 2 * 1000 / 100 + 2 * 1 * 0.5)
    # Three nodes of four: 2 * 3/4 * 10 inside, 2 * 2/3 * 250 / 10 between, and 2 * (3 + 2) messages one after another.
    assert all_reduce_seconds(1000.0, 12, machine) == pytest.approx(15 + 2 * 2 / 3 * 25 + 5)


def test_what_the_backward_pass_hides():
    slow = Machine(gpus=1, outside=25 * MB, latency=0)  # a bucket takes 2 (m - 1) / m seconds
    few, many = (Projection(step=6.0, batch=8, size=size * 25 * MB, gpus=2, machine=slow) for size in (3, 9))
    assert few.buckets == 3 and few.exposed == pytest.approx(
        1
    )  # two seconds are hidden behind four, the last bucket is not
    assert many.exposed == pytest.approx(1 + 8 - 4)
    assert many.efficiency == pytest.approx(6 / 11) and many.images_per_s == pytest.approx(16 / 11)
    alone = Projection(step=6.0, batch=8, size=9 * 25 * MB, gpus=1, machine=slow)
    assert alone.exposed == 0 and alone.efficiency == 1


def test_bottlenecks():
    machine = Machine(cores=32)
    found = Projection(step=0.1, batch=128, size=224e6, gpus=64, machine=machine)
    assert found.cores(1000.0) == pytest.approx(found.images_per_s / 8 / 1000)
    assert found.bottlenecks(rate=1000.0) == ["batch size"]
    assert found.bottlenecks(rate=50.0) == ["input", "batch size"]
    assert Projection(step=0.1, batch=128, size=224e6, gpus=8, machine=machine).bottlenecks(1000.0) == []
    assert Projection(step=0.01, batch=4, size=224e6, gpus=64, machine=Machine(outside=1e8)).bottlenecks(1000.0) == [
        "all-reduce"
    ]


def test_projection(tmp_path, capsys):
    scaling.main(["--step-ms", "100", "--batch-size", "128", "--gpus", "1", "8", "--output", str(tmp_path / "full")])
    one, eight = csv.DictReader((tmp_path / "full" / "scaling.csv").read_text().splitlines())
    assert one["img/s"] == "1280" and one["efficiency"] == "1.000" and float(eight["img/s"]) < 8 * 1280
    assert eight["global batch"] == "1024" and eight["bottleneck"] == "none"
    assert capsys.readouterr().out.count("\n") == 4
    scaling.main(["--step-ms", "100", "--gpus", "8", "--gradients", "bfloat16", "--output", str(tmp_path / "half")])
    (half,) = csv.DictReader((tmp_path / "half" / "scaling.csv").read_text().splitlines())
    assert float(half["all-reduce (ms)"]) < 0.6 * float(eight["all-reduce (ms)"])


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "pass one of them"),
        ("--step-ms 10 --measure 1", "pass one of them"),
        ("--step-ms 0", "argument --step-ms: '0' is not a number above 0"),
        ("--step-ms 10 --gpus 0", "argument --gpus: '0' is not a number from 1 up"),
        ("--step-ms 10 --model alt_gvt", "argument --model: invalid choice: 'alt_gvt'"),
        ("--measure 3 --batch-size 4 --model alt_gvt_demo", "a multiple of 3 processes"),
    ],
)
def test_wrong_words(words, says, capsys):
    try:
        code = exit_code("scaling.py", scaling.main, words.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.count("\n") == 1


@pytest.mark.slow
def test_measurement(tmp_path):
    path = tmp_path / "scaling.csv"
    scaling.main(
        f"--measure 1 2 --model alt_gvt_demo --batch-size 4 --input-size 32 --repeats 3 --output {tmp_path}".split()
    )
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert {"command", "commit", "hardware", "torch", "started"} <= set(record["environment"]) and record["settings"][
        "measure"
    ] == [1, 2]
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["scaling"], row["processes"], row["images per process"]) for row in rows] == [
        *(("weak", "1", "4"), ("strong", "1", "4"), ("weak", "2", "4"), ("strong", "2", "2")),
    ]
    assert rows[0]["efficiency"] == "1.00"
    for row in rows:
        step, rate = float(row["step (ms)"]), float(row["img/s"])
        assert rate == pytest.approx(int(row["processes"]) * int(row["images per process"]) / step * 1e3, rel=0.05)
