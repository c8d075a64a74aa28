"""The files of bootstrap_captions.py: what has become of each row so far, and the data set at the end."""

import io
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from modeling_blip2x.printable_blip2x import printable

from ..data.caption_dataset import ImageDataset
from ..data.images import image_source
from ..system.atomic_files import write_whole
from ..system.fingerprints import differences
from ..system.json_lines import read_whole_lines
from ..system.utf8 import json_bytes

REMEDY = "Delete the file to start over."


class Progress:
    """What has become of each row so far: one JSON line a row, after one that says how the run was made.

    A line cut off by a crash is dropped when the run goes on, with its batch: the batches stay what they would have been.
    Raises ValueError where the file is of another run.
    """

    def __init__(self, path: Path, identity: dict, num_rows: int, batch_size: int, overwrite: bool):
        self.path = path
        values = read_progress(path)
        differs = values and differences(values[0], identity)
        if differs and not overwrite:
            raise ValueError(
                f"{path.parent.parent} holds this split made otherwise ({differs}). Choose another "
                "--output_dir, or pass --overwrite_output_dir to start over."
            )
        self.records = [] if differs else values[1:]
        done = len(self.records)
        if done < num_rows:
            self.records = self.records[: done // batch_size * batch_size]
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True)[1:] if self.records else []
        first = json.dumps(identity).encode() + b"\n"
        write_whole(path, first + b"".join(lines[: len(self.records)]))

    def add(self, records: list[dict]) -> None:
        self.records += records
        with open(self.path, "ab") as file:
            file.write(json_lines(records))


def read_progress(path: Path) -> list[dict]:
    """Identity and records; [] where there are none yet. Raises ValueError for a file that is damaged."""
    if not path.exists():
        return []
    values = read_whole_lines(path, REMEDY)
    for number, value in enumerate(values):
        if not isinstance(value, dict) or value.get("row") != (number - 1 if number else None):
            raise ValueError(f"{path}, line {number + 1} is damaged: it is not that of row {number - 1}. {REMEDY}")
    return values


def json_lines(records: list[dict]) -> bytes:
    return json_bytes("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_dataset(images: ImageDataset, records: list[dict], folder: Path, split: str) -> Path:
    """SPLIT.jsonl with paths of images, or SPLIT.parquet with the images themselves where the source embeds any."""
    kept = [record for record in records if "captions" in record]

    def source(record: dict) -> io.BytesIO | Path:
        return image_source(images.images[record["row"]][images.image_column], images.folder)[0]

    def row_of(record: dict, image: str | dict) -> dict:
        return {"image": image} | {name: record[name] for name in ("captions", "scores", "sources")}

    if all(isinstance(source(record), Path) for record in kept):
        target = folder / f"{split}.jsonl"
        write_whole(target, json_lines([row_of(record, str(source(record).absolute())) for record in kept]))
        return target
    target = folder / f"{split}.parquet"
    temporary = target.with_name(f".{target.name}.tmp")
    texts, numbers = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("float32"))
    schema = datasets.Features(
        {"image": datasets.Image(), "captions": texts, "scores": numbers, "sources": texts}
    ).arrow_schema
    with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(kept), 100):  # images of 100 rows in memory
            rows = []
            for record in kept[start : start + 100]:
                image, value = source(record), images.images[record["row"]][images.image_column]
                content = image.read_bytes() if isinstance(image, Path) else image.getvalue()
                path = value.get("path") if isinstance(value, dict) else value
                rows.append(row_of(record, {"bytes": content, "path": path and printable(Path(path).name, keep="")}))
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    os.replace(temporary, target)
    return target
