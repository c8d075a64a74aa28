"""Files and folders that appear whole or not at all, also when the power goes or the disk is full."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it is on the disk and takes the target's name when the block ends.

    A block that raises leaves no trace, and the space it took is free again.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        even_modes(temporary)
        sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    discard(target)
    os.replace(temporary, target)
    sync(target.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into; it is on the disk and takes the name, in place of an older one, when the block ends."""
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    try:
        # "x" makes a new file: were a link put under this name meanwhile, it would fail and not write elsewhere.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file in one go, in place of an older one."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def even_modes(folder: Path) -> None:
    """Give all files the mode that new files have here; safetensors makes its own readable for their owner alone."""
    mode = folder.stat().st_mode & 0o666  # of a folder made just now: all but what the umask takes
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


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
        remove(path)


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
