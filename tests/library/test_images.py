"""Any picture as RGB: its levels whatever its type, white under what is transparent, and the same pixels everywhere."""

import base64
import io
import os
import random
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import EpsImagePlugin, Image

from blip2x_training.cache_features import Views
from blip2x_training.data import transforms
from blip2x_training.data.images import BadRow, open_image, opened
from blip2x_training.evaluation.report.page import embedded
from blip2x_training.evaluation.samples import EvaluationSet
from modeling_blip2x.images_blip2x import FORMATS, orientation_of, rgb_image
from tests.helpers.picture_files import (
    EVERYWHERE,
    HIDDEN_LEFT,
    LEFT_OUT_OF_THE_SPACE,
    PLAIN,
    RIGHT,
    WHITE,
    both,
    encoded,
    halves,
)
from tests.helpers.tiny import image_processor


@pytest.mark.parametrize("name", HIDDEN_LEFT)
def test_what_is_transparent_shows_white(name):
    content, right = HIDDEN_LEFT[name]
    assert both(rgb_image(content)) == (WHITE, right)


@pytest.mark.parametrize("name", PLAIN | LEFT_OUT_OF_THE_SPACE)
def test_levels_of_files(name):
    content, left, right = (PLAIN | LEFT_OUT_OF_THE_SPACE)[name]
    shown = rgb_image(content)
    assert shown.mode == "RGB" and both(shown) == (left, right)


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, WHITE),
        ("LA", (0, 0), WHITE),
        ("LA", (100, 255), (100, 100, 100)),
        ("La", (0, 0), WHITE),
        ("PA", (5, 0), WHITE),
        ("RGBA", (0, 0, 0, 0), WHITE),
        ("RGBA", (100, 0, 200, 51), (224, 204, 244)),  # a fifth of the colour on four fifths of white
        ("RGBa", (0, 0, 0, 0), WHITE),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (0, 100, 200, 0), (255, 155, 55)),
        ("YCbCr", (100, 128, 128), (100, 100, 100)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("LAB", (0, 128, 128), (0, 0, 0)),
        ("I", 100, (100, 100, 100)),
        ("I", 100 * 257, (100, 100, 100)),
        ("I;16", 100 * 257, (100, 100, 100)),
        ("I;16", 65535, WHITE),
        ("I;16", 0, (0, 0, 0)),
        ("I;16B", 100 * 257, (100, 100, 100)),
        ("F", 100 / 255, (100, 100, 100)),
        ("F", 1.0, WHITE),
        ("F", 100.0, (100, 100, 100)),
    ],
)
def test_every_mode_of_pil(mode, colour, expected):
    image = Image.new(mode, (4, 3), colour)
    before = image.mode, dict(image.info), image.tobytes()
    shown = rgb_image(image)
    assert shown.mode == "RGB" and shown.size == (4, 3)
    assert np.abs(np.subtract(shown.getpixel((2, 1)), expected)).max() <= (1 if mode == "LAB" else 0)
    assert (image.mode, dict(image.info), image.tobytes()) == before  # the caller's picture stays as it is


def test_a_palette_of_colours_with_alpha():
    image = halves("RGBA", (9, 9, 9, 0), (*RIGHT, 255)).quantize()
    assert image.mode == "P" and "transparency" not in image.info
    assert both(rgb_image(image)) == (WHITE, RIGHT)


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
OPAQUE = np.full((5, 7, 1), 255, np.uint8)
ARRAYS = {  # all of PIXELS
    "uint8": PIXELS,
    "channels first": PIXELS.transpose(2, 0, 1),
    "with alpha": np.concatenate([PIXELS, OPAQUE], axis=2),
    "with alpha, channels first": np.concatenate([PIXELS, OPAQUE], axis=2).transpose(2, 0, 1),
    "mirrored twice": PIXELS[:, ::-1].copy()[:, ::-1],
    "int64": PIXELS.astype(np.int64),
    "uint16": PIXELS.astype(np.uint16) * 257,
    "uint16, other byte order": (PIXELS.astype(np.uint16) * 257).astype(">u2"),
    "int32 of 16 bits": PIXELS.astype(np.int32) * 257,
    "floats to 1": (PIXELS / 255).astype(np.float32),
    "float64 to 1": PIXELS / 255,
    "float16 to 1": (PIXELS / 255).astype(np.float16),
    "floats to 255": PIXELS.astype(np.float32),
    "a tensor": torch.tensor(PIXELS),
    "a tensor, channels first": torch.tensor(PIXELS).permute(2, 0, 1),
    "of torchvision's ToTensor": torch.tensor(PIXELS).permute(2, 0, 1) / 255,
    "a tensor that trains": (torch.tensor(PIXELS) / 255).requires_grad_(),
    "uint16 tensor": torch.tensor(PIXELS.astype(np.uint16) * 257),
    "float64 tensor": torch.tensor(PIXELS / 255),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_tensors(name):
    assert np.array_equal(rgb_image(ARRAYS[name]), PIXELS)


def test_coarse_floats_and_booleans():
    halved = rgb_image(torch.tensor(PIXELS).bfloat16() / 255)
    assert np.abs(np.asarray(halved).astype(int) - PIXELS).max() <= 1  # bfloat16 has 8 bits
    assert np.array_equal(np.asarray(rgb_image(PIXELS[..., 0] > 99))[..., 1], 255 * (PIXELS[..., 0] > 99))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7)])
def test_grey_arrays(shape):
    grey = PIXELS[..., 0].reshape(shape)
    for given in (grey, torch.tensor(grey), grey / 255):
        assert np.array_equal(np.asarray(rgb_image(given)), np.repeat(PIXELS[..., :1], 3, axis=2))


@pytest.mark.parametrize("high", [1, 3, 4])
def test_where_both_ends_could_be_channels_arrays_end_with_them_and_tensors_start(high):
    low = np.resize(PIXELS, (high, 9, 3))
    assert np.array_equal(rgb_image(low), low)
    narrow = torch.tensor(PIXELS[:, :high]).permute(2, 0, 1)  # (3, H, W) as torchvision makes it, 1, 3 or 4 wide
    assert np.array_equal(rgb_image(narrow), PIXELS[:, :high])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.full((3, 4, 3), np.nan), r"\(3, 4, 3\) and dtype float64 with NaN"),
        (np.full((3, 4, 3), np.inf, np.float32), "infinite"),
        (np.full((3, 4), -1), "from -1 to -1.*scale"),
        (np.full((3, 4), 70000), "from 70000 to 70000.*scale"),
        (np.full((3, 4), -0.5), "from -0.5 to -0.5.*undo a normalisation"),
        (np.linspace(-2, 2, 12).reshape(3, 4), "from -2 to 2.*undo a normalisation"),
        (np.full((3, 4), 1.2), "from 1.2 to 1.2.*clip"),
        (np.full((3, 4), 30000.0), "from 30000 to 30000.*scale"),
        (np.full((3, 4), 200, np.uint16), "from 200 to 200 of 65535, which is black.*numpy.uint8"),
        (torch.full((3, 9, 9), 2.5), "from 2.5 to 2.5"),
        (Image.new("F", (4, 3), 1.5), "mode F with values from 1.5 to 1.5"),
        (Image.new("I", (4, 3), -7), "mode I with values from -7 to -7"),
        (Image.new("I;16", (4, 3), 200), "mode I;16 with values from 200 to 200 of 65535, which is black"),
        (np.zeros((2, 3, 4, 3), np.uint8), r"\(2, 3, 4, 3\).*of a batch a list"),
        (torch.zeros(5), r"shape \(5,\)"),
        (np.zeros((9, 9, 5), np.uint8), r"\(9, 9, 5\).*1, 3 or 4 channels"),
        (np.zeros((0, 3, 3), np.uint8), r"\(0, 3, 3\).*no pixel"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (np.zeros((3, 3), complex), "complex128.*no levels"),
        ({}, "Give it bytes or a path"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
    ],
)
def test_what_has_no_certain_levels_is_refused_with_its_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        rgb_image(wrong)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
PAGE = Image.new("RGB", (9, 9)).im


def test_what_is_no_picture_at_all():
    for wrong in (None, 5, [PIXELS]):
        with pytest.raises(TypeError, match=f"An image is a {type(wrong).__name__}"):
            rgb_image(wrong)


def test_paths_bytes_and_dictionaries_show_the_same(tmp_path):
    content = encoded(Image.fromarray(PIXELS))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    dictionaries = ({"bytes": content, "path": "gone.png"}, {"bytes": None, "path": str(path)}, {"path": path})
    for given in (path, str(path), content, bytearray(content), memoryview(content), *dictionaries, Image.open(path)):
        assert np.array_equal(rgb_image(given), PIXELS)


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = encoded(Image.fromarray(np.resize(PIXELS[::-1], (30, 30, 3))), compress_level=0)
    files = {"cut.png": whole[:900], "text.png": b"hello", "empty.png": b""}
    files["page.eps"] = EPS
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {"cut.png": "OSError|truncated", "text.png": "no known image format", "empty.png": "the file is empty"}
    reasons |= {
        "page.eps": "no known image format",
        "pipe.png": "not a regular file",
        "gone.png": "the file is missing",
    }
    reasons |= {"": "not a regular file"}  # the folder
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{tmp_path / name}.* cannot be read: .*({reason})"):
            rgb_image(tmp_path / name)
        with pytest.raises(BadRow, match=reason):
            open_image(str(tmp_path / name), None)
    with pytest.raises(ValueError, match="image in 900 bytes cannot be read: .*truncated"):
        rgb_image(whole[:900])
    with pytest.raises(ValueError, match="PNG image of 30 x 30 pixels cannot be decoded: .*truncated"):
        rgb_image(Image.open(tmp_path / "cut.png"))


def test_no_format_is_taken_that_another_program_reads(monkeypatch):
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: called.append(1) or PAGE)
    opened_by_the_caller = Image.open(io.BytesIO(EPS))
    assert opened_by_the_caller.format == "EPS"
    with pytest.raises(ValueError, match="EPS image of 9 x 9 would be drawn by another program"):
        rgb_image(opened_by_the_caller)
    with pytest.raises(ValueError, match="no known image format"):
        rgb_image(EPS)
    assert not called
    assert not {"EPS", "WMF", "EMF", "GRIB", "HDF5", "BUFR"} & set(FORMATS)


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("RGB", "WEBP"), ("I;16", "PNG")]
)
def test_every_orientation_is_turned_once(mode, kind):
    """Against the definition of the tag: which corner of the scene is stored in the upper left, and which way rows go."""
    levels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    image = Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    as_it_lies = np.asarray(rgb_image(encoded(image, kind)))
    turns = [
        lambda p: p,
        lambda p: p[:, ::-1],
        lambda p: p[::-1, ::-1],
        lambda p: p[::-1],
        lambda p: p.swapaxes(0, 1),
        lambda p: np.rot90(p, -1),
        lambda p: p[::-1, ::-1].swapaxes(0, 1),
        np.rot90,
    ]
    for orientation, turn in enumerate(turns, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        shown = rgb_image(encoded(image, kind, exif=exif))
        assert np.array_equal(shown, turn(as_it_lies)), orientation
        assert np.array_equal(rgb_image(shown), shown), "turned again"


def test_damaged_exif_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 9  # 1 to 8 are defined
    for data in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", exif.tobytes()):
        content = encoded(Image.fromarray(PIXELS), exif=data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's
            assert orientation_of(Image.open(io.BytesIO(content))) == 1
            assert np.array_equal(rgb_image(content), PIXELS)


def test_ordinary_photos_keep_every_bit():
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("BMP", {}), ("GIF", {})):
        content = encoded(noise, kind, **options)
        assert np.array_equal(rgb_image(content), Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in (EVERYWHERE | {name: entry[0] for name, entry in LEFT_OUT_OF_THE_SPACE.items()}).items():
        (folder / name).write_bytes(content)
    return folder


def evaluation_set(path) -> EvaluationSet:
    rows = Dataset.from_dict({"image": [str(path)], "caption": ["a"]}).cast_column("image", ImageFeature())
    return EvaluationSet(rows, task="caption")


@pytest.mark.parametrize("name", [*EVERYWHERE, *LEFT_OUT_OF_THE_SPACE])
def test_training_cache_and_evaluation_see_the_same_pixels(files, name, monkeypatch):
    path = files / name
    expected = rgb_image(path)
    levels = torch.tensor(np.array(expected)).permute(2, 0, 1)
    assert np.array_equal(open_image(str(path), None), expected)
    assert np.array_equal(open_image({"bytes": path.read_bytes(), "path": None}, None), expected)

    # A crop of all of it in its own size, which a draw of 0.84 does not flip.
    monkeypatch.setattr(transforms, "draw_crop", lambda width, height, rng: (0, 0, width, height))
    with opened(str(path), None) as image:
        assert torch.equal(transforms.augment_image(image, levels.shape[1:], random.Random(0)), levels)

    data = evaluation_set(path)
    assert np.array_equal(data[0, 0]["image"], expected) and np.array_equal(data.image_of(0), expected)
    pixels, fault = Views(data, image_processor(), 1, 0)[0]
    assert fault == "" and torch.equal(pixels, image_processor()(images=[expected], return_tensors="pt").pixel_values)


def test_the_report_shows_white_too():
    uri = embedded(Image.open(io.BytesIO(HIDDEN_LEFT["rgba.png"][0])))
    left, right = both(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert left == WHITE and np.abs(np.subtract(right, RIGHT)).max() < 6  # a JPEG
