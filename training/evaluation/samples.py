"""What is evaluated: images with captions, questions with answers, or images with a class, each with its official ids."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
from PIL import Image

from ..data.caption_dataset import ImageDataset, fill_prompt
from ..data.image_identity import ImageNumbers, rows_by_image
from ..data.images import NO_NAME, BadRow, FoundImage, find_images, open_image
from ..data.rows import IMAGE_ID_COLUMNS, PROMPT_COLUMNS, Rows, find_column
from ..data.texts import plain_texts
from ..data.transforms import clean_caption
from ..system.utf8 import not_utf8
from .grounding import others

COLUMNS = {  # task: where its texts are looked for
    "caption": ("caption", "captions", "text", "text_output"),
    "retrieval": ("caption", "captions", "text", "text_output"),
    "vqa": ("answers", "answer", "text_output", "text"),
    "classification": ("label", "class", "cls", "text"),
}
GROUPS = ("domain", "question_type", "answer_type")
REMOVED_FROM_QUESTIONS = re.compile(r'[.!"()*#:;~]')  # LAVIS, BlipQuestionProcessor


@dataclass
class Sample:
    """One prediction to make. `groups`: domain, question_type, answer_type, where the data set has them."""

    row: int
    image_id: int | str
    references: list[str]
    question: str = ""
    question_id: int | str | None = None
    groups: dict[str, str] = field(default_factory=dict)


class EvaluationSet(ImageDataset):
    """Samples over images. `skipped` has a report for each row whose image is missing.

    `asked` is everything that the data asks, in its order, as an evaluation server wants it answered; `samples` are those
    of it that can be shown to a model, and `places` their numbers in `asked`.

    Items ([epoch, sample], as data sets of training are indexed) hold `image`, `prompt` and `text`, the first reference.

    Args:
        texts: columns and cleaning as in `EvaluationArguments`; `prompt` goes before what is written.
    """

    def __init__(
        self,
        rows: datasets.Dataset | Rows,
        *,
        task: str,
        image_column: str = "image",
        text_column: str | None = None,
        prompt_column: str | None = None,
        prompt: str = "",
        clean_texts: bool = False,
        clean_questions: bool = False,
        folder: Path | None = None,
        name: str = "",
    ):
        super().__init__(rows, image_column, folder)
        self.prompt, self.task = prompt, task
        found = list(find_images(self.images, image_column, folder))
        self.skipped = [self.report(row, fault) for row, fault in enumerate(found) if isinstance(fault, BadRow)]
        if len(self.skipped) == len(found):
            first = self.skipped[0]
            raise ValueError(
                f"No image of the {len(found)} rows of {name} is there, the first: row {first['row']}, {first['name']}: "
                f"{first['reason']}. Relative paths start at {folder or 'the working directory'}; --image_folder changes it."
            )
        self.faults = {report["row"] for report in self.skipped}
        self.asked = self.read(rows, found, text_column, prompt_column, clean_texts, clean_questions)
        shown = [place for place, sample in enumerate(self.asked) if sample.row not in self.faults]
        self.places = [place for place in shown if self.asked[place].question or task != "vqa"]
        blank = [self.asked[place].row for place in shown if not self.asked[place].question and task == "vqa"]
        self.skipped += [self.report(row, BadRow("blank question")) for row in blank]
        self.samples = [self.asked[place] for place in self.places]
        self.partners: list[int] | None = None
        if self.skipped and not self.samples:
            first = self.skipped[0]
            raise ValueError(
                f"None of the {len(found)} rows of {name} can be used, the first: row {first['row']}, {first['name']}: "
                f"{first['reason']}."
            )

    def read(
        self,
        rows: datasets.Dataset | Rows,
        found: list[FoundImage | BadRow],
        text_column: str | None,
        prompt_column: str | None,
        clean_texts: bool,
        clean_questions: bool,
    ) -> list[Sample]:
        """What all rows ask, whether their image is there or not: a question each, or an image each with all its texts."""
        texts = read_column(rows, text_column, COLUMNS[self.task], "text_column")
        if self.task != "classification":
            check_texts(texts, text_column or next((one for one in COLUMNS[self.task] if one in rows.column_names), ""))
        id_column = next((name for name in IMAGE_ID_COLUMNS if name in rows.column_names), None)
        ids = rows[id_column][:] if id_column else [None] * len(found)
        groups = {column: rows[column][:] for column in GROUPS if column in rows.column_names}

        def sample(row: int, references: list[str], **others: object) -> Sample:
            kinds = {name: str(values[row]) for name, values in groups.items() if values[row] is not None}
            image_id = file_id(self.name(row), row) if ids[row] is None else ids[row]
            return Sample(row, image_id, references, groups=kinds, **others)

        questions = [None] * len(found)
        if self.task == "vqa":
            questions = rows[find_column(rows, prompt_column, PROMPT_COLUMNS, "prompt_column")][:]
        for row in range(len(found)):
            fault = not_utf8(texts[row], questions[row])
            if fault is not None and row not in self.faults:
                self.skipped.append(self.report(row, BadRow(fault)))
                self.faults.add(row)
        samples: list[Sample] = []
        if self.task == "vqa":
            numbers = rows["question_id"][:] if "question_id" in rows.column_names else None
            for row, question in enumerate(questions):
                turns = turns_of(row, question, texts[row])
                if numbers and not turns:
                    turns = [("", [])]  # blank, but a server that knows its number waits for an answer
                for question, answers in turns:
                    number = numbers[row] if numbers else len(samples)
                    question = clean_question(question) if clean_questions else question
                    samples.append(sample(row, answers, question=question, question_id=number))
            return samples
        if self.task == "classification":
            return [sample(row, as_labels(value)) for row, value in enumerate(texts)]
        here = [row for row in range(len(found)) if row not in self.faults]
        numbers = ImageNumbers().number_rows(found, [None if one is None else str(one) for one in ids])
        for rows_of_image in rows_by_image(here, found, numbers):
            captions = [text for row in rows_of_image for text in as_texts(texts[row])]
            captions = [clean_caption(text) for text in captions] if clean_texts else captions
            samples.append(sample(rows_of_image[0], [text for text in captions if text.strip()]))
        # An image that no usable row shows is asked about all the same, once.
        named = {one.image_id for one in samples}
        for row in sorted(self.faults):
            lost = sample(row, [])
            samples += [lost] if lost.image_id not in named else []
            named.add(lost.image_id)
        return sorted(samples, key=lambda one: one.row)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        sample = self.samples[key[1]]
        return {
            "image": open_image(self.images[self.row_shown(key[1])][self.image_column], self.folder),
            "prompt": fill_prompt(self.prompt, sample.question) if sample.question else self.prompt,
            "text": sample.references[0] if sample.references else "",
            "image_id": key[1],
        }

    def row_shown(self, number: int) -> int:
        """The row whose image a sample is shown."""
        return self.samples[number if self.partners is None else self.partners[number]].row

    def exchange_images(self) -> None:
        """Show each sample the image of another from now on: see `grounding.others`.

        Raises ValueError where one image has more than half of the samples.
        """
        self.partners = others([sample.image_id for sample in self.samples])
        if self.partners is None:
            raise ValueError(
                f"--other_images is true, but one image has more than half of the {len(self)} samples. Evaluate more images."
            )

    def readable_items(self, numbers: list[int]) -> dict[int, dict | BadRow]:
        """Items of samples, or why an image cannot be read."""
        found = {}
        for number in numbers:
            try:
                found[number] = self[0, number]
            except BadRow as error:
                found[number] = error
        return found

    @property
    def texts(self) -> list[list[str]]:
        """References of each sample, as retrieval takes them."""
        return [sample.references for sample in self.samples]

    def image_of(self, number: int) -> Image.Image:
        return self.image(self.row_shown(number))

    def drop(self, numbers: set[int]) -> None:
        """Leave samples out."""
        self.places = [place for number, place in enumerate(self.places) if number not in numbers]
        self.samples = [self.asked[place] for place in self.places]

    def report(self, row: int, fault: BadRow) -> dict:
        return {"row": row, "name": self.name(row), "reason": str(fault)}

    def fingerprint(self) -> list:
        """What decides what is asked, for a run that goes on: names of images without their folders, ids and texts."""
        return [{**asdict(sample), "name": Path(self.name(sample.row)).name} for sample in self.samples]


def read_column(rows: datasets.Dataset | Rows, column: str | None, known: tuple[str, ...], flag: str) -> list:
    """A column of texts; class numbers of a data set that names them become the names. None for each row where there is
    no such column and none was asked for: test sets have no answers."""
    if column is None and not any(name in rows.column_names for name in known):
        return [None] * len(rows)
    column = find_column(rows, column, known, flag)
    values = rows[column][:]
    names = getattr(rows.features.get(column), "names", None) if isinstance(rows, datasets.Dataset) else None
    return [names[value] if names and isinstance(value, int) and value >= 0 else value for value in values]


def file_id(name: str, row: int) -> int | str:
    """COCO's number out of a file name such as COCO_val2014_000000391895.jpg, else the file's name, else the row."""
    if name in (NO_NAME, "embedded bytes"):
        return row
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", Path(name).stem)
    return int(number[1]) if number else Path(name).name


def check_texts(values: list, column: str) -> None:
    """Raises ValueError that names column, row, value and type of what is no text; rows with several questions hold
    lists of lists."""
    for row, value in enumerate(values):
        try:
            for one in value if isinstance(value, list) else [value]:
                as_texts(one)
        except ValueError as error:
            raise ValueError(
                f"Column {column!r}, row {row}: {error}. Name the column of the texts: --text_column."
            ) from error


def as_texts(value: object) -> list[str]:
    """A text, a list of them, a number or nothing, as a list of texts; raises ValueError for what is neither."""
    return plain_texts(value, numbers=True)


def as_labels(value: object) -> list[int | str]:
    """Class labels, numbers as numbers: `name_labels` tells what they stand for."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [int(one) if isinstance(one, float) and one.is_integer() else one for one in values if one is not None]


def turns_of(row: int, question: object, value: object) -> list[tuple[str, list[str]]]:
    """Questions of a row with their answers; blank questions ask nothing."""
    if not isinstance(question, list):
        return [(question.strip(), as_texts(value))] if isinstance(question, str) and question.strip() else []
    answers = value if isinstance(value, list) else [None] * len(question)
    if len(answers) != len(question):
        raise ValueError(f"Row {row} has {len(question)} questions, but {len(answers)} answers. Give one each.")
    return [(one.strip(), as_texts(given)) for one, given in zip(question, answers) if one and one.strip()]


def clean_question(question: str) -> str:
    return REMOVED_FROM_QUESTIONS.sub("", question.lower()).strip()
