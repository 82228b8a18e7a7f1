"""Write what a classifier sees in images as vectors: python -m tools.embed IMAGES... --weights FILE --output emb.npz.

The file holds, for each image that can be read, `features` (N, C), what the classifier's last layer is given; `paths`;
`labels`, the folder that the image lies in if that is a class, else ""; and `predictions`. np.load opens it.
--plot draws the features in two dimensions; --neighbors finds the images most like others.
"""

# isort: split
import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from tqdm import tqdm

from tools import sheets, trained, user_images
from tools.sheets import Cell
from tools.trained import Trained
from tools.user_images import printable
from training.errors import UserError, exit_code
from training.images import ImageReader
from training.options import path as file_name
from training.outputs import check_new, write_file

NEIGHBORS = 6  # of each image that is asked for
MOST_COLORS = 20  # classes with a color of their own


@dataclass(frozen=True)
class Embeddings:
    """features: (N, C) in float32; the others have N names each. unread: how many images could not be read."""

    features: np.ndarray
    paths: list[str]
    labels: list[str]
    predictions: list[str]
    unread: int


def embed(words: Sequence[str], model: Trained, device: torch.device, args) -> Embeddings:
    """Return the features of the images that can be read, and print what is wrong with others."""
    paths, problems = user_images.find(words)
    head = model.model.get_classifier()
    width, features, used, predictions = head.in_features, [], [], []

    def compute(images: torch.Tensor) -> torch.Tensor:
        pooled = model.model.forward_head(model.model.forward_features(images), pre_logits=True)
        return torch.cat([pooled, head(pooled)], 1)

    for path, values, error in user_images.outputs(paths, model, compute, device, args):
        if values is None:
            problems.append(error)
            continue
        features.append(values[:width].numpy().copy())
        predictions.append(model.classes[int(values[width:].argmax())])
        used.append(path)
    for problem in problems:
        tqdm.write(f"error: {printable(problem)}")
    if not used:
        raise UserError(f"no image could be read ({', '.join(words)}): see the lines above")
    folders = [Path(path).absolute().parent.name for path in used]
    labels = [name if name in model.classes else "" for name in folders]
    return Embeddings(np.stack(features), used, labels, predictions, len(problems))


def write(path: Path, found: Embeddings) -> None:
    buffer = io.BytesIO()
    names = dict(paths=found.paths, labels=found.labels, predictions=found.predictions)
    np.savez(buffer, features=found.features, **{name: np.array(values, dtype=str) for name, values in names.items()})
    write_file(path, "--output", lambda file: file.write(buffer.getbuffer()))


# ---------------------------------------------------------------- two dimensions


def projected(features: np.ndarray, method: str) -> np.ndarray:
    """Return (N, 2) by t-SNE or PCA, the same each time."""
    if len(features) < 3:
        raise UserError(f"too few images to draw (--plot): {len(features)}, give at least 3")
    if method == "pca":
        return PCA(2, random_state=0).fit_transform(features)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(features)


def draw(found: Embeddings, method: str) -> Figure:
    """Draw a point for each image, colored by its label, or by its prediction where labels are unknown."""
    by_label = all(found.labels)
    names = np.array(found.labels if by_label else found.predictions)
    points, counts = projected(found.features, method), Counter(names.tolist())
    shown = sorted(name for name, _ in counts.most_common(MOST_COLORS))
    colors = matplotlib.colormaps["tab20"].colors
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(shown):
        chosen = names == name
        axes.scatter(*points[chosen].T, s=14, color=colors[number], label=printable(name).replace("$", r"\$"))
    others = ~np.isin(names, shown)
    if others.any():
        axes.scatter(*points[others].T, s=8, color="lightgray", label=f"{len(counts) - len(shown)} others", zorder=0)
    axes.set(xticks=[], yticks=[])
    kind = "label" if by_label else "prediction"
    title = f"{'t-SNE' if method == 'tsne' else 'PCA'} of {len(points)} images, by {kind}"
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, markerscale=2, frameon=False)
    return figure


# ---------------------------------------------------------------- neighbors


def nearest(query: Embeddings, found: Embeddings) -> list[list[tuple[int, float]]]:
    """Return for each query the most similar images of `found`, without itself: number and cosine similarity."""
    a, b = (each.features / np.linalg.norm(each.features, axis=1, keepdims=True) for each in (query, found))
    where = [Path(path).resolve() for path in found.paths]
    result = []
    for path, row in zip(query.paths, a @ b.T):
        order = [k for k in np.argsort(-row, kind="stable") if where[k] != Path(path).resolve()]
        result.append([(int(k), float(row[k])) for k in order[:NEIGHBORS]])
    return result


def neighbor_sheet(query: Embeddings, found: Embeddings, reader: ImageReader):
    """Print the nearest neighbors of each query, and return a sheet with a row for each."""
    cells = []

    def add(path: str, line: str) -> None:
        cells.append(Cell(sheets.thumbnail(reader(path)), (printable(Path(path).stem), line)))

    for path, label, row in zip(query.paths, query.predictions, nearest(query, found)):
        add(path, f"predicted {printable(label)}")
        for k, similarity in row:
            add(found.paths[k], f"similarity {similarity:.3f}")
        cells += [Cell(None, ("", ""))] * (NEIGHBORS - len(row))
        print(f"{printable(path)}: " + ", ".join(f"{printable(found.paths[k])} {value:.3f}" for k, value in row))
    return sheets.contact_sheet(cells, columns=NEIGHBORS + 1)


# ---------------------------------------------------------------- the command


def check_outputs(args) -> None:
    if bool(args.neighbors) != bool(args.sheet):
        raise UserError("--neighbors IMAGE and --sheet FILE belong together (command line): give both, or none")
    wanted = (args.output, "--output", (".npz",)), (args.plot, "--plot", (".png",)), (args.sheet, "--sheet", (".png",))
    for path, option, suffixes in wanted:
        if path:
            check_new(path, option, overwrite=args.overwrite, suffixes=suffixes)
    if args.plot and args.sheet and args.plot.absolute() == args.sheet.absolute():
        raise UserError(f"one name for two files ({args.plot}): give --sheet another")


def run(args) -> int:
    """Write all files; return 1 if an image could not be read, else 0."""
    check_outputs(args)
    device = user_images.choose(args.device)
    model = trained.load(args.weights, args.model, device, fast=True)
    model.require_twins()
    found = embed(args.images, model, device, args)
    query = embed(args.neighbors, model, device, args) if args.neighbors else None
    unread = found.unread + (query.unread if query else 0)
    figure = draw(found, args.method) if args.plot else None
    sheet = neighbor_sheet(query, found, user_images.build_reader(model, args)) if query else None
    write(args.output, found)
    if figure:
        write_file(args.plot, "--plot", lambda file: figure.savefig(file, format="png", dpi=110))
    if sheet:
        write_file(args.sheet, "--sheet", lambda file: sheet.save(file, format="PNG"))
    errors = f", {unread} could not be read" if unread else ""
    print(f"{len(found.paths)} images{errors}: {found.features.shape[1]} features each, {model.name} on {device}")
    for what in (args.output, args.plot, args.sheet):
        if what:
            print(what)
    return 1 if unread else 0


def main(argv: list[str]) -> int:
    parser = user_images.new_parser("embed", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="a new file, .npz")
    add("--plot", type=Path, metavar="FILE", help="draw the features in two dimensions: a new file, .png")
    add("--method", choices=("tsne", "pca"), default="tsne", help="of --plot (%(default)s)")
    what = f"find the {NEIGHBORS} images of IMAGES most like these"
    add("--neighbors", nargs="+", type=file_name, metavar="IMAGE", help=what)
    add("--sheet", type=Path, metavar="FILE", help="of --neighbors: a new file, .png")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_code("embed.py", main, sys.argv[1:]))
