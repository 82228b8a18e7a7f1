"""Write scikit-learn's handwritten digits as an ImageNet-style folder: python -m tools.digits FOLDER.

1,797 real images of 8 x 8, which come with scikit-learn, enlarged to 32 x 32 as FOLDER/{train,val}/DIGIT/NUMBER.png. A
fifth of each digit, drawn with a seed, is val.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from training.errors import exit_code
from training.options import Parser

VAL_SHARE = 0.2
SIDE = 32  # pixels


def split_digits(seed: int) -> dict[str, list[tuple[int, int, Image.Image]]]:
    """Return train and val: each digit's number in scikit-learn's set, its label, its image (8 x 8, white on black)."""
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=VAL_SHARE, random_state=seed, stratify=digits.target)
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return {
        split: [(int(k), int(digits.target[k]), Image.fromarray(gray[k])) for k in chosen]
        for split, chosen in (("train", train), ("val", val))
    }


def write(folder: Path, *, size: int = SIDE, seed: int = 0) -> dict[str, int]:
    """Write the images that are not there yet. Return how many each split has."""
    splits = split_digits(seed)
    for split, digits in splits.items():
        for number, label, image in digits:
            path = folder / split / str(label) / f"{number:04d}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(path)
    return {split: len(digits) for split, digits in splits.items()}


def main(argv: list[str]) -> None:
    parser = Parser(prog="digits.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(argv).folder
    counts = write(folder)
    print(f"{folder}: {counts['train']} train and {counts['val']} val images of digits")


if __name__ == "__main__":
    sys.exit(exit_code("digits.py", main, sys.argv[1:]))
