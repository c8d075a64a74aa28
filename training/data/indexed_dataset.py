"""A data set by its index: what a visit needs of a row is read when it is visited, and nothing of the others is held.

For training, in place of `CaptionDataset`, on more rows than memory holds. Visits draw alike in both, and a row is judged
when it is visited: where it has no text, or an image that cannot be read, it is reported, and another stands in.
"""

import hashlib
import io
import os
import random
import stat
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from modeling_blip2x.printable_blip2x import printable

from .caption_dataset import Sampling, fill_prompt, read_row, visit
from .images import BadRow, image_source, missing, open_image, opened
from .index_files import Index, IndexedRows, Shard
from .index_images import image_value, name_of_image
from .order import ShardStarts
from .rows import IMAGE_ID_COLUMNS, PROMPT_COLUMNS, TEXT_COLUMNS, Rows, find_column
from .shard_cache import ShardCache
from .transforms import augment_image


class IndexedCaptionDataset(torch.utils.data.Dataset):
    """Map-style dataset of images with texts, indexed by (epoch, index of a row), with the items of `CaptionDataset`.

    `image_id` is 63 bits of the hash of the image's bytes, and of the row's own id where it has one.

    Args:
        ranges: (first, end) of the rows that belong to it.
        text_column, prompt_column, prompt, clean_captions, sampling, source: as in `CaptionDataset`.
        cache: where remote shards are fetched to.
    """

    unreadable: list[dict] = []  # found in validation alone, which does not use this

    def __init__(
        self,
        index: Index,
        ranges: Sequence[tuple[int, int]],
        *,
        text_column: str | None = None,
        prompt_column: str | None = None,
        prompt: str = "",
        clean_captions: bool = True,
        sampling: Sampling = Sampling(),
        source: tuple[str, str] = ("", ""),
        cache: ShardCache | None = None,
    ):
        self.index, self.rows, self.ranges, self.cache = index, IndexedRows(index), list(ranges), cache
        names = Rows({name: [] for name in index.columns})
        self.text_column = find_column(names, text_column, TEXT_COLUMNS, "text_column")
        self.asks = prompt_column is not None
        if self.asks:
            wanted = None if prompt_column == "auto" else prompt_column
            prompt_column = find_column(names, wanted, PROMPT_COLUMNS, "prompt_column")
        self.prompt_column, self.prompt, self.clean_captions = prompt_column, prompt, clean_captions
        self.id_column = next((name for name in IMAGE_ID_COLUMNS if name in index.columns), None)
        self.seed, self.crop_size = sampling.seed, sampling.crop_size
        self.source, self.sources, self.skip_log = source, {source}, None
        self.ends = np.cumsum([end - first for first, end in self.ranges]).tolist() or [0]
        self.left_out = [self.report_of_shard(number) for number, one in enumerate(index.shards) if one.fault]
        if not len(self):
            why = f" The first shard that is left out: {self.left_out[0]['reason']}" if self.left_out else ""
            raise ValueError(f"--dataset {source[0]}, split {source[1]!r} has no rows.{why}")
        self.num_rows = len(self) + sum(report["rows"] for report in self.left_out)

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def parts(self) -> list["IndexedCaptionDataset"]:
        return [self]

    @property
    def shards(self) -> ShardStarts:
        """The shards of the ranges by their first items."""
        starts, passed = [0], 0
        for first, end in self.ranges:
            within = self.index.starts[(self.index.starts > first) & (self.index.starts < end)]
            starts += [passed, *(within - first + passed).tolist()]
            passed += end - first
        return ShardStarts(np.array([*starts, passed]))

    @property
    def texts(self) -> list[list[str]]:
        """All texts of each row that has any: for small data, of which a vocabulary is built."""
        return [texts for number in range(len(self)) if (texts := self.texts_of(number))]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """The item of a visit: see `visit`."""
        return visit(self, *key)

    def row_of(self, number: int) -> int:
        """Row in the index of an item."""
        part = bisect_right(self.ends, number)
        return self.ranges[part][0] + number - (self.ends[part - 1] if part else 0)

    def item(self, number: int, rng: random.Random) -> dict:
        """An item with its random part drawn from `rng`; raises BadRow for a row that cannot be used."""
        shard, place, values = self.rows[self.row_of(number)]
        question, texts = draw(self.turns(values), rng)
        item = {
            "text": draw(texts, rng),
            "draw": rng.random(),
            "prompt": fill_prompt(self.prompt, question) if self.asks else self.prompt,
        }
        content = image_bytes(image_value(shard, place, values, self.cache))
        item["image_id"] = number_of(content, values.get(self.id_column))
        encoded = {"bytes": content, "path": name_of_image(shard, place, values)}  # named in reasons
        if self.crop_size is None:
            return item | {"image": open_image(encoded, None)}
        with opened(encoded, None) as image:
            return item | {"image": augment_image(image, self.crop_size, rng)}

    @property
    def has_remote(self) -> bool:
        return any(shard.mark is not None for shard in self.index.shards)

    def remote_shard(self, number: int) -> Shard | None:
        """The shard of an item, if it is a remote one."""
        shard = self.index.shard_of(self.row_of(number))
        return shard if shard.mark is not None else None

    def turns(self, values: dict) -> list[tuple[str, list[str]]]:
        question = values.get(self.prompt_column) if self.asks else ""
        return read_row(values.get(self.text_column), question, self.clean_captions, self.asks)

    def texts_of(self, number: int) -> list[str]:
        try:
            return [text for _, texts in self.turns(self.rows[self.row_of(number)][2]) for text in texts]
        except BadRow:
            return []

    def text_of(self, index: int, number: int) -> tuple[str, str]:
        """Prompt and text of a row; `number` chooses among its questions and texts. ("", "") where it has none."""
        try:
            turns = self.turns(self.rows[self.row_of(index)][2])
        except BadRow:
            return "", ""
        question, texts = turns[number % len(turns)]
        return fill_prompt(self.prompt, question) if self.asks else self.prompt, texts[number % len(texts)]

    def report_of(self, number: int, fault: BadRow) -> dict:
        row = self.row_of(number)
        name = printable(name_of_image(*self.rows[row]), keep="")
        return self.report(row, name, str(fault))

    def report_of_shard(self, number: int) -> dict:
        """Of a shard that is left out as a whole: `rows` that are known of it. It has a number no row has."""
        shard = self.index.shards[number]
        return self.report(-1 - number, printable(shard.file, keep=""), shard.fault) | {"rows": shard.lost}

    def report(self, row: int, name: str, reason: str) -> dict:
        dataset, split = self.source
        return {"dataset": dataset, "split": split, "row": row, "name": name, "reason": reason}

    def describe(self) -> dict:
        """Marks of what it holds, as `contents.describe_rows` gives them."""
        mark = hashlib.sha256(f"{self.index.digest} {self.ranges}".encode()).hexdigest()[:16]
        return {"rows": len(self), "texts": mark, "any_order": mark, "images": mark}


def draw(choices: list, rng: random.Random):
    return rng.choice(choices) if len(choices) > 1 else choices[0]


def image_bytes(value: dict | str | None) -> bytes:
    """The encoded image; raises BadRow where there is none."""
    source, _ = image_source(value, None)
    if isinstance(source, io.BytesIO):
        return source.getvalue()
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise BadRow("not a regular file")
        return source.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(missing(Path(source))) from error


def number_of(content: bytes, image_id: object) -> int:
    """Equal for rows that show the same image, by its bytes and the data set's own id."""
    digest = hashlib.blake2b(content, digest_size=8)
    if image_id is not None:
        digest.update(f"\0{image_id}".encode())
    return int.from_bytes(digest.digest(), "big") >> 1  # torch has no unsigned 64 bits
