"""What the data side costs as a function of the number of rows: start, memory of a process and of a worker, order.

    python -m benchmarks.data_scale --rows 10000 100000 1000000 --folder runs/data_scale

Tars of 10 000 samples, each a JPEG of 64 x 64 pixels and a caption, are written to --folder, where they stay. Each figure is
of a process of its own: CPU seconds, and anonymous memory, which is what it does not share with others. "rows themselves" is
what training does with the tars without an index.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# All here, so that no measure below is one of imports.
from blip2x_training import index_dataset
from blip2x_training.data.caption_dataset import CaptionDataset, Sampling
from blip2x_training.data.formats import load_rows
from blip2x_training.data.index_images import open_split
from blip2x_training.data.indexed_dataset import IndexedCaptionDataset
from blip2x_training.data.order import BatchOrder, ShardStarts, visit_order

SHARD = 10_000
PAPER = 129_000_000  # pairs of the paper
MEASURES = ("index", "start", "start_rows", "workers", "order")


def write_tars(folder: Path, rows: int) -> None:
    """Tars of `rows` samples, if they are not there."""

    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(buffer, "JPEG")
    image = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, rows, SHARD):
        path = folder / f"{first // SHARD:05d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".tmp"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + SHARD, rows)):
                caption = f"a photo of thing number {number} on a table beside a window".encode()
                for ending, content in (("jpg", image), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.replace(path.with_suffix(".tmp"), path)


def anonymous() -> float:
    """MB of memory that this process shares with nobody and no file holds."""
    line = next(
        line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous")
    )
    return int(line.split()[1]) / 1024


def measure_index(tars: Path, index: Path) -> dict:

    start, cpu = time.perf_counter(), os.times()
    index_dataset.main([str(tars), "--output", str(index), "--overwrite", "true"])
    now = os.times()
    used = sum((now.user, now.system, now.children_user, now.children_system))
    used -= sum((cpu.user, cpu.system, cpu.children_user, cpu.children_system))
    return {"index, CPU s": used, "index, s": time.perf_counter() - start}


def opened(index: Path):

    return IndexedCaptionDataset(*open_split(str(index), "train"), sampling=Sampling(seed=0, crop_size=(56, 56)))


def measure_start(tars: Path, index: Path) -> dict:

    before, cpu = anonymous(), time.process_time()
    data = opened(index)
    order = visit_order([len(data)], [data.shards], None, 0)
    data.rows[data.row_of(order(0)[1])]  # not its image: the first costs what it costs anywhere, for Pillow's formats
    return {"start, CPU s": time.process_time() - cpu, "start, MB": anonymous() - before}


def measure_start_rows(tars: Path, index: Path) -> dict:

    before, cpu = anonymous(), time.process_time()
    data = CaptionDataset(load_rows(str(tars), "train"))
    return {
        "rows themselves, CPU s": time.process_time() - cpu,
        "rows themselves, MB": anonymous() - before if len(data) else 0.0,
    }


class Watched:
    """A data set whose items are the memory that its worker has taken since its first visit."""

    def __init__(self, data):
        self.data, self.before = data, None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key) -> float:
        self.before = anonymous() if self.before is None else self.before
        self.data[key]
        return anonymous() - self.before


def measure_workers(tars: Path, index: Path, visits: int = 8000, workers: int = 2) -> dict:

    data = Watched(opened(index))
    order = visit_order([len(data)], [data.data.shards], None, 0)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=BatchOrder(order, 100, visits // 100), num_workers=workers, collate_fn=max
    )
    start = time.perf_counter()
    largest = max(loader)
    return {"a worker, MB": largest, "samples a second, 2 workers": visits / (time.perf_counter() - start)}


def measure_order(tars: Path, index: Path) -> dict:
    """The order of as many rows as the paper has, in as many shards as these would be."""

    starts = np.arange(0, PAPER + 1, SHARD)
    before, start = anonymous(), time.perf_counter()
    visit_order([PAPER], [ShardStarts(starts)], None, 0)(100_000_000)
    return {"position 100M of 129M, s": time.perf_counter() - start, "its order, MB": anonymous() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--measure", choices=MEASURES, help="Used by the script itself: one measure, in this process.")
    args = parser.parse_args()
    for rows in args.rows:
        tars, index = args.folder / f"tars_{rows}", args.folder / f"index_{rows}"
        if args.measure:
            print(json.dumps(globals()[f"measure_{args.measure}"](tars, index)))
            continue
        write_tars(tars, rows)
        found = {"rows": rows}
        for measure in MEASURES:
            command = [sys.executable, "-m", "benchmarks.data_scale", "--rows", str(rows), "--folder", str(args.folder)]
            output = subprocess.run([*command, "--measure", measure], check=True, capture_output=True, text=True).stdout
            found |= json.loads(output.splitlines()[-1])
        print(json.dumps({name: round(value, 4) for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
