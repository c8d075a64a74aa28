"""Files, functions and parameter lists stay as short as they are, so that each can be read at one sitting."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("modeling_blip2x", "training", "space_app", "benchmarks")
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 450, 100, 10
MOST_PARAMETERS_OF = {"train": 9}
# Whose parameters others dictate: transformers names those of a forward, and a Gradio endpoint has one for each control.
# chunked_backward is one too: forward and backward.
NAMES_OF_FORWARDS = {"forward", "generate", "__call__", "chunked_backward"}
ENDPOINTS = {"caption", "answer"}  # in space_app/*_tab.py
# A tab of the Space is one function, for controls are drawn in the order in which they are made.
MOST_LINES_OF = {"build": 114}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def parameters(function: Function) -> int:
    """Parameters of a function without self and cls; *args and **kwargs count as one each."""
    taken = function.args
    names = [one.arg for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(taken.vararg) + bool(taken.kwarg)


def lines(function: Function) -> int:
    return function.end_lineno - function.lineno + 1


def found(*folders: str) -> list[tuple[Path, Function]]:
    pairs = [
        (path.relative_to(ROOT), function)
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for function in functions(path.read_text(encoding="utf-8"))
    ]
    assert len(pairs) > 500, "the functions are no longer found"
    return pairs


def test_the_ruler():
    source = "class A:\n    def f(self, a, /, b, *c, d=1, **e):\n        return a\n\n\nasync def g():\n    pass\n"
    assert [(one.name, parameters(one), lines(one)) for one in functions(source)] == [("g", 0, 2), ("f", 5, 2)]


def test_no_function_has_many_parameters():
    many = [
        f"{path}:{function.lineno} {function.name} has {parameters(function)}"
        for path, function in found(*ROOMS)
        if parameters(function) > MOST_PARAMETERS_OF.get(function.name, MOST_PARAMETERS)
        and function.name not in NAMES_OF_FORWARDS
        and not (path.name.endswith("_tab.py") and function.name in ENDPOINTS)
    ]
    assert many == []


def test_no_function_is_long():
    long = [
        f"{path}:{function.lineno} {function.name} has {lines(function)} lines"
        for path, function in found(*ROOMS)
        if lines(function) > MOST_LINES_OF.get(function.name, MOST_LINES_OF_A_FUNCTION)
    ]
    assert long == []


def test_no_file_is_long():
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ROOMS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(sizes) > 150, "the files are no longer found"
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FILE} == {}
