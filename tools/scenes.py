"""Write digits on photographs, for small segmentors and detectors: python -m tools.scenes --ade FOLDER --coco FOLDER.

scikit-learn's handwritten digits, enlarged, tinted and pasted without overlap on pieces of its two sample photographs.
Digits of val are not in train. The same images are written twice: as ADE20K keeps them (labels from 1: background, then
the digits 0 to 9) and as COCO does (categories 1 to 10 are the digits 0 to 9, masks as run lengths).
"""

import colorsys
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from tools.digits import split_digits
from training.errors import exit_code
from training.options import Parser

SIDE = 128  # of an image, in pixels
DIGIT = (28, 44)  # smallest and largest side of a digit
MOST = 8  # digits in an image
LIGHT = 0.5  # of a photograph: digits are bright
INK = 0.4  # of a digit's own darkness: what counts as the digit
COUNTS = {"train": 600, "val": 60}  # images
ADE = {"train": "training", "val": "validation"}
COCO = {"train": "train2017", "val": "val2017"}


def texture(random: np.random.Generator, photographs: list[np.ndarray]) -> np.ndarray:
    """Return a piece of a photograph, from a third of its height up, perhaps mirrored, (SIDE, SIDE, 3), 0 to LIGHT."""
    photograph = photographs[random.integers(len(photographs))]
    height, width = photograph.shape[:2]
    side = int(random.integers(height // 3, height))
    y, x = random.integers(height - side + 1), random.integers(width - side + 1)
    piece = Image.fromarray(photograph[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(piece)[:, :: random.choice([-1, 1])] * (LIGHT / 255)


def scene(random: np.random.Generator, photographs: list[np.ndarray], digits: list) -> tuple[np.ndarray, list]:
    """Return an image, (SIDE, SIDE, 3) uint8, and of each digit on it the label and the mask, (SIDE, SIDE) bool."""
    pixels, masks = texture(random, photographs), []
    taken = np.zeros((SIDE, SIDE), bool)
    for _ in range(random.integers(1, MOST + 1)):
        _, label, gray = digits[random.integers(len(digits))]
        side = int(random.integers(DIGIT[0], DIGIT[1] + 1))
        y, x = random.integers(SIDE - side + 1, size=2)
        box = np.s_[y : y + side, x : x + side]
        if taken[box].any():
            continue
        taken[box] = True
        alpha = np.asarray(gray.resize((side, side), Image.Resampling.BICUBIC))[..., None] / 255
        color = np.array(colorsys.hsv_to_rgb(random.random(), 0.4 * random.random(), 1.0))
        pixels[box] = pixels[box] * (1 - alpha) + color * alpha
        mask = np.zeros((SIDE, SIDE), bool)
        mask[box] = alpha[..., 0] > INK
        masks.append((label, mask))
    return np.round(pixels * 255).astype(np.uint8), masks


def run_lengths(mask: np.ndarray) -> dict:
    """Return COCO's lengths of runs of 0 and 1 in turns, beginning with 0, down the columns from left to right."""
    values = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(values)) + 1
    counts = np.diff([0, *ends, values.size]).tolist()
    return dict(size=list(mask.shape), counts=[0, *counts] if values[0] else counts)


def annotation(mask: np.ndarray) -> dict:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    bbox = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    return dict(bbox=bbox, area=int(mask.sum()), iscrowd=0, segmentation=run_lengths(mask))


def write(ade: Path, coco: Path, *, counts: dict[str, int] = COUNTS, seed: int = 0) -> None:
    photographs = load_sample_images().images
    for split, digits in split_digits(seed).items():
        folders = [ade / "images" / ADE[split], coco / COCO[split], ade / "annotations" / ADE[split]]
        for folder in (*folders, coco / "annotations"):
            folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng([seed, sorted(counts).index(split)])
        images, annotations = [], []
        for number in range(counts[split]):
            pixels, masks = scene(random, photographs, digits)
            classes = np.ones((SIDE, SIDE), np.uint8)
            for label, mask in masks:
                classes[mask] = label + 2
                names = dict(id=len(annotations) + 1, image_id=number, category_id=label + 1)
                annotations.append(names | annotation(mask))
            name = f"{number:04d}.png"
            for folder, values in zip(folders, (pixels, pixels, classes)):
                Image.fromarray(values).save(folder / name)
            images.append(dict(id=number, file_name=name, height=SIDE, width=SIDE))
        categories = [dict(id=digit + 1, name=str(digit)) for digit in range(10)]
        text = json.dumps(dict(images=images, annotations=annotations, categories=categories))
        (coco / "annotations" / f"instances_{COCO[split]}.json").write_text(text)


def main(argv: list[str]) -> None:
    parser = Parser(prog="scenes.py", description=__doc__.splitlines()[0])
    parser.add_argument("--ade", type=Path, required=True, metavar="FOLDER", help="for segmentation")
    parser.add_argument("--coco", type=Path, required=True, metavar="FOLDER", help="for detection")
    args = parser.parse_args(argv)
    write(args.ade, args.coco)
    print(f"{args.ade}, {args.coco}: {COUNTS['train']} train and {COUNTS['val']} val images with digits on them")


if __name__ == "__main__":
    sys.exit(exit_code("scenes.py", main, sys.argv[1:]))
