"""Predict images without annotations: image_demo.py of segmentation and of detection."""

import colorsys
import importlib
import json
import sys
from pathlib import Path

from training.options import Parser, positive, probability

# isort: split
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from dense import libraries
from training.errors import UserError, exit_code
from training.folders import image_files, numbered_names
from training.outputs import check_folder, make_folder, write_file
from utils import keep_freed_memory, log

LINE = 18  # pixels of a line of the legend


def image_demo(library: str, argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    sys.exit(exit_code("image_demo.py", lambda words: run(demo_parser(library).parse_args(words), library), argv))


def demo_parser(library: str) -> Parser:
    parser = Parser(prog="image_demo.py", description="Predict images and draw what was found.")
    add = parser.add_argument
    add(
        "words", nargs="+", metavar="IMAGES... CONFIG CHECKPOINT", help="files, folders or globs; a config; its weights"
    )
    add("--out-dir", type=Path, required=True, metavar="FOLDER", help="a new folder for the results")
    add("--overwrite", action="store_true", help="write into a folder that exists, and replace files there")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME", help="(%(default)s)")
    pairs = dict(nargs="+", default=[], metavar="KEY=VALUE", help="set values of the config")
    add("--cfg-options", **pairs)
    if library == "mmseg":
        add("--opacity", type=probability, default=0.5, metavar="F", help="of the classes' colors (%(default)s)")
        add("--save-labels", action="store_true", help="write a PNG of labels for each image, as the annotations are")
    else:
        add("--score-thr", type=probability, default=0.3, metavar="F", help="least score of a box (%(default)s)")
        add("--save-json", action="store_true", help="write all boxes and masks above --score-thr in COCO's format")
        add("--max-boxes", type=positive, default=100, metavar="N", help="of an image (%(default)s)")
    return parser


def run(args, library: str) -> int:
    """Predict all images; return 1 if one could not be read, else 0."""
    if len(args.words) < 3:
        raise UserError("images, config and checkpoint are needed (command line): IMAGES... CONFIG CHECKPOINT")
    *words, config, weights = args.words
    paths = image_files(words)
    if not paths:
        raise UserError(f"no images ({', '.join(words)}): give files, folders or globs")
    check_folder(args.out_dir, "--out-dir", overwrite=args.overwrite)
    keep_freed_memory()
    libraries.load(library)
    predictor = Predictor(config, weights, args.cfg_options, library, args.device)
    drawer = (Segments if library == "mmseg" else Objects)(predictor, args)
    unread = 0
    make_folder(args.out_dir, "--out-dir")
    for path, name in zip(tqdm(paths, unit="image", disable=None), numbered_names(paths)):
        try:
            pixels, result = predictor(path)
        except UserError as error:
            unread += 1
            tqdm.write(str(error))
            continue
        tqdm.write(f"{path}: {drawer.write(path, pixels, result, args.out_dir / name)}")
    drawer.finish(args.out_dir)
    log(f"{len(paths) - unread} of {len(paths)} images, results in {args.out_dir}")
    return 1 if unread else 0


class Predictor:
    """A segmentor or detector with its test pipeline: path -> image (H, W, 3) and its data sample.

    classes and palette: those stored in the checkpoint, or of the config's data set.
    """

    def __init__(self, config: str, weights: str, options: list[str], library: str, device: str):
        from mmcv.transforms import Compose
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import init_default_scope

        from dense import cli, runner
        from training import checkpoint

        arguments = ["--cfg-options", *options] if options else []
        args = cli.test_parser(library).parse_args([config, weights, *arguments])
        self.cfg = cfg = cli.configure(args, library)
        init_default_scope(library)
        cfg.model.backbone.pretrained = None
        payload = checkpoint.load(weights)
        registry = importlib.import_module(f"{library}.registry")
        with libraries.quiet(), runner.must_build(config):
            model = registry.MODELS.build(cfg.model)
        checkpoint.load_into(model, runner.model_state(payload, weights), source=weights, may_have=runner.UNUSED)
        self.model: nn.Module = revert_sync_batchnorm(model).to(device).eval()
        about = dict(registry.DATASETS.get(cfg.test_dataloader.dataset.type).METAINFO)
        about |= cfg.test_dataloader.dataset.get("metainfo", {})
        stored = payload.get("meta", {}).get("dataset_meta") if isinstance(payload.get("meta"), dict) else None
        about |= stored if isinstance(stored, dict) else {}
        self.classes = list(about.get("classes") or [])
        self.palette = [tuple(color) for color in about.get("palette") or colors(len(self.classes))]
        steps = [step for step in cfg.test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"]
        for step in steps:
            if step["type"] == "LoadImageFromFile":
                step.update(exif="apply", labels="shown")  # as a viewer shows the image
        self.pipeline = Compose([registry.TRANSFORMS.build(step) for step in steps])

    @torch.inference_mode()
    def __call__(self, path: str) -> tuple[np.ndarray, object]:
        """Return an image (H, W, 3) in RGB and its data sample; raise UserError if it cannot be read."""
        load, *steps = self.pipeline.transforms
        data = load(dict(img_path=path, img_id=0))
        pixels = np.ascontiguousarray(data["img"][..., ::-1])
        for step in steps:
            data = step(data)
        (result,) = self.model.test_step({key: [value] for key, value in data.items()})
        return pixels, result.cpu()


def colors(number: int) -> list[tuple[int, int, int]]:
    """Return that many colors, far apart in hue."""
    hues = (k * 0.61803 % 1 for k in range(number))
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 0.9)) for hue in hues]


def with_legend(pixels: np.ndarray, entries: list[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """Return an image with a legend on its right: a line and a color for each entry."""
    font = ImageFont.load_default(size=LINE - 5)
    width = 2 * LINE + max((int(font.getlength(text)) for text, _ in entries), default=0)
    height, side, _ = pixels.shape
    drawn = Image.new("RGB", (side + (width if entries else 0), max(height, LINE * len(entries))), "white")
    drawn.paste(Image.fromarray(pixels), (0, 0))
    draw = ImageDraw.Draw(drawn)
    for number, (text, color) in enumerate(entries):
        top = number * LINE
        draw.rectangle((side + 4, top + 3, side + LINE - 2, top + LINE - 3), fill=color)
        draw.text((side + LINE + 3, top), text, fill="black", font=font)
    return drawn


def save(path: Path, image: Image.Image) -> None:
    write_file(path, "--out-dir", lambda file: image.save(file, "PNG"))


class Segments:
    """Draw label maps, and write them."""

    def __init__(self, predictor: Predictor, args):
        self.classes, self.palette, self.opacity = predictor.classes, predictor.palette, args.opacity
        self.save_labels = args.save_labels
        self.first = int(bool(predictor.cfg.test_dataloader.dataset.get("reduce_zero_label")))

    def write(self, path: str, pixels: np.ndarray, result: object, out: Path) -> str:
        labels = result.pred_sem_seg.data[0].numpy()
        values, counts = np.unique(labels, return_counts=True)
        order = np.argsort(-counts)
        shares = [(self.classes[values[k]], counts[k] / labels.size, self.palette[values[k]]) for k in order]
        color = np.array(self.palette, np.float32)[labels]
        blended = (pixels * (1 - self.opacity) + color * self.opacity).round().astype(np.uint8)
        save(out.with_name(f"{out.name}.png"), with_legend(blended, [(f"{n} {s:.0%}", c) for n, s, c in shares]))
        if self.save_labels:
            save(out.with_name(f"{out.name}_labels.png"), Image.fromarray((labels + self.first).astype(np.uint8)))
        return ", ".join(f"{name} {share:.0%}" for name, share, _ in shares[:5])

    def finish(self, folder: Path) -> None:
        """Do nothing: each image is complete."""


class Objects:
    """Draw boxes and masks with their scores, and collect them in COCO's format."""

    def __init__(self, predictor: Predictor, args):
        self.classes, self.palette = predictor.classes, predictor.palette
        self.threshold, self.most, self.save_json = args.score_thr, args.max_boxes, args.save_json
        self.images, self.annotations = [], []

    def write(self, path: str, pixels: np.ndarray, result: object, out: Path) -> str:
        found = result.pred_instances
        found = found[found.scores >= self.threshold][: self.most]
        names = [self.classes[label] for label in found.labels.tolist()]
        entries = {name: self.palette[self.classes.index(name)] for name in sorted(set(names))}
        legend = [(f"{name} {names.count(name)}", color) for name, color in entries.items()]
        save(out.with_name(f"{out.name}.png"), with_legend(self.draw(pixels, found), legend))
        if self.save_json:
            self.collect(path, pixels.shape, found)
        scores = [f"{name} {score:.2f}" for name, score in zip(names, found.scores.tolist())]
        return ", ".join(scores[:5]) + (f" and {len(scores) - 5} more" if len(scores) > 5 else "") or "nothing found"

    def draw(self, pixels: np.ndarray, found: object) -> np.ndarray:
        """Return an image with masks, boxes and scores, the highest score on top."""
        drawn, font = pixels.astype(np.float32), ImageFont.load_default(size=LINE - 6)
        labels = found.labels.tolist()
        for mask, label in zip(found.masks.numpy() if "masks" in found else (), labels):
            drawn[mask] = drawn[mask] * 0.5 + np.float32(self.palette[label]) * 0.5
        image = Image.fromarray(drawn.round().astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for box, label, score in [*zip(found.bboxes.tolist(), labels, found.scores.tolist())][::-1]:
            draw.rectangle(box, outline=self.palette[label], width=2)
            text, left, top = f"{self.classes[label]} {score:.2f}", box[0], max(box[1] - LINE + 4, 0)
            draw.rectangle(draw.textbbox((left, top), text, font=font), fill="black")
            draw.text((left, top), text, fill="white", font=font)
        return np.asarray(image)

    def collect(self, path: str, shape: tuple[int, ...], found: object) -> None:
        from mmdet.structures.mask import encode_mask_results

        number = len(self.images) + 1
        self.images.append(dict(id=number, file_name=path, height=shape[0], width=shape[1]))
        masks = encode_mask_results(found.masks.numpy()) if "masks" in found else [None] * len(found)
        rows = zip(found.bboxes.tolist(), found.labels.tolist(), found.scores.tolist(), masks)
        for (x1, y1, x2, y2), label, score, mask in rows:
            entry = dict(id=len(self.annotations) + 1, image_id=number, category_id=label + 1, score=score, iscrowd=0)
            entry |= dict(bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1))
            if mask is not None:
                entry["segmentation"] = dict(size=mask["size"], counts=mask["counts"].decode())
            self.annotations.append(entry)

    def finish(self, folder: Path) -> None:
        if self.save_json:
            categories = [dict(id=number, name=name) for number, name in enumerate(self.classes, start=1)]
            content = dict(images=self.images, annotations=self.annotations, categories=categories)
            text = (json.dumps(content) + "\n").encode()
            write_file(folder / "predictions.json", "--out-dir", lambda file: file.write(text))
