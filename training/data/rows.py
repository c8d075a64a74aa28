"""Rows in memory, with the part of `datasets.Dataset` that training uses, and the choice of columns.

A JSON file may hold a text here and a list there, or nothing at all; `datasets` refuses the file for one such row.
"""

import difflib
from collections.abc import Iterator, Sequence

import datasets
import numpy as np

TEXT_COLUMNS = ("text", "caption", "captions", "text_output", "answer", "answers", "cls")
PROMPT_COLUMNS = ("question", "questions", "text_input", "prompt")
IMAGE_ID_COLUMNS = ("image_id", "cocoid", "imgid")


class Rows:
    """Columns of equal length. `shards` (rows,), ascending, tells from which shard a row is read; None for no shards."""

    def __init__(self, columns: dict[str, Sequence], shards: np.ndarray | None = None):
        self.columns, self.shards = columns, shards
        self.indices: Sequence[int] = range(len(next(iter(columns.values()), ())))

    @classmethod
    def from_dicts(cls, rows: list[dict]) -> "Rows":
        """A column for each key of any row, with None where a row lacks it."""
        names = dict.fromkeys(name for row in rows for name in row)
        return cls({name: [row.get(name) for row in rows] for name in names})

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | str) -> dict | list:
        if isinstance(key, str):
            return [self.columns[key][index] for index in self.indices]
        return {name: column[self.indices[key]] for name, column in self.columns.items()}

    def __iter__(self) -> Iterator[dict]:
        return (self[number] for number in range(len(self)))

    def select(self, numbers: Sequence[int]) -> "Rows":
        chosen = Rows(self.columns, None if self.shards is None else self.shards[np.asarray(numbers, dtype=int)])
        chosen.indices = [self.indices[number] for number in numbers]
        return chosen

    def select_columns(self, names: list[str]) -> "Rows":
        chosen = Rows({name: self.columns[name] for name in names}, self.shards)
        chosen.indices = self.indices
        return chosen


def take_split(rows: Rows, splits: dict[str, Sequence[int]], split: str) -> Rows:
    """The rows of a split, of a slice such as `train[:90%]`, or of a sum of them; `splits` has the rows of each."""
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in splits.items()})
    return rows.select([number for part in parts for number in splits[part.splitname][part.from_ : part.to]])


def require_column(rows: datasets.Dataset | Rows, column: str, flag: str) -> None:
    """Raise if there is no such column, naming those that are."""
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--{flag} is {column!r}, but the dataset has the columns {rows.column_names}.{hint}")


def find_column(rows: datasets.Dataset | Rows, column: str | None, known: Sequence[str], flag: str) -> str:
    """`column` if it is given, else the first of `known` that there is; raises ValueError if there is none."""
    if column is None:
        column = next((name for name in known if name in rows.column_names), None)
    if column is None:
        raise ValueError(
            f"The dataset has the columns {rows.column_names}, but none of {', '.join(known)}. Name the one with "
            f"--{flag}."
        )
    require_column(rows, column, flag)
    return column
