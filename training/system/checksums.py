"""Checksums that find a flipped bit, a file cut short and a file of another checkpoint, before any of it is used."""

import hashlib
import json
from pathlib import Path

from .atomic_files import write_whole

BLOCK = 2**22  # bytes read at once


def file_sum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_sealed(path: Path, content: dict) -> None:
    """Write a JSON file that carries the checksum of what it says."""
    write_whole(path, json.dumps(content | {"sha256": seal(content)}))


def read_sealed(path: Path, always_with: str) -> dict:
    """What `write_sealed` wrote. A file without a checksum and without the key that came with it is of an earlier version,
    and is taken as it is.

    Raises ValueError for one that does not say what was written, OSError where there is none.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    saved = content.pop("sha256", None)
    if saved != seal(content) and (saved is not None or always_with in content):
        raise ValueError("it does not say what was written, by its checksum")
    return content


def seal(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
