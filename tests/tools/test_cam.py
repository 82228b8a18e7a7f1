"""tools/cam.py: the eleven methods through grad-cam, where their heat lies, classes, and what it refuses."""

import argparse
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import gvt
from tools import cam
from training import checkpoint
from training.errors import UserError, exit_code

CLASSES = ["red", "green", "blue"]
TINY = gvt.Variant((16, 24, 32, 48), (1, 1, 2, 2), (2, 2, 2, 2), (1, 1, 1, 2), window=7)
FAITHFUL = [name for name in cam.METHODS if not name.startswith(("Eigen", "KPCA"))]  # others have an arbitrary sign


def squares(count, *, size, side, seed, each=1):
    """Gray noise with `each` squares of one color on it -> images, colors, and each image's mask of each color."""
    random = np.random.default_rng(seed)
    images = random.normal(0, 0.3, (count, 3, size, size)).astype(np.float32)
    colors = np.stack([random.permutation(3)[:each] for _ in range(count)])
    masks = np.zeros((count, 3, size, size), bool)
    for image, shown, mask in zip(images, colors, masks):
        for number, color in enumerate(shown):
            low, high = number * size // each, (number + 1) * size // each - side
            top, left = random.integers(0, size - side + 1), random.integers(low, high + 1)
            mask[color, top : top + side, left : left + side] = True
            image[color][mask[color]] += 2
    return torch.from_numpy(images), torch.from_numpy(colors), masks


@pytest.fixture(scope="module")
def model():
    """A small Twins that has learned to tell the color of a square."""
    torch.manual_seed(0)
    model = gvt.Twins(TINY, num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    for step in range(60):
        images, colors, _ = squares(16, size=64, side=40, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), colors[:, 0]).backward()
        optimizer.step()
    model.eval().zero_grad()
    images, colors, _ = squares(32, size=64, side=40, seed=1000)
    with torch.no_grad():
        assert (model(images).argmax(1) == colors[:, 0]).float().mean() > 0.9
    return model


@pytest.fixture(autouse=True)
def library():
    return pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed: make extra")


# ---------------------------------------------------------------- where the heat lies


@pytest.mark.parametrize("method", FAITHFUL)
def test_heat_lies_on_the_object_more_than_off_it(model, method):
    images, colors, masks = squares(6, size=128, side=48, seed=7)
    on, off = [], []
    for image, color, mask in zip(images, colors, masks):
        heat = cam.heat_map(model, image[None], target=int(color), method=method, stage=3)
        assert heat.shape == (128, 128) and heat.min() >= 0 and 0.99 < heat.max() <= 1
        on.append(heat[mask.any(0)].mean())
        off.append(heat[~mask.any(0)].mean())
    assert np.mean(on) > np.mean(off) + 0.1 and sum(a > b for a, b in zip(on, off)) >= 5


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "AblationCAM"])
def test_earlier_stages_too(model, method):
    images, colors, masks = squares(4, size=128, side=48, seed=8)
    for image, color, mask in zip(images, colors, masks):
        heat = cam.heat_map(model, image[None], target=int(color), method=method, stage=2)
        assert heat[mask.any(0)].mean() > heat[~mask.any(0)].mean() + 0.1


@pytest.mark.parametrize("method", ["GradCAM", "HiResCAM", "LayerCAM", "AblationCAM"])
def test_heat_for_each_of_two_objects_lies_on_that_one(model, method):
    images, colors, masks = squares(4, size=128, side=48, seed=9, each=2)
    right = 0
    for image, shown, mask in zip(images, colors.tolist(), masks):
        for color, other in (shown, shown[::-1]):
            heat = cam.heat_map(model, image[None], target=color, method=method, stage=3)
            right += heat[mask[color]].mean() > heat[mask[other]].mean()
    assert right == 8


@pytest.mark.parametrize("size", [(128, 128), (130, 190)])
def test_grad_cam_of_the_last_stage_is_the_class_activation_map(model, size):
    """Its classifier is linear in the mean of the normed tokens: each token's own logit, upsampled."""
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(3))
    found = cam.heat_map(model, x, target=1, method="GradCAM", stage=3)
    with torch.no_grad():
        tokens = model.norm(model.forward_maps(x, (3,))[0])
        logits = F.relu(tokens @ model.head.weight[1])[:, None]
    low = (logits - logits.min()) / (logits.max() - logits.min())
    high = F.interpolate(low, size, mode="bilinear", align_corners=False)[0, 0]
    expected = (high - high.min()) / (high.max() - high.min())
    assert np.allclose(found, expected, atol=1e-4)


def test_a_negative_logit_does_not_turn_the_map_of_ablations_around(model):
    images, colors, masks = squares(1, size=128, side=48, seed=7)
    shifted, color = gvt.Twins(TINY, num_classes=3).eval(), int(colors[0, 0])
    shifted.load_state_dict(model.state_dict())
    with torch.no_grad():
        shifted.head.bias -= 100
    options = dict(target=color, method="AblationCAM", stage=3)
    maps = [cam.heat_map(each, images, **options) for each in (model, shifted)]
    assert np.allclose(*maps, atol=1e-3) and maps[0][masks[0, color]].mean() > 0.5


@pytest.mark.parametrize("method", cam.METHODS)
def test_every_method_runs_and_leaves_the_model_as_it_was(model, method):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    heat = cam.heat_map(model, torch.randn(1, 3, 64, 98), target=0, method=method, stage=1)
    assert heat.shape == (64, 98) and np.isfinite(heat).all()
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", cam.METHODS)
@pytest.mark.parametrize("name", ["alt_gvt_demo", "pcpvt_small"])
def test_every_method_on_real_models(name, method):
    model = gvt.Twins(gvt.VARIANTS[name], num_classes=5).eval()
    heat = cam.heat_map(model, torch.randn(1, 3, 64, 64), target=2, method=method, stage=3)
    assert heat.shape == (64, 64) and np.isfinite(heat).all()


def test_the_stage_is_the_last_with_enough_tokens():
    sizes = {(224, 224): 3, (128, 300): 3, (127, 300): 2, (64, 64): 2, (32, 32): 1, (32, 500): 1}
    assert {size: cam.default_stage(size) for size in sizes} == sizes


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("method", cam.METHODS)
def test_methods_have_the_names_of_the_library_in_any_case(method, library):
    assert issubclass(getattr(library, method), library.base_cam.BaseCAM)
    assert cam.method_name(method) == cam.method_name(method.lower()) == method
    assert cam.method_name("gradcam++") == "GradCAMPlusPlus" and cam.method_name("kpca-cam") == "KPCA_CAM"
    assert len(cam.METHODS) == 11


@pytest.mark.parametrize("name, reason", [("FullGrad", "takes every layer"), ("shapleycam", "second derivatives")])
def test_methods_that_do_not_work_are_refused_with_the_reason(name, reason):
    with pytest.raises(argparse.ArgumentTypeError, match=f"does not work with these models: .*{reason}"):
        cam.method_name(name)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of ShapleyCAM, while it is deleted
def test_the_reasons_are_still_true(library):
    """When one of them works, offer it."""
    model, x = gvt.Twins(gvt.VARIANTS["alt_gvt_demo"], num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    for name, error in (("FullGrad", "operands could not be broadcast"), ("ShapleyCAM", "derivative for .*attention")):
        with pytest.raises((ValueError, RuntimeError), match=error):
            getattr(library, name)(model, [model.blocks[3][-1].norm1], cam.to_channels_first)(x, None)
    gc.collect()


def test_a_method_that_is_none(capsys):
    with pytest.raises(SystemExit) as stopped:
        cam.main(["x.png", "--weights", "w.pth", "--output", "out", "--method", "CamCam"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "'CamCam' is none of GradCAM, HiResCAM" in said and said.count("\n") == 1


def test_a_class_is_a_name_or_else_an_index():
    names = ["3", "0", "tench, Tinca tinca", "goldfish"]
    assert [cam.class_index(text, names) for text in ("3", "0", "2", "goldfish", "tench, Tinca tinca")] == [
        0,
        1,
        2,
        3,
        2,
    ]
    for text, advice in (
        ("goldfsh", "did you mean goldfish"),
        ("4", "an index from 0 to 3"),
        ("-1", "index from 0 to 3"),
    ):
        with pytest.raises(UserError, match=rf"no such class \(--class {text}\): .*{advice}"):
            cam.class_index(text, names)


# ---------------------------------------------------------------- the command


def run(*words):
    return exit_code("cam.py", cam.main, [str(word) for word in words])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "checkpoint_best.pth"
    torch.manual_seed(0)
    state = gvt.Twins(gvt.VARIANTS["alt_gvt_demo"], num_classes=3).state_dict()
    args = dict(model="alt_gvt_demo", input_size=64, eval_crop_ratio=0.875)
    checkpoint.save(path, dict(model=state, args=args, class_names=CLASSES))
    return path


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 98, 3), dtype=np.uint8)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_the_figure_and_its_line(weights, photo, tmp_path, capsys):
    (tmp_path / "no.png").write_text("no image")
    out = tmp_path / "out"
    assert run(photo, tmp_path / "no.png", "--weights", weights, "--output", out, "--class", "blue") == 1
    assert [path.name for path in out.iterdir()] == ["cat_GradCAM.png"]
    with Image.open(out / "cat_GradCAM.png") as drawn:
        assert drawn.format == "PNG" and drawn.width >= 700
    said = capsys.readouterr()
    assert said.out.startswith(f"{photo}: ") and "GradCAM at stage 3 for blue" in said.out and said.out.count("\n") == 1
    assert said.err.startswith("cam.py: error: cannot read an image (") and said.err.count("\n") == 1
    assert run(photo, "--weights", weights, "--output", out) == 2
    assert "1 of 1 figures exist already, cat_GradCAM.png the first" in capsys.readouterr().err
    assert run(photo, "--weights", weights, "--output", out, "--overwrite", "--stage", "2", "--method", "EigenCAM") == 0
    assert "EigenCAM at stage 2 ->" in capsys.readouterr().out


def test_a_class_that_the_method_does_not_ask_for(weights, photo, tmp_path, capsys):
    words = ("--weights", weights, "--output", tmp_path / "out", "--method", "EigenCAM", "--class", "red")
    assert run(photo, *words) == 2
    assert "no effect (--class red): EigenCAM is of no class" in capsys.readouterr().err


def test_wrong_weights_and_classes(weights, photo, tmp_path, capsys):
    headless = {name: value for name, value in checkpoint.load(weights)["model"].items() if "head" not in name}
    checkpoint.save(tmp_path / "headless.pth", dict(model=headless))
    for given, expected in (("missing.pth", "no such file"), ("headless.pth", "no classifier")):
        assert run(photo, "--weights", tmp_path / given, "--output", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1
    assert run(photo, "--weights", weights, "--output", tmp_path / "out", "--class", "gren") == 2
    assert "no such class (--class gren): did you mean green" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_library_one_line(weights, photo, tmp_path, capsys, monkeypatch):
    real = cam.need.__globals__["importlib"].import_module

    def missing(name, *rest):
        if name.startswith(cam.LIBRARY):
            raise ModuleNotFoundError(f"No module named {name!r}", name=cam.LIBRARY)
        return real(name, *rest)

    monkeypatch.setattr(cam.need.__globals__["importlib"], "import_module", missing)
    assert run(photo, "--weights", weights, "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said == (
        "cam.py: error: an optional package is missing (grad-cam): run make extra, or pip install grad-cam==1.5.7\n"
    )
    with pytest.raises(SystemExit) as stopped:
        cam.main(["--help"])
    assert stopped.value.code == 0 and "GradCAM (the default)" in capsys.readouterr().out
