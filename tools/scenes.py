"""Digits on photographs, for small segmentors and detectors: python -m tools.scenes --ade FOLDER --coco FOLDER [--seed
0].

scikit-learn's handwritten digits, enlarged, tinted and pasted without overlap on pieces of its two sample photographs.
Digits of val are not in train. The same pictures are written twice: as ADE20K keeps them (labels from 1: background,
then the digits 0 to 9) and as COCO does (categories 1 to 10 are the digits 0 to 9, masks as run lengths).
"""

import argparse
import colorsys
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from tools.digits import parts

SIDE = 128  # of a picture, in pixels
DIGIT = (28, 44)  # smallest and largest side of a digit
MOST = 8  # digits in a picture
LIGHT = 0.5  # of a photograph: digits are bright
INK = 0.4  # of a digit's own darkness: what counts as the digit
ADE = {"train": "training", "val": "validation"}
COCO = {"train": "train2017", "val": "val2017"}


def texture(random: np.random.Generator, photographs: list[np.ndarray]) -> np.ndarray:
    """A piece of a photograph, from a third of its height up, mirrored or not, darkened. -> (SIDE, SIDE, 3), 0 to
    LIGHT.
    """
    photograph = photographs[random.integers(len(photographs))]
    height, width = photograph.shape[:2]
    side = int(random.integers(height // 3, height))
    y, x = random.integers(height - side + 1), random.integers(width - side + 1)
    piece = Image.fromarray(photograph[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(piece)[:, :: random.choice([-1, 1])] * (LIGHT / 255)


def scene(random: np.random.Generator, photographs: list[np.ndarray], digits: list) -> tuple[np.ndarray, list]:
    """-> (SIDE, SIDE, 3) uint8, and for each digit its label and where it is, (SIDE, SIDE) bool."""
    pixels, found = texture(random, photographs), []
    taken = np.zeros((SIDE, SIDE), bool)
    for _ in range(random.integers(1, MOST + 1)):
        _, label, grey = digits[random.integers(len(digits))]
        side = int(random.integers(DIGIT[0], DIGIT[1] + 1))
        y, x = random.integers(SIDE - side + 1, size=2)
        place = np.s_[y : y + side, x : x + side]
        if taken[place].any():
            continue
        taken[place] = True
        alpha = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC))[..., None] / 255
        colour = np.array(colorsys.hsv_to_rgb(random.random(), 0.4 * random.random(), 1.0))
        pixels[place] = pixels[place] * (1 - alpha) + colour * alpha
        mask = np.zeros((SIDE, SIDE), bool)
        mask[place] = alpha[..., 0] > INK
        found.append((label, mask))
    return np.round(pixels * 255).astype(np.uint8), found


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's: lengths of runs of 0 and 1 in turns, beginning with 0, down the columns from left to right."""
    values = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(values)) + 1
    counts = np.diff([0, *ends, values.size]).tolist()
    return dict(size=list(mask.shape), counts=[0, *counts] if values[0] else counts)


def annotation(mask: np.ndarray) -> dict:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    bbox = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    return dict(bbox=bbox, area=int(mask.sum()), iscrowd=0, segmentation=run_lengths(mask))


def write(ade: Path, coco: Path, *, counts: dict[str, int], seed: int) -> None:
    photographs = load_sample_images().images
    for part in counts:
        for folder in (
            ade / "images" / ADE[part],
            ade / "annotations" / ADE[part],
            coco / COCO[part],
            coco / "annotations",
        ):
            folder.mkdir(parents=True, exist_ok=True)
    for part, digits in parts(seed).items():
        random = np.random.default_rng([seed, sorted(counts).index(part)])
        pictures, annotations = [], []
        for number in range(counts[part]):
            pixels, found = scene(random, photographs, digits)
            classes = np.ones((SIDE, SIDE), np.uint8)
            for label, mask in found:
                classes[mask] = label + 2
                annotations.append(
                    dict(id=len(annotations) + 1, image_id=number, category_id=label + 1) | annotation(mask)
                )
            Image.fromarray(pixels).save(ade / "images" / ADE[part] / f"{number:04d}.png")
            Image.fromarray(classes).save(ade / "annotations" / ADE[part] / f"{number:04d}.png")
            Image.fromarray(pixels).save(coco / COCO[part] / f"{number:04d}.png")
            pictures.append(dict(id=number, file_name=f"{number:04d}.png", height=SIDE, width=SIDE))
        categories = [dict(id=digit + 1, name=str(digit)) for digit in range(10)]
        text = json.dumps(dict(images=pictures, annotations=annotations, categories=categories))
        (coco / "annotations" / f"instances_{COCO[part]}.json").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ade", type=Path, required=True, help="where the segmentation set goes")
    parser.add_argument("--coco", type=Path, required=True, help="where the detection set goes")
    parser.add_argument("--train", type=int, default=600, help="pictures to learn from")
    parser.add_argument("--val", type=int, default=60, help="pictures for scores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.ade, args.coco, counts={"train": args.train, "val": args.val}, seed=args.seed)
    print(f"{args.ade}, {args.coco}: {args.train} train and {args.val} val pictures with digits on them")
