"""tools/attention.py: maps of LSA and GSA, rollout, queries, figures, and what it refuses."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import gvt
from gvt_ops import accelerate
from tools import attention, trained, views
from tools.attention import PATCHES, attention_maps, rollout
from training import checkpoint, outputs
from training.errors import UserError, exit_code

NAMES = ("alt_gvt_demo", "pcpvt_tiny")
OFFICIAL = ("alt_gvt_small", "pcpvt_small")
SIZES = ((64, 64), (70, 98), (224, 224), (33, 200))  # at 64, 70 x 98 and 33 x 200 pixels windows have padding
TINY = gvt.Variant((16, 32, 48, 64), (1, 2, 3, 4), (2, 2, 2, 2), (2, 1, 1, 1))
PARTS = ("stage1", "stage2", "stage3", "stage4", "rollout")


def build(name, **options):
    torch.manual_seed(0)
    variant = gvt.VARIANTS.get(name, TINY)
    model = gvt.Twins(variant, num_classes=5, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that attention is far from uniform
    return model


def image(size, seed=1):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the maps


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in OFFICIAL)])
def test_maps_are_those_of_the_model_that_predicts(name, size):
    """Each row's sum is 1, padding is no key, and the logits of the same pass are those of the fused model."""
    model, x, seen = accelerate(build(name)), image(size), []
    with torch.inference_mode():
        expected = model(x)
    hook = model.register_forward_hook(lambda *call: seen.append(call[-1]))
    maps = attention_maps(model, x[0])
    hook.remove()
    assert (seen[0] - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert len(maps) == sum(len(blocks) for blocks in model.blocks)
    for each in maps:
        attn = model.blocks[each.stage][each.block].attn
        assert each.local == isinstance(attn, gvt.LocalAttention) and each.weights.shape[1] == attn.heads
        keys = each.weights.shape[-1]
        assert (each.weights.sum(-1) - 1).abs().max() < 1e-5 and (keys == 1 or each.weights.max() > 1.2 / keys)
        assert each.tokens == tuple(side // PATCHES[each.stage] for side in size)
        maps_of_queries = each.of((each.tokens[0] - 1, 0))
        windows = each.weights.shape[0]
        assert torch.allclose(maps_of_queries.sum((1, 2)), torch.full((attn.heads,), float(windows)), atol=1e-4)


def test_the_model_is_afterwards_as_it_was():
    model = build("alt_gvt_demo", attn_drop_rate=0.5).train()
    model.blocks[1][0].attn.fused_attn = False
    first, second = attention_maps(model, image((64, 64))), attention_maps(model, image((64, 64)))
    assert all(torch.equal(one.weights, other.weights) for one, other in zip(first, second))  # no dropout
    fused = [block.attn.fused_attn for blocks in model.blocks for block in blocks]
    assert model.training and fused == [True, True, False, True, True, True, True, True]
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (70, 98)])
def test_a_local_map_is_attention_computed_by_hand(size):
    """In the window of the query softmax(q k / sqrt(D)) over the tokens of the map; in others of the same place."""
    model, x, inputs = build("alt_gvt_demo"), image(size), []
    attn = model.blocks[1][0].attn
    attn.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    each = next(each for each in attention_maps(model, x) if (each.stage, each.block) == (1, 0))
    H, W = each.tokens
    q, k, _ = attn.qkv(inputs[0]).reshape(H, W, 3, attn.heads, -1).unbind(2)
    for query in ((0, 0), (H - 1, W - 1), (3, 5)):
        found = each.of(query)
        for top, left in itertools.product(range(0, H, 7), range(0, W, 7)):
            row, column = min(top + query[0] % 7, H - 1), min(left + query[1] % 7, W - 1)
            keys = k[top : top + 7, left : left + 7]
            scores = torch.einsum("hd,rchd->hrc", q[row, column], keys) * q.shape[-1] ** -0.5
            expected = scores.flatten(1).softmax(1).reshape(scores.shape)
            assert torch.allclose(found[:, top : top + 7, left : left + 7], expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_global_map_is_attention_computed_by_hand(name):
    """A key's weight is shared by its region; tokens beyond the last whole region (70 x 98) have none."""
    model, inputs = build(name), []
    attn = model.blocks[0][1].attn
    attn.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    each = attention_maps(model, image((70, 98)))[1]
    assert (each.kind, each.tokens, each.cell) == ("GSA", (17, 24), (8, 8))
    x = inputs[0]
    regions = attn.norm(attn.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))[0]  # (2, 3, C)
    q = attn.q(x[0, 9, 20]).reshape(attn.heads, -1)
    k = attn.kv(regions)[..., : x.shape[-1]].reshape(2, 3, attn.heads, -1)
    scores = torch.einsum("hd,rchd->hrc", q, k) * q.shape[-1] ** -0.5
    expected = scores.flatten(1).softmax(1).reshape(scores.shape)
    found = each.of((9, 20))
    assert torch.allclose(found[:, ::8, ::8][:, :2] * 64, expected, atol=1e-6)
    assert torch.equal(found[:, 16], torch.zeros(attn.heads, 24))
    assert torch.allclose(found[:, 7, 15], found[:, 0, 8])


def test_too_large_maps_are_refused_before_anything_is_computed():
    message = r"attention maps of \d+ GiB \(8192 x 8192 pixels\): shrink the image, 4 GiB are the limit"
    with pytest.raises(UserError, match=message):
        attention_maps(build("pcpvt_tiny"), torch.empty(1, device="meta").expand(3, 8192, 8192))


# ---------------------------------------------------------------- rollout


def matrix(each):
    """The attention of a block as a matrix of tokens x tokens, by one query after the other."""
    (H, W), (h, w), rows = each.tokens, each.cell, []
    for row, column in itertools.product(range(H), range(W)):
        heat = each.of((row, column)).mean(0)
        if each.local:  # of the query's window only
            mask, top, left = torch.zeros(H, W), row // h * h, column // w * w
            mask[top : top + h, left : left + w] = 1
            heat = heat * mask
        rows.append(heat.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("size", [(64, 64), (70, 98)])
@pytest.mark.parametrize("name", NAMES)
def test_rollout_is_the_product_of_whole_matrices(name, size):
    model = build(name)
    maps = attention_maps(model, image(size))
    share = torch.full((maps[-1].tokens[0] * maps[-1].tokens[1],), 1 / (maps[-1].tokens[0] * maps[-1].tokens[1]))
    expected, tokens = {}, maps[-1].tokens
    for each in reversed(maps):
        if each.tokens != tokens:
            finer = torch.zeros(each.tokens)
            for row, column in itertools.product(range(tokens[0] * 2), range(tokens[1] * 2)):
                finer[row, column] = share.reshape(tokens)[row // 2, column // 2] / 4
            share, tokens = finer.flatten(), each.tokens
        share = share @ (torch.eye(len(share)) + matrix(each)) / 2
        expected[each.stage] = share.reshape(tokens)
    found = rollout(maps)
    assert len(found) == 4 and all(abs(float(found[stage].sum()) - 1) < 1e-4 for stage in range(4))
    assert all(torch.allclose(found[stage], expected[stage], atol=1e-6) for stage in range(4))


# ---------------------------------------------------------------- views and queries


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint as main.py writes it, of a model that reads 64 x 64 pixels."""
    path = tmp_path_factory.mktemp("weights") / "checkpoint_best.pth"
    args = dict(model="alt_gvt_demo", input_size=64, eval_crop_ratio=0.875)
    checkpoint.save(
        path, dict(model=build("alt_gvt_demo").state_dict(), args=args, class_names=["ant", "bee", "cat", "dog", "elk"])
    )
    return path


@pytest.fixture
def made(weights):
    return trained.load(str(weights))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("width, height", [(64, 64), (200, 100), (90, 333), (500, 77)])
def test_a_point_of_the_original_is_found_in_what_the_model_sees(made, width, height, whole):
    """The image is black but for a square of white: its middle is where the model sees it."""
    for x, y in ((width / 2, height / 2), (width / 2 - 20, height / 2 + 16)):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[int(y) - 4 : int(y) + 4, int(x) - 4 : int(x) + 4] = 255
        seen = views.view(made, Image.fromarray(pixels), whole=whole)
        bright = seen.pixels.mean(2) + 1e-9
        rows, columns = np.mgrid[: bright.shape[0], : bright.shape[1]] + 0.5
        center = (bright * columns).sum() / bright.sum(), (bright * rows).sum() / bright.sum()
        assert np.allclose(seen.to_view((int(x), int(y))), center, atol=0.6)
        assert np.allclose(seen.to_original(seen.to_view((x, y))), (x, y))


@pytest.mark.parametrize("size", [32, 48])
def test_small_models_see_the_shorter_side(made, size):
    """Up to 32 pixels an image is fitted, above it resized and cropped."""
    left, top, right, bottom = views.seen_box(100, 60, size, 0.875)
    share = 1 if size <= 32 else size / int(size / 0.875)
    assert (right - left, bottom - top) == pytest.approx((60 * share, 60 * share), rel=0.03)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((50, 30), abs=1.5)


def test_the_most_confident_position_is_where_the_class_is(made):
    """By brute force over the tokens of the last stage."""
    x = image((128, 192))
    top, probability, (column, row) = attention.predict(made.model, x)
    with torch.inference_mode():
        assert probability == pytest.approx(made.model(x).softmax(1)[0, top].item())
        tokens = made.model.norm(made.model.forward_maps(x, (3,))[0])[0]  # (4, 6, C)
        each = {(r, c): made.model.head(tokens[r, c]).softmax(0)[top].item() for r, c in np.ndindex(tokens.shape[:2])}
    assert (int(row) // 32, int(column) // 32) == max(each, key=each.get) and (column % 32, row % 32) == (16, 16)


def test_a_query_is_the_token_that_holds_it():
    maps = attention_maps(build("alt_gvt_demo"), image((70, 98)))
    assert attention.token_at((0.0, 0.0), maps[0]) == (0, 0)
    assert attention.token_at((11.9, 4.1), maps[0]) == (1, 2)
    assert attention.token_at((97.9, 69.9), maps[0]) == (16, 23)  # the map ends at 68 x 96 pixels


@pytest.mark.parametrize("text", ["5", "a,b", "1,2,3", "nan,1", "inf,1", ""])
def test_queries_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not X,Y in pixels"):
        attention.point(text)


# ---------------------------------------------------------------- the command


def run(*words):
    return exit_code("attention.py", attention.main, [str(word) for word in words])


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "cat.png"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 98, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def quick(monkeypatch):
    """Empty figures in no time, where their content does not matter."""
    monkeypatch.setattr(attention, "draw", lambda *_: (Figure((1, 1)) for _ in PARTS))


def test_figures_of_each_stage_and_rollout(weights, photo, tmp_path, capsys):
    (tmp_path / "no.png").write_text("no image")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.png").symlink_to("nowhere.png")
    Image.new("L", (30, 5000)).save(tmp_path / "folder" / "too_small.png")
    images = (photo, tmp_path / "n*.png", tmp_path / "folder")
    out = tmp_path / "a" / "figures"
    assert run(*images, "--weights", weights, "--output", out, "--whole") == 1
    assert {path.name for path in out.iterdir()} == {f"cat_{part}.png" for part in PARTS}
    for path in out.iterdir():
        with Image.open(path) as drawn:
            assert drawn.format == "PNG" and drawn.width >= 700
    said = capsys.readouterr()
    assert f"cat_{{{','.join(PARTS)}}}.png" in said.out and said.out.count("\n") == 1
    link, unreadable, small = said.err.splitlines()
    assert link.startswith("attention.py: error: a link to nothing (") and "link.png" in link
    assert unreadable.startswith("attention.py: error: cannot read an image (") and "no.png" in unreadable
    assert "too_small.png: an image that is too small for --whole (30 x 5000)" in small


def test_the_figure_has_a_panel_for_each_head_and_the_windows(made):
    seen = views.view(made, Image.new("RGB", (98, 70)), whole=True)
    maps = attention_maps(made.model, seen.x)[2:4]  # of stage 2: LSA and GSA, 2 heads, 8 x 12 tokens
    figure = attention.draw_stage(seen, maps, {"the center": (49, 35), "another": (1, 1)}, "title")
    assert [axis.get_ylabel() for axis in figure.axes] == ["block 1\nLSA", "block 2\nGSA"] * 2
    titles = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert titles == ["image", "mean", "head 1", "head 2"]
    heats = [image.get_array() for image in figure.axes[0].images if image.get_array().shape == maps[0].tokens]
    heads = maps[0].of((35 // 8, 49 // 8))
    expected = torch.stack([heads.mean(0), *heads])
    for top, left in itertools.product((0, 7), (0, 7)):
        window = expected[:, top : top + 7, left : left + 7]
        window /= window.amax((1, 2), keepdim=True)  # a window of few tokens is not brighter than others
    assert len(heats) == 3 and np.allclose(heats, expected)
    lines = [line for group in figure.axes[0].collections for line in group.get_segments()]
    assert len(lines) == 4 * 2 and [len(axis.collections) for axis in figure.axes] == [4, 0, 4, 0]
    assert [line[0][0] for line in map(np.asarray, lines[:1])] == [56]  # after 7 tokens of 8 pixels


def test_pcpvt_says_that_it_has_no_windows():
    model = build("pcpvt_tiny")
    seen = views.View(image((64, 64)), np.zeros((64, 64, 3)), (0, 0, 64, 64))
    figures = list(attention.draw(model, seen, {"given": (3, 3)}, "x.png"))
    assert len(figures) == 5
    assert "stage 1, 16 x 16 tokens: PCPVT has GSA (spatial reduction) only" in figures[0].get_suptitle()


def test_one_image_that_the_query_misses_and_one_that_it_does_not(weights, photo, tmp_path, capsys, quick):
    Image.new("RGB", (400, 300)).save(tmp_path / "wide.png")
    words = ("--weights", weights, "--output", tmp_path / "out", "--query", "390,150")
    assert run(photo, tmp_path / "wide.png", *words) == 1
    assert not list((tmp_path / "out").iterdir())
    errors = capsys.readouterr().err.splitlines()
    assert "wide.png: outside of what the model sees (390,150): choose x from" in errors[1] and len(errors) == 2
    assert run(photo, tmp_path / "wide.png", *words, "--whole") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"wide_{part}.png" for part in PARTS}


@pytest.mark.parametrize("size", [(1, 1), (40, 1), (3, 400)])
def test_tiny_and_narrow_images(made, size):
    assert views.view(made, Image.new("RGB", size)).x.shape == (1, 3, 64, 64)


def test_an_image_that_would_be_resized_to_too_many_pixels(made):
    message = r"too narrow an image \(20000 x 1 pixels, 73 x 1460000 once resized\): crop it, or raise --max-pixels"
    with pytest.raises(UserError, match=message):
        views.view(made, Image.new("RGB", (20000, 1)), max_pixels=10**8)


def test_images_are_upright_by_their_exif_orientation(made, tmp_path):
    """So that a query is in pixels of the image as viewers show it."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (98, 70)).save(tmp_path / "turned.jpg", exif=exif)
    args = argparse.Namespace(images=[str(tmp_path)], whole=True, max_pixels=10**6)
    ((path, name, seen),) = views.Views(args, made, lambda seen: None, program="x")
    assert (path, name, seen.size) == (str(tmp_path / "turned.jpg"), "turned", (70, 98))


def test_words_that_name_no_image(weights, tmp_path, capsys):
    for word, expected in ((tmp_path, "no images ("), (tmp_path / "x.png", "no such image or folder (")):
        assert run(word, "--weights", weights, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert expected in error and str(word) in error and error.count("\n") == 1


def test_what_exists_is_not_overwritten(weights, photo, tmp_path, capsys, quick):
    (tmp_path / "cat_stage3.png").write_text("mine")
    assert run(photo, "--weights", weights, "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert "1 of 5 figures exist already, cat_stage3.png the first (--output" in error and "--overwrite" in error
    assert (tmp_path / "cat_stage3.png").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    assert run(photo, "--weights", weights, "--output", tmp_path, "--overwrite") == 0
    assert (tmp_path / "cat_stage3.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_cannot_be_made_and_a_disk_that_is_full(weights, photo, tmp_path, capsys, quick, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run(photo, "--weights", weights, "--output", tmp_path / "file" / "x") == 2
    assert "cannot make the folder (--output" in capsys.readouterr().err

    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "atomic_write", full)
    assert run(photo, "--weights", weights, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cat_stage1.png): No space left on device; is there room" in error
    assert not list((tmp_path / "out").iterdir())


def test_weights_that_cannot_be_looked_into(photo, tmp_path, capsys):
    import timm

    other = timm.create_model("resnet18", num_classes=2)
    checkpoint.save(tmp_path / "other.pth", dict(model=other.state_dict(), args=dict(model="resnet18")))
    headless = {name: value for name, value in build("alt_gvt_demo").state_dict().items() if "head" not in name}
    checkpoint.save(tmp_path / "headless.pth", dict(model=headless))
    for name in ("missing.pth", "other.pth", "headless.pth"):
        assert run(photo, "--weights", tmp_path / name, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("attention.py: error: ") and name in error
    assert not (tmp_path / "out").exists()
