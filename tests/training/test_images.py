"""Reading image files: the right values for every kind that people have, transparency, EXIF, limits, and errors that
name the file.
"""

import io
import os
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from training import images
from training.batches import build_loader
from training.errors import UserError
from training.images import ImageReader, inverse, turn

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def read(path, **options):
    reader = ImageReader(**options)
    return np.asarray(reader(str(path))), reader


def saved(folder, image, name="x.png", **options):
    image.save(folder / name, **options)
    return folder / name


def lines_of(reader, capsys):
    capsys.readouterr()
    reader.report(final=True)
    return capsys.readouterr().out


# ---------------------------------------------------------------- values


GRAY = np.stack([RAMP] * 3, -1)
KINDS = {
    "8 bits": (Image.fromarray(RAMP), "x.png", GRAY),
    "1 bit": (Image.fromarray(RAMP > 100), "x.png", np.where(GRAY > 100, 255, 0)),
    "palette": (Image.fromarray(GRAY).quantize(256), "x.png", GRAY),
    "gray and alpha": (Image.fromarray(RAMP).convert("LA"), "x.png", GRAY),
    "RGBA": (Image.fromarray(GRAY).convert("RGBA"), "x.png", GRAY),
    "CMYK": (Image.fromarray(np.stack([*[255 - RAMP] * 3, RAMP * 0], -1), "CMYK"), "x.tif", GRAY),
    "YCbCr": (Image.fromarray(GRAY).convert("YCbCr"), "x.tif", GRAY),
    "16-bit PNG": (Image.fromarray(RAMP.astype(np.uint16) * 257), "x.png", GRAY),
    "16-bit TIFF": (Image.fromarray(RAMP.astype(np.uint16) * 257), "x.tif", GRAY),
    "16-bit TIFF, big-endian": (Image.fromarray(RAMP.astype(">u2") * 257), "x.tif", GRAY),
    "32-bit TIFF of 16 bits": (Image.fromarray(RAMP.astype(np.int32) * 257), "x.tif", GRAY),
    "32-bit TIFF of 8 bits": (Image.fromarray(RAMP.astype(np.int32)), "x.tif", GRAY),
    "floats to 1": (Image.fromarray((RAMP / np.float32(255)).astype(np.float32)), "x.tif", GRAY),
    "floats to 255": (Image.fromarray(RAMP.astype(np.float32)), "x.tif", GRAY),
    "BMP": (Image.fromarray(GRAY), "x.bmp", GRAY),
    "GIF": (Image.fromarray(RAMP), "x.gif", GRAY),
    "PPM": (Image.fromarray(GRAY), "x.ppm", GRAY),
    "WebP": (Image.fromarray(GRAY), "x.webp", GRAY),
    "JPEG 2000": (Image.fromarray(GRAY), "x.jp2", GRAY),
    "TGA": (Image.fromarray(GRAY), "x.tga", GRAY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_has_its_values(kind, tmp_path):
    image, name, expected = KINDS[kind]
    options = {
        "WebP": {"lossless": True},
        "YCbCr": {"compression": "tiff_lzw"},
    }  # Pillow 12 cannot read its own raw one
    found, _ = read(saved(tmp_path, image, name, **options.get(kind, {})))
    assert found.shape == (6, 8, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= (1 if kind == "YCbCr" else 0)


def rgb16_png(pixels):
    """Return a PNG of 16 bits per channel, which Pillow does not write."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    height, width, _ = pixels.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bit_rgb_keeps_the_upper_half(tmp_path):
    (tmp_path / "x.png").write_bytes(rgb16_png(GRAY.astype(np.uint16) * 256 + 7))
    assert np.array_equal(read(tmp_path / "x.png")[0], GRAY)


def test_16_bit_values_are_reported_with_their_range(tmp_path, capsys):
    values = np.linspace(100, 4095, 48).round().astype(np.uint16).reshape(6, 8)
    found, reader = read(saved(tmp_path, Image.fromarray(values)))
    assert np.array_equal(found[..., 0], values >> 8)
    line = lines_of(reader, capsys)
    assert "1 of 1 images read are 16-bit gray, with values from 100 to 4095, divided by 256, dark: rescale" in line
    assert not lines_of(reader, capsys)  # once


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.float32([[0, 300]]), "0 to 300; rescale them to 0 to 1, or 0 to 255"),
        (np.float32([[-0.5, 1]]), "-0.5 to 1;"),
        (np.float32([[0, np.nan]]), "nan"),
        (np.int32([[-1000, 3000]]), "-1000 to 3000; rescale them to 0 to 65535"),
        (np.int32([[0, 70000]]), "0 to 70000"),
    ],
)
def test_values_of_no_image_are_refused(values, says, tmp_path):
    path = saved(tmp_path, Image.fromarray(values), "x.tif")
    with pytest.raises(UserError, match="pixel values that no image has") as caught:
        read(path)
    assert str(path) in str(caught.value) and says in str(caught.value)


def test_floats_of_both_ranges_are_a_warning(tmp_path, capsys):
    reader = ImageReader()
    for number, most in enumerate((1, 255)):
        reader(str(saved(tmp_path, Image.fromarray(np.float32([[0, most]])), f"{number}.tif")))
    reader.report(final=True)
    assert "both ranges" in capsys.readouterr().err


def test_a_large_color_profile_is_read(tmp_path):
    path = saved(tmp_path, Image.fromarray(GRAY), icc_profile=np.random.default_rng(0).bytes(1_500_000))
    assert np.array_equal(read(path)[0], GRAY)


# ---------------------------------------------------------------- transparency


def disk(hidden):
    """Return an RGBA image whose shape is in alpha alone."""
    pixels = np.full((8, 8, 4), hidden, np.uint8)
    pixels[..., 3] = 0
    pixels[2:6, 2:6, 3] = 255
    return Image.fromarray(pixels)


def transparent(kind, folder):
    if kind == "RGBA":
        return saved(folder, disk(0))
    if kind == "LA":
        return saved(folder, disk(0).convert("LA"))
    values = np.zeros((8, 8), np.uint8)
    values[2:6, 2:6] = 1
    image = Image.fromarray(values)
    if kind == "gray, one transparent value":
        return saved(folder, image.point(lambda value: 0 if value else 7), transparency=7)
    if kind == "RGB, one transparent value":
        return saved(folder, image.point(lambda value: 0 if value else 7).convert("RGB"), transparency=(7, 7, 7))
    if kind == "16-bit gray, one transparent value":
        return saved(folder, Image.fromarray(np.where(values, 0, 7).astype(np.uint16)), transparency=7)
    image = image.convert("P")
    image.putpalette([0, 0, 0] * 256)
    return saved(folder, image, "x.gif" if kind == "GIF" else "x.png", transparency=0)


PLACES = [
    *("RGBA", "LA", "palette", "GIF", "gray, one transparent value", "RGB, one transparent value"),
    "16-bit gray, one transparent value",
]


@pytest.mark.parametrize("kind", PLACES)
def test_a_shape_in_alpha_alone_does_not_vanish(kind, tmp_path, capsys):
    path = transparent(kind, tmp_path)
    shape = np.zeros((8, 8), bool)
    shape[2:6, 2:6] = True
    found, reader = read(path)
    assert (found[~shape] == 255).all() and (found[shape] == 0).all()
    assert "1 of 1 images read have transparent pixels, which are laid on white" in lines_of(reader, capsys)
    assert (read(path, alpha="black")[0] == 0).all()
    assert read(path, alpha="drop")[0].max() < 10


def test_half_transparent_pixels_are_mixed(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (2, 2), (200, 100, 0, 51)))
    assert read(path)[0][0, 0].tolist() == [244, 224, 204]  # 255 + (c - 255) / 5
    assert read(path, alpha="black")[0][0, 0].tolist() == [40, 20, 0]


def test_opaque_alpha_changes_nothing(tmp_path, capsys):
    _, reader = read(saved(tmp_path, Image.fromarray(GRAY).convert("RGBA")))
    assert not lines_of(reader, capsys)


@pytest.mark.parametrize(("extra", "has"), [(0, False), (1, True), (2, True)])
def test_the_fourth_channel_of_a_tiff(extra, has, tmp_path):
    """Near infrared (ExtraSamples 0) is no alpha."""
    path = saved(tmp_path, Image.new("RGBA", (2, 2), (10, 10, 10, 10)), "x.tif")
    tag = b"\x52\x01\x03\0\x01\0\0\0"  # ExtraSamples, one short
    content = path.read_bytes()
    assert content.count(tag) == 1
    path.write_bytes(content.replace(tag + b"\2", tag + bytes([extra])))
    assert bool(read(path)[1].counts.sum(0)[ImageReader.KINDS.index("transparent")]) == has
    assert (read(path)[0].max() > 200) == has


# ---------------------------------------------------------------- orientation


def photograph(folder, orientation, name="x.png"):
    """Save an image whose shown form is always the same, with this orientation; return it and the shown pixels."""
    shown = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    stored = turn(shown.transpose(2, 0, 1), inverse(orientation)).transpose(1, 2, 0)
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    return saved(folder, image, name, exif=exif), shown, stored


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_under_both_readings(orientation, name, tmp_path, capsys):
    if name == "x.webp":
        exif = Image.Exif()
        exif[274] = orientation
        _, shown, stored = photograph(tmp_path, orientation)
        path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), name, lossless=True, exif=exif)
    else:
        path, shown, stored = photograph(tmp_path, orientation, name)
    found, reader = read(path, exif="apply")
    assert np.array_equal(found, shown)
    assert ("EXIF orientation other than 1, applied" in lines_of(reader, capsys)) == (orientation != 1)
    found, reader = read(path)
    assert np.array_equal(found, stored)
    assert ("EXIF orientation other than 1, ignored" in lines_of(reader, capsys)) == (orientation != 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_gray_tiff_that_is_not_compressed(orientation, tmp_path):
    """Pillow 12 and 13 alone mix up its sides where it is turned on its side."""
    shown = np.random.default_rng(0).integers(0, 256, (6, 8)).astype(np.uint8)
    stored, exif = np.ascontiguousarray(turn(shown, inverse(orientation))), Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path, Image.fromarray(stored), "x.tif", exif=exif)
    assert np.array_equal(read(path, exif="apply")[0][..., 0], shown)
    assert np.array_equal(read(path)[0][..., 0], stored)


def test_turning_is_what_pillow_does():
    from PIL import ImageOps

    for orientation in range(1, 9):
        image = Image.fromarray(RAMP)
        image.getexif()[274] = orientation
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), turn(RAMP, orientation))
        tensor = turn(torch.from_numpy(RAMP.copy())[None], orientation)[0]
        assert np.array_equal(tensor.numpy(), turn(RAMP, orientation))
        assert np.array_equal(turn(turn(RAMP, orientation), inverse(orientation)), RAMP)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # as training/images does
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"no"])
def test_corrupt_exif_is_no_orientation(exif, tmp_path):
    path = saved(tmp_path, Image.fromarray(GRAY), "x.jpg", exif=exif)
    found, reader = read(path, exif="apply")
    assert found.shape == GRAY.shape and not reader.counts[:, 1].any()


def test_an_orientation_of_no_meaning_is_none(tmp_path):
    exif = Image.Exif()
    exif[274] = 42
    assert not read(saved(tmp_path, Image.fromarray(GRAY), exif=exif))[1].counts[:, 1].any()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_counts_of_all_workers_are_reported_once(workers, tmp_path, capsys):
    class Files(torch.utils.data.Dataset):
        reader = ImageReader("train")

        def __getitem__(self, index):
            return torch.tensor(np.asarray(self.reader(str(path)))), 0

        def __len__(self):
            return 12

    path, *_ = photograph(tmp_path, 6)
    data = Files()
    loader = build_loader(data, range(12), batch_size=4, workers=workers, pin_memory=False, drop_last=False)
    for _ in range(2):
        assert len(list(loader)) == 3
    assert capsys.readouterr().out.count("train: 12 of 12 images read have an EXIF orientation") == 1


# ---------------------------------------------------------------- limits and errors


def huge_png(path, side):
    """Write the header of a PNG of side x side pixels, and rows of zeros as far as they compress into little."""
    data = io.BytesIO()
    Image.new("1", (8, 8)).save(data, "PNG")
    content = bytearray(data.getvalue())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize(("side", "limit"), [(20_000, {}), (13_400, {}), (10_000, dict(max_pixels=10**7))])
def test_too_large_an_image_is_refused_from_its_header(side, limit, tmp_path):
    huge_png(tmp_path / "x.jpg", side)
    images.formats()  # imports Pillow's plugins, once
    start = time.process_time()
    with pytest.raises(UserError, match=r"too large an image .*x.jpg.*--max-pixels"):
        read(tmp_path / "x.jpg", **limit)
    assert time.process_time() - start < 0.2


def test_108_megapixels_pass_the_limit(tmp_path):
    huge_png(tmp_path / "x.png", 10_390)
    with images.opened(str(tmp_path / "x.png")) as file:
        assert file.size == (10_390, 10_390)
    assert Image.MAX_IMAGE_PIXELS == images.MAX_PIXELS


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (bytes(100), "zeros only"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"SIMPLE  =                    T" + b" " * 2850, "FITS"),
        (b"PK\x03\x04xxxx", "ZIP"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "replace or remove it"),
        (b"not an image", "replace or remove it"),
    ],
)
def test_unreadable_files_are_named_by_their_first_bytes(content, says, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"cannot read an image ({path}): ") and says in line and "\n" not in line


def test_a_cut_image_is_refused(tmp_path):
    path = saved(tmp_path, Image.effect_noise((64, 64), 80), "x.jpg")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot read an image .*truncated"):
        read(path)


def test_a_pipe_and_links_to_nothing_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match="not a regular file .*pipe.jpg"):
        read(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("gone.jpg")
    with pytest.raises(UserError, match="a link to nothing .*link.jpg -> gone.jpg"):
        read(tmp_path / "link.jpg")
    with pytest.raises(UserError, match="cannot read an image .*No such file"):
        read(tmp_path / "none.jpg")
