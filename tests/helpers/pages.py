"""The pages of the documentation and what is in them: blocks of code, headings, links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "space_app/README.md", *DOCS]
FENCE = re.compile(r"(?:^<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass
class Block:
    """A fenced block: where it starts, its language, its text, and why it is not run, if a marker before it says so."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None


def blocks(page: Path, language: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text[: match.start(3)].count("\n") + 1, match[2], match[3], match[1])
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose(page))}


def sections(page: Path) -> dict[str, str]:
    """The text below each heading, by the heading; not that of the headings below it."""
    text = page.read_text(encoding="utf-8")
    fences = [match.span() for match in FENCE.finditer(text)]
    starts = [one for one in HEADING.finditer(text) if not any(a <= one.start() < b for a, b in fences)]
    ends = [one.start() for one in starts[1:]] + [len(text)]
    return {one[1]: text[one.end() : end] for one, end in zip(starts, ends)}
