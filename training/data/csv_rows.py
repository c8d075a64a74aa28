"""Rows of a table of text: CSV, the TSV of CC3M, and Flickr8k's captions.txt."""

import csv
from pathlib import Path

from .rows import IMAGE_ID_COLUMNS, PROMPT_COLUMNS, TEXT_COLUMNS, Rows

ENDINGS = (".csv", ".tsv", ".txt")
WITHOUT_HEADER = ("text", "image")  # the order of CC3M: caption, address


def csv_rows(path: Path) -> Rows:
    """A row a line; cells in quotes may hold commas and line ends. `.tsv` is separated by tabs, the others by commas.

    The first line names the columns, unless it is that of CC3M: a caption and an image, without names.

    Raises:
        ValueError: no line, columns without names that are not two, or a line of another length, with its number.
    """
    # What is no UTF-8 is left out row by row, with its reason; -sig takes off the mark that some editors begin with.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            lines = [(reader.line_num, cells) for cells in reader if cells]
        except csv.Error as error:
            raise ValueError(f"{path.name}, line {reader.line_num}: {error}") from error
    if not lines:
        raise ValueError(f"{path.name} is empty")
    names = [cell.strip() for cell in lines[0][1]]
    if set(names) & {"image", "file_name", *TEXT_COLUMNS, *PROMPT_COLUMNS, *IMAGE_ID_COLUMNS}:
        lines = lines[1:]
    elif len(names) == len(WITHOUT_HEADER):
        names = list(WITHOUT_HEADER)
    else:
        raise ValueError(
            f"the first line of {path.name} names no column that is known, such as image and caption: {str(names)[:100]}. "
            "Write the names of the columns there"
        )
    uneven = next((number for number, cells in lines if len(cells) != len(names)), None)
    if uneven is not None:
        raise ValueError(f"{path.name}, line {uneven}: it has another number of cells than the {len(names)} columns")
    columns = {name: [cells[place] or None for _, cells in lines] for place, name in enumerate(names)}
    if "image" not in columns and "file_name" in columns:
        columns["image"] = columns.pop("file_name")
    return Rows(columns)
