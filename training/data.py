"""From the dataset argument to rows, and the order in which training visits them.

Everything random about a row (drawn caption, crop, flip, prefix split) comes from (seed, epoch, row), and the order
of rows from (seed, epoch): no worker or process holds state, and a run resumes from the number of samples seen.
"""

import difflib
import io
import random
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from stopping import shield_worker
from transforms import augment_image, clean_caption


def load_rows(dataset: str, split: str) -> datasets.Dataset:
    """Rows of one split of a hub id, a folder (imagefolder with metadata.jsonl, parquet) or a JSON / JSONL file.

    Images stay encoded: a row's image is a dict with `path` and `bytes`, or a path.
    """
    path = Path(dataset)
    if not path.exists() and (path.is_absolute() or dataset.startswith(".") or path.suffix in (".json", ".jsonl")):
        raise ValueError(f"--dataset {dataset}: there is no such file or folder. Check the path.")
    if path.is_dir() and not any(item.is_file() for item in path.rglob("*")):
        raise ValueError(
            f"--dataset {dataset} is an empty folder. It needs images with a metadata.jsonl, or parquet files."
        )
    try:
        if path.is_file():
            kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(path.suffix)
            if kind is None:
                raise ValueError(f"{path.name} is no .json, .jsonl or .parquet file")
            rows = datasets.load_dataset(kind, data_files=str(path), split=split)
        else:
            rows = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # datasets raises a dozen kinds
        raise ValueError(f"--dataset {dataset}, split {split!r} cannot be read: {error}") from error
    if len(rows) == 0:
        raise ValueError(f"--dataset {dataset}, split {split!r} has no rows.")
    return rows


def require_column(rows: datasets.Dataset, column: str, flag: str) -> None:
    """Raise if there is no such column, naming those that are."""
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--{flag} is {column!r}, but the dataset has the columns {rows.column_names}.{hint}")


class ImageDataset(torch.utils.data.Dataset):
    """The images of rows, opened one by one; relative paths start at `folder`."""

    def __init__(self, rows: datasets.Dataset, image_column: str, folder: Path | None = None):
        require_column(rows, image_column, "image_column")
        self.images = keep_encoded(rows, image_column).select_columns([image_column])
        self.image_column, self.folder = image_column, folder
        check_files_exist(self.images, image_column, folder)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """The RGB image of a row; raises ValueError with row and path if it cannot be decoded."""
        source, name = image_source(self.images[index][self.image_column], self.folder)
        try:
            return Image.open(source).convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"The image of row {index} ({name}) cannot be read: {error}. Repair or remove the row."
            ) from error


class CaptionDataset(ImageDataset):
    """Map-style dataset of images with texts, indexed by (epoch, row).

    An item holds `text` (str), `prompt` (str), `image_id` (int), `draw` (float in [0, 1), for the collator), and
    either `image` (RGB PIL image) or, after `use_features`, `vision_embeds` (N, D) float32.

    Args:
        rows: dataset rows with `image_column` and `text_column`; the latter holds one text or a list of texts.
        prompt_column: texts that go before the supervised ones, one for each; else every text gets `prompt`.
        crop_size: (height, width) of the training augmentation; None for no augmentation.
        draw_text: True draws one text of a list each visit, False takes the first.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        image_column: str,
        text_column: str,
        prompt_column: str | None = None,
        prompt: str = "",
        clean_captions: bool = True,
        folder: Path | None = None,
        seed: int = 0,
        crop_size: tuple[int, int] | None = None,
        draw_text: bool = True,
    ):
        super().__init__(rows, image_column, folder)
        require_column(rows, text_column, "text_column")
        if prompt_column:
            require_column(rows, prompt_column, "prompt_column")
        self.texts = read_texts(rows, text_column, clean_captions)
        self.prompts = read_prompts(rows, prompt_column, self.texts) if prompt_column else None
        self.prompt, self.seed, self.crop_size, self.draw_text, self.features = prompt, seed, crop_size, draw_text, None

    def use_features(self, features: np.ndarray) -> None:
        """Give out rows of `features` (rows, N, D), from a feature cache, in place of images.

        Of several views, (rows, V, N, D), each visit draws one where it draws a text too, else it takes the first.
        """
        if len(features) != len(self):
            raise ValueError(
                f"The feature cache holds {len(features)} rows, the dataset {len(self)}. Write the cache again."
            )
        self.features = features

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        rng = random.Random(f"{self.seed}-{epoch}-{index}")
        texts = self.texts[index]
        choice = rng.randrange(len(texts)) if self.draw_text else 0
        item = {
            "text": texts[choice],
            "image_id": index,
            "draw": rng.random(),
            "prompt": self.prompts[index][choice] if self.prompts else self.prompt,
        }
        if self.features is not None:
            features = self.features[index]
            if features.ndim == 3:
                features = features[rng.randrange(len(features)) if self.draw_text else 0]
            item["vision_embeds"] = torch.from_numpy(features.astype(np.float32))
        else:
            image = self.image(index)
            item["image"] = augment_image(image, self.crop_size, rng) if self.crop_size else image
        return item


def keep_encoded(rows: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """Keep images as bytes or path, so that scanning rows decodes nothing and errors can name the file."""
    if isinstance(rows.features[image_column], datasets.Image):
        return rows.cast_column(image_column, datasets.Image(decode=False))
    return rows


def image_source(value: dict | str, folder: Path | None) -> tuple[io.BytesIO | Path, str]:
    """What PIL opens, and a name for messages."""
    if isinstance(value, dict) and value.get("bytes"):
        return io.BytesIO(value["bytes"]), str(value.get("path") or "embedded bytes")
    path = Path(value["path"] if isinstance(value, dict) else value)
    path = path if path.is_absolute() or folder is None else folder / path
    return path, str(path)


def check_files_exist(images: datasets.Dataset, image_column: str, folder: Path | None) -> None:
    """Raise for the first rows whose image is missing, before any time is spent on training."""
    missing = []
    for index, row in enumerate(images):
        value = row[image_column]
        if value is None or (isinstance(value, dict) and not value.get("bytes") and not value.get("path")):
            missing.append(f"row {index}: no image")
        elif not (isinstance(value, dict) and value.get("bytes")):
            source, name = image_source(value, folder)
            if not source.exists():
                missing.append(f"row {index}: {name}")
    if missing:
        raise ValueError(
            f"{len(missing)} image(s) are missing, the first: {'; '.join(missing[:3])}. "
            "Check the paths (relative ones start at the folder of the JSON file) or remove the rows."
        )


def read_texts(rows: datasets.Dataset, column: str, clean: bool) -> list[list[str]]:
    """The texts of each row as a list; raises for rows without text."""
    texts = []
    for index, value in enumerate(rows[column][:]):
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise ValueError(
                f"Row {index}, column {column!r} holds {value!r}, but must hold a text or a list of texts. "
                "Correct or remove the row."
            )
        cleaned = [clean_caption(text) if clean else text for text in value]
        if not all(text.strip() for text in cleaned):
            raise ValueError(
                f"Row {index}, column {column!r} has an empty caption: {value!r}. Correct or remove the row."
            )
        texts.append(cleaned)
    return texts


def read_prompts(rows: datasets.Dataset, column: str, texts: list[list[str]]) -> list[list[str]]:
    """The prompts of each row, one for each of its texts."""
    prompts = []
    for index, value in enumerate(rows[column][:]):
        value = [value] * len(texts[index]) if isinstance(value, str) else value
        if not isinstance(value, list) or len(value) != len(texts[index]) or not all(isinstance(v, str) for v in value):
            raise ValueError(
                f"Row {index}, column {column!r} holds {value!r}, but must hold a prompt, or one for each of "
                f"the row's {len(texts[index])} texts. Correct the row."
            )
        prompts.append(value)
    return prompts


class BatchOrder:
    """Batch sampler: the (epoch, row) keys of this process's micro-batches, from a given sample to the last step.

    Epochs are permutations by (seed, epoch) laid end to end and cut into global batches, so no row is dropped, no
    batch is short, and the order of samples does not depend on the number of processes.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        num_batches: int,
        *,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        samples_seen: int = 0,
    ):
        self.num_rows, self.batch_size, self.num_batches = num_rows, batch_size, num_batches
        self.seed, self.rank, self.num_processes, self.samples_seen = seed, rank, num_processes, samples_seen

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        permutations = {}
        for batch in range(self.num_batches):
            start = self.samples_seen + (batch * self.num_processes + self.rank) * self.batch_size
            keys = []
            for position in range(start, start + self.batch_size):
                epoch, offset = divmod(position, self.num_rows)
                if epoch not in permutations:
                    permutations = {e: p for e, p in permutations.items() if e >= epoch - 1}
                    permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
                keys.append((epoch, int(permutations[epoch][offset])))
            yield keys


def make_loader(
    dataset: CaptionDataset, order, collator, num_workers: int, pin_memory: bool
) -> torch.utils.data.DataLoader:
    """A loader over given batches of keys. Its own generator keeps it from advancing the global random state."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=shield_worker,
    )
