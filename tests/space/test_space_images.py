"""The Space sees the pixels that training and the processor see, and says what it cannot show."""

import warnings

import numpy as np
import pytest
import uploads
from mistakes import Mistake
from PIL import Image

from modeling_blip2x.images_blip2x import rgb_image
from tests.helpers.picture_files import EVERYWHERE, WHITE, encoded


@pytest.mark.parametrize("name", EVERYWHERE)
def test_the_space_sees_the_same_pixels(tmp_path, name):
    (tmp_path / name).write_bytes(EVERYWHERE[name])
    assert np.array_equal(uploads.open_upload(tmp_path / name), rgb_image(tmp_path / name))


def test_damaged_exif_turns_nothing(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 9  # 1 to 8 are defined
    for data in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", exif.tobytes()):
        (tmp_path / "damaged.png").write_bytes(encoded(Image.fromarray(pixels), exif=data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's
            assert np.array_equal(uploads.open_upload(tmp_path / "damaged.png"), pixels)


def test_the_space_shrinks_colours_not_palette_entries_or_hidden_ones(tmp_path):
    """Stripes of one pixel become their mean; a border to transparent black has no dark rim."""
    stripes = np.tile(np.array([0, 1], np.uint8), (64, 1100))
    palette = Image.fromarray(stripes).convert("P")
    palette.putpalette([0, 0, 0, 200, 200, 200])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(stripes.astype(np.uint16) * 200 * 257).save(tmp_path / "grey16.png")
    for name in ("palette.png", "grey16.png"):
        shown = np.asarray(uploads.open_upload(tmp_path / name))
        assert shown.shape[1] == 1024 and abs(shown.mean() - 100) < 2 and np.abs(shown.astype(int) - 100).max() < 60, (
            name
        )
    clear = Image.new("RGBA", (2200, 64), (0, 0, 0, 0))
    clear.paste(WHITE + (255,), (1101, 0, 2200, 64))
    clear.save(tmp_path / "clear.png")
    assert np.asarray(uploads.open_upload(tmp_path / "clear.png")).min() == 255


def test_the_space_says_what_it_cannot_show(tmp_path):
    Image.new("I;16", (9, 9), 200).save(tmp_path / "dark.png")
    with pytest.raises(Mistake, match="all but black"):
        uploads.open_upload(tmp_path / "dark.png")
