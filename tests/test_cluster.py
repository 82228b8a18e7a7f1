"""docs/cluster.md: its arithmetic is that of the code and of the records, and its example of sharding runs."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, launch

import gvt
import main
from training import options
from training.checkpoint import Checkpoint

PAGE = (ROOT / "docs" / "cluster.md").read_text()
IMAGES, WORKERS = 1_281_167, 8
WAYS = {  # their names when the record was made
    "float32, as in the official code": "float32 as published",
    "default": "bytes until the device",
    "`--fast-augment`": "--fast-augment",
}


def rows(name: str) -> list[list[str]]:
    table = re.search(rf"<!-- arithmetic: {name} .*?-->\n(.*?)<!-- end arithmetic -->", PAGE, re.S)[1]
    return [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines()[2:]]


def test_learning_rates_follow_from_the_batch():
    lr, found = options.parse_args([]).lr, rows("rates")
    recipes = [name for name in gvt.MODEL_NAMES if name != "alt_gvt_demo"]
    assert sorted(row[0] for row in found) == sorted(f"`{name}`" for name in recipes)
    for model, each, *by_gpus, on_64 in found:
        batches = [int(each) * gpus for gpus in (1, 8, 64)]
        assert by_gpus == [f"{batch}, {lr * batch / 512:.8g}" for batch in batches]
        assert batches[1] == main.RECIPE_BATCH[model.strip("`")]
        assert on_64 == f"`--batch-size {batches[1] // 64}`"


def test_loading_times_follow_from_the_record():
    record = (ROOT / "logs" / "benchmarks" / "feeding-2-cores-2026-11-25" / "table.txt").read_text()
    large = record[record.index("enlarged to 375: 1000 pictures, median 500 x 375") :]
    found = rows("loading")
    assert [row[0] for row in found] == list(WAYS)
    for way, rate, *seconds in found:
        measured = rf"^{WAYS[way]}: (\d+) pictures/s and core \(loading process, in all\)"
        assert rate == re.search(measured, large, re.M)[1]
        exact = [IMAGES / (gpus * WORKERS * int(rate)) for gpus in (1, 8, 64)]
        assert seconds == [f"{each:.0f}" if each >= 10 else f"{each:.1f}" for each in exact]
    assert f"8 x {found[1][1]} = {8 * int(found[1][1]):,} images/s" in PAGE


@pytest.mark.slow
def test_the_example_of_sharding_has_no_difference(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    command = [sys.executable, *launch(2), str(script)]
    environ = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "difference 0.0"
    model = gvt.Twins(gvt.VARIANTS["alt_gvt_demo"], num_classes=10)
    Checkpoint.open(tmp_path / "sharded.pth").load_into(model)
