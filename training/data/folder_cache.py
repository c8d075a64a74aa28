"""Local folders through `datasets`, without the rows that it has kept of another folder."""

import hashlib
from pathlib import Path

import datasets


def load_folder(folder: Path, config: str | None, split: str) -> datasets.Dataset:
    """The rows of a split of one configuration, or of the only one.

    `datasets` looks up what it has converted of a folder whose README.md lists configurations by the names of the two alone:
    of another folder with that name, or after files have changed, it gives the old rows. Such a folder gets a cache of its own.
    """
    cache_dir = None
    if (folder / "README.md").is_file():
        cache_dir = str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / files_fingerprint(folder))
    return datasets.load_dataset(str(folder), config, split=split, cache_dir=cache_dir)


def files_fingerprint(folder: Path) -> str:
    """Hash of where the files of a folder are, and of their sizes and times."""
    digest = hashlib.blake2b(str(folder.absolute()).encode(errors="surrogateescape"), digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        about = path.stat()
        digest.update(
            f"{path.relative_to(folder)}\0{about.st_size}\0{about.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()
