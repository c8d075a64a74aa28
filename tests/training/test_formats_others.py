"""LLaVA's conversations, configurations, save_to_disk, and lists of images, read by training, the cache and evaluation."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.arguments.pretraining import Stage1Arguments
from blip2x_training.bootstrap_captions import main as bootstrap_captions
from blip2x_training.cache_features import main as cache_features
from blip2x_training.caption_language import main as caption_language
from blip2x_training.data.caption_dataset import CaptionDataset, ImageDataset
from blip2x_training.data.evaluation_formats import evaluation_rows
from blip2x_training.data.feature_cache import images_fingerprint, load_features
from blip2x_training.data.formats import load_rows
from blip2x_training.data.splits import load_dataset_split
from blip2x_training.evaluation.fields import EvaluationArguments
from blip2x_training.evaluation.samples import EvaluationSet
from blip2x_training.trim_bert import main as trim_bert
from tests.helpers.training_parts import make_vision_model, put_pictures


@pytest.fixture
def photos(tmp_path) -> Path:
    return put_pictures(tmp_path / "photos", ["one.jpg", "two.jpg"])


def conversation(image: object, *turns: str, starts: str = "human") -> dict:
    speakers = ("human", "gpt") if starts == "human" else ("gpt", "human")
    told = [{"from": speakers[number % 2], "value": turn} for number, turn in enumerate(turns)]
    return {"id": "7", "conversations": told} | ({"image": image} if image else {})


def put(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_llava_turns_are_questions_with_their_answers(photos):
    rows = [
        conversation(None, "What is 1 + 1?", "2"),
        conversation("one.jpg", "<image>\nWhat is it?", "A dog.", "Why is <it> red?", "Paint."),
        conversation(["two.jpg"], "Describe it.\n<image>", "A cat."),
        conversation("two.jpg", "Hello", "starts with the answer", starts="gpt"),
        conversation("two.jpg", "<image>\nNobody answers this"),
    ]
    name = put(photos / "llava_v1_5_mix.json", rows)
    with pytest.warns(
        UserWarning, match="1 of 5 conversations of llava_v1_5_mix.json are left out: they have no image"
    ):
        data = CaptionDataset(load_rows(name, "train"), folder=photos, prompt_column="auto", clean_captions=False)
    assert data.turns == [
        [("What is it?", ["A dog."]), ("Why is <it> red?", ["Paint."])],
        [("Describe it.", ["A cat."])],
    ]
    assert {report["reason"] for report in data.left_out} == {"1 questions, but 0 texts"} and data.num_rows == 4
    asked = {(data[epoch, 0]["prompt"], data[epoch, 0]["text"]) for epoch in range(50)}
    assert asked == {("What is it?", "A dog."), ("Why is <it> red?", "Paint.")}

    with pytest.warns(UserWarning, match="1 of 5"):
        samples = EvaluationSet(evaluation_rows(name, "all[:2]"), task="vqa", folder=photos).samples
    asked = [(one.question, one.references, one.image_id) for one in samples]
    assert asked == [
        ("What is it?", ["A dog."], "one.jpg"),
        ("Why is <it> red?", ["Paint."], "one.jpg"),
        ("Describe it.", ["A cat."], "two.jpg"),
    ]
    with pytest.warns(UserWarning, match="1 of 5"):
        captions = CaptionDataset(load_rows(name, "train[1:2]"), folder=photos)
    assert captions.texts == [["a cat"]]  # without a prompt its answers are captions, as in LLaVA's own pre-training
    with pytest.raises(ValueError, match="no row of its conversations has an `image`"):
        load_rows(put(photos / "text.json", rows[:1]), "train")


def test_the_feature_cache_of_llava_counts_the_rows_that_are_left(tmp_path, photos):
    rows = [conversation(None, "What is 1 + 1?", "2"), conversation("one.jpg", "What?", "A dog.")]
    name, cache = put(photos / "llava.json", rows), tmp_path / "cache"
    flags = ["--dataset", name, "--vision_model", str(make_vision_model(tmp_path / "tower"))]
    with pytest.warns(UserWarning, match="1 of 2"):
        cache_features([*flags, "--output_dir", str(cache), "--splits", "train"])
        data = CaptionDataset(load_rows(name, "train"), folder=photos)
    data.use_features(load_features(str(cache), "train", {"images": images_fingerprint(data)}))
    item = data[0, 0]
    assert item["text"] == "a dog" and item["vision_embeds"].isfinite().all() and "image" not in item


@pytest.fixture
def languages(tmp_path) -> Path:
    """A data set as on the hub, with the configurations en and de, of one image each."""
    folder = tmp_path / "languages"
    for number, name in enumerate(("en", "de")):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), (0, 100 * number, 0)).save(folder / name / "a.png")
        (folder / name / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": f"text {name}"}))
    front = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
    return folder


def stage1(*flags: str) -> Stage1Arguments:
    return parse_arguments(Stage1Arguments, [*flags, "--output_dir", "out", "--vision_model", "tower"])


def test_a_configuration_is_chosen_in_training(photos, languages):
    dataset = str(languages)
    one = load_dataset_split(
        stage1("--dataset", dataset, "--dataset_config", "de"), Accelerator(cpu=True), "train", None, True
    )
    assert one.texts == [["text de"]]
    listed = put(photos / "rows.json", [{"image": "one.jpg", "text": "red"}])
    args = stage1(
        "--dataset", dataset, dataset, listed, "--dataset_config", "de", "en", "default", "--image_folder", str(photos)
    )
    several = load_dataset_split(args, Accelerator(cpu=True), "train", None, True)
    assert several.texts == [["text de"], ["text en"], ["red"]] and several.image_ids == [0, 1, 2]
    # skipped.jsonl tells rows apart by data set, split and number.
    assert several.sources == {
        (f"{dataset}, de", "train"),
        (f"{dataset}, en", "train"),
        (f"{listed}, default", "train"),
    }
    with pytest.raises(ValueError, match="--dataset_config names 1 configurations for 2 data sets. Give one each"):
        stage1("--dataset", dataset, dataset, "--dataset_config", "de")


@pytest.mark.parametrize("read, flag", [(load_rows, "--dataset"), (evaluation_rows, "--data")])
def test_configurations_are_listed_where_one_is_needed(photos, languages, read, flag):
    assert read(str(languages), "train[:1]", None, "en")["text"] == ["text en"]
    with pytest.raises(
        ValueError, match=f"^{flag} .*has several configurations: en, de. Name one of these: --dataset_config.$"
    ):
        read(str(languages), "train")
    with pytest.raises(
        ValueError, match=f"^{flag} .*has no configuration 'fr', only en, de. Name .*--dataset_config.$"
    ):
        read(str(languages), "train", None, "fr")
    with pytest.raises(ValueError, match="has no split 'test', only .*train.*. Name one of these"):
        read(str(languages), "test", None, "en")
    listed = put(photos / "rows.json", [{"image": "one.jpg", "text": "red"}])
    for name in (listed, str(photos / "*.json"), f"{listed},{listed}"):
        with pytest.raises(ValueError, match="--dataset_config is 'en', but only hub data sets and folders have any"):
            read(name, "train", None, "en")


def test_a_configuration_of_the_feature_cache(tmp_path, languages):
    tower, cache = make_vision_model(tmp_path / "tower"), tmp_path / "cache"
    flags = ["--dataset", str(languages), "--vision_model", str(tower), "--output_dir", str(cache), "--splits", "train"]
    with pytest.raises(ValueError, match="several configurations: en, de"):
        cache_features(flags)
    cache_features([*flags, "--dataset_config", "de"])
    described = json.loads((cache / "train.json").read_text())
    prints = [
        images_fingerprint(ImageDataset(load_rows(str(languages), "train", None, name), "image"))
        for name in ("de", "en")
    ]
    assert described["images"] == prints[0] != prints[1]
    with pytest.raises(ValueError, match="holds another cache of split 'train' .images was"):
        cache_features([*flags, "--dataset_config", "en"])


@pytest.mark.parametrize("config", ["de", "default"])
def test_a_folder_never_gives_the_rows_of_another_or_of_earlier_files(tmp_path, config):
    folders = [tmp_path / name / "languages" for name in ("first", "second")]
    for folder, texts in ((folders[0], ["red"]), (folders[1], ["blue"]), (folders[1], ["blue", "green"])):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files: data/*\n---\n")
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "data" / "train.parquet")
        assert load_rows(str(folder), "train", None, config)["text"][:] == texts
        assert load_rows(str(folder), "train")["text"][:] == texts  # the only one


@pytest.mark.parametrize(
    "command, flags",
    [
        (bootstrap_captions, ["--captioner", "model"]),
        (caption_language, []),
        (trim_bert, ["--bert", "model"]),
    ],
)
def test_a_configuration_of_the_other_commands(languages, command, flags):
    with pytest.raises(ValueError, match="has no configuration 'fr', only en, de"):
        command(["--dataset", str(languages), "--output_dir", "out", *flags, "--dataset_config", "fr"])


def test_evaluation_takes_a_configuration():
    flags = ["--model", "m", "--task", "caption", "--data", "user/name", "--output_dir", "out"]
    assert parse_arguments(EvaluationArguments, [*flags, "--dataset_config", "de"]).dataset_config == "de"


@pytest.fixture
def saved(tmp_path, photos) -> Path:
    """DIR/one is a Dataset with embedded images, DIR/all a DatasetDict of it and its second row."""
    columns = {"image": [str(photos / "one.jpg"), str(photos / "two.jpg")], "text": ["red", "blue"]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.with_format("torch").save_to_disk(tmp_path / "saved" / "one")
    splits = {"train": rows, "validation": rows.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved" / "all")
    for path in photos.glob("*.jpg"):
        path.unlink()
    return tmp_path / "saved"


@pytest.mark.parametrize("read", [load_rows, evaluation_rows])
def test_save_to_disk(saved, read):
    for name, split, texts in (
        ("one", "train", ["red", "blue"]),
        ("one", "all[1:]", ["blue"]),
        ("all", "train[:50%]+validation", ["red", "blue"]),
        ("all", "validation", ["blue"]),
    ):
        data = CaptionDataset(read(str(saved / name), split))
        assert [data[0, row]["text"] for row in range(len(data))] == texts
        assert [data[0, row]["image"].size for row in range(len(data))] == [(40, 30)] * len(texts)
    for name, splits in (("one", "train, all"), ("all", "train, validation")):
        with pytest.raises(ValueError, match=f"has no split 'test', only .*{splits}.*Name one of these"):
            read(str(saved / name), "test")
    with pytest.raises(ValueError, match="--dataset_config is 'en', but only hub"):
        read(str(saved / "all"), "train", None, "en")


def test_the_feature_cache_of_save_to_disk(tmp_path, saved):
    tower, cache = make_vision_model(tmp_path / "tower"), tmp_path / "cache"
    cache_features(
        ["--dataset", str(saved / "all"), "--vision_model", str(tower), "--output_dir", str(cache), "--shard_size", "1"]
    )
    described = {name: json.loads((cache / f"{name}.json").read_text()) for name in ("train", "validation")}
    assert [described[name]["shape"][0] for name in described] == [2, 1]
    assert sorted(path.name for path in cache.glob("train-*")) == [
        "train-00000-of-00002.npy",
        "train-00001-of-00002.npy",
    ]


SEVERAL = "2 images in one row, of which one is taken: make a row of each"


def test_a_row_of_several_images_is_left_out_by_its_number(photos):
    rows = [{"image": "one.jpg", "text": "red"}, {"image": ["one.jpg", "two.jpg"], "text": "both"}]
    name = put(photos / "rows.json", rows)
    data = CaptionDataset(load_rows(name, "train"), folder=photos)
    (report,) = data.left_out
    assert data.texts == [["red"]] and report["row"] == 1 and report["reason"] == SEVERAL
    with pytest.raises(ValueError, match=f"the first: row 0, .*: {SEVERAL}"):
        CaptionDataset(load_rows(name, "train[1:]"), folder=photos)
    with pytest.raises(ValueError, match=f"image of row 1 .*{SEVERAL}"):
        data.image(1)


@pytest.mark.parametrize("kind", [datasets.Image(), datasets.Value("string")])
@pytest.mark.parametrize("make", [datasets.List, datasets.LargeList])
@pytest.mark.parametrize("embed", [False, True])
def test_a_column_of_lists_of_images(tmp_path, photos, make, kind, embed):
    paths = [str(photos / "one.jpg"), str(photos / "two.jpg")]
    features = datasets.Features({"image": make(kind), "text": datasets.Value("string")})
    lists = {"image": [paths[1:], paths, []], "text": ["blue", "both", "none"]}
    rows = datasets.Dataset.from_dict(lists, features=features)
    if embed:
        rows.to_parquet(tmp_path / "rows.parquet")
        rows = load_rows(str(tmp_path / "rows.parquet"), "train")
    data = CaptionDataset(rows)
    assert data.texts == [["blue"]] and np.array_equal(data[0, 0]["image"], Image.open(paths[1]))
    assert [(report["row"], report["reason"]) for report in data.left_out] == [(1, SEVERAL), (2, "no image")]
