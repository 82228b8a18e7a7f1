"""tools.embed: pooled features of images, drawn in two dimensions, and nearest neighbors."""

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image

import gvt
from tools import embed, sheets, user_images
from training.errors import UserError, exit_code


def run(*words) -> int:
    return exit_code("embed.py", embed.main, [*(str(word) for word in words), "--device", "cpu"])


def test_features_paths_and_labels(toy, classifier, tmp_path, capsys):
    make_images(tmp_path, classes=("unknown",), each=1)
    out = tmp_path / "x.npz"
    words = (toy / "val" / "ant", toy / "val" / "dog", tmp_path / "unknown")
    assert run(*words, "--weights", classifier, "--output", out) == 0
    with np.load(out) as file:
        found = dict(file)
    assert list(found) == ["features", "paths", "labels", "predictions"]
    assert found["features"].shape == (52, 256) and found["features"].dtype == np.float32
    assert found["labels"].tolist() == ["ant"] * 26 + ["dog"] * 25 + [""]
    model, transform, classes = gvt.load(classifier)
    for number in (0, 30, 51):
        with Image.open(found["paths"][number]) as image, torch.no_grad():
            tokens = model.forward_features(transform(image)[None])
            pooled = model.forward_head(tokens, pre_logits=True)[0]
            label = classes[model(transform(image)[None]).argmax()]
        assert np.allclose(found["features"][number], pooled, atol=1e-5)
        assert found["predictions"][number] == label
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["52 images: 256 features each, alt_gvt_demo on cpu", str(out)]


def two_groups(count=20):
    """Features of two groups far apart, and their names."""
    random = np.random.default_rng(0)
    features = random.normal(0, 0.1, (2 * count, 8)).astype(np.float32)
    features[:count, 0] += 5
    features[count:, 1] += 5
    labels = ["a $x$"] * count + ["b"] * count
    return embed.Embeddings(features, [f"/x/{k}.png" for k in range(2 * count)], labels, ["c"] * 2 * count, 0)


@pytest.mark.parametrize("method", ["pca", pytest.param("tsne", marks=pytest.mark.slow)])
def test_groups_stay_apart_in_two_dimensions(method, tmp_path):
    found = two_groups()
    points = embed.projected(found.features, method)
    assert points.shape == (40, 2) and np.array_equal(points, embed.projected(found.features, method))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    assert distance[:20, :20].max() < distance[:20, 20:].min()
    figure = embed.draw(found, method)
    assert "of 40 images, by label" in figure.axes[0].get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"a \$x\$", "b"]
    figure.savefig(tmp_path / "x.png")
    unlabeled = embed.Embeddings(found.features, found.paths, ["", *found.labels[1:]], found.predictions, 0)
    assert "by prediction" in embed.draw(unlabeled, method).axes[0].get_title()


def test_many_classes_share_a_color():
    found = two_groups()
    names = [f"class {number:02d}" for number in range(40)]
    figure = embed.draw(embed.Embeddings(found.features, found.paths, names, names, 0), "pca")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*names[:20], "20 others"]


def test_nearest_neighbors_are_by_angle_and_never_the_image_itself():
    features = np.array([[1, 0], [10, 1], [0, 1], [1, 1]], np.float32)
    found = embed.Embeddings(features, [f"/x/{k}.png" for k in range(4)], [""] * 4, ["a"] * 4, 0)
    query = embed.Embeddings(features[:1] * 3, ["/x/../x/0.png"], [""], ["a"], 0)
    ((first, second, third),) = embed.nearest(query, found)
    assert (first[0], second[0], third[0]) == (1, 3, 2)
    assert [first[1], second[1], third[1]] == pytest.approx([10 / 101**0.5, 0.5**0.5, 0], abs=1e-6)


def test_all_files_at_once(toy, classifier, tmp_path, capsys):
    names = ("--output", tmp_path / "x.npz", "--plot", tmp_path / "p.png", "--sheet", tmp_path / "s.png")
    words = (toy / "val", "--weights", classifier, *names, "--method", "pca", "--neighbors")
    queries = toy / "val" / "ant" / "3.png", toy / "train" / "dog" / "1.png"
    assert run(*words, *queries) == 0
    out = capsys.readouterr().out
    for query in queries:
        (line,) = (line for line in out.splitlines() if line.startswith(f"{query}: "))
        assert line.count(".png") == 7 and line.count(str(query)) == 1
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width == 7 * (sheets.CELL + sheets.MARGIN) + sheets.MARGIN
        assert sheet.height == 2 * (sheets.CELL + sheets.MARGIN + 2 * sheets.LINE) + sheets.MARGIN
    with Image.open(tmp_path / "p.png") as plot:
        assert min(plot.size) > 600
    assert run(*words, *queries) == 2 and "it exists already" in capsys.readouterr().err
    assert run(*words, *queries, "--overwrite") == 0


def test_unreadable_images_are_left_out(classifier, tmp_path, capsys):
    make_images(tmp_path / "in", classes=("a",), each=2)
    (tmp_path / "in" / "a" / "1.png").write_bytes(b"")
    assert run(tmp_path / "in", "--weights", classifier, "--output", tmp_path / "x.npz") == 1
    assert np.load(tmp_path / "x.npz")["paths"].tolist() == [str(tmp_path / "in" / "a" / "0.png")]
    out = capsys.readouterr().out
    assert "error: cannot read an image" in out and "1 images, 1 could not be read: " in out
    assert run(tmp_path / "in" / "a" / "1.png", "--weights", classifier, "--output", tmp_path / "y.npz") == 2
    assert "no image could be read" in capsys.readouterr().err and not (tmp_path / "y.npz").exists()


ERRORS = {
    "another suffix": ("--output TMP/x.npy", "no such format (--output"),
    "no folder": ("--output TMP/none/x.npz", "no such folder (--output"),
    "a plot that exists": ("--output TMP/x.npz --plot TMP/mine.png", "it exists already (--plot"),
    "neighbors without a sheet": ("--output TMP/x.npz --neighbors IMAGE", "belong together"),
    "a sheet without neighbors": ("--output TMP/x.npz --sheet TMP/s.png", "belong together"),
    "one name twice": (
        "--output TMP/x.npz --plot TMP/s.png --sheet TMP/s.png --neighbors IMAGE",
        "one name for two files",
    ),
    "too few to draw": ("--output TMP/x.npz --plot TMP/p.png", "too few images to draw"),
    "a missing query": ("--output TMP/x.npz --sheet TMP/s.png --neighbors TMP/none.png", "no such image"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_and_write_nothing(kind, toy, classifier, tmp_path, capsys):
    (tmp_path / "mine.png").write_text("mine")
    line, says = ERRORS[kind]
    image = str(toy / "val" / "bee" / "0.png")
    assert run(image, "--weights", classifier, *line.replace("TMP", str(tmp_path)).replace("IMAGE", image).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("embed.py: error: ") and error.count("\n") == 1 and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_another_network_is_refused(toy, classifier, tmp_path, monkeypatch):
    found = embed.trained.load(str(classifier))
    other = embed.Trained(**vars(found) | dict(model=torch.nn.Linear(2, 2), name="resnet18"))
    monkeypatch.setattr(embed.trained, "load", lambda *_, **__: other)
    args = user_images.new_parser("embed", "").parse_args([str(toy), "--weights", "x", "--device", "cpu"])
    vars(args).update(output=tmp_path / "x.npz", plot=None, sheet=None, neighbors=None)
    with pytest.raises(UserError, match="not a Twins .resnet18"):
        embed.run(args)
