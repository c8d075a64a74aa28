"""setup.py, the constraints, the Space's requirements and README's table name the same releases."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
EXTRAS = ("CORE", "TRAIN", "EVAL", "SPACE", "QUANTIZE")
# Tested beyond constraints.txt, as README says: gradio, which is in constraints.txt, takes no Pillow above 12.
BEYOND = {"pillow"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """By canonical name."""
    texts = (re.sub(r"\s+#.*|^#.*", "", line).strip() for line in lines)
    return {canonicalize_name(one.name): one for one in map(Requirement, filter(None, texts))}


def read(name: str) -> dict[str, Requirement]:
    return requirements((ROOT / name).read_text(encoding="utf-8").splitlines())


def pins(name: str) -> dict[str, Version]:
    return {package: Version(str(one.specifier).removeprefix("==")) for package, one in read(name).items()}


@pytest.fixture(scope="module")
def allowed() -> dict[str, Requirement]:
    """What setup.py requires, by name."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in EXTRAS
    }
    assert set(lists) == set(EXTRAS)
    return requirements([line for lines in lists.values() for line in lines])


@pytest.fixture(scope="module")
def bounds(allowed) -> dict[str, tuple[Version, Version]]:
    """Lower and upper bound of every requirement that has both."""
    found = {}
    for name, one in allowed.items():
        versions = {part.operator: Version(part.version) for part in one.specifier}
        if "<" in versions:
            assert set(versions) == {">=", "<"}, one
            found[name] = versions[">="], versions["<"]
    return found


@pytest.fixture(scope="module")
def table() -> dict[str, tuple[Version, Version, str]]:
    """Rows of README's "Works with": oldest and newest tested version, and the first that setup.py refuses."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Works with\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+)[^|]* \| ([\d.]+) \|$", text, re.MULTILINE)
    return {canonicalize_name(name): (Version(old), Version(new), Version(end)) for name, old, new, end in rows}


def test_what_moves_fast_has_an_upper_bound(bounds):
    named = {"torch", "transformers", "accelerate", "datasets", "peft", "gradio", "huggingface-hub", "pillow"}
    assert named <= set(bounds)


def test_readme_has_the_bounds_of_setup(bounds, table):
    assert {name: (old, end) for name, (old, _, end) in table.items()} == bounds


def test_the_oldest_tested_are_the_lower_bounds(bounds):
    assert pins("constraints-oldest.txt") == {name: lower for name, (lower, _) in bounds.items()}


def test_the_newest_tested_are_in_constraints(bounds, table):
    newest = pins("constraints.txt")
    for name, (lower, upper) in bounds.items():
        assert lower <= newest[name] <= table[name][1] < upper, name
        assert (newest[name] != table[name][1]) == (name in BEYOND), name


def test_the_upper_bound_is_the_first_untested_release(table):
    """The next minor release of transformers, which renames arguments in them; the next major one of all others."""
    for name, (_, newest, upper) in table.items():
        next_one = f"{newest.major}.{newest.minor + 1}" if name == "transformers" else str(newest.major + 1)
        assert upper == Version(next_one), name


def test_the_space_requires_what_setup_does(allowed):
    space = read("space_app/requirements.txt")
    assert {"torch", "transformers", "safetensors", "huggingface-hub", "pillow", "numpy", "psutil"} == set(space)
    for name, one in space.items():
        expected = ">=12.0.0,<13" if name == "pillow" else str(allowed[name].specifier)  # gradio takes none above 12
        assert one.specifier == Requirement(name + expected).specifier, name
    sdk = re.search(r"^sdk_version: (.+)$", (ROOT / "space_app" / "README.md").read_text(), re.MULTILINE)[1]
    assert Version(sdk) == pins("constraints.txt")["gradio"]


def test_the_newest_releases_come_with_the_torch_of_constraints():
    assert pins("constraints-latest.txt") == {"torch": pins("constraints.txt")["torch"]}
