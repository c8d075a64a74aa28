"""Scores as HTML: bars, and a matrix for several images. Every text from outside is escaped."""

import base64
import io
from html import escape

from PIL import Image

THUMBNAIL = 96  # pixels


AWAITED = '<p class="awaited">The scores will be shown here.</p>'


def bars(scores: dict) -> str:
    """Two bars a text, ITC cosine and ITM match probability, for the first image of `matching.match`'s scores."""
    rows = [
        f'<div class="bar-row"><div class="bar-text">{escape(str(text))}</div>'
        f"{_bar('ITC', itc, 'itc')}{_bar('ITM', itm, 'itm')}</div>"
        for text, itc, itm in zip(scores["texts"], scores["itc"][0], scores["itm"][0])
    ]
    return f'<div class="bars" role="img" aria-label="Scores of each text as bars">{"".join(rows)}</div>{LEGEND}'


LEGEND = (
    '<p class="legend"><b>ITC</b>: cosine of image and text, from -1 to 1; compare texts with one another. '
    "<b>ITM</b>: probability that they match, by the head that reads both together.</p>"
)


def _bar(name: str, value: float, kind: str) -> str:
    value = float(value)
    width = 100 * min(max(value, 0.0), 1.0)
    return (
        f'<div class="bar"><span class="bar-name">{name}</span>'
        f'<span class="bar-track"><span class="bar-fill {kind}" style="width:{width:.1f}%"></span></span>'
        f'<span class="bar-value">{value:.3f}</span></div>'
    )


def matrix(scores: dict, images: list[Image.Image]) -> str:
    """A table of texts (rows) and images (columns); a cell has the ITM match probability, which colours it, and the ITC
    cosine. Texts are rows because there may be many, and a page is longer than wide."""
    heads = "".join(
        f'<th scope="col"><img src="{thumbnail(image)}" alt="">picture {number}</th>'
        for number, image in enumerate(images, 1)
    )
    rows = []
    for text, itc, itm in zip(scores["texts"], zip(*scores["itc"]), zip(*scores["itm"])):
        cells = "".join(
            f'<td style="--match:{float(m):.3f}"><small>ITM</small> <b>{float(m):.3f}</b>'
            f"<small><br>ITC {float(c):.3f}</small></td>"
            for c, m in zip(itc, itm)
        )
        rows.append(f'<tr><th scope="row">{escape(str(text))}</th>{cells}</tr>')
    return (
        '<div class="matrix-frame" tabindex="0" role="region" aria-label="Scores of each picture and text">'
        f'<table class="matrix"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{LEGEND}'
    )


def thumbnail(image: Image.Image) -> str:
    """A small JPEG as an address, so that the page needs no file."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def chart(scores: dict | None, images: list[Image.Image]) -> str:
    """Bars for one image, a matrix for several. Nothing if the pictures have changed since they were scored."""
    if not scores or len(images) != len(scores["itc"]):
        return ""
    return bars(scores) if len(images) == 1 else matrix(scores, images)


def verdict(ranking: list[dict] | None) -> str:
    """A sentence where none of the ranked fits: ITM's head chooses between two, so below a half it says no."""
    matches = [row["itm"] for row in ranking or [] if row["itm"] is not None]
    if not matches or max(matches) >= 0.5:
        return ""
    return f"Nothing here matches well: the highest ITM is {max(matches):.2f}. The first ones only come closest."


def text_ranking(ranking: list[dict] | None) -> str:
    """Ranked texts as a numbered list with their bars."""
    if not ranking:
        return ""
    rows = [
        f'<li class="bar-row"><div class="bar-text">{escape(str(row["text"]))}</div>{_bar("ITC", row["itc"], "itc")}'
        f"{'' if row['itm'] is None else _bar('ITM', row['itm'], 'itm')}</li>"
        for row in ranking
    ]
    doubt = f'<p class="verdict">{sentence}</p>' if (sentence := verdict(ranking)) else ""
    return f'{doubt}<ol class="bars">{"".join(rows)}</ol>{LEGEND}'
