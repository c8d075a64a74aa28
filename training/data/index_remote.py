"""The index of a remote data set, written at its first use and kept in the cache of the hub."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from .index_files import check_files, open_index
from .indexing import index_pieces, pieces_of_files
from .shard_files import shard_files

WORKERS = 8  # shards that are fetched at a time: fetching waits more than it computes


def index_remote(dataset: str, split: str, image_column: str = "image") -> str:
    """The folder of the index of a data set by its address; written where there is none, by one process of a machine.

    split: or a slice of one. To index a large one before a run, and for several machines at once: index_dataset.py.
    """
    name = split.split("[")[0]
    mark = hashlib.sha256(f"{dataset} {image_column}".encode()).hexdigest()[:16]
    home = Path(constants.HF_HOME) / "blip2x" / "indexes" / mark
    with waiting_lock(home / f"{name}.lock"):
        if not (home / name / "index.json").exists():
            kind, files = shard_files(dataset, name) or ("tar", [])
            print(f"Indexing {dataset}, split {name}, {len(files)} files, once.", flush=True)
            pieces = pieces_of_files(files, kind, image_column)
            described = {"source": dataset, "split": name}
            index_pieces(pieces, home / name, described, None, None, WORKERS, lambda text: print(text, flush=True))
        check_files(open_index(home, name))
    return str(home)


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
