"""tools/ablation.py: the variants, Table 5 of the paper, the recipe, the statistics, and a tiny run from end to end."""

import functools
import json
import subprocess

import pytest
from conftest import ROOT, make_images, run_main

import gvt

# isort: split
import timm
import torch

import datasets
import utils
from tools import ablation, ablation_models, ablation_results
from tools.ablation import Run
from tools.ablation_models import DESIGNS, PatternedTwins
from training import options
from training.errors import UserError, exit_code
from training.optimizer import build_optimizer, build_schedule

run = functools.partial(exit_code, "ablation.py", ablation.main)


def small(name: str, **settings) -> PatternedTwins:
    torch.manual_seed(0)
    return timm.create_model(f"ablation_{name}", num_classes=10, **settings).eval()


def parsed(name: str, *words: object, kind: str = "seed", seed: int = 0, data=ROOT) -> options.Options:
    run = Run(name, seed, 1e-3, kind)
    return options.parse_args([*run.words(4), "--data-path", str(data), *map(str, words)])


def letters(model) -> str:
    kinds = {gvt.LocalAttention: "L", gvt.GlobalAttention: "G"}
    return "/".join("".join(kinds[type(block.attn)] for block in stage) for stage in model.blocks)


# ---------------------------------------------------------------- the variants


@pytest.mark.parametrize("name", DESIGNS)
@torch.inference_mode()
def test_a_variant(name):
    model = small(name)
    assert all(model(torch.randn(2, 3, size, size)).shape == (2, 10) for size in (64, 96))
    title = DESIGNS[name].title
    assert letters(model) == (title if "/" in title else "GG/GG/GG")
    has_peg, has_table = name not in ("g_absolute", "g_none"), "absolute" in name
    assert {type(each) for each in model.pos_block} == {gvt.PEG if has_peg else torch.nn.Identity}
    tables = [each.shape for key, each in model.named_parameters() if key.endswith(".table")]
    assert tables == ([(1, 16, 16, 32), (1, 8, 8, 64), (1, 4, 4, 128)] if has_table else [])


def test_positions_are_what_tells_tokens_apart():
    """Without positions GSA cannot tell where a token is: a shift of the whole map moves the output with it."""
    tokens = torch.randn(1, 8, 8, 64)
    for name, blind in (("g_none", True), ("g_peg", False), ("g_absolute", False)):
        model = small(name)

        def stage(x, model=model):
            return model.blocks[1](model.pos_drops[1](x), model.pos_block[1])

        with torch.inference_mode():
            moved = stage(tokens.roll(2, dims=2)) - stage(tokens).roll(2, dims=3)
        assert (moved.abs().max() < 1e-5) == blind, name


def test_a_position_table_at_another_size():
    table = ablation_models.PositionTable(2, 4)
    with torch.no_grad():
        table.table.copy_(torch.stack([torch.full((4, 4), 3.0), torch.arange(4.0).expand(4, 4)], -1)[None])
    assert torch.equal(table(torch.zeros(1, 4, 4, 2)), table.table)
    constant, ramp = table(torch.zeros(2, 6, 8, 2)).unbind(-1)
    assert constant.shape == (2, 6, 8) and torch.allclose(constant, torch.tensor(3.0))
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])  # bilinear, by hand
    assert torch.allclose(ramp, expected.expand(2, 6, 8))


def test_position_tables_and_pegs_have_no_weight_decay():
    model = small("g_absolute_peg")
    names = {id(each): name for name, each in model.named_parameters()}
    decayed = set()
    for group in build_optimizer(parsed("g_absolute_peg"), model, 1e-3).param_groups:
        decayed |= {names[id(each)] for each in group["params"]} if group["weight_decay"] else set()
    assert decayed == {
        name for name, each in model.named_parameters() if each.ndim > 1 and not name.startswith(("pos_", "pos_drops"))
    }


def test_variants_have_no_weights_to_download():
    with pytest.raises(RuntimeError, match="has no weights"):
        small("g_peg", pretrained=True)


# ---------------------------------------------------------------- Table 5


SVT_S = gvt.VARIANTS["alt_gvt_small"]
THREE = gvt.Variant(SVT_S.dims[:3], SVT_S.heads[:3], SVT_S.mlp_ratios[:3], SVT_S.depths[:3], window=7)


@pytest.mark.parametrize(
    "variant, pattern, millions",
    [
        (THREE, ("L", "L", "L"), 8.82),
        (SVT_S, ("L", "LLG", "LLG", "G"), 23.01),  # the paper has 23.5
        (SVT_S, ("L", "LG", "LG", "G"), 23.80),  # as the paper writes it; its 24.1 is that of the next
        (SVT_S, ("LG", "LG", "LG", "LG"), 24.06),
        (SVT_S, ("L", "L", "L", "G"), 22.22),
    ],
)
def test_parameters_of_table_5(variant, pattern, millions):
    with torch.device("meta"):
        model = PatternedTwins(variant, pattern=pattern)
        shipped = timm.create_model("alt_gvt_small")
    count = sum(each.numel() for each in model.parameters())
    assert round(count / 1e6, 2) == millions
    if set(pattern) == {"LG"}:
        assert {name: each.shape for name, each in model.named_parameters()} == {
            name: each.shape for name, each in shipped.named_parameters()
        }


def test_at_224_the_last_stage_has_one_window():
    """There LSA equals GSA, so that the paper's (L, L, L, G) is all local."""
    local = gvt.LocalAttention(512, 16, window=7).double()
    whole = gvt.GlobalAttention(512, 16, sr_ratio=1).double()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            q, kv = getattr(local.qkv, kind).split([512, 1024])
            getattr(whole.q, kind).copy_(q)
            getattr(whole.kv, kind).copy_(kv)
            getattr(whole.proj, kind).copy_(getattr(local.proj, kind))
        tokens = torch.randn(2, 7, 7, 512, dtype=torch.float64)
        assert (local(tokens) - whole(tokens)).abs().max() < 1e-14


# ---------------------------------------------------------------- the runs


@pytest.mark.parametrize("kind", ["lr", "seed"])
def test_every_option_of_the_recipe_has_an_effect(kind):
    args = parsed("g_peg", kind=kind)
    assert not options.without_effect(args) and not options.schedule_warnings(args, args.lr)
    assert not args.mixing and args.eval_interval == args.epochs == 4
    scheduler = build_schedule(args, optimizer := build_optimizer(args, small("g_peg"), args.lr))
    rates = [optimizer.param_groups[0]["lr"]]
    for epoch in range(3):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 3e-4, 9e-5])


def test_runs_of_a_seed_see_the_same_images_in_the_same_order(tmp_path):
    make_images(tmp_path / "train", classes=("ant", "bee"), each=70)
    make_images(tmp_path / "val", classes=("ant", "bee"), each=2)

    def batch(name, seed):
        args = parsed(name, seed=seed, data=tmp_path)
        loader = datasets.build_train_loader(args, datasets.build_datasets(args)[0], torch.device("cpu"))
        loader.sampler.set_epoch(1)
        images, labels = next(iter(loader))
        return images.pixels, labels

    first, second, other = batch("g_peg", 3), batch("lg_lg_gg", 3), batch("g_peg", 4)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], other[0])


def write_results(folder, kind: str, scores: dict[str, list[float]], **changes) -> None:
    folder.mkdir(exist_ok=True)
    for name, values in scores.items():
        for number, top1 in enumerate(values):
            seed, lr = (100, ablation.RATES[number]) if kind == "lr" else (number, 1e-3)
            record = dict(variant=name, seed=seed, lr=lr, top1=top1, commit="c" * 40, recipe="--epochs 4", data="d")
            record |= dict(parameters=600_000, minutes=8.0) | changes
            (folder / f"{Run(name, seed, lr, kind).name}.json").write_text(json.dumps(record))


def test_counted_runs_use_the_better_rate_of_two(tmp_path):
    with pytest.raises(UserError, match=r"no learning rate was chosen \(g_peg"):
        ablation.counted_runs(["g_peg"], [0], tmp_path)
    write_results(tmp_path, "lr", {"g_peg": [50.0, 51.0], "g_none": [40.0, 40.0]})
    runs = ablation.counted_runs(["g_peg", "g_none"], [0, 1], tmp_path)
    assert [(run.name, run.lr) for run in runs] == [
        *[("g_peg-seed0", ablation.RATES[1]), ("g_none-seed0", ablation.RATES[0])],
        *[("g_peg-seed1", ablation.RATES[1]), ("g_none-seed1", ablation.RATES[0])],
    ]
    assert [run.name for run in ablation.rate_runs(["g_peg"])] == ["g_peg-lr0.001", "g_peg-lr0.003"]


def test_counted_runs_start_from_a_clean_commit_only(tmp_path, monkeypatch, capsys):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]

    def commit():
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "x"], check=True)

    results = tmp_path / "logs" / "ablation"
    results.mkdir(parents=True)
    for module in (ablation, utils):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(ablation, "RESULTS", results)
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "main.py").write_text("1\n")
    commit()
    write_results(results, "seed", {"g_peg": [50.0]})
    assert len(ablation.clean_commit("seed")) == 40  # what such runs leave does not stop the next
    write_results(results, "lr", {"g_peg": [50.0]})
    with pytest.raises(UserError, match=r"the tree differs from its commit \(logs/ablation/g_peg-lr0.001.json\)"):
        ablation.clean_commit("seed")
    commit()
    write_results(results, "seed", {"g_peg": [51.0]})
    assert "+" not in ablation.clean_commit("seed")
    (tmp_path / "main.py").write_text("2\n")
    assert run(["--data-path", str(tmp_path)]) == 2
    assert "the tree differs from its commit (main.py): commit or remove it" in capsys.readouterr().err


class Place:
    def __init__(self, results, fails=""):
        self.results, self.fails, self.trained = results, fails, []

    def train(self, run):
        if run.name == self.fails:
            raise UserError(f"a run ended ({run.name}): see it")
        self.trained.append(run.name)
        write_results(self.results, "seed", {run.variant: [1.0] * (run.seed + 1)})
        return {"top1": 1.0}


def test_only_missing_runs_are_done(tmp_path):
    runs = [Run("g_peg", seed, 1e-3, "seed") for seed in range(3)]
    write_results(tmp_path, "seed", {"g_peg": [1.0]})
    with pytest.raises(UserError, match="g_peg-seed1"):
        ablation.train_all(runs, failing := Place(tmp_path, "g_peg-seed1"), 1)
    assert "g_peg-seed0" not in failing.trained
    ablation.train_all(runs, place := Place(tmp_path / "new"), 2)
    assert sorted(place.trained) == [run.name for run in runs]
    ablation.train_all(runs, again := Place(tmp_path / "new"), 2)
    assert again.trained == []


def test_a_run_that_fails_or_ends_in_another_tree_has_no_result(tmp_path, monkeypatch):
    class Ended:
        returncode = 3

    place = ablation.Place(tmp_path, tmp_path / "results", tmp_path / "runs", 4, "c" * 40, counted=True)
    monkeypatch.setattr(ablation.subprocess, "run", lambda *_, **settings: Ended)
    with pytest.raises(UserError, match=r"a run ended with exit code 3 \(g_peg-seed0\): see .*output.txt"):
        place.train(Run("g_peg", 0, 1e-3, "seed"))
    Ended.returncode = 0
    monkeypatch.setattr(ablation, "clean_commit", lambda kind: "d" * 40)
    with pytest.raises(UserError, match=r"another commit than when the run began \(g_peg-seed0\)"):
        place.train(Run("g_peg", 0, 1e-3, "seed"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "one of --data-path, --table is required"),
        (["--data-path", "x", "--epochs", "1"], "--epochs is for --trial"),
        (["--data-path", "x", "--variants", "g_pge"], "invalid choice: 'g_pge'"),
    ],
)
def test_wrong_command_lines(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablation.main(words)
    assert says in capsys.readouterr().err


def test_prepare(tmp_path, monkeypatch, capsys):
    assert run(["--prepare", str(tmp_path), "--data-path", str(tmp_path / "images")]) == 2
    assert "no CIFAR-10 (--prepare" in capsys.readouterr().err

    class Archive:
        base_folder, url, classes = "x", "y", ["cat", "dog"]

        def __init__(self, root, train):
            self.items = [(ablation_image(number), number % 2) for number in range(4 if train else 2)]

        def __len__(self):
            return len(self.items)

        def __iter__(self):
            return iter(self.items)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Archive)
    assert run(["--prepare", str(tmp_path), "--data-path", str(tmp_path / "images")]) == 0
    found = sorted(str(path.relative_to(tmp_path / "images")) for path in tmp_path.rglob("*.png"))
    trained = ["train/cat/00000.png", "train/cat/00002.png", "train/dog/00001.png", "train/dog/00003.png"]
    assert found == [*trained, "val/cat/00000.png", "val/dog/00001.png"]


def ablation_image(number: int):
    from PIL import Image

    return Image.new("RGB", (32, 32), (number, 0, 0))


# ---------------------------------------------------------------- statistics and tables


def test_a_t_interval_by_hand():
    """Mean 2, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.3027."""
    found = ablation_results.summarize([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, -0.4841, 4.4841, 0.0742), abs=1e-4)
    assert ablation_results.summarize([-1.0, -2.0, -3.0]).p == pytest.approx(found.p)
    assert ablation_results.summarize([2.0, 2.0]) == (2.0, 2.0, 2.0, 0.0)


def test_holm_by_hand():
    assert ablation_results.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ablation_results.holm([0.5, 0.9]) == [1.0, 1.0]


SCORES = {
    "g_peg": [60.0, 61.0, 62.0],
    "g_absolute": [52.0, 53.1, 53.9],  # 8.0, 7.9, 8.1 below
    "g_none": [70.0, 71.1, 71.9],  # about 10 above
    "ll_ll_gg": [61.0, 60.0, 62.0],
    "lg_lg_gg": [60.5, 61.0, 61.5],
}


def test_verdicts(tmp_path):
    write_results(tmp_path, "seed", SCORES)
    _, rows = ablation_results.contrast_table(tmp_path)
    assert [row[-1] for row in rows] == ["same sign, resolved", "opposite sign, resolved", "unresolved", "unresolved"]
    question, names, each, mean, interval, p, _ = rows[0]
    assert (names, each, mean) == ("G-PEG - G-absolute", "+8.00, +7.90, +8.10", "+8.00")
    assert interval == "+7.75 to +8.25"
    assert float(p) == pytest.approx(3 * 5.21e-5, rel=0.01)  # the second smallest of four; t is 138.6
    assert "G-absolute + PEG" not in str(rows)
    write_results(tmp_path, "seed", {"g_absolute_peg": [60.0, 60.0, 60.0]})
    _, rows = ablation_results.contrast_table(tmp_path)
    assert [row[-1] for row in rows[4:]] == ["not tested"] * 2 and rows[4][3] == "+7.00"


def test_no_verdict_before_all_contrasts_have_runs(tmp_path):
    write_results(tmp_path, "seed", {name: SCORES[name] for name in ("g_peg", "g_absolute")})
    (row,) = ablation_results.contrast_table(tmp_path)[1]
    assert row[5:] == ["", "runs are missing"]


def test_tables_of_runs_and_rates(tmp_path):
    tables = ablation_results.rate_table, ablation_results.run_table, ablation_results.contrast_table
    assert [table(tmp_path / "nothing")[1] for table in tables] == [[], [], []]
    write_results(tmp_path, "seed", {"g_none": [40.0, 41.0], "g_peg": [60.0]})
    write_results(tmp_path, "lr", {"g_none": [40.0, 42.0]})
    header, rows = ablation_results.run_table(tmp_path)
    assert "Seed 0 | Seed 1" in header and header.count("|") + 1 == len(rows[0]) == len(rows[1])
    assert rows[0][:6] == ["G-PEG", "0.60", "0.001", "60.00", "", "60.00"]
    assert rows[1][:7] == ["G-none", "0.60", "0.001", "40.00", "41.00", "40.50", "0.71"]
    assert ablation_results.rate_table(tmp_path)[1] == [["G-none", "0.001: 40.00, 0.003: 42.00", "0.003", "c" * 8]]


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(commit="c" * 40 + "+changes"), "a result from no clean commit"),
        (dict(commit=""), "a result from no clean commit"),
        (dict(recipe="--epochs 5"), "more than one recipe or data set"),
        (dict(data="e"), "more than one recipe or data set"),
        (dict(lr=2e-3, variant="g_peg", seed=9), "a variant with two learning rates"),
        (dict(top1="high"), "no result of a run"),
    ],
)
def test_results_that_do_not_count(changes, says, tmp_path):
    write_results(tmp_path, "seed", {"g_peg": [60.0, 61.0]})
    write_results(tmp_path, "seed", {"g_none": [40.0]}, **changes)
    with pytest.raises(UserError, match=says):
        ablation_results.counted(tmp_path)


def test_the_recorded_tables_are_up_to_date():
    assert run(["--table", "--check"]) == 0


# ---------------------------------------------------------------- from end to end


@pytest.mark.slow
def test_a_tiny_run_is_recorded_and_resumed(tmp_path, capsys):
    make_images(tmp_path / "data" / "train", classes=("ant", "bee"), each=80)
    make_images(tmp_path / "data" / "val", classes=("ant", "bee"), each=10, seed=1)
    trial, common = (
        tmp_path / "trial",
        ["--data-path", str(tmp_path / "data"), "--epochs", "1", "--variants", "lg_lg_gg"],
    )
    assert run([*common, "--trial", str(trial), "--choose-lr", "--jobs", "2"]) == 0
    rates = ablation_results.rates(trial)["lg_lg_gg"]
    assert set(rates) == set(ablation.RATES)
    assert "16 of 160 images" in (trial / "runs" / "lg_lg_gg-lr0.001" / "output.txt").read_text()

    words = [*common, "--trial", str(trial), "--seeds", "2"]
    assert run(words) == 0
    path = trial / "lg_lg_gg-seed2.json"
    record = json.loads(path.read_text())
    assert record["lr"] == ablation_results.chosen(rates) and record["recipe"].endswith("--epochs 1")
    assert record["environment"]["threads"] == 1 and len(record["log"]) == 1 and 0 <= record["top1"] <= 100
    assert record["parameters"] == sum(each.numel() for each in small("lg_lg_gg").parameters()) - 8 * 129  # 2 classes

    path.unlink()
    log = trial / "runs" / "lg_lg_gg-seed2" / "log.txt"
    trained = log.stat().st_mtime_ns
    assert run(words) == 0
    assert json.loads(path.read_text())["log"] == record["log"] and log.stat().st_mtime_ns == trained
    capsys.readouterr()
    assert run(words) == 0 and "1 of 1 runs have a result" in capsys.readouterr().err


def test_main_alone_does_not_know_the_variants():
    """They are the tool's: neither main.py nor gvt.py has them."""
    found = run_main("--model", "ablation_g_peg", "--data-path", ROOT)
    assert found.returncode == 2 and "unknown model (--model ablation_g_peg)" in found.stderr
