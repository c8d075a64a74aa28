"""What a page shows, asked of the browser: its pictures, colours and width."""

import base64
import io
import re

import numpy as np
from PIL import Image
from playwright.sync_api import expect
from uploads import open_upload

from tests.helpers.space_server import EXAMPLES

PIXELS = """async image => {
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
}"""


def is_shown(element, picture: Image.Image) -> bool:
    """Whether an <img> that can be seen shows this picture, and shows it better than any example that is another."""
    expect(element).to_be_visible()
    found = Image.open(io.BytesIO(base64.b64decode(element.evaluate(PIXELS))))

    def likeness(other: Image.Image) -> float:
        pair = [np.asarray(one.convert("RGB").resize((48, 48))).ravel() for one in (found, other)]
        return np.corrcoef(pair)[0, 1]

    others = [other for other in map(open_upload, EXAMPLES) if other.tobytes() != picture.tobytes()]
    return likeness(picture) > 0.95 and likeness(picture) > max(map(likeness, others))


def nothing_hangs_out(page) -> bool:
    """Whether the page is no wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1


def colour_of(element, name: str) -> tuple[int, ...]:
    """RGB of a computed CSS colour."""
    text = element.evaluate("(element, name) => getComputedStyle(element)[name]", name)
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def wait_until_still(page) -> None:
    """Until every transition and animation that ends has ended."""
    page.wait_for_function(
        "document.getAnimations().every(one => one.playState != 'running' || "
        "one.effect.getComputedTiming().endTime == Infinity)"
    )
