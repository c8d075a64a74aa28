"""Folders that `save_to_disk` of a Dataset or a DatasetDict wrote."""

from pathlib import Path

import datasets


def is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_rows(folder: Path, split: str) -> datasets.Dataset:
    """The rows of a split, of a slice such as `train[:90%]`, or of a sum of them. A Dataset alone is `train` and `all`."""
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved, "all": saved}
    wanted = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in wanted]
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return rows.with_format(None)  # saved with it may be a format such as torch, whose images are arrays
