"""Scores as HTML: bars, and a matrix for several images. Every text from outside is escaped."""

from html import escape


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


def matrix(scores: dict) -> str:
    """A table of images and texts; a cell has the ITM match probability, which colours it, and the ITC cosine."""
    heads = "".join(f'<th scope="col">{escape(str(text))}</th>' for text in scores["texts"])
    rows = []
    for number, (itc, itm) in enumerate(zip(scores["itc"], scores["itm"]), 1):
        cells = "".join(
            f'<td style="--match:{float(m):.3f}"><b>{float(m):.3f}</b><small>ITC {float(c):.3f}</small></td>'
            for c, m in zip(itc, itm)
        )
        rows.append(f'<tr><th scope="row">picture {number}</th>{cells}</tr>')
    return (
        '<div class="matrix-frame" tabindex="0" role="region" aria-label="Scores of each picture and text">'
        f'<table class="matrix"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{LEGEND}'
    )


def chart(scores: dict | None) -> str:
    """Bars for one image, a matrix for several."""
    if not scores:
        return ""
    return bars(scores) if len(scores["itc"]) == 1 else matrix(scores)


def text_ranking(ranking: list[dict] | None) -> str:
    """Ranked texts as a numbered list with their bars."""
    if not ranking:
        return ""
    rows = [
        f'<li class="bar-row"><div class="bar-text">{escape(str(row["text"]))}</div>{_bar("ITC", row["itc"], "itc")}'
        f"{'' if row['itm'] is None else _bar('ITM', row['itm'], 'itm')}</li>"
        for row in ranking
    ]
    return f'<ol class="bars">{"".join(rows)}</ol>{LEGEND}'
