"""Each format that --dataset takes, made here as its authors publish it: loaded, and one batch collated."""

import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.arguments.pretraining import Stage1Arguments
from blip2x_training.data.caption_dataset import CaptionDataset, JointDataset, Sampling
from blip2x_training.data.collators import Stage1Collator
from blip2x_training.data.formats import image_start, load_rows, vqa_rows
from blip2x_training.data.order import BatchOrder, EpochOrder
from blip2x_training.data.shard_files import expand_braces
from blip2x_training.data.splits import load_dataset_split
from blip2x_training.data.vocabulary import build_tokenizer
from tests.helpers.tiny import image_processor
from tests.helpers.training_parts import make_image_folder, make_tars

WORDS = ["a red square", "a green square", "what colour", "red", "green", "yes", "no"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """photos/ with four images of four colours, some of them in folders."""
    for number, name in enumerate(["one.jpg", "two.jpg", "val2014/three.jpg", "val2014/four.jpg"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (60 * number, 0, 200)).save(path)
    return tmp_path / "photos"


def put(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def captions_of(dataset: str, split: str = "train", folder: Path | None = None, **options) -> CaptionDataset:
    """The data set, after a batch of it has been collated for stage 1."""
    folder = folder and str(folder)
    data = CaptionDataset(load_rows(dataset, split, folder), folder=image_start(dataset, folder), **options)
    collator = Stage1Collator(image_processor(), build_tokenizer(WORDS, 1), 12, cropped=False)
    keys = next(iter(BatchOrder(EpochOrder(len(data), 0), min(2, len(data)), 1)))
    batch = collator([data[key] for key in keys])
    assert batch["pixel_values"].shape[:2] == (len(keys), 3) and batch["input_ids"].shape[0] == len(keys)
    assert not any(data[key]["skipped"] for key in keys)
    return data


def test_coco_captions(tmp_path, photos):
    names = ["one.jpg", "two.jpg"]
    images = [{"id": 900 + n, "file_name": name, "height": 30, "width": 40} for n, name in enumerate(names)]
    notes = [(901, "A green square."), (900, "a red square"), (901, "green, square")]
    annotations = [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate(notes)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    data = captions_of(put(tmp_path / "captions_val2017.json", content), folder=photos)
    assert data.texts == [["a red square"], ["a green square", "green, square"]] and data.image_ids == [0, 1]
    beside = captions_of(put(photos / "captions.json", content))  # images lie beside the file
    assert beside.texts == data.texts
    assert len(load_rows(str(photos / "captions.json"), "train[50%:]")) == 1


def test_karpathy(tmp_path, photos):
    def entry(folder, name, split, number, *texts):
        sentences = [{"raw": text, "tokens": text.split(), "imgid": number, "sentid": 0} for text in texts]
        place = {"filepath": folder} if folder else {}
        return {
            "filename": name,
            "imgid": number,
            "split": split,
            "sentences": sentences,
            "cocoid": 70 + number,
        } | place

    images = [
        entry("", "one.jpg", "train", 0, "A red square", "red"),
        entry("val2014", "three.jpg", "restval", 1, "a green square"),
        entry("val2014", "four.jpg", "test", 2, "yes"),
        entry("", "two.jpg", "val", 3, "no"),
    ]
    name = put(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert captions_of(name, "train", photos).texts == [["a red square", "red"], ["a green square"]]
    assert captions_of(name, "validation", photos).texts == captions_of(name, "val", photos).texts == [["no"]]
    assert captions_of(name, "test", photos).texts == [["yes"]]
    with pytest.raises(ValueError, match="has no split 'holdout', only train, .*test.*Name one of these"):
        load_rows(name, "holdout")


@pytest.mark.parametrize("pattern", ["COCO_val2014_{:012d}.jpg", "val2014/COCO_val2014_{:012d}.jpg", "{:012d}.jpg"])
def test_vqav2_pair(tmp_path, photos, pattern):
    for number in (7, 8):
        Image.new("RGB", (40, 30)).save(photos / pattern.format(number))
    asked = [(7, "what colour", 70), (8, "is it red", 80), (7, "is it green", 71)]
    questions = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    questions["questions"] = [{"image_id": i, "question": q, "question_id": n} for i, q, n in asked]
    given = {70: ["red"] * 8 + ["green"] * 2, 80: ["yes"] * 10, 71: ["no"] * 10}
    annotations = [
        {
            "question_id": number,
            "image_id": number // 10,
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": texts[0],
            "answers": [{"answer_id": n + 1, "answer": t, "answer_confidence": "yes"} for n, t in enumerate(texts)],
        }
        for number, texts in given.items()
    ]
    first = put(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", questions)
    second = put(tmp_path / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})
    data = captions_of(f"{first},{second}", folder=photos, prompt_column="auto", prompt="Question: {} Answer:")
    assert data[0, 1]["prompt"] == "Question: is it red Answer:" and data[0, 1]["text"] == "yes"
    assert data.image_ids == [0, 1, 0]
    drawn = [data[epoch, 0]["text"] for epoch in range(200)]
    assert set(drawn) == {"red", "green"} and 130 < drawn.count("red") < 185  # eight of ten annotators
    for alone, other in ((first, "annotations"), (second, "questions")):
        with pytest.raises(ValueError, match=f"without the {other}.*QUESTIONS.json,ANNOTATIONS.json"):
            load_rows(alone, "train")


def test_the_name_of_a_subset_is_no_template(photos):
    asked = {"image_id": 7, "question": "is it red", "question_id": 70}
    questions = {"data_subtype": "{0.__class__}", "questions": [asked]}
    rows = vqa_rows(questions, {"annotations": []}, photos)
    assert rows[0]["image"] == "COCO_{0.__class__}_000000000007.jpg"


def test_lavis_lists(tmp_path, photos):
    rows = [
        {"caption": "A red square.", "image": "one.jpg", "image_id": "coco_1"},
        {"caption": "a green square", "image": "val2014/three.jpg", "image_id": "coco_2"},
        {"caption": "red", "image": "one.jpg", "image_id": "coco_1"},
    ]
    data = captions_of(put(tmp_path / "coco_karpathy_train.json", rows), folder=photos)
    assert data.texts == [["a red square"], ["a green square"], ["red"]] and data.image_ids == [0, 1, 0]
    validation = [{"image": "two.jpg", "caption": ["red", "a red square"]}]
    assert captions_of(put(tmp_path / "val.json", validation), folder=photos).texts == [["red", "a red square"]]
    answers = ["yes"] * 3 + ["no"]
    vqa = [{"question_id": 1, "question": "is it red", "answer": answers, "image": "one.jpg", "dataset": "vqa"}]
    vqa += [{"question_id": 2, "question": "what colour", "answer": "red", "image": "two.jpg", "dataset": "vg"}]
    data = captions_of(put(tmp_path / "vqa_train.json", vqa), folder=photos, prompt_column="auto")
    assert data[0, 0]["prompt"] == "is it red" and data[0, 1]["prompt"] == "what colour"
    assert data.turns[0] == [("is it red", answers)] and data[0, 1]["text"] == "red"


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_plain_lists(photos, ending):
    rows = [{"image": "one.jpg", "text_input": "what colour", "text_output": "red"}]
    rows += [{"image": "two.jpg", "text_input": "is it green", "text_output": "yes", "extra": 1}]
    text = json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)) + "\n\n"
    (photos / f"plain.{ending}").write_text(text)
    data = captions_of(str(photos / f"plain.{ending}"), prompt_column="auto")
    assert [(data[0, n]["prompt"], data[0, n]["text"]) for n in (0, 1)] == [
        ("what colour", "red"),
        ("is it green", "yes"),
    ]


def test_lists_of_questions_have_an_answer_each(tmp_path, photos):
    rows = [{"image": "one.jpg", "questions": ["what colour", "is it red"], "answers": ["red", ["yes", "no"]]}]
    data = captions_of(put(tmp_path / "daquar.json", rows), folder=photos, prompt_column="auto")
    drawn = [data[epoch, 0] for epoch in range(200)]
    pairs = [(item["prompt"], item["text"]) for item in drawn]
    assert set(pairs) == {("what colour", "red"), ("is it red", "yes"), ("is it red", "no")}
    assert 70 < pairs.count(("what colour", "red")) < 130  # questions are drawn evenly, whatever their answers
    first = captions_of(
        str(tmp_path / "daquar.json"), folder=photos, prompt_column="auto", sampling=Sampling(draw_text=False)
    )
    assert first.texts == [["red", "yes", "no"]] and first[7, 0]["prompt"] == "what colour"


def test_imagefolder_with_mixed_types_and_parquet(tmp_path):
    folder = make_image_folder(tmp_path / "folder", {"train": 4, "validation": 2})
    assert len(captions_of(str(folder)).texts[0]) == 2
    listed = folder / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    rows[1]["captions"], rows[2]["captions"] = "one text", 5
    listed.write_text("\n".join(map(json.dumps, rows)))
    data = captions_of(str(folder))
    assert data.texts[1] == ["one text"] and [report["row"] for report in data.left_out] == [2]

    (tmp_path / "untyped").mkdir()
    images = [{"bytes": path.read_bytes(), "path": "same_name.png"} for path in sorted(folder.glob("train/*.png"))]
    columns = {"image": [*images, images[0]], "caption": ["red", "green", "yes", "no", "red"]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "rows.parquet"))
    pandas = datasets.Dataset.from_dict(columns)  # without datasets' note that the bytes are an image
    pandas.to_parquet(str(tmp_path / "untyped" / "rows.parquet"))
    for name in ("rows.parquet", "*.parquet", "untyped"):
        data = captions_of(str(tmp_path / name))
        assert data.image_ids == [0, 1, 2, 3, 0], "images are told apart by their bytes, not by the name"
        assert data.image(0).size == (48, 40)


def test_tars_are_read_where_they_lie(tmp_path):
    paths = make_tars(tmp_path / "tars", [3, 0, 2], {"npy": b"\0" * 3000})
    for name in ("tars", "tars/*.tar", "tars/{000..002}.tar", "tars/{000,001,002}.tar"):
        rows = load_rows(str(tmp_path / name), "train")
        assert rows["text"] == [f"text {shard} {number}" for shard, number in ((0, 0), (0, 1), (0, 2), (2, 0), (2, 1))]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    data = captions_of(str(tmp_path / "tars"))
    assert data.shards.tolist() == [0, 0, 0, 2, 2] and len(set(data.image_ids)) == 5
    with tarfile.open(paths[2]) as tar:
        expected = Image.open(tar.extractfile("001.jpg")).convert("RGB")
    assert np.array_equal(data[0, 4]["image"], expected) and data.name(4).endswith("tars/002.tar/001.jpg")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "something was unpacked"
    assert load_rows(paths[0], "train[1:]")["text"] == ["text 0 1", "text 0 2"]
    with pytest.raises(ValueError, match="there is no .*003.tar"):
        load_rows(str(tmp_path / "tars" / "{000..003}.tar"), "train")


def test_tars_with_json_and_class_files(tmp_path):
    make_tars(tmp_path / "tars", [1, 2])
    data = captions_of(str(tmp_path / "tars" / "001.tar"))
    assert data.texts == [["text 1 0"], ["text 1 1"]]
    rows = load_rows(make_tars(tmp_path / "classes", [1], {"cls": b"17", "txt": b""})[0], "train")
    assert rows["cls"] == ["17"] and captions_of(str(tmp_path / "classes"), text_column="cls").texts == [["17"]]


def test_splits_of_a_folder_of_tars(tmp_path):
    for split, counts in (("train", [2, 1]), ("val", [1])):
        make_tars(tmp_path / "folders" / split, counts)
        for shard, path in enumerate(make_tars(tmp_path / "names", counts)):
            Path(path).rename(tmp_path / "names" / f"{split}-{shard}.tar.moved")
    for path in (tmp_path / "names").glob("*.moved"):
        path.rename(path.with_suffix(""))
    for folder in ("folders", "names"):
        lengths = [len(load_rows(str(tmp_path / folder), split)) for split in ("train", "validation", "train[:2]")]
        assert lengths == [3, 1, 2]
    with pytest.raises(ValueError, match="has no split 'test', only train, val.*Name one of these"):
        load_rows(str(tmp_path / "names"), "test")


def test_a_damaged_tar_is_named(tmp_path):
    (path,) = make_tars(tmp_path / "tars", [5])
    whole = Path(path).read_bytes()
    for length in (len(whole) // 2, 512 * 3 + 100, 700, 100, 0):
        Path(path).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="000.tar is no whole tar"):
            load_rows(str(tmp_path / "tars"), "train")


def test_several_data_sets_share_their_images(tmp_path, photos):
    one = put(tmp_path / "one.json", [{"image": "one.jpg", "caption": "red"}, {"image": "two.jpg", "caption": "no"}])
    other = put(tmp_path / "other.jsonl", {"image": "two.jpg", "text": "yes", "image_id": 5})
    flags = ["--dataset", one, other, "--dataset_weights", "3", "1", "--image_folder", str(photos)]
    args = parse_arguments(Stage1Arguments, [*flags, "--output_dir", "out", "--vision_model", "tower"])
    assert args.dataset == [one, other] and args.dataset_weights == [3.0, 1.0]
    joined = load_dataset_split(args, Accelerator(cpu=True), "train", None, True)
    assert isinstance(joined, JointDataset) and len(joined) == 3 and joined.texts == [["red"], ["no"], ["yes"]]
    assert [joined[0, row]["image_id"] for row in range(3)] == [0, 1, 1]
    assert [joined[0, row]["text"] for row in range(3)] == ["red", "no", "yes"]
    for flags, part in (
        (["--dataset_weights", "3"], "has 1 weights for 2"),
        (["--dataset_weights", "3", "0"], "above 0"),
        (["--feature_cache", "cache", "--augment", "false"], "names several"),
    ):
        with pytest.raises(ValueError, match=part):
            parse_arguments(
                Stage1Arguments, ["--dataset", one, other, "--output_dir", "out", "--vision_model", "t", *flags]
            )


def test_columns_are_found_or_named(tmp_path, photos):
    rows = load_rows(put(tmp_path / "rows.json", [{"image": "one.jpg", "sentence": "x"}]), "train")
    with pytest.raises(ValueError, match=r"\['image', 'sentence'\], but none of text, caption.*--text_column"):
        CaptionDataset(rows, folder=photos)
    with pytest.raises(ValueError, match="none of question.*--prompt_column"):
        CaptionDataset(rows, folder=photos, text_column="sentence", prompt_column="auto")
    with pytest.raises(ValueError, match="its keys are .'licenses'.*COCO captions"):
        load_rows(put(tmp_path / "odd.json", {"licenses": []}), "train")
    with pytest.raises(ValueError, match="rows.jsonl, line 2"):
        (tmp_path / "rows.jsonl").write_text('{"image": "one.jpg"}\n{"image"\n')
        load_rows(str(tmp_path / "rows.jsonl"), "train")


def test_braces_are_expanded_as_in_a_shell():
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"] and expand_braces("plain") == ["plain"]
