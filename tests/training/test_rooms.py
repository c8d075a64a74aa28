"""The rooms of training/: imports go downwards only, without circles, and no name means two modules."""

import ast
import sys
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "blip2x_training"
# From the ground up: a room imports from itself and from those before it. The scripts are the roof.
FLOORS = (
    "metrics", "system", "arguments", "models", "reporting", "data", "evaluation", "engine", "capfilt", "toy", "photo_run", "scripts"
)  # fmt: skip
FOLDERS = {PACKAGE: "training", "modeling_blip2x": "modeling_blip2x"}


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file, packages by the name of their folder."""
    folder = ROOT / FOLDERS[package]
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the same package that a module imports, at its top or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names}
    return (found & known.keys()) - {name}


def graph(package: str) -> dict[str, set[str]]:
    known = modules(package)
    return {name: imports_of(name, path, known) for name, path in known.items()}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A way that ends where it began, or nothing."""
    done = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows[name]):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := visit(name, []))), [])


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or (ROOT / "training" / parts[-1]).is_dir() else "scripts"


def path_changes(path: Path) -> list[int]:
    """Lines that change sys.path; code in strings, for other processes, is not meant."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "path" and ast.unparse(node.value) == "sys"
    ]


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", FOLDERS)
def test_no_import_circle(package):
    assert circle(graph(package)) == []


def test_rooms_import_downwards_only():
    arrows = {(name, other) for name, others in graph(PACKAGE).items() for other in others if name != PACKAGE}
    assert len(arrows) > 100, "the imports are no longer found"
    upwards = [
        f"{name} imports {other}"
        for name, other in sorted(arrows)
        if other != PACKAGE and FLOORS.index(room_of(name)) < FLOORS.index(room_of(other))
    ]
    assert upwards == []


def test_every_module_lies_in_a_room():
    rooms = {room_of(name) for name in modules(PACKAGE) if name != PACKAGE}
    assert rooms == set(FLOORS)


def test_no_two_modules_of_one_name():
    # Each metric has its own scores.py: evaluate loads a metric by its folder.
    names = Counter(name.rpartition(".")[2] for name in modules(PACKAGE) if ".metrics." not in name)
    assert [name for name, count in names.items() if count > 1] == []


def test_no_room_hides_an_installed_package():
    # When a script runs by its path, sys.path begins with training/: its folders and files come before all others.
    tops = {path.stem for path in (ROOT / "training").iterdir() if path.suffix == ".py" or path.is_dir()}
    installed = set(packages_distributions()) | sys.stdlib_module_names
    assert {"data", "engine", "pretrain_stage1"} <= tops and "torch" in installed
    assert tops & installed - {"__init__"} == set()


def test_nothing_changes_the_import_path():
    files = [
        path
        for folder in ("modeling_blip2x", "training", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 150
    assert {str(path.relative_to(ROOT)): path_changes(path) for path in files if path_changes(path)} == {}


def test_no_test_imports_a_test_or_a_benchmark_and_no_benchmark_a_test():
    wrong = []
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
                if any(part.startswith("test_") for name in names for part in name.split(".")):
                    wrong.append(f"{path.name} imports a test")
                if folder == "tests" and any(name.split(".")[0] == "benchmarks" for name in names):
                    wrong.append(f"{path.name} imports a benchmark")
    assert wrong == []
