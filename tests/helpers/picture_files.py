"""Picture files of every kind of levels and transparency, each with the colours that it shows."""

import io
import struct
import zlib

from PIL import Image

from tests.helpers.tiny import SIZE

GREY = 100
SIZES = (SIZE, SIZE)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def raw_png(colour: int, bits: int, row: bytes, hidden: bytes = b"") -> bytes:
    """A PNG of 2 x 1 pixels of a kind that PIL does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0))
    body = (chunk(b"tRNS", hidden) if hidden else b"") + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def palette_image() -> Image.Image:
    """Left half entry 0 (1, 2, 3), right half entry 1 (200, 100, 50)."""
    image = Image.new("P", SIZES, 0)
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.paste(1, (SIZE // 2, 0, SIZE, SIZE))
    return image


def halves(mode: str, left, right) -> Image.Image:
    image = Image.new(mode, SIZES, left)
    image.paste(right, (SIZE // 2, 0, SIZE, SIZE))
    return image


def both(image) -> tuple:
    """The colours of the left and the right edge."""
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, 0))


WHITE = (255, 255, 255)
RIGHT = (200, 100, 50)
HIDDEN_LEFT = {  # files whose left half is transparent over some dark colour; what their right half shows
    "rgba.png": (encoded(halves("RGBA", (9, 9, 9, 0), (*RIGHT, 255))), RIGHT),
    "la.png": (encoded(halves("LA", (9, 0), (70, 255))), (70, 70, 70)),
    "palette.png": (encoded(palette_image(), transparency=0), RIGHT),
    "palette_bytes.png": (encoded(palette_image(), transparency=b"\x00\x80"), (227, 177, 152)),
    "rgb_key.png": (encoded(halves("RGB", (9, 9, 9), RIGHT), transparency=(9, 9, 9)), RIGHT),
    "grey_key.png": (encoded(halves("L", 9, 70), transparency=9), (70, 70, 70)),
    "one_bit_key.png": (encoded(halves("1", 0, 1), transparency=0), WHITE),
    "grey16_key.png": (encoded(halves("I;16", 9 * 257, 70 * 257), transparency=9 * 257), (70, 70, 70)),
    "rgba.webp": (encoded(halves("RGBA", (9, 9, 9, 0), (*RIGHT, 255)), "WEBP", lossless=True), RIGHT),
    "palette.gif": (encoded(palette_image(), "GIF", transparency=0), RIGHT),
    "rgb16_key.png": (
        raw_png(2, 16, struct.pack(">6H", 2570, 2570, 2570, 51400, 25700, 12850), b"\x0a\x0a" * 3),
        RIGHT,
    ),
    "rgba16.png": (raw_png(6, 16, struct.pack(">8H", 9, 9, 9, 0, 51400, 25700, 12850, 65535)), RIGHT),
}
PLAIN = {  # files without transparency; left and right colour
    "rgb.png": (encoded(halves("RGB", (9, 8, 7), RIGHT)), (9, 8, 7), RIGHT),
    "grey.bmp": (encoded(halves("L", 9, 70), "BMP"), (9, 9, 9), (70, 70, 70)),
    "rgb.bmp": (encoded(halves("RGB", (9, 8, 7), RIGHT), "BMP"), (9, 8, 7), RIGHT),
    "one_bit.png": (encoded(halves("1", 0, 1)), (0, 0, 0), WHITE),
    "palette.png": (encoded(palette_image()), (1, 2, 3), RIGHT),
    "grey16.png": (encoded(halves("I;16", GREY * 257, 65535)), (GREY,) * 3, WHITE),
}
LEFT_OUT_OF_THE_SPACE = {  # formats that uploads do not take
    "grey16.tiff": (encoded(halves("I;16", GREY * 257, 65535), "TIFF"), (GREY,) * 3, WHITE),
    "floats.tiff": (encoded(halves("F", 0.4, 1.0), "TIFF"), (102,) * 3, WHITE),
    "cmyk.tiff": (encoded(halves("CMYK", (0, 155, 205, 0), (55, 155, 205, 0)), "TIFF"), (255, 100, 50), RIGHT),
    "grey16.pgm": (b"P5 2 1 65535\n" + struct.pack(">2H", GREY * 257, 65535), (GREY,) * 3, WHITE),
}
EVERYWHERE = {name: content for name, (content, *_) in (HIDDEN_LEFT | PLAIN).items()}
