"""Images are told apart by their bytes; validation counts images, and leaves out those that it cannot read."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from blip2x_training import cache_features
from blip2x_training.data.caption_dataset import CaptionDataset, ImageDataset, Sampling
from blip2x_training.data.feature_cache import images_fingerprint
from blip2x_training.data.formats import load_rows
from blip2x_training.data.image_identity import ImageNumbers
from blip2x_training.data.images import FoundImage
from blip2x_training.evaluation.samples import EvaluationSet
from blip2x_training.evaluation.validation import matching_accuracy
from tests.helpers.ranks import run
from tests.helpers.training_parts import make_image_folder, make_vision_model, run_stage1, stage1_flags
from tests.helpers.training_runs import without_speed

COUNT, BAD = 8, (1, 5)
ONE_STEP = ["--max_steps", "1", "--eval_split", "validation", "--max_skip_fraction", "0.5", "--rerank_k", "2"]


def picture(number: int, ending: str) -> bytes:
    """A white picture without compression, whose middle alone differs: both ends are 4096 bytes of white."""
    pixels = np.full((80, 80, 3), 255, np.uint8)
    pixels[38:42, 38:42] = 10 * number
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, ending)
    return content.getvalue()


def write_pictures(folder: Path, ending: str, count: int = COUNT) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        (folder / f"{number}.{ending}").write_bytes(picture(number, ending))
        rows.append({"image": str(folder / f"{number}.{ending}"), "caption": f"a picture {number}"})
    return rows


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("ending", ["bmp", "tiff", "ppm"])
@pytest.mark.parametrize("kind", ["files", "parquet", "tar"])
def test_white_pictures_of_one_size_are_different_images(tmp_path, ending, kind):
    listed = write_pictures(tmp_path / "photos", ending)
    assert len({Path(row["image"]).stat().st_size for row in listed}) == 1, "sizes tell them apart"
    if kind == "files":
        (tmp_path / "rows.json").write_text(json.dumps(listed))
        source = str(tmp_path / "rows.json")
    elif kind == "parquet":
        columns = {"image": [{"bytes": Path(row["image"]).read_bytes(), "path": None} for row in listed]}
        table = datasets.Dataset.from_dict(columns | {"caption": [row["caption"] for row in listed]})
        table.cast_column("image", datasets.Image()).to_parquet(source := str(tmp_path / "rows.parquet"))
    else:
        files = {f"{n}.{ending}": Path(row["image"]).read_bytes() for n, row in enumerate(listed)}
        files |= {f"{n}.txt": row["caption"].encode() for n, row in enumerate(listed)}
        source = write_tar(tmp_path / "rows.tar", dict(sorted(files.items())))
    rows = load_rows(source, "train")
    assert CaptionDataset(rows).image_ids == list(range(COUNT))
    assert len(EvaluationSet(rows, task="caption", text_column=rows.column_names[-1])) == COUNT


def test_copies_are_one_image_across_data_sets_and_only_lookalikes_are_read(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 9000)
    (tmp_path / "b").write_bytes(b"x" * 4500 + b"y" + b"x" * 4499)  # differs in the middle
    (tmp_path / "c").write_bytes(b"x" * 9000)
    (tmp_path / "alone").write_bytes(b"x" * 8000)
    (tmp_path / "ends").write_bytes(b"y" + b"x" * 8999)
    whole, content = [], FoundImage.content
    monkeypatch.setattr(FoundImage, "content", lambda self: whole.append(Path(self.place).name) or content(self))
    numbers = ImageNumbers()
    first = [{"image": name, "text": "x"} for name in ("a", "b", "alone", "ends", "a")]
    (tmp_path / "one.json").write_text(json.dumps(first))
    (tmp_path / "two.json").write_text(json.dumps([{"image": "alone", "text": "x"}, {"image": "c", "text": "x"}]))
    one, two = (
        CaptionDataset(load_rows(str(tmp_path / name), "train"), folder=tmp_path, known_images=numbers)
        for name in ("one.json", "two.json")
    )
    assert one.image_ids == [0, 1, 2, 3, 0] and two.image_ids == [2, 0]
    assert sorted(whole) == ["a", "b", "c"], "more was read than images that may be equal"


def test_equal_images_with_different_ids_are_different(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    rows = [
        {"image": f"{name}.png", "image_id": number, "text": "x"} for name, number in (("a", 7), ("b", 8), ("a", 7))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = CaptionDataset(load_rows(str(tmp_path / "rows.json"), "train"), folder=tmp_path)
    assert data.image_ids == [0, 1, 0]
    for row, same in zip(rows, ("one", "one", "one")):
        row["image_id"] = same  # an id that is no id joins nothing
    (tmp_path / "b.png").write_bytes(picture(3, "bmp"))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = CaptionDataset(load_rows(str(tmp_path / "rows.json"), "train"), folder=tmp_path)
    assert data.image_ids == [0, 1, 0]


@pytest.mark.parametrize("where", [0, 60 * 240, -1])
def test_a_fingerprint_sees_every_byte_under_the_same_name_and_size(tmp_path, where):
    listed = write_pictures(tmp_path / "photos", "bmp", 3)
    (tmp_path / "rows.json").write_text(json.dumps(listed))
    rows = load_rows(str(tmp_path / "rows.json"), "train")
    before = images_fingerprint(ImageDataset(rows, "image"))
    assert before == images_fingerprint(ImageDataset(rows, "image"))
    path = Path(listed[1]["image"])
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert images_fingerprint(ImageDataset(rows, "image")) != before


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """tower/, and data/ with eight images of validation, each with two captions."""
    root = tmp_path_factory.mktemp("validation")
    make_vision_model(root / "tower")
    make_image_folder(root / "data", {"train": 8, "validation": COUNT})
    return root


def validation_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation" / "metadata.jsonl").read_text().splitlines()]


def with_bad_rows(parts: Path, folder: Path, bad: bool) -> Path:
    """The data with two validation images cut off, or without their rows."""
    shutil.copytree(parts / "data", folder)
    rows = validation_rows(folder)
    for number in BAD:
        path = folder / "validation" / rows[number]["file_name"]
        path.write_bytes(path.read_bytes()[:60]) if bad else path.unlink()
    kept = [row for number, row in enumerate(rows) if bad or number not in BAD]
    (folder / "validation" / "metadata.jsonl").write_text("\n".join(map(json.dumps, kept)))
    return folder


def as_tars(folder: Path) -> None:
    for split in ("train", "validation"):
        files = {}
        for row in (json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()):
            name = Path(row["file_name"]).stem
            files[f"{name}.png"] = (folder / split / row["file_name"]).read_bytes()
            files[f"{name}.json"] = json.dumps({"captions": row["captions"]}).encode()
        shutil.rmtree(folder / split)
        write_tar(folder / split / "000.tar", files)


def figures(lines: list[dict]) -> dict:
    return without_speed(lines)[-1]


@pytest.mark.parametrize("kind", ["folder", "tars", "cache"])
def test_validation_with_bad_rows_equals_that_of_the_data_without_them(parts, tmp_path, kind, capsys):
    found = {}
    for name, bad in (("bad", True), ("without", False)):
        data = with_bad_rows(parts, tmp_path / name, bad)
        flags = ["--no_augment"]
        if kind == "tars":
            as_tars(data)
        if kind == "cache":
            given = ["--dataset", str(data), "--vision_model", str(parts / "tower"), "--max_skip_fraction", "0.5"]
            cache_features.main([*given, "--output_dir", str(tmp_path / f"cache_{name}")])
            flags += ["--feature_cache", str(tmp_path / f"cache_{name}")]
        found[name] = figures(run_stage1(data, parts / "tower", tmp_path / f"out_{name}", *ONE_STEP, *flags))
    assert found["bad"] == found["without"] and "i2t_r1" in found["bad"] and "eval_cider" in found["bad"]
    reports = [json.loads(line) for line in (tmp_path / "out_bad" / "skipped.jsonl").read_text().splitlines()]
    assert [(report["split"], report["row"]) for report in reports] == [("validation", row) for row in BAD]
    assert f"{len(BAD)} of {COUNT} rows are left out" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_leave_out_the_same_rows(parts, tmp_path):
    runs = []
    for name, bad in (("bad", True), ("without", False)):
        data = with_bad_rows(parts, tmp_path / name, bad)
        flags = stage1_flags(data, parts / "tower", tmp_path / f"out_{name}")
        runs.append(("pretrain_stage1", [*flags, *ONE_STEP, "--per_device_train_batch_size=2"]))
    run(2, runs)
    bad, without = (
        figures([json.loads(line) for line in (tmp_path / f"out_{name}" / "metrics.jsonl").read_text().splitlines()])
        for name in ("bad", "without")
    )
    assert bad == without and "i2t_r1" in bad


def test_a_caption_a_row_and_all_captions_a_row_give_the_same_figures(parts, tmp_path):
    listed = figures(run_stage1(parts / "data", parts / "tower", tmp_path / "listed", *ONE_STEP))
    shutil.copytree(parts / "data", tmp_path / "apart")
    rows = validation_rows(tmp_path / "apart")
    apart = [{"file_name": row["file_name"], "captions": row["captions"][turn]} for turn in (0, 1) for row in rows]
    (tmp_path / "apart" / "validation" / "metadata.jsonl").write_text("\n".join(map(json.dumps, apart)))
    assert figures(run_stage1(tmp_path / "apart", parts / "tower", tmp_path / "out", *ONE_STEP)) == listed

    columns = {  # a copy of the image in each row, under a name that says nothing
        "image": [{"bytes": (parts / "data/validation" / row["file_name"]).read_bytes(), "path": "x"} for row in apart],
        "captions": [row["captions"] for row in apart],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data, training = (CaptionDataset(rows, sampling=Sampling(draw_text=draw)) for draw in (False, True))
    assert len(data) == COUNT and len(training) == 2 * COUNT
    assert data.texts[0] == [text for row in training.texts[::COUNT] for text in row]
    assert training.image_ids == [*range(COUNT), *range(COUNT)]


def test_an_image_that_breaks_during_the_run_is_named_and_has_no_stand_in(parts, tmp_path):
    shutil.copytree(parts / "data", tmp_path / "data")
    data = CaptionDataset(
        load_rows(str(tmp_path / "data"), "validation"), text_column="captions", sampling=Sampling(draw_text=False)
    )
    assert data.fault(2) is None
    Path(data.name(2)).write_bytes(b"")
    with pytest.raises(ValueError, match=r"validation image of row 2 \(.*\) cannot be read: the file is empty"):
        data[0, 2]
    with pytest.raises(ValueError, match="No image of split '' of .*the first: row 0.*broken"):
        data.leave_out(dict.fromkeys(range(len(data)), "broken"))


class Judge:
    """Stands for a RetrievalSet; keeps the pairs whose match is asked for."""

    def __init__(self, image_ids: list[int]):
        count = len(image_ids)
        self.owner, self.cosines, self.pairs = torch.arange(count), torch.zeros(count, count), []
        self.dataset = type("Data", (), {"image_ids": image_ids})

    def match_logits(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        self.pairs.append(list(zip(images.tolist(), texts.tolist())))
        return torch.tensor([[0.0, 1.0]]).repeat(len(images), 1)


def test_negatives_of_validation_are_never_the_same_image():
    ids = [0, 1, 0, 0, 2, 0]
    judge = Judge(ids)
    results = matching_accuracy(judge, 6, 1.0, seed=3)
    matched, hard, random = judge.pairs
    assert matched == [(n, n) for n in range(6)] and len(hard) == len(random) == 6
    assert all(ids[image] != ids[text] for image, text in hard + random)
    assert results == {"itm_balanced_accuracy_hard": 0.5, "itm_balanced_accuracy_random": 0.5}
    assert matching_accuracy(Judge([4, 4, 4]), 3, 1.0, seed=3) == {}, "there are no negatives"
