"""Data sets of images with texts, indexed by (epoch, row), over the rows that formats.py loads.

Everything random about a row (drawn caption, crop, flip, prefix split, what stands in for a bad row) comes from (seed,
epoch, row): no worker or process holds state. The order of rows is in `order`.
"""

import random
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_blip2x.printable_blip2x import printable

from ..system.signals import shield_worker
from ..system.utf8 import not_utf8
from .bad_rows import TRIES, ReportedBatches, Reporting, SkipLog
from .image_identity import ImageNumbers, rows_by_image
from .images import BadRow, find_images, image_name, keep_encoded, open_image, opened
from .rows import IMAGE_ID_COLUMNS, PROMPT_COLUMNS, TEXT_COLUMNS, Rows, find_column, require_column
from .texts import bare_texts, not_a_text
from .transforms import augment_image, clean_caption

Turn = tuple[str, list[str]]  # a question ("" for none) and the texts that answer it, of which each visit draws one


class ImageDataset(torch.utils.data.Dataset):
    """The images of rows, opened one by one; relative paths start at `folder`."""

    def __init__(self, rows: datasets.Dataset | Rows, image_column: str, folder: Path | None = None):
        require_column(rows, image_column, "image_column")
        self.images = keep_encoded(rows, image_column).select_columns([image_column])
        self.image_column, self.folder = image_column, folder

    def __len__(self) -> int:
        return len(self.images)

    def image(self, row: int) -> Image.Image:
        """The upright RGB image of a row; raises ValueError with row and path if it cannot be read."""
        try:
            return open_image(self.images[row][self.image_column], self.folder)
        except BadRow as error:
            raise ValueError(
                f"The image of row {row} ({self.name(row)}) cannot be read: {error}. Repair or remove the row."
            ) from error

    def name(self, row: int) -> str:
        """What a report calls the image of a row."""
        return printable(image_name(self.images[row][self.image_column], self.folder), keep="")


@dataclass(frozen=True)
class Sampling:
    """How a visit to a row draws: what comes out depends on seed, epoch and row alone.

    crop_size: (height, width) of the training augmentation; None for no augmentation.
    draw_text: True draws one question and text each visit, False takes the first.
    """

    seed: int | str = 0
    crop_size: tuple[int, int] | None = None
    draw_text: bool = True


class CaptionDataset(ImageDataset):
    """Map-style dataset of images with texts, indexed by (epoch, index of a usable row).

    An item holds `text` (str), `prompt` (str), `image_id` (int, equal for rows that show the same image), `draw` (float
    in [0, 1), for the collator), `skipped` (reports of rows that could not be read, in whose place this one is), and either
    `image` (RGB PIL image; where crops are drawn, levels (3, *crop_size) uint8) or, after `use_features`, `vision_embeds`
    (N, D) float32.

    Rows without image or text are left out: `left_out` has their reports, `kept` the numbers of the others.

    Training (`draw_text`) visits every row, and where an image cannot be read another row stands in. Validation counts
    images: rows that show the same one, without questions, are one item with all their texts, and nothing stands in; call
    `leave_out` with those for which `fault` gives a reason.

    Args:
        rows: dataset rows with `image_column` and `text_column`; the latter holds one text or a list of texts.
        text_column: None takes the first of `rows.TEXT_COLUMNS` that there is.
        prompt_column: question that the texts answer; a list of questions has one text, or list of texts, for each. "auto"
            takes the first of `rows.PROMPT_COLUMNS`, None leaves questions out.
        prompt: goes before every text; `{}` in it stands for the question.
        source: data set and split, as reports name them.
        known_images: gives images their numbers, shared by data sets that are trained on together.
    """

    def __init__(
        self,
        rows: datasets.Dataset | Rows,
        *,
        image_column: str = "image",
        text_column: str | None = None,
        prompt_column: str | None = None,
        prompt: str = "",
        clean_captions: bool = True,
        folder: Path | None = None,
        sampling: Sampling = Sampling(),
        source: tuple[str, str] = ("", ""),
        known_images: ImageNumbers | None = None,
    ):
        super().__init__(rows, image_column, folder)
        text_column = find_column(rows, text_column, TEXT_COLUMNS, "text_column")
        if prompt_column is not None:
            wanted = None if prompt_column == "auto" else prompt_column
            prompt_column = find_column(rows, wanted, PROMPT_COLUMNS, "prompt_column")
        self.prompt, self.asks, self.features = prompt, prompt_column is not None, None
        self.seed, self.crop_size, self.draw_text = sampling.seed, sampling.crop_size, sampling.draw_text
        self.source, self.sources = source, {source}
        self.skip_log: SkipLog | None = None

        found = list(find_images(self.images, image_column, folder))
        turns = read_turns(rows, text_column, prompt_column, clean_captions)
        faults = [next((part for part in pair if isinstance(part, BadRow)), None) for pair in zip(found, turns)]
        self.num_rows, self.kept = len(rows), np.flatnonzero([fault is None for fault in faults])
        self.left_out = [self.report(row, fault) for row, fault in enumerate(faults) if fault is not None]
        if not len(self.kept):
            first = self.left_out[0]
            raise ValueError(
                f"None of the {self.num_rows} rows of {source[0] or 'the dataset'} can be used, the first: "
                f"row {first['row']}, {first['name']}: {first['reason']}. Relative paths start at {folder or 'the working directory'}; --image_folder changes it, "
                "--text_column the column of the texts."
            )
        numbers = (known_images or ImageNumbers()).number_rows(found, read_image_ids(rows), source[0])
        # The rows of each item, of which the first gives the image.
        self.rows_of = [[row] for row in self.kept.tolist()]
        if not sampling.draw_text and not self.asks:
            self.rows_of = rows_by_image(self.kept.tolist(), found, numbers)
            self.kept = np.array([rows[0] for rows in self.rows_of])
        self.turns = [joined_turns([turns[row] for row in rows]) for rows in self.rows_of]
        self.image_ids = [numbers[row] for row in self.kept]
        self.unreadable: list[dict] = []
        shards = getattr(rows, "shards", None)
        self.shards = None if shards is None else shards[self.kept]

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def parts(self) -> list["CaptionDataset"]:
        return [self]

    @property
    def texts(self) -> list[list[str]]:
        """All texts of each usable row."""
        return [[text for _, texts in turns for text in texts] for turns in self.turns]

    @property
    def references(self) -> list[list[str]]:
        """Texts that answer the first question of each usable row, which is the one asked where nothing is drawn."""
        return [turns[0][1] for turns in self.turns]

    def use_features(self, features) -> None:
        """Give out rows of a `feature_cache.FeatureCache` in place of images.

        Of several views each visit draws one where it draws a text too, else it takes the first.
        """
        if len(features) != self.num_rows:
            raise ValueError(
                f"The feature cache holds {len(features)} rows, the dataset {self.num_rows}. Write the cache again."
            )
        self.features = features

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """The item of a visit; in training see `visit`.

        Raises ValueError for a bad row in validation, where a stand-in would be scored against texts of another image.
        """
        epoch, visited = key
        if self.draw_text:
            return visit(self, epoch, visited)
        try:
            return {**self.item(visited, random.Random(f"{self.seed}-{epoch}-{visited}")), "skipped": []}
        except BadRow as error:
            report = self.report_of(visited, error)
            raise ValueError(
                f"The validation image of row {report['row']} ({report['name']}) cannot be read: {error}. It could "
                "when the run began. Repair it; the same command then goes on."
            ) from error

    def fault(self, index: int) -> str | None:
        """Why an item cannot be used, which only reading its image tells; None where it can."""
        try:
            self.item(index, random.Random(0))
        except BadRow as error:
            return str(error)
        return None

    def leave_out(self, faults: dict[int, str]) -> None:
        """Take items out with all their texts; `unreadable` gets the reports of their rows."""
        for index, reason in faults.items():
            self.unreadable += [self.report(row, BadRow(reason)) for row in self.rows_of[index]]
        left = [index for index in range(len(self)) if index not in faults]
        if not left:
            first = self.unreadable[0]
            raise ValueError(
                f"No image of split {first['split']!r} of {first['dataset']} can be read, the first: row {first['row']}, "
                f"{first['name']}: {first['reason']}."
            )
        self.kept, self.shards = self.kept[left], None if self.shards is None else self.shards[left]
        for name in ("turns", "image_ids", "rows_of"):
            setattr(self, name, [getattr(self, name)[index] for index in left])

    def item(self, index: int, rng: random.Random) -> dict:
        """An item with its random part drawn from `rng`; raises BadRow where the image cannot be read."""
        question, texts = self.draw(self.turns[index], rng)
        item = {
            "text": self.draw(texts, rng),
            "image_id": self.image_ids[index],
            "draw": rng.random(),
            "prompt": fill_prompt(self.prompt, question) if self.asks else self.prompt,
        }
        row = int(self.kept[index])
        if self.features is not None:
            view = rng.randrange(self.features.views) if self.draw_text else 0
            try:
                item["vision_embeds"] = self.features.read(row, view)
            except ValueError as error:
                raise BadRow(str(error)) from error
        else:
            item["image"] = self.open_or_crop(row, rng)
        return item

    def text_of(self, index: int, number: int) -> tuple[str, str]:
        """Prompt and text of a usable row; `number` chooses among its questions and texts."""
        question, texts = self.turns[index][number % len(self.turns[index])]
        prompt = fill_prompt(self.prompt, question) if self.asks else self.prompt
        return prompt, texts[number % len(texts)]

    def remote_shard(self, index: int) -> None:
        """Nothing: its rows are local."""

    def open_or_crop(self, row: int, rng: random.Random) -> Image.Image:
        value = self.images[row][self.image_column]
        if self.crop_size is None:
            return open_image(value, self.folder)
        with opened(value, self.folder) as image:
            return augment_image(image, self.crop_size, rng)

    def draw(self, choices: list, rng: random.Random):
        return rng.choice(choices) if self.draw_text and len(choices) > 1 else choices[0]

    def report_of(self, index: int, fault: BadRow) -> dict:
        return self.report(int(self.kept[index]), fault)

    def report(self, row: int, fault: BadRow) -> dict:
        dataset, split = self.source
        return {"dataset": dataset, "split": split, "row": row, "name": self.name(row), "reason": str(fault)}


class JointDataset(torch.utils.data.Dataset):
    """Several data sets as one, whose rows count through them."""

    def __init__(self, parts: list[CaptionDataset]):
        self.parts, self.skip_log = parts, None
        self.first_rows = np.cumsum([0, *map(len, parts)]).tolist()
        self.num_rows = sum(part.num_rows for part in parts)
        self.left_out = [report for part in parts for report in part.left_out]
        self.sources = {part.source for part in parts}
        self.asks = parts[0].asks

    def __len__(self) -> int:
        return self.first_rows[-1]

    @property
    def image_ids(self) -> list[int]:
        return [number for part in self.parts for number in part.image_ids]

    @property
    def unreadable(self) -> list[dict]:
        return [report for part in self.parts for report in part.unreadable]

    @property
    def texts(self) -> list[list[str]]:
        return [texts for part in self.parts for texts in part.texts]

    @property
    def references(self) -> list[list[str]]:
        return [texts for part in self.parts for texts in part.references]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        part, row = self.place(index)
        return self.parts[part][epoch, row]

    def place(self, index: int) -> tuple[int, int]:
        """Number of a data set, and the item in it."""
        part = bisect_right(self.first_rows, index) - 1
        return part, index - self.first_rows[part]

    def fault(self, index: int) -> str | None:
        part, row = self.place(index)
        return self.parts[part].fault(row)

    def leave_out(self, faults: dict[int, str]) -> None:
        places = {self.place(index): reason for index, reason in faults.items()}
        for number, part in enumerate(self.parts):
            part.leave_out({row: reason for (of, row), reason in places.items() if of == number})
        self.first_rows = np.cumsum([0, *map(len, self.parts)]).tolist()

    def remote_shard(self, index: int):
        """The remote shard of an item; None for a local one."""
        part, row = self.place(index)
        return self.parts[part].remote_shard(row)

    def text_of(self, index: int, number: int) -> tuple[str, str]:
        part, row = self.place(index)
        return self.parts[part].text_of(row, number)


def visit(dataset, epoch: int, visited: int) -> dict:
    """The item of a visit in training. A bad row is replaced by another; after `TRIES` bad ones there is `skipped` alone.

    dataset: one with `item`, `report_of`, `seed` and a length.
    """
    index, reports = visited, []
    while len(reports) < TRIES:
        try:
            return {**dataset.item(index, random.Random(f"{dataset.seed}-{epoch}-{visited}")), "skipped": reports}
        except BadRow as error:
            reports.append(dataset.report_of(index, error))
            stand_in = random.Random(f"{dataset.seed}-{epoch}-{visited}-in-place-{len(reports)}")
            index = stand_in.randrange(len(dataset))
    return {"skipped": reports}


def fill_prompt(template: str, question: str) -> str:
    """The question at the `{}` of a template such as `Question: {} Answer:`; alone where there is no template."""
    return template.replace("{}", question) if template else question


def joined_turns(turns_of_rows: list[list[Turn]]) -> list[Turn]:
    """Turns of an item: those of its row, or of several rows, which ask nothing, all texts."""
    if len(turns_of_rows) == 1:
        return turns_of_rows[0]
    return [("", [text for turns in turns_of_rows for _, texts in turns for text in texts])]


class NoText(BadRow):
    """A value of another type where a text should be: most likely the wrong column."""


def read_turns(
    rows: datasets.Dataset | Rows, text_column: str, prompt_column: str | None, clean: bool
) -> list[list[Turn] | BadRow]:
    """Questions and texts of each row, or what is wrong with it."""
    values = rows[text_column][:]
    questions = rows[prompt_column][:] if prompt_column else [""] * len(values)
    turns = []
    for value, question in zip(values, questions, strict=True):
        try:
            turns.append(read_row(value, question, clean, bool(prompt_column)))
        except NoText as error:
            turns.append(BadRow(f"column {text_column!r}: {error}"))
        except BadRow as error:
            turns.append(error)
    return turns


def read_captions(rows: datasets.Dataset | Rows, text_column: str | None, clean: bool) -> list[str]:
    """All texts of the rows that have any."""
    column = find_column(rows, text_column, TEXT_COLUMNS, "text_column")
    usable = [turns for turns in read_turns(rows, column, None, clean) if not isinstance(turns, BadRow)]
    if not usable:
        raise ValueError(f"--text_column {column} holds no text. Name another.")
    return [text for turns in usable for _, texts in turns for text in texts]


def read_row(value, question, clean: bool, asks: bool) -> list[Turn]:
    """Turns of a row: one whose texts all answer a question, or one for each of a list of questions."""
    fault = not_utf8(value, question)
    if fault is not None:
        raise BadRow(fault)
    asked = question if isinstance(question, list) else [question]
    if asks and not (asked and all(isinstance(one, str) and one.strip() for one in asked)):
        raise BadRow(f"no question: {question!r}")
    if not isinstance(question, list):
        return [(question, read_texts(value, clean))]
    if not isinstance(value, list) or len(value) != len(question):
        count = len(value) if isinstance(value, list) else "no list of"
        raise BadRow(f"{len(question)} questions, but {count} texts")
    return [(one, read_texts(text, clean)) for one, text in zip(question, value)]


def read_texts(value, clean: bool) -> list[str]:
    """The texts of a row without the empty ones; raises BadRow if there is none, or anything that is no text."""
    try:
        value = bare_texts(value)
    except ValueError as error:
        raise NoText(str(error)) from error
    texts = [value] if isinstance(value, str) else value
    if texts is None or texts == []:
        raise BadRow("no text")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise NoText(not_a_text(value))
    cleaned = [clean_caption(text) if clean else text for text in texts]
    kept = [text for text in cleaned if text.strip()]
    if not kept:
        raise BadRow(f"the text is empty: {str(value)[:100]!r}")
    return kept


def read_image_ids(rows: datasets.Dataset | Rows) -> list[str | None] | None:
    """Ids of the rows' images, or None where no column holds any."""
    column = next((name for name in IMAGE_ID_COLUMNS if name in rows.column_names), None)
    return None if column is None else [None if value is None else str(value) for value in rows[column][:]]


def make_loader(
    dataset: "CaptionDataset | JointDataset",
    order,
    collator,
    num_workers: int,
    pin_memory: bool,
    timeout: float = 0,
    device: torch.device | str = "cpu",
) -> ReportedBatches:
    """Batches over given lists of keys; what they skip goes to the data set's `skip_log`.

    The loader's own generator keeps it from advancing the global random state. timeout: seconds that workers may take for a
    batch; 0: any time. device: where levels of pixels become pixels.
    """
    # What reads the network has threads, which a fork would leave behind: its workers would wait for them for ever.
    reads_network = num_workers > 0 and any(
        getattr(part, "has_remote", False) for part in getattr(dataset, "parts", ())
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=Reporting(collator),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=shield_worker,
        timeout=timeout if num_workers else 0,
        multiprocessing_context="spawn" if reads_network else None,
    )
    return ReportedBatches(loader, dataset.skip_log, device)
