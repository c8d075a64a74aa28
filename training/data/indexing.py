"""Writing the index of a data set: shard by shard in several processes, continued where a killed one stopped.

Tars and parquet files are read where they lie, one by one; of other formats the rows are loaded once, as training would
load them. Nothing is cleaned or judged here: that is done at each visit, so an index serves any setting.
"""

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from ..system.atomic_files import discard, sync, write_whole
from ..system.json_lines import read_json_object
from ..system.utf8 import json_bytes
from .images import BadRow, image_name, plain_value
from .index_files import IMAGE, PLACE, Shard, write_index
from .remote import RangeFile, about, download, is_remote
from .rows import Rows
from .tars import columns_of, read_index

RUN = 10_000  # rows of a list that count as a shard
FEW = 16  # shards that are indexed in one process: others take seconds to start
COPY = 2**24  # bytes at once when the parts are joined


@dataclass(frozen=True)
class Piece:
    """What one process indexes at a time: a tar, a row group of a parquet file, or rows from `first` on of a list."""

    kind: str
    file: str
    group: int | None = None
    first: int = 0
    column: str = "image"


@dataclass
class Part:
    """The index of a piece in memory: `rows` of PLACE, whose texts stand in `texts`."""

    rows: np.ndarray
    texts: bytes
    columns: list[str]
    fault: str | None = None
    lost: int = 0


def pieces_of_files(files: Sequence[str], kind: str, image_column: str) -> list[Piece]:
    """One piece for each tar, or row group of a parquet file."""
    if kind == "tar":
        return [Piece(kind, file) for file in files]
    groups = {
        file: pyarrow.parquet.ParquetFile(RangeFile(file) if is_remote(file) else file).num_row_groups for file in files
    }
    return [Piece(kind, file, group, column=image_column) for file, n in groups.items() for group in range(n)]


def pieces_of_rows(rows: Rows | datasets.Dataset, source: str, image_column: str) -> list[Piece]:
    """One piece for each RUN rows of a list."""
    return [Piece("rows", source, first=first, column=image_column) for first in range(0, len(rows), RUN)]


def index_pieces(
    pieces: Sequence[Piece],
    folder: Path,
    described: dict,
    rows: Rows | datasets.Dataset | None,
    image_folder: Path | None,
    num_workers: int,
    say: Callable[[str], None],
) -> None:
    """Write the index of `pieces` to `folder`, whose parts that are there already are taken.

    rows: those of a list, which are then indexed in this process, with `image_folder` before relative paths. described: what index.json says of the data set.
    """
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    keep_if_same(parts, described, pieces)
    missing = [number for number in range(len(pieces)) if not (parts / f"{number:06d}.json").exists()]
    if len(missing) < len(pieces):
        say(f"{len(pieces) - len(missing)} of {len(pieces)} shards are indexed already.")
    if rows is not None:
        for number in missing:
            save_part(parts, number, pieces[number], part_of_rows(rows, pieces[number], image_folder))
    else:
        for done, _ in enumerate(mapped(index_piece, [(parts, n, pieces[n]) for n in missing], num_workers), 1):
            if done % max(1, len(missing) // 20) == 0:
                say(f"{done} of {len(missing)} shards")
    join_parts(folder, len(pieces), described)


def mapped(function: Callable, jobs: list, num_workers: int) -> Iterator:
    """The results of all jobs, by several processes where there are enough jobs to be worth the start of them."""
    if num_workers == 1 or len(jobs) < FEW:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def keep_if_same(parts: Path, described: dict, pieces: Sequence[Piece]) -> None:
    """Drop the parts that an earlier indexing of something else has left."""
    mark = hashlib.sha256(json.dumps([described, [asdict(piece) for piece in pieces]]).encode()).hexdigest()
    known = parts / "of"
    if known.exists() and known.read_text() != mark:
        for path in parts.iterdir():
            path.unlink()
    write_whole(known, mark)


def index_piece(job: tuple[Path, int, Piece]) -> None:
    parts, number, piece = job
    with without_collection():
        part, size, mark = part_of(piece, parts / f"{number:06d}.tar")
    save_part(parts, number, piece, part, size, mark)


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection, which looks again and again at the many small objects of a tar, and takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def part_of(piece: Piece, local: Path) -> tuple[Part, int, str | None]:
    """The index of a tar or a row group; of a remote file its size and mark, too. A remote tar is fetched to `local` for it."""
    size, mark = about(piece.file) if is_remote(piece.file) else (0, None)
    if piece.kind == "parquet":
        return part_of_group(piece), size, mark
    if mark is None:
        return part_of_tar(piece.file), size, mark
    download(piece.file, size, local)
    part = part_of_tar(str(local))
    part.fault = part.fault and part.fault.replace(str(local), piece.file)
    local.unlink()
    return part, size, mark


def part_of_tar(path: str) -> Part:
    """The samples of a tar; none, with the reason, of one that is damaged or ambiguous."""
    try:
        return packed((name, place, columns_of(texts)) for name, place, texts in read_index(path))
    except ValueError as error:
        return Part(np.zeros(0, PLACE), b"", [], str(error), max(1, getattr(error, "images", 1)))


def part_of_group(piece: Piece) -> Part:
    """A row group of a parquet file: its columns but those of images, and the number of each row."""
    file = pyarrow.parquet.ParquetFile(RangeFile(piece.file) if is_remote(piece.file) else piece.file)
    names = file.schema_arrow.names
    if piece.column not in names:
        raise ValueError(
            f"{piece.file} has the columns {names}, but no {piece.column!r}. Name that of the images: --image_column."
        )
    wanted = [field.name for field in file.schema_arrow if field.name != piece.column and not is_binary(field.type)]
    count = file.metadata.row_group(piece.group).num_rows
    table = file.read_row_group(piece.group, columns=wanted).to_pylist() if wanted else [{}] * count
    return packed((None, (number, 0), present(row)) for number, row in enumerate(table))


def is_binary(kind: pyarrow.DataType) -> bool:
    """Bytes, or a struct with bytes in it: an image."""
    if pyarrow.types.is_struct(kind):
        return any(is_binary(kind.field(number).type) for number in range(kind.num_fields))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return is_binary(kind.value_type)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def part_of_rows(rows: Rows | datasets.Dataset, piece: Piece, image_folder: Path | None) -> Part:
    """Rows of a list, whose images are files by their names, which are kept absolute.

    Raises ValueError for images that are not files.
    """

    def samples() -> Iterator[tuple]:
        for number in range(piece.first, min(piece.first + RUN, len(rows))):
            row = rows[number]
            image = row.pop(piece.column)
            if isinstance(image, (bytes, bytearray)) or (isinstance(image, dict) and image.get("bytes")):
                raise ValueError(
                    f"The image of row {number} is embedded in {piece.file}. Index its parquet files by a pattern: "
                    "'DIR/*.parquet'."
                )
            yield absolute(image.get("path") if isinstance(image, dict) else image, image_folder), (-1, 0), present(row)

    return packed(samples())


def absolute(image: object, folder: Path | None) -> object:
    """A file by its absolute name; what is none, such as a data: URI, as it is."""
    try:
        plain = plain_value(image)
    except BadRow:
        return image  # refused at each visit
    return os.path.abspath(image_name(plain, folder)) if isinstance(plain, str) and plain else image


def present(row: dict) -> dict:
    return {name: value for name, value in row.items() if value is not None}


def packed(samples: Iterator[tuple[object, tuple[int, int], dict]]) -> Part:
    """Samples (name of the image, place, columns) as they are kept."""
    rows, texts, columns, end = [], [], {}, 0
    for name, (offset, size), values in samples:
        columns |= dict.fromkeys(values)
        text = json_bytes(json.dumps({IMAGE: name, **values}, ensure_ascii=False, default=str))
        rows.append((end, offset, size, len(text), 0))
        texts.append(text)
        end += len(text)
    return Part(np.array(rows, PLACE), b"".join(texts), list(columns))


def save_part(parts: Path, number: int, piece: Piece, part: Part, size: int = 0, mark: str | None = None) -> None:
    """Write rows, texts and, last, what says that both are whole. size, mark: of a remote file."""
    changed = 0
    if mark is None and os.path.exists(piece.file):
        found = os.stat(piece.file)
        size, changed = found.st_size, found.st_mtime_ns
    column = piece.column if piece.kind == "parquet" else None
    shard = Shard(
        piece.kind, piece.file, size, changed, len(part.rows), piece.group, column, mark, part.fault, part.lost
    )
    write_whole(parts / f"{number:06d}.rows", part.rows.tobytes())
    write_whole(parts / f"{number:06d}.texts", part.texts)
    said = {"shard": asdict(shard), "columns": part.columns}
    write_whole(parts / f"{number:06d}.json", json.dumps(said).encode())


def join_parts(folder: Path, count: int, described: dict) -> None:
    """The parts as one index; index.json, which makes it one, is written last."""
    shards, columns, digest, end = [], {}, hashlib.blake2b(digest_size=16), 0
    with open(folder / "rows.bin", "wb") as rows_file, open(folder / "texts.bin", "wb") as texts_file:
        for number in range(count):
            said = read_json_object(folder / "parts" / f"{number:06d}.json", "Delete it and index again.")
            shards.append(Shard(**said["shard"]))
            columns |= dict.fromkeys(said["columns"])
            rows = np.fromfile(folder / "parts" / f"{number:06d}.rows", PLACE)
            rows["text"] += end
            rows_file.write(rows.tobytes())
            digest.update(rows.tobytes())
            with open(folder / "parts" / f"{number:06d}.texts", "rb") as part:
                for block in iter(lambda: part.read(COPY), b""):
                    texts_file.write(block)
                    digest.update(block)
                    end += len(block)
    for name in ("rows.bin", "texts.bin"):
        sync(folder / name)
    write_index(folder, described | {"columns": list(columns), "text_bytes": end, "digest": digest.hexdigest()}, shards)
    discard(folder / "parts")
