"""From the dataset argument to rows: one function a format, told apart by file names and by the keys of the JSON."""

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from .csv_rows import ENDINGS, csv_rows
from .first_index import first_index
from .folder_cache import load_folder
from .index_files import is_index
from .index_images import open_split, rows_of_index
from .llava_rows import llava_rows
from .remote import is_remote
from .rows import Rows, take_split
from .saved_rows import is_saved, saved_rows
from .shard_files import pattern_files, split_tars
from .tars import tar_rows

NO_CONFIG = (None, "default")  # what datasets calls that of a data set with only one
NAME_A_SPLIT = "Name one of these."
Splits = dict[str, Sequence[int]]  # the rows of each split
FORMATS = (
    "COCO captions ({images, annotations}), Karpathy ({images: [{sentences, split}]}), GQA's questions, LLaVA's "
    "conversations, or a list of rows such as [{image, caption}], [{image, question, answer}] or [{image, text_input, text_output}]"
)


def load_rows(
    dataset: str, split: str, image_folder: str | None = None, config: str | None = None
) -> datasets.Dataset | Rows:
    """Rows of one split of what `--dataset` names.

    A hub id or a folder (imagefolder with metadata.jsonl, parquet, webdataset tars), of which `config` is one configuration;
    a folder of `save_to_disk`; an index that index_dataset.py wrote; tars or parquet files by a pattern such as `DIR/{000..099}.tar`; a JSON, JSONL, CSV, TSV or
    parquet file; VQAv2's `QUESTIONS.json,ANNOTATIONS.json`. Images stay encoded: a row's image is a path, or a dict with
    `path` and `bytes` or the place in a tar. Raises ValueError for what cannot be read or holds nothing.
    """
    path, files = Path(dataset), pattern_files(dataset)
    try:
        check_config(dataset, config)
        if is_remote(dataset):
            rows = rows_of_index(*open_split(first_index(dataset, split), split))
        elif is_index(path):
            rows = rows_of_index(*open_split(dataset, split))
        elif files:
            rows = many_files(files, split)
        elif is_vqa_pair(dataset):
            questions, annotations = dataset.split(",")
            folder = image_start(dataset, image_folder)
            rows = take_split(*whole(vqa_rows(read_json(Path(questions)), read_json(Path(annotations)), folder)), split)
        elif path.is_dir():
            rows = folder_rows(path, split, config)
        elif path.suffix in (".json", ".jsonl"):
            rows = take_split(*json_rows(path), split)
        elif path.suffix in ENDINGS and path.exists():
            rows = take_split(*whole(csv_rows(path)), split)
        elif path.suffix in (".parquet", ".tar"):
            rows = many_files([existing(path)], split)
        elif path.exists() or path.is_absolute() or dataset.startswith("."):
            existing(path)
            if zipfile.is_zipfile(path):
                raise ValueError(f"{path.name} is a zip: unpack it, and name the folder")
            raise ValueError(f"{path.name} is no .json, .jsonl, .csv, .tsv, .parquet or .tar file")
        else:
            rows = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # datasets raises a dozen kinds
        if configs := configs_named_in(error):
            lacks = f"has no configuration {config!r}, only" if config else "has several configurations:"
            raise ValueError(f"--dataset {dataset} {lacks} {configs}. Name one of these: --dataset_config.") from error
        if splits := splits_named_in(error):
            raise ValueError(f"--dataset {dataset} has no split {split!r}, only {splits}. {NAME_A_SPLIT}") from error
        raise ValueError(f"--dataset {dataset}, split {split!r} cannot be read: {error}") from error
    if len(rows) == 0:
        raise ValueError(f"--dataset {dataset}, split {split!r} has no rows.")
    return rows


def splits_named_in(error: Exception) -> str | None:
    """The splits that there are, if `error` is that of `datasets` about a split that there is not."""
    found = re.search(r"Unknown split .* Should be one of \[(.*)\]", str(error))
    return found and found[1].replace("'", "")


def configs_named_in(error: Exception) -> str | None:
    """The configurations that there are, if `error` is that of `datasets` about one that is missing or unknown."""
    found = re.search(r"(?:Config name is missing|BuilderConfig .* not found).*?\[(.*?)\]", str(error), re.DOTALL)
    return found and found[1].replace("'", "")


def check_config(dataset: str, config: str | None) -> None:
    """Raise ValueError for a configuration of what has none: files, and folders of save_to_disk."""
    path = Path(dataset)
    alone = (
        path.is_file() or is_saved(path) or is_vqa_pair(dataset) or is_remote(dataset) or bool(pattern_files(dataset))
    )
    if alone and config not in NO_CONFIG:
        raise ValueError(f"--dataset_config is {config!r}, but only hub data sets and folders have any. Pass default")


def image_start(dataset: str, image_folder: str | None) -> Path | None:
    """The folder that relative paths of images start at: `image_folder`, else that of the JSON file."""
    first = Path(dataset.split(",")[0]) if is_vqa_pair(dataset) else Path(dataset)
    return Path(image_folder) if image_folder else first.parent if first.is_file() else None


def existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder. Check the path.")
    return path


def whole(rows: Rows) -> tuple[Rows, Splits]:
    """One split, called train, as `datasets` calls that of a file, or all, as evaluation calls it."""
    return rows, {"train": range(len(rows)), "all": range(len(rows))}


def many_files(files: list[str | Path], split: str) -> datasets.Dataset | Rows:
    """Tars or parquet files, one split together."""
    kinds = {Path(file).suffix for file in files}
    if kinds == {".tar"}:
        return take_split(*whole(tar_rows([str(file) for file in files])), split)
    if kinds == {".parquet"}:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split=split)
    raise ValueError(f"the files end in {', '.join(sorted(kinds))}, but must all be .tar or all .parquet")


def folder_rows(folder: Path, split: str, config: str | None = None) -> datasets.Dataset | Rows:
    """An imagefolder, a folder of parquet files, one of tars, or one that save_to_disk wrote."""
    if not any(item.is_file() for item in folder.rglob("*")):
        raise ValueError(f"{folder} is an empty folder. It needs images with a metadata.jsonl, parquet files or tars.")
    if is_saved(folder):
        return saved_rows(folder, split)
    name = re.match(r"\w+", split)
    tars = split_tars(folder, name[0]) if name and config in NO_CONFIG else []
    if tars:
        rows = tar_rows(tars)
        return take_split(rows, {name[0]: range(len(rows))}, split)
    try:
        return load_folder(folder, config, split)
    except Exception as error:  # datasets wants one type in a column of metadata.jsonl
        if config not in NO_CONFIG or configs_named_in(error):
            raise
        inside = [folder / name[0] / "metadata.jsonl", folder / "metadata.jsonl"] if name else []
        listed = next((path for path in inside if path.exists()), None)
        if listed is None or (listed.parent == folder and name[0] != "train"):
            raise
        rows = [{"image": row.pop("file_name", None), **row} for row in read_json(listed)]
        for row in rows:
            row["image"] = str(listed.parent / row["image"]) if row["image"] else None
        return take_split(Rows.from_dicts(rows), {name[0]: range(len(rows))}, split)


def read_json(path: Path) -> dict | list:
    """Content of a JSON file, or the rows of a JSONL file. Raises ValueError that names the line."""
    # What is no UTF-8 is left out row by row, with its reason; -sig takes off the mark that some editors begin with.
    with open(existing(path), encoding="utf-8-sig", errors="surrogateescape") as file:
        first, more = file.readline(), file.readline().strip()
        file.seek(0)
        # By content, whatever the file is called: lines of objects, or one value.
        if first.lstrip().startswith("[") or (path.suffix == ".json" and not (more and is_whole(first))):
            return json.load(file)
        rows = []
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
        return rows


def is_whole(line: str) -> bool:
    """Whether a line is JSON by itself."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def json_rows(path: Path) -> tuple[Rows, Splits]:
    """The rows of a JSON or JSONL file by what it holds, and which belong to which split."""
    content = read_json(path)
    if isinstance(content, list):
        if not all(isinstance(row, dict) for row in content):
            raise ValueError(f"its rows must be objects: {FORMATS}")
        if any("conversations" in row for row in content):
            return whole(llava_rows(content, path.name))
        return whole(Rows.from_dicts(content))
    images, annotations = content.get("images"), content.get("annotations")
    if images and "sentences" in images[0]:
        return karpathy_rows(content)
    if images and annotations and "caption" in annotations[0]:
        return whole(coco_rows(content))
    if content and all(isinstance(one, dict) and "imageId" in one for one in content.values()):
        return whole(gqa_rows(content))
    if "questions" in content or (annotations and "question_id" in annotations[0]):
        other = "annotations" if "questions" in content else "questions"
        raise ValueError(
            f"it holds VQAv2's {'questions' if 'questions' in content else 'annotations'} alone, without the {other}. Pass "
            "both, with a comma between: --dataset QUESTIONS.json,ANNOTATIONS.json"
        )
    raise ValueError(f"its keys are {list(content)}, but it must be one of: {FORMATS}")


def coco_rows(content: dict) -> Rows:
    """COCO captions and NoCaps: a row an image with all its captions, and its domain where it has one.

    Raises ValueError for captions of images that the file does not list.
    """
    captions = {image["id"]: [] for image in content["images"]}
    lost = [annotation["image_id"] for annotation in content["annotations"] if annotation["image_id"] not in captions]
    if lost:
        raise ValueError(
            f"{len(lost)} captions are of images that `images` does not list, the first of image_id {lost[0]}. Add the images, "
            "or remove the captions"
        )
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    names = [image["file_name"] for image in content["images"]]
    columns = {"image": names, "captions": list(captions.values()), "image_id": list(captions)}
    if any("domain" in image for image in content["images"]):
        columns["domain"] = [image.get("domain") for image in content["images"]]
    return Rows(columns)


def gqa_rows(content: dict) -> Rows:
    """GQA: {question id: {imageId, question, answer, types}}; the images are called imageId.jpg."""
    rows = [
        {
            "image": f"{one['imageId']}.jpg",
            "question": one["question"],
            "answers": [one["answer"]] if "answer" in one else [],
            "image_id": one["imageId"],
            "question_id": number,
            "question_type": one.get("types", {}).get("structural"),
        }
        for number, one in content.items()
    ]
    return Rows.from_dicts(rows)


def karpathy_rows(content: dict) -> tuple[Rows, Splits]:
    """Karpathy's COCO, Flickr30k and Flickr8k. `train` has restval with it, as captioning trains; `validation` is val."""
    rows = [
        {
            "image": "/".join(filter(None, (image.get("filepath"), image["filename"]))),
            "captions": [sentence["raw"] for sentence in image["sentences"]],
            "image_id": image.get("cocoid", image.get("imgid")),
        }
        for image in content["images"]
    ]
    parts = [image["split"] for image in content["images"]]
    members = {"train": ("train", "restval"), "validation": ("val",), "val": ("val",), "test": ("test",)}
    splits = {name: [number for number, part in enumerate(parts) if part in of] for name, of in members.items()}
    return Rows.from_dicts(rows), splits


def is_vqa_pair(dataset: str) -> bool:
    parts = dataset.split(",")
    return len(parts) == 2 and all(part.endswith(".json") for part in parts) and not Path(dataset).exists()


def vqa_rows(questions: dict, annotations: dict, folder: Path) -> Rows:
    """VQAv2 and OK-VQA: a row a question with the ten answers to it."""
    for name, content in (("questions", questions), ("annotations", annotations)):
        if not isinstance(content, dict) or name not in content:
            raise ValueError(f"the first file must hold `questions`, the second `annotations`; one has no {name!r}")
    notes = {one["question_id"]: one for one in annotations["annotations"]}
    file_name = coco_file_name(questions, folder)
    rows = [
        {
            "image": file_name(question["image_id"]),
            "question": question["question"],
            "answers": [given["answer"] for given in notes.get(question["question_id"], {}).get("answers", [])],
            "image_id": question["image_id"],
            "question_id": question["question_id"],
            **{name: notes.get(question["question_id"], {}).get(name) for name in ("question_type", "answer_type")},
        }
        for question in questions["questions"]
    ]
    return Rows.from_dicts(rows)


def coco_file_name(questions: dict, folder: Path) -> Callable[[int], str]:
    """How the images are called, by their id: the official name, or that of the 2017 release, whichever is there."""
    subset = str(questions.get("data_subtype", "")).replace("test-dev", "test")

    def official(image_id: int) -> str:
        return f"COCO_{subset}_{int(image_id):012d}.jpg"

    names = (
        official,
        lambda image_id: f"{subset}/{official(image_id)}",
        lambda image_id: f"{int(image_id):012d}.jpg",
        lambda image_id: f"{subset}/{int(image_id):012d}.jpg",
    )
    for question in questions["questions"][:100]:
        for name in names:
            if (folder / name(question["image_id"])).exists():
                return name
    return official
