"""One small data set as tars, as parquet files and as a list of files; two rows after one another show one picture."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

SHARDS, ROWS = 3, 5


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (number * 37 % 256, 90, number % 256)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tars(folder: Path) -> str:
    for shard in range(SHARDS):
        files = {}
        for row in range(ROWS):
            number = shard * ROWS + row
            files[f"{number:04d}.jpg"] = picture(number // 2)
            files[f"{number:04d}.txt"] = f"a photo of thing {number}".encode()
        write_tar(folder / f"{shard:03d}.tar", files)
    return str(folder)


def parquet(folder: Path) -> str:
    for shard in range(SHARDS):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        table = pyarrow.table(
            {
                "image": [{"bytes": picture(number // 2), "path": None} for number in numbers],
                "captions": [[f"thing {number}", f"number {number}"] for number in numbers],
            }
        )
        pyarrow.parquet.write_table(table, folder / f"train-{shard:03d}.parquet", row_group_size=2)
    return f"{folder}/*.parquet"


def jsonl(folder: Path) -> str:
    rows = []
    for number in range(SHARDS * ROWS):
        (folder / f"{number}.jpg").write_bytes(picture(number // 2))
        rows.append({"image": f"{number}.jpg", "question": f"which {number}?", "answer": [str(number), "it"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


FORMATS = {"tars": tars, "parquet": parquet, "jsonl": jsonl}
