"""Tables of text: CSV, TSV and Flickr8k's captions.txt, with a header row, or CC3M's TSV, caption<TAB>image without one.

By the csv module: the reader of `datasets` goes through pandas, which makes a number of the answer "2" and nothing of the
answer "none".
"""

import codecs
import csv
import io
from pathlib import Path

from PIL import Image

from .rows import Rows

ENDINGS = (".csv", ".tsv", ".txt")
DELIMITERS = ",;|\t"  # of files but .tsv; a spreadsheet writes ; where the comma is the decimal sign


def csv_rows(path: Path) -> Rows:
    """Columns of texts; `file_name` is called `image`, as in an imagefolder.

    Raises ValueError, with the line, for a row that has not as many cells as the first.
    """
    text = read_text(path)
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    delimiter = "\t" if path.suffix == ".tsv" else max(DELIMITERS, key=first.count)
    lines = fields_of(text, path.name, delimiter)
    if not lines:
        raise ValueError(f"{path.name} is empty. It needs a header row such as image,caption")
    names = [name.strip() for name in lines[0]]
    if any(is_picture(name) for name in names):
        return rows_without_header(lines, path.name)
    if "image" not in names:
        names = ["image" if name == "file_name" else name for name in names]
    if len(set(names)) < len(names):
        raise ValueError(f"{path.name}: the header row {names} has a name twice. Rename one.")
    return Rows({name: [fields[number] or None for fields in lines[1:]] for number, name in enumerate(names)})


def rows_without_header(lines: list[list[str]], name: str) -> Rows:
    """CC3M's columns, with paths of the images that were downloaded."""
    image = lines[0][-1]
    if len(lines[0]) != 2 or not is_picture(image):
        raise ValueError(
            f"{name} has no header row: the first is {lines[0]}. Put names of the columns above it, such as image,caption. "
            "Without them two columns are read, the caption and then the image"
        )
    return Rows({"image": [image for _, image in lines], "caption": [caption for caption, _ in lines]})


def read_text(path: Path) -> str:
    """The text without a byte order mark. What is no UTF-8 is left out row by row later, with its reason."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # a spreadsheet's "Unicode text"
        return content.decode("utf-16")
    return content.decode("utf-8-sig", errors="surrogateescape")


def fields_of(text: str, name: str, delimiter: str) -> list[list[str]]:
    """The fields of each row but blank ones, as many as the first row has."""
    if delimiter == "\t":
        # Captions of the web may begin with a quote that nothing ends. Where each line is a row as it stands, so it is read.
        lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
        if len({line.count("\t") for line in lines}) == 1:
            return [fields_of_line(line) for line in lines]
    rows, start = [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                if rows and len(fields) != len(rows[0]):
                    raise ValueError(
                        f"{name}, line {start}: it has another number of cells than the {len(rows[0])} columns: "
                        f"{str(fields)[:200]}. Put quotes round a text that holds {delimiter!r}"
                    )
                rows.append(fields)
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{name}, line {start}: {error}. A quote inside a quoted text is written twice, and one at its end closes it"
        ) from error
    return rows


def fields_of_line(line: str) -> list[str]:
    """The fields of a line with tabs; a quote counts as one only where it makes whole fields."""
    try:
        fields = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return line.split("\t")
    return fields if len(fields) == line.count("\t") + 1 else line.split("\t")


def is_picture(cell: str) -> bool:
    """Whether a cell holds an image and no name of a column: an address, or a file's name."""
    return "://" in cell or Path(cell).suffix.lower() in Image.registered_extensions()
