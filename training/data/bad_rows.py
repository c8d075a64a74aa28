"""Bad rows: skipped, counted, written to skipped.jsonl once each, and too many of them stop the run.

What a look at the rows shows (no text, no file) is left out from the start. What only decoding shows is found where images
are read, maybe in a worker: the visit takes another row, and the report travels with the batch to the main process, which
writes it. So what is written belongs to batches that were trained on, and a resumed run writes nothing twice. Validation
decodes all of its images before the run instead, and leaves the bad ones out with their texts.
"""

import fcntl
import gc
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from modeling_blip2x.printable_blip2x import printable

from ..system.utf8 import json_bytes
from .pixels import finished

TRIES = 20  # rows that a visit tries before it gives up
SAMPLE = 1000  # visits that the share of bad rows is at least judged by


@dataclass
class Reporting:
    """A collator whose batches carry the reports of their items as `skipped`; a batch without items has nothing else."""

    collator: Callable[[list[dict]], dict]

    def __call__(self, items: list[dict]) -> dict:
        skipped = [report for item in items for report in item.pop("skipped", [])]
        return {"skipped": skipped} | (self.collator(items) if all(items) else {})


@dataclass
class ReportedBatches:
    """The batches of a loader without their reports, which go to `log` as each batch is taken, and with their pixels.

    device: where levels of pixels become pixels.
    """

    loader: Iterable[dict]
    log: "SkipLog | None"
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        for batch in started(self.loader):
            skipped = batch.pop("skipped")
            if self.log is not None:
                self.log.add(skipped, len(next(iter(batch.values()), ())))
            if not batch:
                last = skipped[-1]
                raise ValueError(
                    f"{TRIES} rows in a row cannot be used, the last: row {last['row']} of {last['dataset']} ({last['name']}: "
                    f"{last['reason']}). Repair or remove them."
                )
            yield finished(batch, self.device)


def started(loader: Iterable[dict]) -> Iterator[dict]:
    """The iterator of a loader, whose workers leave what they share with this process where it is.

    A full garbage collection in a worker would write to every object that it looks at, and so copy each page: a worker over
    a million rows took a gigabyte. What is frozen before the fork is not looked at.
    """
    if not getattr(loader, "num_workers", 0):
        return iter(loader)
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()  # here alone: the workers have theirs


class SkipLog:
    """Writes what was skipped of a data set to `path` and judges how much that is.

    Args:
        left_out: reports of what was left out from the start, of `num_rows` rows.
        sources: (data set, split) of the reports that count here; the file may hold others.
        visited: rows that earlier runs have visited.
        num_processes: processes that visit as many each.
    """

    def __init__(
        self,
        path: Path,
        left_out: list[dict],
        sources: set[tuple[str, str]],
        num_rows: int,
        max_fraction: float,
        visited: int = 0,
        num_processes: int = 1,
    ):
        self.path, self.left_out, self.sources, self.num_rows = path, left_out, sources, num_rows
        self.max_fraction, self.visited, self.num_processes = max_fraction, visited, num_processes
        # Held, not built for each batch that has a bad image: that took 92 ms at 100 000 rows left out.
        self.from_start = {row_of(report) for report in left_out}
        self.position, self.written, self.found = 0, set(), 0

    def start(self, write: bool) -> None:
        """Write what was left out from the start (on one process), and judge it."""
        if write and self.left_out:
            self.append(self.left_out)
        self.judge(0)

    def add(self, reports: list[dict], batch_size: int) -> None:
        """Take the reports of a batch of this process. Raises ValueError when too much was skipped."""
        self.visited += batch_size * self.num_processes
        if reports:
            self.append(reports)
            self.judge(self.found)

    def append(self, reports: list[dict]) -> None:
        """Append the reports whose rows the file lacks; the lock lets other processes do the same meanwhile."""
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self.position)
            content = file.read()
            for line in content.splitlines():
                try:
                    self.note(row_of(json.loads(line)))
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a crash, or none of ours
            lines = [] if content.endswith(b"\n") or not content else ["\n"]
            for report in reports:
                if self.note(row_of(report)):
                    lines.append(json.dumps(report, ensure_ascii=False) + "\n")
            file.write(json_bytes("".join(lines)))
            file.flush()
            self.position = file.tell()

    def note(self, row: tuple[str, str, int]) -> bool:
        """Whether the file lacked the row until now; counts it in `found` if it counts here and was found by a visit."""
        if row in self.written:
            return False
        self.written.add(row)
        self.found += row[:2] in self.sources and row not in self.from_start
        return True

    def judge(self, found: int) -> None:
        """Raise ValueError when the share left out plus the share found among the visited rows is above the limit."""
        visited = min(max(self.visited, SAMPLE), self.num_rows)
        left_out = sum(rows_of(report) for report in self.left_out)
        fraction = left_out / self.num_rows + found / visited
        if fraction > self.max_fraction:
            raise ValueError(
                f"Too many rows cannot be used: {left_out} of {self.num_rows} were left out at the start, and "
                f"{found} of {visited} visited ones could not be read. That is {fraction:.2%}, above --max_skip_fraction "
                f"{self.max_fraction}. {self.path} lists them with the reasons. Repair or remove them, or raise "
                "--max_skip_fraction."
            )


def rows_of(report: dict) -> int:
    """How many rows a report is of: one, but for a shard that is left out as a whole."""
    return report.get("rows", 1)


def row_of(report: dict) -> tuple[str, str, int]:
    return report["dataset"], report["split"], report["row"]


def record_skips(
    accelerator: Accelerator, output_dir: Path, max_fraction: float, train_set, eval_set, samples_seen: int
) -> None:
    """Let both data sets write what they skip to skipped.jsonl; a run from the start begins it anew.

    Raises ValueError when what was left out at the start, or cannot be read in validation, is too much.
    """
    path = output_dir / "skipped.jsonl"
    if accelerator.is_main_process and not samples_seen:
        path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    for dataset, seen in ((train_set, samples_seen), (eval_set, 0)):
        if dataset is None:
            continue
        left_out, num_rows, unreadable = dataset.left_out, dataset.num_rows, dataset.unreadable
        dataset.skip_log = SkipLog(
            path, left_out, dataset.sources, num_rows, max_fraction, seen, accelerator.num_processes
        )
        if left_out or unreadable:
            first = (left_out + unreadable)[0]
            line = (
                f"{sum(map(rows_of, left_out + unreadable))} of {num_rows} rows are left out, the first: row {first['row']} of {first['dataset']}, "
                f"{first['name']}: {first['reason']}. {path} lists all."
            )
            accelerator.print(printable(line, keep=""))
        dataset.skip_log.start(write=accelerator.is_main_process)
        if unreadable:
            dataset.skip_log.add(unreadable, num_rows)
    accelerator.wait_for_everyone()
