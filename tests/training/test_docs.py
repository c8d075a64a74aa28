"""Pages of the documentation: links, files that they name, figures, and the site that mkdocs builds of them."""

import json
import re
import subprocess
import sys

import pytest

from blip2x_training.toy.summary import table
from tests.helpers.pages import DOCS, LINK, PAGES, README, ROOT, anchors, blocks, name_of, prose, sections

FOLDERS = "training|modeling_blip2x|tests|benchmarks|space_app|docs"
PATH = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w/?")
FILE = re.compile(r"`([\w.]+\.(?:py|yaml))`")
FROM_A_RUN = {"config.yaml"}  # names of files that a run writes
NOT_MEASURED = {"Works with", "Shapes"}  # sections whose numbers are versions and sizes


@pytest.mark.parametrize("page", [*PAGES, ROOT / "llms.txt"], ids=name_of)
def test_links_lead_somewhere(page):
    text = prose(page)
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name_of(page)} links to {target}"


def test_the_index_and_llms_txt_name_every_page():
    for page in DOCS:
        assert page.name == "index.md" or f"]({page.name})" in (ROOT / "docs/index.md").read_text()
        assert page.name == "index.md" or f"](docs/{page.name})" in (ROOT / "llms.txt").read_text()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "llms.txt"], ids=name_of)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    known = {path.name for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.*")}
    known |= {path.name for path in ROOT.glob("*.*")} | FROM_A_RUN
    missing |= {name for name in FILE.findall(text) if name not in known}
    assert not missing


def test_the_tree_of_the_readme_is_that_of_the_repository():
    tree = next(block.text for block in blocks(README, "text") if block.text.startswith("modeling_blip2x/"))
    folder = None
    for line in tree.splitlines():
        names = re.split(r"[ ,]+", re.split(r"  +", line.strip())[0])
        if not line.startswith(" "):
            (folder,) = names
        for name in names if line.startswith(" ") else ["."]:
            assert (ROOT / folder / name).exists(), f"{folder}{name}"


def test_commands_of_an_installed_package_are_those_of_setup():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    named = {name for page in PAGES for name in re.findall(r"`(blip2x-\w+)`", page.read_text(encoding="utf-8"))}
    assert len(named) == 9 and all(f'"{name} = ' in setup for name in named)


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_table_of_speed_is_what_the_benchmarks_wrote():
    header, _, *lines = [line for line in (ROOT / "docs/speed.md").read_text().splitlines() if line.startswith("|")]
    names, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines))
    rows = json.loads((ROOT / "docs/figures/speed.json").read_text())
    for shown, row in zip((dict(zip(names, each, strict=True)) for each in cells), rows, strict=True):
        assert {name: shown[name] for name in ("suite", "case", "dtype", "unit")}.items() <= row.items()
        assert shown["met"] == {None: "", True: "yes", False: "no"}[row["met"]]
        for name, form in (("ours", ".4g"), ("baseline", ".4g"), ("ratio", ".2f"), ("aim", ".2f")):
            assert shown[name] == ("" if row[name] is None else format(row[name], form)), (row["case"], name)


def test_figures_of_the_quickstart_are_those_that_a_run_wrote():
    """Those of the model card too, which a run fills anew."""
    figures = table(json.loads((ROOT / "docs/figures/quickstart.json").read_text()))
    for page in ("docs/quickstart.md", "model_card.md"):
        assert f"```\n{figures}\n```" in (ROOT / page).read_text(encoding="utf-8").replace("```text", "```"), page
    (shown,) = (block.text for block in blocks(README, "text") if "caption exact match" in block.text)
    assert len(shown.splitlines()) >= 5 and set(shown.splitlines()) <= set(figures.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_measured_figures_carry_date_and_command(page):
    """Wherever a table, or what a command printed, has a number with a decimal point."""
    for heading, text in sections(page).items():
        shown = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        shown += re.findall(r"^\|.*", re.sub(r"`[^`\n]+`", "", text), re.MULTILINE)
        if heading in NOT_MEASURED or page.name == "scale.md":  # formulas, compared with benchmarks/traffic.py
            continue
        if any(re.search(r"(?<![\w.])\d*\.\d", one) for one in shown):
            assert re.search(r"measured\s20\d\d-\d\d-\d\d\s(with|against|by)", text), f"{name_of(page)}: {heading}"


def test_mkdocs_builds_the_pages_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout
    for page in DOCS:
        built = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        heading = next(iter(sections(page)))
        assert f">{heading}</h1>" in (tmp_path / "site" / built).read_text(encoding="utf-8")
