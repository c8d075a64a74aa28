"""Indexes that are written at the first use of a data set, and kept in the cache of the hub: of tars, and of what is remote."""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from ..system.atomic_files import discard
from .index_files import check_files, open_index
from .indexing import index_pieces, pieces_of_files
from .remote import is_remote
from .shard_cache import ChangedShard, check_remote
from .shard_files import shard_files

FETCHED = 8  # remote shards that are fetched at a time: fetching waits more than it computes
SPOKEN = 100  # files from which on indexing is worth a line


def first_index(dataset: str, split: str, image_column: str = "image") -> str:
    """The folder of the index of a data set of tars or at an address; written where there is none or its files have
    changed, by one process of a machine, while others wait.

    split: or a slice of one. To index a large one before a run, and once for several machines: index_dataset.py.
    """
    name = re.match(r"\w*", split)[0]
    kind, files = shard_files(dataset, name) or ("tar", [])
    mark = hashlib.sha256("\n".join([image_column, *files]).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    home = Path(constants.HF_HOME) / "blip2x" / "indexes" / mark
    with waiting_lock(home / f"{name}.lock"):
        if not is_current(home, name):
            if is_remote(dataset) or len(files) >= SPOKEN:
                print(f"Indexing {dataset}, split {name}, {len(files)} files, once.", flush=True)
            described = {"source": dataset, "split": name}
            workers = FETCHED if is_remote(dataset) else os.cpu_count() or 1
            index_pieces(pieces_of_files(files, kind, image_column), home / name, described, None, None, workers, say)
    return str(home)


def is_current(home: Path, name: str) -> bool:
    """Whether the index is there; one that is damaged, or whose files have changed, is removed.

    Raises ValueError for a remote file that cannot be asked.
    """
    if not (home / name / "index.json").exists():
        return False
    try:
        index = open_index(home, name)
        check_files(index)
    except ValueError:
        discard(home / name)
        return False
    remote = {shard.file: shard for shard in index.shards if shard.mark is not None}
    try:
        with ThreadPoolExecutor(FETCHED) as pool:
            list(pool.map(check_remote, remote.values()))
    except ChangedShard:
        discard(home / name)
        return False
    return True


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold a lock of this machine, however long another process has it; the system lets go of it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
