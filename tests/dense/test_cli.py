"""The official commands: they parse, train, resume, score, and report in one line what they cannot do."""

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import timm
import torch
from toys import DETECTOR, ROOT, SEGMENTOR, ade_toy, coco_toy, forget_visualizers, run, write

from dense import cli, libraries
from training import checkpoint
from training.errors import UserError

# Of mmengine, where one process makes several runs
pytestmark = pytest.mark.filterwarnings("ignore:.*instance named of:UserWarning")

FOLDERS = {"mmseg": "segmentation", "mmdet": "detection"}


@pytest.fixture(scope="session")
def ade(tmp_path_factory):
    return ade_toy(tmp_path_factory.mktemp("ade") / "data")


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    libraries.load("mmdet")
    return coco_toy(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="session")
def segmentor(ade):
    return write(ade.parent / "segmentor.py", SEGMENTOR, data=ade)


@pytest.fixture(scope="session")
def detector(coco):
    return write(coco.parent / "detector.py", DETECTOR, data=coco, setting="mask_rcnn_3x_swin", masks=True)


def ok(result):
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def same_weights(one, other):
    a, b = (checkpoint.load(str(path)) for path in (one, other))
    assert a["meta"]["iter"] == b["meta"]["iter"]
    return a["state_dict"].keys() == b["state_dict"].keys() and all(
        torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items()
    )


def python(library, program):
    return [sys.executable, ROOT / FOLDERS[library] / f"{program}.py"]


# ---------------------------------------------------------------- the official command lines


TRAIN = "--work-dir --resume-from --load-from --no-validate --seed --deterministic --options --cfg-options --launcher --local_rank --gpus --gpu-ids"
TEST = "--out --format-only --eval --show --show-dir --aug-test --eval-options --gpu-collect --tmpdir --options --cfg-options --launcher --local_rank"


def test_official_options_parse():
    known = cli.train_parser()._option_string_actions
    assert set(TRAIN.split()) <= set(known)
    for library in FOLDERS:
        assert set(TEST.split()) <= set(cli.test_parser(library)._option_string_actions)


def test_official_commands_parse():
    words = "configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py checkpoint_file --eval mIoU --aug-test --launcher pytorch --local-rank=3"
    args = cli.test_parser("mmseg").parse_args(words.split())
    assert args.eval == ["mIoU"] and args.aug_test and args.checkpoint == "checkpoint_file" and args.local_rank == 3
    words = "configs/retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting.py checkpoint_file --eval bbox segm"
    assert cli.test_parser("mmdet").parse_args(words.split()).eval == ["bbox", "segm"]


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_scripts_of_both_folders_are_the_same(folder):
    for name in ("dist_train.sh", "dist_test.sh"):
        assert (ROOT / folder / name).read_text() == (ROOT / "segmentation" / name).read_text()


def test_values_of_options():
    parsed = cli.key_values(["a.b=1", "c=[1,2]", "d=(1.5,x)", "e=None", "f=zero"], "--cfg-options")
    assert parsed == {"a.b": 1, "c": [1, 2], "d": (1.5, "x"), "e": None, "f": "zero"}


def test_paths_keep_their_commas_and_spaces():
    words = ["data_root=/a,b/c d", "x.pretrained='./w,1.pth'", "metric=bbox,segm", "scales=[a/b,c]"]
    expected = {
        "data_root": "/a,b/c d",
        "x.pretrained": "./w,1.pth",
        "metric": ["bbox", "segm"],
        "scales": ["a/b", "c"],
    }
    assert cli.key_values(words, "--cfg-options") == expected
    with pytest.raises(UserError, match=r"^not a path \(--cfg-options, data_root=\['a', 'b'\]\): .* data_root=./NAME$"):
        cli.key_values(["data_root=a,b"], "--cfg-options")


# ---------------------------------------------------------------- one line


def training(library, *words):
    forget_visualizers()
    cli.run_training(cli.train_parser().parse_args([str(word) for word in words]), library)


def scoring(library, *words):
    forget_visualizers()
    cli.run_test(cli.test_parser(library).parse_args([str(word) for word in words]), library)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fpn_alt_gvt_small_512x512_80k_ade20k.py"], "did you mean fpn_alt_gvt_s_512x512_80k_ade20k.py"),
        (["nothing.py"], "no such config"),
        (
            ["fpn_alt_gvt_s_512x512_80k_ade20k.py"],
            r"no image folder \(data/ade/ADEChallengeData2016/images/training\)",
        ),
        (["fpn_alt_gvt_s_512x512_80k_ade20k.py", "--gpus", "2"], "dist_train.sh CONFIG GPUS"),
        (
            ["fpn_alt_gvt_s_512x512_80k_ade20k.py", "--resume-from", "a", "--load-from", "b"],
            "both --resume-from .* and --load-from",
        ),
        (["fpn_alt_gvt_s_512x512_80k_ade20k.py", "--cfg-options", "model.backbone.pad"], "not KEY=VALUE"),
        (
            ["fpn_alt_gvt_s_512x512_80k_ade20k.py", "--cfg-options", "param_scheduler.7.end=3"],
            "no such key in the config",
        ),
    ],
)
def test_wrong_words(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *rest = words
    with pytest.raises(UserError, match=says) as caught:
        training("mmseg", ROOT / "segmentation" / "configs" / name, *rest)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_config_of_the_other_library(detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a config for mmdet"):
        training("mmseg", detector)


def test_a_config_that_is_no_program(tmp_path):
    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(UserError, match="cannot read the config"):
        training("mmseg", tmp_path / "broken.py")


def test_missing_annotations(detector, coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no annotation file \(.*annotations/none.json\)"):
        training("mmdet", detector, "--cfg-options", "train_dataloader.dataset.ann_file=annotations/none.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("img_suffix='.jpg'", "img_suffix='.bmp'"), "no images with labels"),
        (
            ("num_classes=3", "num_classes=4"),
            r"a head for another number of classes \(decode_head: 4\): the data set has 3",
        ),
        (("crop_size", "crop"), "crop"),
        (
            ('with_fpn("alt_gvt_demo")', 'with_fpn("alt_gvt_demo", depth=50)'),
            "cannot build from the config .*'depth'",
        ),
    ],
)
@pytest.mark.slow
def test_wrong_configs(change, says, ade, tmp_path):
    text = SEGMENTOR.replace('"', "'").replace(*(part.replace('"', "'") for part in change))
    assert text != SEGMENTOR.replace('"', "'")
    result = run([*python("mmseg", "train"), write(tmp_path / "wrong.py", text, data=ade)], tmp_path)
    assert result.returncode == 2 and re.search(says, result.stderr.splitlines()[-1]), result.stderr[-2000:]
    assert "Traceback" not in result.stderr


def test_missing_classification_weights(segmentor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file \(pretrained/x.pth\)"):
        training("mmseg", segmentor, "--cfg-options", "model.backbone.pretrained=pretrained/x.pth")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("option", ["--resume-from", "--load-from", None])
def test_nothing_in_a_checkpoint_can_run(option, segmentor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"meta": {"config": Hostile(tmp_path / "ran")}, "state_dict": {"backbone.x": torch.zeros(1)}},
        tmp_path / "hostile.pth",
    )
    start = (training, "mmseg", segmentor, option) if option else (scoring, "mmseg", segmentor)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        start[0](*start[1:], tmp_path / "hostile.pth")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def trained(segmentor, tmp_path_factory):
    """A training run of 4 iterations, with a score and a checkpoint after 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    output = ok(run([*python("mmseg", "train"), segmentor, "--work-dir", "run", "--seed", 3], folder))
    return folder / "run", output


def test_a_training_and_its_log(trained):
    folder, output = trained
    assert "total batch size 2 (1 processes x 2 images), the recipe's is 32" in output
    (log,) = folder.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["iter"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(
        line["lr"] == pytest.approx((1e-4 - 1e-6) * (1 - (line["iter"] - 1) / 80_000) ** 0.9 + 1e-6)
        for line in lines
        if "lr" in line
    )
    assert len([line for line in lines if "mIoU" in line]) == 2
    payload = checkpoint.load(str(folder / "iter_4.pth"))  # tensors and plain values only
    assert payload["meta"]["dataset_meta"]["classes"] == ["ant", "bee", "cat"] and payload["meta"]["seed"] == 3
    assert not [line for line in output.splitlines() if "UserWarning" in line or "Could not import" in line]


def test_a_score(trained, segmentor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, output = trained
    last = re.findall(r"mIoU: ([\d.]+)", output)[-1]
    words = ["--eval", "mIoU", "--out", "labels.pkl", "--show-dir", "shown", "--work-dir", "run"]
    scoring("mmseg", segmentor, folder / "iter_4.pth", *words)
    (log,) = tmp_path.glob("run/*/[0-9]*.json")
    assert f"{json.loads(log.read_text())['mIoU']:.4f}" == last
    assert len(list((tmp_path / "labels").glob("*.png"))) == 5 == len(list((tmp_path / "shown").rglob("*.png")))


@pytest.mark.slow
def test_a_resumed_training_has_the_same_bits(trained, segmentor, tmp_path):
    """For 0 and 2 workers, and by resume=True in the config; the text of a config inside the file does not run."""
    folder, _ = trained
    payload = checkpoint.load(str(folder / "iter_2.pth"))
    text = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    payload["meta"] |= {"cfg": text, "config": text}
    checkpoint.save(tmp_path / "iter_2.pth", payload)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    for workers, work_dir, words in (
        (0, "run0", ["--resume-from", "iter_2.pth", "--cfg-options"]),
        (2, "run2", ["--resume-from", "iter_2.pth", "--cfg-options"]),
        (0, "run", ["--cfg-options", "resume=True"]),
    ):
        words = ["--work-dir", work_dir, *words, f"train_dataloader.num_workers={workers}"]
        ok(run([*python("mmseg", "train"), segmentor, *words], tmp_path))
        assert same_weights(folder / "iter_4.pth", tmp_path / work_dir / "iter_4.pth")
    assert not (tmp_path / "ran").exists()
    assert not same_weights_but_iter(folder / "iter_2.pth", folder / "iter_4.pth")


def same_weights_but_iter(one, other):
    a, b = (checkpoint.load(str(path))["state_dict"] for path in (one, other))
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.slow
def test_two_processes(segmentor, tmp_path):
    """The official scripts: train, resume to the same bits, score as one process scores."""
    train, test = (
        ["bash", ROOT / "segmentation" / "dist_train.sh", segmentor, 2],
        ["bash", ROOT / "segmentation" / "dist_test.sh", segmentor],
    )
    ok(run([*train, "--work-dir", "run", "--seed", 3], tmp_path))
    ok(
        run(
            [
                *train,
                "--work-dir",
                "again",
                "--resume-from",
                "run/iter_2.pth",
                "--cfg-options",
                "train_dataloader.num_workers=1",
            ],
            tmp_path,
        )
    )
    assert same_weights(tmp_path / "run" / "iter_4.pth", tmp_path / "again" / "iter_4.pth")
    two = ok(run([*test, "run/iter_4.pth", 2, "--eval", "mIoU"], tmp_path))
    one = ok(run([*python("mmseg", "test"), segmentor, "run/iter_4.pth", "--eval", "mIoU"], tmp_path))
    scores = [re.findall(r"mIoU: ([\d.]+)", output) for output in (one, two)]
    assert len(scores[0]) == 1 and scores[0] == scores[1][:1]


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--aug-test"]])
def test_format_only_reads_no_labels(words, trained, ade, segmentor, tmp_path, monkeypatch):
    """With a label folder that does not exist, the labels written are those of a test with labels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "validation").symlink_to(ade / "images" / "validation")
    weights = trained[0] / "iter_4.pth"
    scoring("mmseg", segmentor, weights, "--out", "scored", *words)
    options = ["--cfg-options", "test_dataloader.dataset.data_root=./data"]
    scoring("mmseg", segmentor, weights, "--format-only", "--out", "labels", *words, *options)
    names = sorted(path.name for path in Path("labels").iterdir())
    assert names == [f"validation_{number}.png" for number in range(5)]
    assert all(Path("labels", name).read_bytes() == Path("scored", name).read_bytes() for name in names)


@pytest.mark.slow
def test_show_dir_names_each_image(trained, segmentor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scoring("mmseg", segmentor, trained[0] / "iter_4.pth", "--show-dir", "shown")
    assert sorted(path.name for path in Path("shown").iterdir()) == [f"validation_{number}.png" for number in range(5)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train_cfg.frobnicate=1"], r"^cannot build from the config \(train_cfg\): .*'frobnicate'.*; fix it$"),
        (["optim_wrapper.frobnicate=1"], r"^cannot build from the config \(optim_wrapper\): .*'frobnicate'.*; fix it$"),
        (["param_scheduler.0.frobnicate=1"], r"^cannot build from the config \(param_scheduler\): .*'frobnicate'"),
        (
            ["visualizer.vis_backends=[{'type':'TensorboardVisBackend'}]"],
            r"^a package of the config is not installed \(.*segmentor.py\): .*tensorboard.*; install it, or change",
        ),
    ],
)
def test_wrong_keys_and_missing_packages(words, says, segmentor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tensorboard", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    text = segmentor.read_text()
    if "visualizer" in words[0]:
        text, words = text + 'visualizer = dict(vis_backends=[dict(type="TensorboardVisBackend")])\n', []
    (tmp_path / "segmentor.py").write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        training("mmseg", tmp_path / "segmentor.py", *(["--cfg-options", *words] if words else []))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_upernet_with_a_batch_of_one(ade, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SEGMENTOR.replace("fpn_80k_ade20k", "upernet_160k_ade20k").replace("batch_size=2", "batch_size=1")
    text = text.replace("import with_fpn", "import upernet").replace(
        'with_fpn("alt_gvt_demo")', 'upernet("alt_gvt_demo", num_classes=3)'
    )
    text = text.replace("decode_head=dict(num_classes=3)", "").replace("**part, ", "**part, ")
    with pytest.raises(UserError, match=r"a single value \(train_dataloader.batch_size=1\): set it to 2 or more"):
        training("mmseg", write(tmp_path / "upernet.py", text, data=ade))
    assert json.loads(Path("work_dirs/upernet/status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_aug_test(trained, segmentor, tmp_path):
    folder, _ = trained
    output = ok(run([*python("mmseg", "test"), segmentor, folder / "iter_4.pth", "--aug-test"], tmp_path))
    assert re.search(r"mIoU: [\d.]+", output)


@pytest.mark.slow
def test_a_new_run_from_another_ones_weights(trained, ade, tmp_path):
    """Heads of another size keep their initial weights, with a log line; a test rejects them."""
    folder, _ = trained
    six = (
        SEGMENTOR.replace("num_classes=3", "num_classes=6")
        .replace("{classes}", "tuple('abcdef')")
        .replace("[0, 0, 250]]", "[0, 0, 250]] * 2")
    )
    config = write(tmp_path / "six.py", six, data=ade)
    words = [
        "--load-from",
        folder / "iter_4.pth",
        "--no-validate",
        "--cfg-options",
        "train_cfg.max_iters=1",
        "model.backbone.pretrained=missing.pth",
    ]
    output = ok(run([*python("mmseg", "train"), config, *words], tmp_path))
    assert (
        "randomly initialized, because the file has none of that shape: decode_head.conv_seg.weight, decode_head.conv_seg.bias"
        in output
    )
    test = run([*python("mmseg", "test"), config, folder / "iter_4.pth"], tmp_path)
    assert test.returncode == 2 and "do not fit the model" in test.stderr.splitlines()[-1]


@pytest.mark.slow
def test_pretrained_weights_are_read_for_a_new_run_only(segmentor, trained, tmp_path):
    checkpoint.save(tmp_path / "classifier.pth", {"model": timm.create_model("alt_gvt_demo").state_dict()})
    words = ["--no-validate", "--cfg-options", "train_cfg.max_iters=1", "model.backbone.pretrained=classifier.pth"]
    line = "tensors from classifier.pth; missing in the file, randomly initialized: norm_list; in the file, not used: "
    assert line in ok(run([*python("mmseg", "train"), segmentor, *words], tmp_path))
    (tmp_path / "classifier.pth").unlink()
    ok(run([*python("mmseg", "test"), segmentor, trained[0] / "iter_4.pth", "--cfg-options", words[-1]], tmp_path))


@pytest.mark.slow
def test_format_only_of_a_detector_without_annotations(coco, tmp_path, monkeypatch):
    """The boxes written are those of a test with annotations."""
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "retinanet.py", DETECTOR, data=coco, setting="retinanet_1x_pvt", masks=False)
    length = ["train_cfg.max_epochs=1", "train_dataloader.dataset.indices=2"]
    training("mmdet", config, "--work-dir", "run", "--no-validate", "--cfg-options", *length)
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    content.pop("annotations")
    Path("test.json").write_text(json.dumps(content))
    low, found = "model.test_cfg.score_thr=0.0", []
    for name, ann_file in (
        ("with", coco / "annotations" / "instances_val2017.json"),
        ("without", tmp_path / "test.json"),
    ):
        data = [f"test_dataloader.dataset.ann_file={ann_file}", f"test_evaluator.ann_file={ann_file}"]
        words = ["--format-only", "--eval-options", f"jsonfile_prefix={name}", "--cfg-options", low, *data]
        scoring("mmdet", config, "run/epoch_1.pth", *words)
        found.append(json.loads(Path(f"{name}.bbox.json").read_text()))
    assert found[0] == found[1] and len(found[0]) >= 3


@pytest.mark.slow
def test_a_detector(detector, tmp_path):
    """Train in float32 instead of float16, resume to the same bits, score boxes and masks by the README's mAP."""
    train = [*python("mmdet", "train"), detector, "--work-dir", "run"]
    output = ok(run([*train, "--seed", 3], tmp_path))
    assert "no GPU: training in float32" in output or torch.cuda.is_available()
    first = checkpoint.load(str(tmp_path / "run" / "epoch_2.pth"))
    ok(run([*train, "--resume-from", "run/epoch_1.pth", "--cfg-options", "train_dataloader.num_workers=2"], tmp_path))
    second = checkpoint.load(str(tmp_path / "run" / "epoch_2.pth"))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    test = [*python("mmdet", "test"), detector, "run/epoch_2.pth", "--cfg-options", "model.test_cfg.rcnn.score_thr=0.0"]
    output = ok(
        run([*test, "--eval", "mAP", "--out", "found.pkl", "--show-dir", "shown", "--show-score-thr", 0], tmp_path)
    )
    assert "--eval mAP: bbox and segm" in output and re.search(r"coco/bbox_mAP: .*coco/segm_mAP: ", output)
    assert (tmp_path / "found.pkl").is_file() and len(list((tmp_path / "shown").glob("*.png"))) == 3
    ok(run([*test, "--format-only"], tmp_path))
    assert json.loads((tmp_path / "work_dirs" / "detector" / "results.bbox.json").read_text())


@pytest.mark.slow
def test_two_processes_of_a_detector(coco, tmp_path):
    config = write(tmp_path / "retinanet.py", DETECTOR, data=coco, setting="retinanet_1x_pvt", masks=False)
    ok(run(["bash", ROOT / "detection" / "dist_train.sh", config, 2, "--work-dir", "run"], tmp_path))
    words = ["--eval", "mAP", "--cfg-options", "model.test_cfg.score_thr=0.0"]
    output = ok(run(["bash", ROOT / "detection" / "dist_test.sh", config, "run/epoch_2.pth", 2, *words], tmp_path))
    assert "--eval mAP: bbox\n" in output and "coco/bbox_mAP: " in output


@pytest.mark.slow
def test_a_resumed_detector_of_two_processes_has_the_same_bits(detector, tmp_path):
    """From the end of an epoch, and with workers where there were none."""
    train = ["bash", ROOT / "detection" / "dist_train.sh", detector, 2, "--no-validate"]
    ok(run([*train, "--work-dir", "run", "--seed", 3], tmp_path))
    words = [
        "--work-dir",
        "again",
        "--resume-from",
        "run/epoch_1.pth",
        "--cfg-options",
        "train_dataloader.num_workers=1",
    ]
    ok(run([*train, *words], tmp_path))
    assert same_weights(tmp_path / "run" / "epoch_2.pth", tmp_path / "again" / "epoch_2.pth")
    assert not same_weights_but_iter(tmp_path / "run" / "epoch_1.pth", tmp_path / "run" / "epoch_2.pth")


@pytest.mark.slow
def test_the_official_commands_for_pcpvt_l(ade, tmp_path):
    """From inside segmentation/, the README's command with two processes, and options that make it as small as the
    toy.
    """
    config = "configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py"
    data = [
        f"{part}_dataloader.{key}"
        for part in ("train", "test")
        for key in (f"dataset.data_root={ade}", "num_workers=0")
    ]
    small = [
        "model.data_preprocessor.size=(64,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "test_dataloader.dataset.pipeline.1.scale=(128,64)",
    ]
    short = [
        "train_cfg.max_iters=2",
        "default_hooks.checkpoint.save_optimizer=False",
        "default_hooks.logger.interval=1",
        "model.backbone.pretrained=None",
    ]
    options = ["--work-dir", tmp_path / "run", "--cfg-options", *data, *small, *short]
    output = ok(run(["bash", "dist_train.sh", config, 2, "--no-validate", *options], ROOT / "segmentation"))
    assert "total batch size 4 (2 processes x 2 images), the recipe's is 16" in output
    assert len(re.findall(r"Iter\(train\) \[[12]/2\].* loss: \d", output)) == 2
    output = ok(
        run(
            ["bash", "dist_test.sh", config, tmp_path / "run" / "iter_2.pth", 2, "--eval", "mIoU", *options],
            ROOT / "segmentation",
        )
    )
    assert re.search(r"mIoU: \d", output)
