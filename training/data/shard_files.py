"""Which files a data set of shards consists of: tars or parquet files, local or remote, by folders and patterns."""

import glob
import os
import re
from pathlib import Path

from .remote import is_remote, listed
from .saved_rows import is_saved

NOT_SHARDS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".zip", ".gz", ".tgz", ".arrow")
SPLIT_PREFIXES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def shard_files(dataset: str, split: str) -> tuple[str, list[str]] | None:
    """("tar" or "parquet", the files, by absolute names) of a data set of such files, which can be read one by one; None for others.

    Raises ValueError for a remote one that is of neither.
    """
    path = Path(dataset)
    for kind in ("tar", "parquet"):
        if is_remote(dataset):
            files = remote_files(dataset, split, kind)
        elif path.is_dir() and not is_saved(path):
            files = split_tars(path, split, f".{kind}")
        else:
            files = [dataset] if path.is_file() else pattern_files(dataset)
        if files and {Path(file).suffix for file in files} == {f".{kind}"}:
            return kind, [file if is_remote(file) else os.path.abspath(file) for file in map(str, files)]
    if is_remote(dataset):
        raise ValueError(
            f"{dataset}, split {split!r}: only .tar and .parquet files are read from an address. Name them, such as "
            f"{dataset.rstrip('/')}/{{00000..00099}}.tar"
        )
    return None


def remote_files(dataset: str, split: str, kind: str) -> list[str]:
    """Addresses of the files of a split: those of a pattern, or below a folder or a repository those of the split."""
    written = expand_braces(dataset)
    if all(name.endswith(f".{kind}") for name in written):
        return [file for name in written for file in (listed(name) if re.search(r"[*?]", name) else [name])]
    if Path(dataset).suffix in (".tar", ".parquet", *NOT_SHARDS):
        return []
    root = dataset.rstrip("/") + "/"
    below = [name.removeprefix(root) for name in listed(root) if name.endswith(f".{kind}")]
    return [root + name for name in names_of_split(below, split)]


def split_tars(folder: Path, split: str, ending: str = ".tar") -> list[str]:
    """The tars, or files of another ending, of a split, in a folder or one below it."""
    files = sorted(folder.glob(f"*{ending}")) + sorted(folder.glob(f"*/*{ending}"))
    names = names_of_split([str(path.relative_to(folder)) for path in files], split)
    return [str(folder / name) for name in names]


def names_of_split(names: list[str], split: str) -> list[str]:
    """Those in a folder of the split's name or called after it, else those whose last part is (data/train-0.parquet); all
    are training data if none is called after any split."""
    for called in (str, lambda name: Path(name).name):
        named = {
            known: [name for name in names if called(name).startswith(prefixes)]
            for known, prefixes in SPLIT_PREFIXES.items()
        }
        if any(named.values()):
            return named.get(split, [])
    return names if split == "train" else []


def pattern_files(dataset: str) -> list[str]:
    """Local files of a pattern with {a,b}, {000..099}, * or ?, sorted; empty if `dataset` is none or names a file itself.

    Raises ValueError for those of a list or range that do not exist.
    """
    if is_remote(dataset) or Path(dataset).exists() or not re.search(r"[*?{]", dataset):
        return []
    files = []
    for name in expand_braces(dataset):
        found = sorted(glob.glob(name))
        if not found:
            raise ValueError(f"--dataset {dataset}: there is no {name}. Check the pattern.")
        files += found
    return files


def expand_braces(pattern: str) -> list[str]:
    """`{a,b}` and `{08..11}` written out, as a shell does; ranges keep leading zeros."""
    # Ours, for these ten lines are all that names of shards need: braceexpand would be a dependency more.
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        parts = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        parts = match[1].split(",")
    return [name for part in parts for name in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]
