"""Files of one JSON value a line, to which a run appends: a kill may cut off the last line, and nothing else."""

import json
from pathlib import Path


def read_whole_lines(path: Path, remedy: str) -> list:
    """The values of all lines, without a last one that was cut off.

    Raises ValueError with file, line and `remedy` for a line within that is no JSON.
    """
    values = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}). {remedy}") from error
    return values


def read_json_object(path: Path, remedy: str) -> dict:
    """A file of one JSON object. Raises ValueError with the file and `remedy` where it is not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(content).__name__}). {remedy}")
    return content
