"""Lay out scikit-learn's handwritten digits as an ImageNet-style folder: python -m tools.digits FOLDER [--size 32]
[--seed 0].

1,797 real pictures of 8 x 8, which come with scikit-learn, enlarged to PNG files FOLDER/{train,val}/DIGIT/NUMBER.png.
A fifth of each digit, drawn with the seed, is val.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

VAL_SHARE = 0.2


def parts(seed: int) -> dict[str, list[tuple[int, int, Image.Image]]]:
    """train and val: each digit's number in scikit-learn's set, its label, and its picture, white on black, 8 x 8."""
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=VAL_SHARE, random_state=seed, stratify=digits.target)
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return {
        part: [(int(k), int(digits.target[k]), Image.fromarray(grey[k])) for k in chosen]
        for part, chosen in (("train", train), ("val", val))
    }


def lay_out(folder: Path, *, size: int, seed: int) -> dict[str, int]:
    """Write the pictures, unless they are all there. Returns how many each part has."""
    chosen = parts(seed)
    for part, digits in chosen.items():
        for number, label, grey in digits:
            path = folder / part / str(label) / f"{number:04d}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(path)
    return {part: len(digits) for part, digits in chosen.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=32, help="side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()
    counts = lay_out(args.folder, size=args.size, seed=args.seed)
    print(f"{args.folder}: {counts['train']} train and {counts['val']} val pictures of digits")
