"""tools/readme_tables.py: what the tables say, and that --check notices a README that says something else."""

import functools
import json
from pathlib import Path

import pytest

import gvt
import main
from tools import readme_tables
from training.errors import exit_code

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- table: {} (python -m tools.readme_tables) -->"
END = "<!-- end table -->"
run = functools.partial(exit_code, "readme_tables.py", readme_tables.main)
counted = functools.cache(readme_tables.count)


@pytest.fixture(autouse=True)
def count_each_model_once(monkeypatch):
    monkeypatch.setattr(readme_tables, "count", counted)


@pytest.fixture
def no_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(readme_tables.TABLES, "runs", lambda: readme_tables.runs(tmp_path))


def readme(folder: Path, *lines: str) -> Path:
    path = folder / "README.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def cells(table: list[str]) -> list[list[str]]:
    """The rows of a table, without its heading."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


# ---------------------------------------------------------------- what the tables say


def test_classification():
    found = [[row[0], *row[1:5], row[6].split("]")[0]] for row in cells(readme_tables.classification())]
    assert found == [
        ["PCPVT-Small", "`pcpvt_small_v0`", "81.2", "3.8 / 3.7", "24.1", "[81.23 (286)"],
        ["Twins-SVT-Small", "`alt_gvt_small`", "81.7", "2.9 / 2.8", "24.1", "[81.72 (291)"],
        ["PCPVT-Base", "`pcpvt_base_v0`", "82.7", "6.7 / 6.4", "43.8", "[82.72 (292)"],
        ["Twins-SVT-Base", "`alt_gvt_base`", "83.2", "8.6 / 8.3", "56.1", "[83.16 (298)"],
        ["PCPVT-Large", "`pcpvt_large_v0`", "83.1", "9.8 / 9.5", "61.0", "[83.06 (292)"],
        ["Twins-SVT-Large", "`alt_gvt_large`", "83.7", "15.1 / 14.8", "99.3", "[83.67 (290)"],
    ]


def test_links_of_classification():
    links = [row[5] for row in cells(readme_tables.classification())]
    assert links[1] == "[alt_gvt_small.pth](https://drive.google.com/file/d/131SVOphM_-SaBytf4kWjo3ony5hpOt4S/view)"
    assert len(set(links)) == 6
    for row in cells(readme_tables.classification()):
        assert (ROOT / row[6].split("](")[1].removesuffix(")")).is_file()


def test_recipes():
    launch = "python -m torch.distributed.launch --nproc_per_node=8 --use_env main.py --model"
    rows = cells(readme_tables.recipes())
    assert [row[:5] for row in rows] == [
        ["`pcpvt_small_v0`", "1280", "5", "0.2", "0.00125"],
        ["`alt_gvt_small`", "2048", "5", "0.2", "0.002"],
        ["`pcpvt_base_v0`", "1024", "5", "0.3", "0.001"],
        ["`alt_gvt_base`", "1024", "5", "0.3", "0.001"],
        ["`pcpvt_large_v0`", "1024", "5", "0.5", "0.001"],
        ["`alt_gvt_large`", "1024", "20", "0.5", "0.001"],
    ]
    assert (
        rows[0][5]
        == f"`{launch} pcpvt_small_v0 --batch-size 160 --data-path path_to_imagenet --dist-eval --drop-path 0.2`"
    )
    assert (
        rows[5][5]
        == f"`{launch} alt_gvt_large --batch-size 128 --data-path path_to_imagenet --dist-eval --drop-path 0.5 --warmup-epochs 20`"
    )


def test_paper_agrees_with_the_models_and_the_trainer():
    rows = readme_tables.paper()
    assert {row["model"] for row in rows} == set(gvt.VARIANTS) - {"alt_gvt_demo"}
    for row in rows:
        assert int(row["global_batch"]) == main.RECIPE_BATCH[readme_tables.REGISTERED[row["model"]]]


def test_paper_agrees_with_the_published_logs():
    """Acc@1 is the log's best, rounded; the rate peaks after the warm-up, one epoch late, just below the recipe's."""
    logs = readme_tables.published_logs()
    for row in readme_tables.paper():
        log = logs[row["log"]]
        assert f"{max(epoch['test_acc1'] for epoch in log):.1f}" == row["acc1"]
        peak = max(log, key=lambda epoch: epoch["train_lr"])
        assert peak["epoch"] == int(row["warmup_epochs"]) + 1
        assert peak["train_lr"] == pytest.approx(5e-4 * int(row["global_batch"]) / 512, rel=0.02)


@pytest.fixture
def no_libraries(monkeypatch):
    def load(library):
        raise AssertionError(f"{library} was asked for")

    monkeypatch.setattr("dense.libraries.load", load)


def test_segmentation(no_libraries):
    rows = {row[0].split("]")[0].strip("["): row[1:] for row in cells(readme_tables.segmentation())}
    assert len(rows) == 12
    assert rows["fpn_alt_gvt_l_512x512_80k_ade20k"] == ["46.7", "", "", "106.6 / 101.5", "102", "102.7", "103.7", ""]
    assert rows["upernet_alt_gvt_b_512x512_160k_ade20k_swin_setting"] == [
        *("47.7", "48.9", "[47.69, 48.13 (128000)](logs/published/dense.csv)", "260.0 / 256.2", "261", "87.7", "88.5"),
        "[alt_gvt_base.pth](https://drive.google.com/file/d/1LNtdvACihmKO6XyBPoJDxbrd6AuHVVvq/view)",
    ]
    assert len({row[-1] for row in rows.values()}) == 6 + 1


def test_detection(no_libraries):
    rows = {row[0].split("]")[0].strip("["): row[1:] for row in cells(readme_tables.detection())}
    assert len(rows) == 22
    found = rows["retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting"]
    assert found == ["43.0 / 64.2 / 46.3", "28.0 / 46.4 / 57.5", "", "103.6 / 97.8", "104", "33.8", "34.3"]
    assert rows["retinanet_alt_gvt_b_fpn_3x_ms_coco"] == [
        "46.9 / 68.0 / 50.2",
        "31.7 / 50.3 / -",
        "",
        "163.0 / 151.8",
        "",
        "66.2",
        "",
    ]
    found = rows["mask_rcnn_pcpvt_l_fpn_1x_coco_pvt_setting"]
    assert found == ["45.4 / - / -", "", "41.5 / - / -", "247.5 / 220.4", "", "80.6", "81.2"]
    assert rows["mask_rcnn_alt_gvt_l_fpn_3x_coco_swin_setting"] == ["", "", "", "290.4 / 275.4", "", "118.6", ""]


def test_every_config_has_a_row_and_says_the_same_figure():
    rows = {row["config"]: row for row, _ in readme_tables.by_config(("",))}
    files = {
        path.stem: path for task in ("segmentation", "detection") for path in (ROOT / task / "configs").glob("*.py")
    }
    assert set(rows) == set(files) and len(rows) == 34
    for name, row in rows.items():
        if row["miou"]:
            says = f"{row['miou']} mIoU" + (f"; {row['miou_ms']} with --aug-test" if row["miou_ms"] else "")
        elif row["ap"]:
            says = f"box AP {row['ap']}" + (f", mask AP {row['mask_ap']}" if row["mask_ap"] else "")
        else:
            says = "no figure"
        assert f"\nPublished: {says}.\n" in files[name].read_text(), name


def make_run(logs: Path, name: str, *, commit: str, epochs: int, data_path: str = "/data/digits") -> Path:
    folder = logs / name
    folder.mkdir(parents=True)
    lines = [
        dict(
            train_lr=1e-3,
            train_loss=2.0,
            test_loss=1.0,
            test_acc1=acc1,
            test_acc5=99.0,
            epoch=epoch,
            n_parameters=1,
            images_per_s=rate,
        )
        for epoch, (acc1, rate) in enumerate([(10.0, 1.0), (90.126, 300.4), (80.5, 500.0)])
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "args.json").write_text(json.dumps(dict(model="alt_gvt_demo", data_path=data_path, epochs=epochs)))
    (folder / "environment.json").write_text(json.dumps(dict(device="cpu: x86_64", commit=commit)))
    return folder


def test_runs(tmp_path):
    make_run(tmp_path, "b_unfinished", commit="", epochs=20, data_path="data/pets/")
    make_run(tmp_path, "a_finished", commit="0123456789abcdef+changes", epochs=3)
    (make_run(tmp_path, "not_ours", commit="", epochs=3) / "environment.json").unlink()
    (tmp_path / "published").mkdir()
    assert cells(readme_tables.runs(tmp_path)) == [
        [
            "[a_finished](logs/a_finished)",
            "`alt_gvt_demo`",
            "digits",
            "3",
            "90.13 (1)",
            "80.50",
            "300",
            "cpu: x86_64",
            "01234567+changes",
        ],
        [
            "[b_unfinished](logs/b_unfinished)",
            "`alt_gvt_demo`",
            "pets",
            "3 of 20",
            "90.13 (1)",
            "80.50",
            "300",
            "cpu: x86_64",
            "unknown",
        ],
    ]


def make_benchmark(logs: Path) -> None:
    def row(library, mode, rate, **others):
        return dict(library=library, mode=mode, pictures_per_s=rate, **others)

    rows = [row("ours", "eager", 20.0, share_of_product_rate=0.5), row("timm", "eager", 10.0)]
    compiled = [row("ours", "compiled", 30.04, share_of_product_rate=0.754), row("timm", "compiled", 20.0)]
    ratio = dict(ours="eager", library="timm", mode="eager", median=2.014)
    others = [
        dict(ours="compiled", library="timm", mode="compiled", median=1.5),
        dict(ours="compiled", library="timm", mode="eager", median=3.0),
    ]
    case = dict(model="alt_gvt_demo", task="inference", dtype="float32", batch=8, size=224, rows=rows, ratios=[ratio])
    environment = dict(
        hardware="A CPU",
        threads=2,
        torch="2.13.0",
        timm="1.0.31",
        started="2026-11-24T10:00:00",
        command="python -m tools.benchmark",
    )
    results = dict(
        environment=environment,
        settings=dict(repeats=30),
        cases=[case, case | dict(rows=rows + compiled, ratios=[ratio, *others])],
    )
    (logs / "benchmarks" / "a_cpu").mkdir(parents=True)
    (logs / "benchmarks" / "a_cpu" / "results.json").write_text(json.dumps(results))


def test_speed(tmp_path):
    assert readme_tables.speed(logs=tmp_path) == ["none yet"]
    make_benchmark(tmp_path)
    found = readme_tables.speed(logs=tmp_path)
    assert found == readme_tables.speed("a_cpu", logs=tmp_path)
    assert found[1] == "A CPU, 2 threads, torch 2.13.0, timm 1.0.31, 2026-11-24, 30 rounds. `python -m tools.benchmark`"
    assert (
        found[3]
        == "| Model | Task | dtype | Batch | ours / timm, eager | ours / timm, compiled | % of peak GEMM throughput |"
    )
    assert cells(found[3:-1]) == [
        ["`alt_gvt_demo`", "inference", "float32", "8 x 224", "20 / 10 = 2.01", "", "50 % (eager)"],
        ["`alt_gvt_demo`", "inference", "float32", "8 x 224", "20 / 10 = 2.01", "30 / 20 = 1.50", "75 % (compiled)"],
    ]


def test_the_best_modes_the_gemm_rate_and_failures():
    rates = {("ours", "eager"): 20, ("ours", "freezing"): 40, ("timm", "eager"): 10, ("timm", "compiled"): 32}
    rates[("timm", "openvino")] = 25
    rows = [dict(library=name, mode=mode, pictures_per_s=rate) for (name, mode), rate in rates.items()]
    rows += [dict(library="ours", mode="compiled", failed="no compiler")]
    for row in rows:
        row["share_of_product_rate"] = 0.5
    case = dict(model="m", task="inference", dtype="float32", batch=8, size=224, rows=rows)
    case["ratios"] = [dict(ours="eager", library="timm", mode="eager", median=2.0)]
    case["limits"] = dict(operations_per_s=215.4e9)
    case["comparisons"] = [
        dict(of="PyTorch", ours="freezing", library="timm", mode="compiled", median=1.25),
        dict(of="all", ours="freezing", library="timm", mode="openvino", median=1.6),
    ]
    table = readme_tables.speeds([case])
    assert table[0].split(" | ")[4:] == [
        "ours / timm, eager",
        "ours / timm, compiled",
        "ours / timm, openvino",
        "best of ours / best of timm, PyTorch",
        "best of all of ours / OpenVINO on timm's model",
        "GEMM, GFLOP/s",
        "% of peak GEMM throughput |",
    ]
    assert cells(table)[0][4:] == [
        "20 / 10 = 2.00",
        "failed / 32",
        "",
        "40 / 32 = 1.25 (freezing / compiled)",
        "40 / 25 = 1.60 (freezing)",
        "215",
        "50 % (freezing)",
    ]


def test_the_newest_record_of_a_name(tmp_path):
    days = ("2026-01-02_cpu_inference", "2026-01-05_cpu_inference", "2026-01-10_other_cpu_inference")
    for name in (*days, "2026-01-11_cpu_training"):
        (tmp_path / "benchmarks" / name).mkdir(parents=True)
        (tmp_path / "benchmarks" / name / "results.json").touch()
    assert readme_tables.record("cpu_inference", tmp_path).parent.name == "2026-01-05_cpu_inference"
    assert readme_tables.record("2026-01-02_cpu_inference", tmp_path).parent.name == "2026-01-02_cpu_inference"


def test_settings_are_those_of_the_recipes():
    for short, long in zip(cells(readme_tables.settings()), cells(readme_tables.recipes())):
        gpus, batch = map(int, short[1].split(" x "))
        assert [short[0], str(gpus * batch), *short[2:]] == long[:5]


def test_links_are_relative_to_the_page():
    for page, logs, config in (
        ("README.md", "logs", "segmentation/configs"),
        ("segmentation/README.md", "../logs", "configs"),
        ("logs/benchmarks/README.md", "..", "../../segmentation/configs"),
    ):
        lines = "\n".join(readme_tables.make_table("segmentation", ROOT / page))
        assert f"]({logs}/published/dense.csv)" in lines and f"]({config}/fpn" in lines
        assert "](https://drive.google.com" in lines


def test_attentions_shares_where_sizes_differ():
    case = dict(model="m", task="features", dtype="float32", batch=1, ratios=[], rows=[])
    case["rows"] = [dict(library="ours", mode="eager", pictures_per_s=1.0, share_of_product_rate=0.5)]
    cases = [
        case | dict(size=size, floor=dict(shares_of_operations={"LSA": 0.2, "GSA": gsa}))
        for size, gsa in ((224, 0.1), (512, 0.304))
    ]
    table = readme_tables.speeds(cases)
    assert table[0].endswith("| % of peak GEMM throughput | Operations |")
    assert [row[-1] for row in cells(table)] == ["LSA 20 %, GSA 10 %", "LSA 20 %, GSA 30 %"]


def test_finetuning(tmp_path):
    for seed, (way, accuracy) in enumerate([("decay", 50.0), ("decay", 61.0), ("frozen", 40.126)]):
        folder = make_run(tmp_path / "finetuning" / "flowers", f"{way}-{seed}", commit="0123456789abcdef", epochs=3)
        (folder / "args.json").write_text('{"lr": 0.004}')
        lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        lines[-1]["test_acc1"] = accuracy
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    number = f"{lines[-1]['n_parameters']:,}"
    assert cells(readme_tables.finetuning(tmp_path)) == [
        ["flowers", "decay", "0.004", number, "55.50", "50.00, 61.00", "01234567"],
        ["flowers", "frozen", "0.004", number, "40.13", "40.13", "01234567"],
    ]
    assert readme_tables.finetuning(tmp_path / "none") == ["none yet"]


def test_no_runs(tmp_path):
    assert readme_tables.runs(tmp_path) == ["none yet"]


def make_dense_run(logs: Path, name: str, lines: list[dict], **others: dict) -> None:
    folder = logs / name
    folder.mkdir()
    (folder / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(
        json.dumps(dict(device="cpu: x86_64", threads=1, commit="0123456789abcdef"))
    )
    for kind, record in others.items():
        (folder / f"scores_{kind}.json").write_text(json.dumps(record))


def test_dense_runs(tmp_path):
    steps = [dict(loss=2.0, time=3.0, iter=20, step=20), dict(loss=0.5, time=1.5, iter=60, step=60)]
    score = {
        "coco/bbox_mAP": 0.6,
        "coco/bbox_mAP_50": 0.9,
        "coco/segm_mAP": 0.5,
        "coco/segm_mAP_50": 0.75,
        "coco/bbox_mAP_s": 0.1,
        "step": 60,
    }
    make_dense_run(tmp_path, "a", [*steps, score])
    make_dense_run(
        tmp_path, "b", [steps[0], dict(mIoU=10.0, step=20), steps[1], dict(mIoU=20.555, step=70)], test=dict(mIoU=19.5)
    )
    make_dense_run(tmp_path, "c", steps)
    end = ["2", "cpu: x86_64, 1", "01234567"]
    assert cells(readme_tables.dense_runs(tmp_path)) == [
        ["[a](logs/a)", "60", "2, 0.5", "box AP 0.600, AP50 0.900, mask AP 0.500, AP50 0.750", "", *end],
        ["[b](logs/b)", "70", "2, 0.5", f"mIoU {20.555:.2f}", "test: mIoU 19.50", *end],
        ["[c](logs/c)", "60", "2, 0.5", "", "", *end],
    ]
    assert readme_tables.dense_runs(tmp_path / "none") == ["none yet"]


# ---------------------------------------------------------------- the README


def test_fills_the_tables_and_nothing_else(tmp_path, capsys, no_runs):
    path = readme(
        tmp_path, "# Title", BEGIN.format("recipes"), "old", "older", END, "text", "", BEGIN.format("runs"), END, "last"
    )
    assert run(["--readme", str(path)]) == 0
    expected = [
        "# Title",
        BEGIN.format("recipes"),
        *readme_tables.recipes(),
        END,
        "text",
        "",
        BEGIN.format("runs"),
        "none yet",
        END,
        "last",
    ]
    assert path.read_text() == "\n".join(expected) + "\n"
    assert "wrote recipes, runs" in capsys.readouterr().out
    assert run(["--readme", str(path), "--check"]) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, digit, other",
    [
        ("classification", "81.7", "81.8"),
        ("recipes", "0.00125", "0.00126"),
        ("segmentation", "48.13", "48.31"),
        ("detection", "163.7", "163.8"),
        ("runs", "none", "none,"),
    ],
)
def test_check_notices_a_changed_figure(name, digit, other, tmp_path, capsys, no_runs):
    lines = [line for table in readme_tables.TABLES for line in (BEGIN.format(table), END)]
    path = readme(tmp_path, *lines)
    assert run(["--readme", str(path)]) == 0
    assert run(["--readme", str(path), "--check"]) == 0
    capsys.readouterr()
    changed = path.read_text().replace(digit, other, 1)
    assert changed != path.read_text()
    path.write_text(changed)
    assert run(["--readme", str(path), "--check"]) == 1
    out, error = capsys.readouterr()
    assert (out, error) == ("", f"readme_tables.py: out of date ({path}, {name}): run python -m tools.readme_tables\n")
    assert path.read_text() == changed


BAD = {
    "unknown table": ([BEGIN.format("throughput"), END], "unknown table"),
    "a folder that is not there": (
        [BEGIN.format("speed no_such-folder"), END],
        "no_such-folder/results.json): restore",
    ),
    "a folder of no speed": ([BEGIN.format("runs mine"), END], "unknown table"),
    "no name": ([BEGIN.format("  "), END], "unknown table"),
    "misspelt marker": (["<!-- table: runs -->", END], "unknown table"),
    "open at the end": (["text", BEGIN.format("runs"), "none yet"], "table runs is not closed"),
    "open at the next": ([BEGIN.format("recipes"), BEGIN.format("runs"), END], "table recipes is not closed"),
    "end of nothing": ([BEGIN.format("runs"), END, END], "line 3): write the line"),
}


@pytest.mark.parametrize("mode", [[], ["--check"]], ids=["write", "check"])
@pytest.mark.parametrize("lines, part", BAD.values(), ids=BAD)
def test_bad_markers_are_one_line(lines, part, mode, tmp_path, capsys):
    path = readme(tmp_path, *lines)
    before = path.read_text()
    assert_one_line(["--readme", str(path), *mode], part, capsys)
    assert path.read_text() == before


def test_other_errors_are_one_line(tmp_path, capsys, monkeypatch):
    assert_one_line(["--readme", str(tmp_path / "none.md")], "none.md): give a file", capsys)
    path = readme(tmp_path, BEGIN.format("runs"), END)
    monkeypatch.setitem(readme_tables.TABLES, "runs", lambda: readme_tables.runs(tmp_path / "logs"))
    folder = make_run(tmp_path / "logs", "mine", commit="", epochs=3)
    (folder / "args.json").write_text("{}")
    assert_one_line(["--readme", str(path)], "no model, data_path, epochs", capsys)
    (folder / "args.json").unlink()
    assert_one_line(["--readme", str(path)], "args.json): restore", capsys)
    (folder / "log.txt").write_text("")
    assert_one_line(["--readme", str(path)], "empty log", capsys)


def assert_one_line(argv, part, capsys):
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("readme_tables.py: error: ")
    assert part in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the project has no README.md yet")
def test_the_projects_readme(capsys):
    assert run(["--check"]) == 0, capsys.readouterr().err
