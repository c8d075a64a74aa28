"""Remote shards on the local disk, up to a limit: fetched ahead in the order in which a run visits them.

The order is a pure function of the position, so which shards come next is known exactly. One process of a machine fetches
them, in a thread; what is not there yet, such as a row that stands in for a bad one, is read from the store by its range. A
file that is removed while a worker reads it stays readable for that worker.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants

from .index_files import Shard
from .order import GROUP
from .remote import about, download

AHEAD = 2 * GROUP  # shards that are looked for ahead: the group that is read, and the next


def shard_home() -> Path:
    """Where shards are kept unless a run says otherwise: beside the cache of the hub."""
    return Path(constants.HF_HOME) / "blip2x" / "shards"


class ShardCache:
    """Whole remote shards in a folder of at most `limit` bytes."""

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder), limit

    def path(self, shard: Shard) -> Path:
        name = hashlib.sha256(f"{shard.file} {shard.size} {shard.mark}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.{shard.kind}"

    def find(self, shard: Shard) -> str | None:
        """The local file of a shard, if it is there."""
        path = self.path(shard)
        return str(path) if path.exists() else None

    def used(self) -> int:
        """Bytes of all files in the folder, finished or not."""
        return sum(size for _, size in self.files())

    def files(self) -> list[tuple[Path, int]]:
        """Files with their bytes, oldest use first."""
        found = []
        for path in self.folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # another thread or process has just removed it, or named it
                about_file = path.stat()
                found.append((about_file.st_mtime_ns, path, about_file.st_size))
        return [(path, size) for _, path, size in sorted(found)]

    def fetch(self, shard: Shard, needed: set[Path]) -> bool:
        """Fetch a shard, for which files that are not `needed` make room; False where there is no room.

        Raises ValueError where it cannot be read, or is not what was indexed.
        """
        path = self.path(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.utime(path)
            return True
        files = self.files()
        used = sum(size for _, size in files)
        for old, size in files:
            if used + shard.size <= self.limit:
                break
            if old not in needed:
                used -= size
                old.unlink(missing_ok=True)
        if used + shard.size > self.limit:
            return False
        check_remote(shard)
        download(shard.file, shard.size, path)
        return True


class ChangedShard(ValueError):
    """A remote shard is not what was indexed."""


def check_remote(shard: Shard) -> None:
    """Raise ChangedShard for a remote shard that is not what was indexed, by its size and its mark, and ValueError for one
    that cannot be asked."""
    size, mark = about(shard.file)
    if (size, mark) != (shard.size, shard.mark):
        raise ChangedShard(
            f"{shard.file} has changed since it was indexed: {size} bytes, {shard.size} then, or its mark is another. Write "
            "an index of your own again: index_dataset.py --overwrite true; another is written at the next start."
        )


class Prefetcher(threading.Thread):
    """Fetches the shards of the positions to come.

    Args:
        visited: key (epoch, row) of each position.
        shard_of: the remote shard of a row; None for a local one.
        start: position that a run begins or goes on at.
        rows_ahead: positions that are looked at ahead of the one that is read.
    """

    def __init__(
        self,
        cache: ShardCache,
        visited: Callable[[int], tuple[int, int]],
        shard_of: Callable[[int], Shard | None],
        start: int,
        rows_ahead: int,
    ):
        super().__init__(daemon=True)
        self.cache, self.visited, self.shard_of, self.rows_ahead = cache, visited, shard_of, rows_ahead
        self.position = self.read = start
        self.last_need: dict[Path, int] = {}
        self.changed, self.stopped = threading.Condition(), False
        self.error: Exception | None = None

    def advance(self, position: int) -> None:
        """The run has come to a position: what only positions before it need may go.

        Raises what has ended the thread: a shard cannot be read or has changed (ValueError), or be written (OSError).
        """
        if self.error is not None:
            raise self.error
        with self.changed:
            self.read = max(self.read, position)
            self.changed.notify()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify()

    def run(self) -> None:
        while self.wait_for(lambda: self.position < self.read + self.rows_ahead):
            shard = self.shard_of(self.visited(self.position)[1])
            self.position += 1
            if shard is None:
                continue
            path = self.cache.path(shard)
            if path not in self.last_need and not self.fetched(shard):
                return
            self.last_need[path] = self.position

    def fetched(self, shard: Shard) -> bool:
        """Fetch a shard, waiting for the run to leave room for it. False: it cannot be had, or the run is over."""
        while not self.stopped:
            read = self.read
            self.last_need = {path: last for path, last in self.last_need.items() if last > read}
            try:
                if shard.size > self.cache.limit:
                    check_remote(shard)
                    return True  # its rows are read by their ranges
                if self.cache.fetch(shard, set(self.last_need)):
                    return True
            except (ValueError, OSError) as error:
                self.error = error  # told by `advance`, to the thread that trains
                return False
            if not self.wait_for(lambda before=read: self.read > before):
                return False
        return False

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        """Wait until something is so; False where the run is over before."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or ready())
            return not self.stopped


def start_prefetcher(dataset, visited: Callable[[int], tuple[int, int]], start: int) -> Prefetcher | None:
    """A thread that fetches the remote shards of a data set from position `start` on; None where it has none."""
    remote = [part for part in dataset.parts if getattr(part, "cache", None) and part.has_remote]
    if not remote:
        return None
    shards = [shard for part in remote for shard in part.index.shards]
    rows_ahead = AHEAD * max(1, sum(shard.rows for shard in shards) // len(shards)) * len(dataset.parts)
    prefetcher = Prefetcher(remote[0].cache, visited, dataset.remote_shard, start, rows_ahead)
    prefetcher.start()
    return prefetcher
