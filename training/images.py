"""Read image files: one way for classification, segmentation and detection."""

import contextlib
import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch.utils.data import get_worker_info

from training.command_line import MAX_PIXELS
from training.errors import UserError, short_reason
from utils import log, warn

# What Pillow decodes by itself, MPO among JPEG. Not EPS (a program), video, or formats of other programs' plugins.
FORMATS = (
    *(
        "JPEG",
        "PNG",
        "WEBP",
        "TIFF",
        "BMP",
        "GIF",
        "AVIF",
        "JPEG2000",
        "MPO",
        "PPM",
        "TGA",
        "ICO",
        "ICNS",
        "DDS",
        "DIB",
    ),
    *("PCX", "DCX", "PSD", "QOI", "SGI", "SUN", "XBM", "XPM", "MSP", "IM", "CUR", "BLP", "FTEX", "FLI", "PIXAR"),
)
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
ORIENTATIONS = {  # EXIF orientation: from the stored to the shown image, transpose, then flip columns, then flip rows
    **{1: (False, False, False), 2: (False, True, False), 3: (False, True, True), 4: (False, False, True)},
    **{5: (True, False, False), 6: (True, True, False), 7: (True, True, True), 8: (True, False, True)},
}
# The beginnings of files that people mistake for images, and what they are.
MISTAKEN = {
    b"version https://git-lfs": "a Git LFS pointer, run git lfs pull",
    b"<!DOCTYPE": "an HTML page, download the image again",
    b"<!doctype": "an HTML page, download the image again",
    b"<html": "an HTML page, download the image again",
    b"<?xml": "an XML or SVG file, convert it to PNG",
    b"<svg": "an SVG file, convert it to PNG",
    b"%PDF": "a PDF file, convert it to PNG",
    b"%!PS": "a PostScript file, convert it to PNG",
    b"SIMPLE  =": "a FITS file, convert it to PNG",
    b"\x89HDF": "an HDF5 file, convert it to PNG",
    b"\x93NUMPY": "a NumPy array, convert it to PNG",
    b"PK\x03\x04": "a ZIP archive, unpack it",
    b"\x1f\x8b": "a gzip archive, unpack it",
}
REPORTED_AFTER = 1000  # images: earlier, a count says little

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes: large color profiles are no reason to refuse an image
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `opened` raises an error of its own
warnings.filterwarnings("ignore", message="Corrupt EXIF data")  # `orientation_of` takes it for none


# ---------------------------------------------------------------- orientation


def inverse(orientation: int) -> int:
    """Return the orientation that leads from the shown image back to the stored one."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def turn(array, orientation: int):
    """Return an array or tensor (..., H, W) of the stored image as the shown one's, by its EXIF orientation."""
    transpose, columns, rows = ORIENTATIONS[orientation]
    array = array.swapaxes(-1, -2) if transpose else array
    flipped = [axis for axis, flip in ((-1, columns), (-2, rows)) if flip]
    if not flipped:
        return array
    return array.flip(flipped) if isinstance(array, torch.Tensor) else np.flip(array, flipped)


def orientation_of(file: Image.Image) -> int:
    """Return the EXIF orientation of an image that was opened, not loaded: 1 to 8; 1 if it has none or corrupt EXIF."""
    try:
        value = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF can be corrupt in any way
        return 1
    return value if value in ORIENTATIONS else 1


# ---------------------------------------------------------------- one file


def mistaken_for_image(start: bytes) -> str:
    """Return what a file is that is no image, with what to do, from its first bytes; empty if unknown."""
    if not start:
        return "an empty file, replace or remove it"
    if not start.strip(b"\0"):
        return "it holds zeros only, download or copy it again"
    if start[4:8] == b"ftyp":
        kind = (
            "a HEIC image" if start[8:12] in (b"heic", b"heix", b"heim", b"hevc", b"mif1") else "a video or HEIC image"
        )
        return f"{kind}, convert it to JPEG or PNG"
    return next((what for magic, what in MISTAKEN.items() if start.lstrip().startswith(magic)), "")


def too_large(path: str, size: str) -> UserError:
    advice = "shrink it, or raise --max-pixels (in a config: reading.max_pixels)"
    return UserError(f"too large an image ({path}): {size}; {advice}")


@functools.cache
def formats() -> tuple[str, ...]:
    """Return those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def opened(
    path: str, what: str = "an image", *, data: bytes | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open an image file without decoding it. What goes wrong, in the body too, is a UserError that names the file.

    data: the file's bytes, if they come from an archive, where `path` is only a name.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        if data is None and not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise UserError(f"not a regular file ({path}): replace or remove it")
        with Image.open(path if data is None else io.BytesIO(data), formats=formats()) as file:
            if file.width * file.height > max_pixels:
                raise too_large(path, f"{file.width} x {file.height}")
            if file.format == "TIFF":
                file.filename = ""  # Pillow mixes up the sides of a turned gray TIFF that it maps into memory
            yield file
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+ pixels", str(error))
        raise too_large(path, pixels[0] if pixels else "too many pixels") from error
    except OSError as error:
        if os.path.islink(path) and not os.path.exists(path):
            raise dangling(path) from None
        raise cannot_read(path, what, error, data) from error
    except Exception as error:  # decoders raise anything
        raise cannot_read(path, what, error, data) from error


def cannot_read(path: str, what: str, error: Exception, data: bytes | None) -> UserError:
    nature = ""
    if data is not None:
        nature = mistaken_for_image(data[:64])
    elif os.path.isfile(path):
        with open(path, "rb") as file:
            nature = mistaken_for_image(file.read(64))
    reason = getattr(error, "strerror", None) or short_reason(error).replace(f" {str(path)!r}", "")
    reason = re.sub(r" <_io.BytesIO object at \w+>", "", reason)
    return UserError(f"cannot read {what} ({path}): {nature or f'replace or remove it [{reason}]'}")


def dangling(path: str) -> UserError:
    return UserError(f"a link to nothing ({path} -> {os.readlink(path)}): remove it, or restore what it names")


# ---------------------------------------------------------------- the reader


class ImageReader:
    """Read image files as RGB images, and count over all loader workers what it had to decide about them.

    name: of the images, in what is logged. alpha: what transparent pixels are laid on, white or black, or drop to show
    their hidden colors. exif: apply the EXIF orientation, or ignore it. max_pixels: larger images are refused.
    """

    KINDS = ("read", "turned", "transparent", "16-bit", "floats to 1", "floats to 255")
    ROWS = 257  # of counts: the main process, and workers by their number

    def __init__(
        self, name: str = "images", *, alpha: str = "white", exif: str = "ignore", max_pixels: int = MAX_PIXELS
    ):
        self.name, self.alpha, self.exif, self.max_pixels = name, alpha, exif, max_pixels
        self.counts = torch.zeros(self.ROWS, len(self.KINDS), dtype=torch.int64).share_memory_()
        self.range = torch.tensor([[2**16, -1]] * self.ROWS).share_memory_()  # of 16-bit values
        self.reported: set[str] = set()

    def __call__(self, path: str, data: bytes | None = None) -> Image.Image:
        return self.read(path, data)[0]

    def read(self, path: str, data: bytes | None = None) -> tuple[Image.Image, int]:
        """Return an image and the orientation that was applied to the stored pixels, 1 for none.

        data: see `opened`. Raises UserError with its path if it cannot be read; it is never replaced by another.
        """
        with opened(path, data=data, max_pixels=self.max_pixels) as file:
            orientation = orientation_of(file)
            image, shown = self.to_rgb(file, path), file.format == "TIFF"  # which Pillow turns while it decodes
        self.count("read")
        if orientation == 1:
            return image, 1
        self.count("turned")
        apply = self.exif == "apply"
        if apply != shown:
            pixels = np.asarray(image).transpose(2, 0, 1)
            pixels = turn(pixels, orientation if apply else inverse(orientation)).transpose(1, 2, 0)
            image = Image.fromarray(np.ascontiguousarray(pixels))
        return image, orientation if apply else 1

    def to_rgb(self, file: Image.Image, path: str) -> Image.Image:
        if file.mode.startswith("I"):
            file = self.from_integers(file, path)
        elif file.mode == "F":
            return self.from_floats(file, path)
        if not has_alpha(file):
            return file.convert("RGB")
        # Palettes with transparency too: Pillow warns about converting them to RGB directly.
        image = file.convert("RGBA")
        if image.getchannel("A").getextrema()[0] == 255:
            return image.convert("RGB")
        self.count("transparent")
        if self.alpha == "drop":
            return image.convert("RGB")
        background = Image.new("RGBA", image.size, (*BACKGROUNDS[self.alpha], 255))
        return Image.alpha_composite(background, image).convert("RGB")

    def from_integers(self, file: Image.Image, path: str) -> Image.Image:
        """Return gray values of 16 bits as 8: the upper half. Values of 32 bits up to 255 stay."""
        values = np.asarray(file)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise out_of_range(path, low, high, "0 to 65535")
        if file.mode != "I" or high > 255:
            self.count("16-bit")
            row = self.range[worker()]
            row[0], row[1] = min(int(row[0]), low), max(int(row[1]), high)
            values = values >> 8
        image = Image.fromarray(values.astype(np.uint8))
        if isinstance(transparent := file.info.get("transparency"), int):
            image.putalpha(Image.fromarray(np.where(np.asarray(file) == transparent, 0, 255).astype(np.uint8)))
        return image

    def from_floats(self, file: Image.Image, path: str) -> Image.Image:
        values = np.asarray(file)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 255):  # or not a number
            raise out_of_range(path, low, high, "0 to 1, or 0 to 255")
        self.count("floats to 1" if high <= 1 else "floats to 255")
        values = (values * 255 if high <= 1 else values).round().astype(np.uint8)
        return Image.fromarray(values).convert("RGB")

    # ------------------------------------------------------------ what was decided

    def count(self, kind: str) -> None:
        self.counts[worker(), self.KINDS.index(kind)] += 1

    def report(self, *, final: bool, write: Callable[[str], None] = log) -> None:
        """Log once what was decided about the images read so far; if not final, only after some number of them."""
        number = dict(zip(self.KINDS, self.counts.sum(0).tolist()))
        if not final and number["read"] < REPORTED_AFTER:
            return
        for kind, line in self.lines(number).items():
            if kind not in self.reported:
                write(f"{self.name}: {number[kind]} of {number['read']} images read {line}")
                self.reported.add(kind)
        if number["floats to 1"] and number["floats to 255"] and "both" not in self.reported:
            warn(f"{self.name}: floating-point images of both ranges: rescale all to one of them")
            self.reported.add("both")

    def lines(self, number: dict[str, int]) -> dict[str, str]:
        other, done = ("ignore", "applied") if self.exif == "apply" else ("apply", "ignored")
        laid = "have their hidden colors shown" if self.alpha == "drop" else f"are laid on {self.alpha}"
        low, high = int(self.range[:, 0].min()), int(self.range[:, 1].max())
        dark = ", dark: rescale them to 16 bits" if high < 2**15 else ""
        lines = {
            "turned": f"have an EXIF orientation other than 1, {done}; change it with --exif {other} "
            f"(in a config: reading.exif={other})",
            "transparent": f"have transparent pixels, which {laid}; change it with --alpha "
            "(in a config: reading.alpha)",
            "16-bit": f"are 16-bit gray, with values from {low} to {high}, divided by 256{dark}",
            "floats to 1": "are floating-point from 0 to 1, multiplied by 255",
            "floats to 255": "are floating-point from 0 to 255, rounded",
        }
        return {kind: line for kind, line in lines.items() if number[kind]}


def worker() -> int:
    """Return the row of this process in a reader's counts."""
    info = get_worker_info()
    return info.id % (ImageReader.ROWS - 1) + 1 if info else 0


def out_of_range(path: str, low: float, high: float, expected: str) -> UserError:
    return UserError(f"pixel values that no image has ({path}): {low:g} to {high:g}; rescale them to {expected}")


def has_alpha(file: Image.Image) -> bool:
    """Return True if an image has transparency; the fourth channel of a TIFF may be anything, as near infrared."""
    extra = getattr(file, "tag_v2", {}).get(338, ())  # ExtraSamples
    return file.has_transparency_data and (file.format != "TIFF" or bool({1, 2} & set(np.atleast_1d(extra).tolist())))
