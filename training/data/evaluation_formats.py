"""Official files of evaluation sets that training does not read: questions without answers, DAQUAR's and Flickr8k's texts.

`evaluation_rows` reads these, and leaves everything else to `formats.load_rows`.
"""

import re
from pathlib import Path

import datasets

from .formats import (
    NAME_A_SPLIT,
    check_config,
    existing,
    image_start,
    load_rows,
    read_json,
    splits_named_in,
    vqa_rows,
    whole,
)
from .rows import Rows, take_split

FLICKR8K_SPLITS = {"train": "train", "validation": "dev", "test": "test"}  # Flickr_8k.devImages.txt
IN_THE_IMAGE = re.compile(r"\s+(?:in|on|of|from)?\s*(?:the\s+)?image(\d+)\s*")


def evaluation_rows(
    data: str, split: str, image_folder: str | None = None, config: str | None = None
) -> datasets.Dataset | Rows:
    """Rows of one split of what --data names; raises ValueError for what cannot be read or holds nothing."""
    path = Path(data)
    try:
        check_config(data, config)
        if path.suffix == ".txt":
            lines = existing(path).read_text(encoding="utf-8-sig").splitlines()
            read = flickr8k_rows if lines and "#" in lines[0].partition("\t")[0] else daquar_rows
            return take_split(*read(path, lines), split)
        content = read_json(path) if path.suffix == ".json" and path.is_file() else None
        if isinstance(content, dict) and content.get("questions"):
            return take_split(*whole(vqa_rows(content, {"annotations": []}, image_start(data, image_folder))), split)
        images = content.get("images") if isinstance(content, dict) else None
        if images and "annotations" not in content and "sentences" not in images[0]:
            return take_split(*whole(image_rows(images)), split)
    except (ValueError, KeyError, OSError) as error:
        if splits := splits_named_in(error):
            raise ValueError(
                f"--data {data} has no split {split!r}, only {splits}. Name one of these: --split."
            ) from error
        raise ValueError(f"--data {data}, split {split!r} cannot be read: {error}") from error
    try:
        return load_rows(data, split, image_folder, config)
    except ValueError as error:
        message = str(error).replace("--dataset ", "--data ").replace(NAME_A_SPLIT, "Name one of these: --split.")
        raise ValueError(message) from error


def image_rows(images: list[dict]) -> Rows:
    """COCO's and NoCaps' test images, whose captions only the evaluation server has."""
    return Rows.from_dicts([{"image": one["file_name"], "captions": [], "image_id": one["id"]} for one in images])


def flickr8k_rows(path: Path, lines: list[str]) -> tuple[Rows, dict]:
    """Flickr8k.token.txt: `NAME.jpg#NUMBER<tab>caption`, with the lists of its splits beside it."""
    captions: dict[str, list[str]] = {}
    for line in lines:
        name, _, caption = line.partition("\t")
        if caption:
            captions.setdefault(name.partition("#")[0], []).append(caption.strip())
    names = list(captions)
    splits = {"all": range(len(names))}
    for split, official in FLICKR8K_SPLITS.items():
        listed = path.parent / f"Flickr_8k.{official}Images.txt"
        if listed.exists():
            members = set(listed.read_text(encoding="utf-8-sig").split())
            splits[split] = [number for number, name in enumerate(names) if name in members]
    return Rows({"image": names, "captions": list(captions.values()), "image_id": names}), splits


def daquar_rows(path: Path, lines: list[str]) -> tuple[Rows, dict]:
    """DAQUAR's qa.*.txt: a line with a question "... in the image3 ?" and one with its answer, in turn."""
    lines = [line.strip() for line in lines if line.strip()]
    rows = []
    for number, (question, answer) in enumerate(zip(lines[::2], lines[1::2])):
        image = IN_THE_IMAGE.search(question)
        if image is None:
            raise ValueError(
                f"{path.name}, question {number + 1}, {question!r}, names no image such as image3. DAQUAR's files have a line "
                "with a question and one with its answer in turn."
            )
        asked = IN_THE_IMAGE.sub(" ", question).strip()
        rows.append({"image": f"image{image[1]}.png", "question": asked, "answers": [answer]})
    return whole(Rows.from_dicts(rows))
