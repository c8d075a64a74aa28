"""Files and folders that appear whole or not at all, also when the power goes or the disk is full."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it is on the disk and takes the target's name when the block ends.

    A block that raises leaves no trace, and the space it took is free again.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    discard(target)
    os.replace(temporary, target)
    sync(target.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file in one go, in place of an older one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def discard(folder: Path) -> None:
    """Remove a folder. It is gone from its name at once, so half of it is never taken for the whole."""
    if folder.exists():
        going = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(folder, going)
        shutil.rmtree(going)


def clear_unfinished(parent: Path) -> None:
    """Remove what a process that died while it wrote or removed has left behind."""
    for path in parent.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_folder(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
