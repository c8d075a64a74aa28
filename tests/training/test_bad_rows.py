"""Bad rows are skipped, written down once each, and stop the run when they are too many; through the real script too."""

import json
import multiprocessing
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blip2x_training.data import images
from blip2x_training.data.bad_rows import SkipLog, row_of
from blip2x_training.data.caption_dataset import CaptionDataset, Sampling, make_loader
from blip2x_training.data.formats import load_rows
from blip2x_training.data.images import BadRow, open_image
from blip2x_training.data.order import BatchOrder, EpochOrder
from tests.helpers.training_parts import make_image_folder, make_tars, make_vision_model, run_stage1
from tests.helpers.training_runs import interrupted_after, without_speed

BAD = {3: "missing", 7: "truncated", 11: "empty file", 13: "bomb", 17: "empty text"}
FROM_THE_START = {3, 17}  # what needs no decoding


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels and whose data are not there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def damage(folder: Path, kind: str) -> None:
    """Make a row of a split of 20 bad in each of the five ways; images become JPEGs, which are larger than a block."""
    listed = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    for number, row in enumerate(rows):
        noise = np.random.default_rng(number).integers(0, 255, (60, 60, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(noise).save(path)
        (folder / row["file_name"]).unlink()
        row["file_name"] = path.name
        fault = BAD.get(number)
        if fault == "missing":
            path.unlink()
        elif fault == "truncated":
            path.write_bytes(path.read_bytes()[:1500])
        elif fault == "empty file":
            path.write_bytes(b"")
        elif fault == "bomb":
            path.write_bytes(png(9000, 9000))  # PIL would only warn
        elif fault == "empty text":
            row["captions"] = [" ", ".!"]
    if kind == "json":
        for row in rows:
            row["image"] = row.pop("file_name")
        (folder / "rows.json").write_text(json.dumps(rows))
    else:
        listed.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """tower/, good/ with twenty images and bad/ with five of them bad, as an imagefolder and as bad/train/rows.json."""
    root = tmp_path_factory.mktemp("skipping")
    make_vision_model(root / "tower")
    make_image_folder(root / "good", {"train": 20, "validation": 4})
    make_image_folder(root / "bad", {"train": 20, "validation": 4})
    make_image_folder(root / "json", {"train": 20})
    damage(root / "bad" / "train", "imagefolder")
    damage(root / "json" / "train", "json")
    return root


def skipped(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dataset", ["bad", "json/train/rows.json"])
def test_bad_rows_are_skipped_and_written_once(parts, tmp_path, dataset, capsys):
    flags = ["--max_steps", "20", "--dataloader_num_workers", "2", "--max_skip_fraction", "0.3"]  # four epochs
    lines = run_stage1(parts / dataset, parts / "tower", tmp_path / "out", *flags)
    assert len([line for line in lines if "lr" in line]) == 20
    reports = {Path(report["name"]).name: report for report in skipped(tmp_path / "out")}
    assert len(skipped(tmp_path / "out")) == len(reports) == 5
    assert set(reports) == {f"{number}.jpg" for number in BAD}
    reasons = {number: reports[f"{number}.jpg"]["reason"] for number in BAD}
    for number, part in (
        (3, "missing"),
        (7, "truncated"),
        (11, "empty"),
        (13, "decompression bomb"),
        (17, "text is emp"),
    ):
        assert part in reasons[number]
    assert {row_of(report)[:2] for report in reports.values()} == {(str(parts / dataset), "train")}
    assert "2 of 20 rows are left out" in capsys.readouterr().out


def test_too_many_bad_rows_stop_the_run(parts, tmp_path):
    workers = ("--max_steps", "20", "--dataloader_num_workers", "2")
    with pytest.raises(
        ValueError, match=r"2 of 20 were left out.*10.00%, above --max_skip_fraction 0.01.*skipped.jsonl"
    ):
        run_stage1(parts / "bad", parts / "tower", tmp_path / "out", *workers)
    assert len(skipped(tmp_path / "out")) == 2 and not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"2 of 20 .* 3 of 20 visited .*25.00%, above --max_skip_fraction 0.2"):
        run_stage1(parts / "bad", parts / "tower", tmp_path / "out", *workers, "--max_skip_fraction", "0.2")
    assert len(skipped(tmp_path / "out")) == 5, "a run from the start begins the file anew"
    run_stage1(parts / "bad", parts / "tower", tmp_path / "out", *workers, "--max_skip_fraction", "0.25")


@pytest.mark.parametrize("kind", ["bad", "tars"])
def test_a_resumed_run_is_bit_exact_and_writes_no_row_twice(parts, tmp_path, monkeypatch, kind):
    dataset = parts / "bad"
    if kind == "tars":
        make_tars(tmp_path / "tars", [6, 3, 5, 4, 4])
        dataset = tmp_path / "tars"
    flags = ["--max_steps", "12", "--save_steps", "5", "--dataloader_num_workers", "2", "--max_skip_fraction", "0.3"]
    flags += ["--text_column", "text"] if kind == "tars" else []
    whole = run_stage1(dataset, parts / "tower", tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(5, patch)
        run_stage1(dataset, parts / "tower", tmp_path / "halves", *flags)
    resumed = run_stage1(dataset, parts / "tower", tmp_path / "halves", *flags)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert without_speed(resumed) == without_speed(whole)
    if kind == "bad":
        rows = [[row_of(report) for report in skipped(tmp_path / name)] for name in ("whole", "halves")]
        assert len(rows[1]) == len(set(rows[1])) and set(rows[0]) == set(rows[1])


def test_every_row_of_five_tars_once_an_epoch_with_two_workers(tmp_path):
    make_tars(tmp_path / "tars", [6, 3, 5, 4, 4])
    data = CaptionDataset(load_rows(str(tmp_path / "tars"), "train"), clean_captions=False)
    order = BatchOrder(EpochOrder(22, seed=4, shards=data.shards), 2, 22)
    batches = list(make_loader(data, order, collate_texts, 2, pin_memory=False))
    texts = [text for batch in batches for text in batch["texts"]]
    everything = sorted(text for texts in data.texts for text in texts)
    assert sorted(texts[:22]) == sorted(texts[22:]) == everything and len(set(everything)) == 22
    assert texts[:22] != texts[22:]
    means = {text: mean for batch in batches for text, mean in zip(batch["texts"], batch["means"])}
    alone = {data[0, row]["text"]: float(np.asarray(data[0, row]["image"]).mean()) for row in range(22)}
    assert means == alone, "a text came with another image"


def collate_texts(items: list[dict]) -> dict:
    means = [float(np.asarray(item["image"]).mean()) for item in items]
    return {"texts": [item["text"] for item in items], "means": means}


def test_a_stand_in_depends_on_seed_epoch_and_row_alone(parts):
    def visits(seed: int) -> list:
        data = CaptionDataset(load_rows(str(parts / "bad"), "train"), sampling=Sampling(seed, (16, 16)))
        assert len(data) == 18 and data.num_rows == 20
        return [data[epoch, row] for epoch in range(4) for row in range(18)]

    one, again, other = visits(1), visits(1), visits(2)
    stood_in = [number for number, item in enumerate(one) if item["skipped"]]
    assert len(stood_in) == 3 * 4
    for first, second in zip(one, again):
        assert first["text"] == second["text"] and np.array_equal(first["image"], second["image"])
        assert first["skipped"] == second["skipped"] and first["image_id"] == second["image_id"]
    assert len({one[number]["image_id"] for number in stood_in}) > 3
    assert [one[number]["image_id"] for number in stood_in] != [other[number]["image_id"] for number in stood_in]


def test_every_kind_of_bad_image_has_a_reason(tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(good)
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "warned.png").write_bytes(png(9500, 9500))
    (tmp_path / "bomb.png").write_bytes(png(40_000, 40_000))
    for name, part in (("text.png", "no known image format"), ("warned.png", "bomb"), ("bomb.png", "bomb")):
        with pytest.raises(BadRow, match=part):
            open_image(str(tmp_path / name), None)
    for value, part in ((None, "no image"), ({"bytes": None, "path": None}, "no image"), ("gone.png", "missing")):
        with pytest.raises(BadRow, match=part):
            open_image(value, tmp_path)
    with pytest.raises(BadRow, match="OSError|SyntaxError|truncated"):
        open_image({"bytes": good.read_bytes()[:900], "path": None}, None)
    assert open_image("good.png", tmp_path).size == (30, 20)
    monkeypatch.setattr(images, "MAX_PIXELS", 30 * 20 - 1)
    with pytest.raises(BadRow, match="30 x 20 pixels, more than 599"):
        open_image("good.png", tmp_path)


def test_images_are_read_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10] = 255  # bright at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "lying.png", exif=exif)
    assert np.array_equal(open_image("lying.png", tmp_path), pixels)


@pytest.mark.parametrize(
    "value, reason",
    [
        ("  ", "empty"),
        (" .!", "empty"),
        ([], "no text"),
        (None, "no text"),
        (5, "no text: 5"),
        (["a", 3], "is no text"),
    ],
)
def test_rows_without_text_are_left_out(tmp_path, value, reason):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "captions": "Good"}, {"image": "a.png", "captions": value}]
    rows += [{"image": "a.png", "captions": ["", "kept"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = ("rows.json", "train")
    data = CaptionDataset(load_rows(str(tmp_path / "rows.json"), "train"), folder=tmp_path, source=source)
    assert data.texts == [["good"], ["kept"]] and data.kept.tolist() == [0, 2]
    (report,) = data.left_out
    assert reason in report["reason"] and row_of(report) == (*source, 1)
    assert report["name"] == str(tmp_path / "a.png")


def test_questions_must_be_there_and_have_answers(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = [("why", "because"), ("", "x"), (None, "x"), (["a", "b"], ["x"]), (["a"], "x"), (["a", 3], ["x", "y"])]
    rows = [{"image": "a.png", "question": question, "answer": answer} for question, answer in asked]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = CaptionDataset(load_rows(str(tmp_path / "rows.json"), "train"), folder=tmp_path, prompt_column="auto")
    assert data.kept.tolist() == [0]
    reasons = [report["reason"] for report in data.left_out]
    assert all("no question" in reasons[number] for number in (0, 1, 4))
    assert "2 questions, but 1 texts" in reasons[2] and "1 questions, but no list of texts" in reasons[3]


def test_a_data_set_without_any_usable_row_says_what_is_wrong(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "b.png", "text": "x"}] * 3))
    with pytest.raises(ValueError, match="None of the 3 rows.*b.png: the file is missing.*--image_folder"):
        CaptionDataset(load_rows(str(tmp_path / "rows.json"), "train"), folder=tmp_path)


def test_nothing_but_bad_images_ends_with_a_message_not_a_crash(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"image": f"{n}.png", "text": "x"} for n in range(3)]))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    data = CaptionDataset(load_rows(str(tmp_path / "rows.json"), "train"), folder=tmp_path, source=("rows", "train"))
    data.skip_log = SkipLog(tmp_path / "skipped.jsonl", [], data.sources, 3, max_fraction=1.0)
    loader = make_loader(data, BatchOrder(EpochOrder(3, 0), 2, 3), collate_texts, 1, pin_memory=False)
    with pytest.raises(ValueError, match="20 rows in a row cannot be used.*the file is empty"):
        list(loader)
    assert {report["row"] for report in skipped(tmp_path)} == {0, 1, 2} and len(skipped(tmp_path)) == 3


def report(row: int) -> dict:
    return {"dataset": "d", "split": "train", "row": row, "name": "n" * 500, "reason": "r"}


def test_the_share_is_judged_by_at_least_a_thousand_visits(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", [], {("d", "train")}, 100_000, max_fraction=0.01, num_processes=2)
    for row in range(10):
        log.add([report(row), report(row)], 4)
    with pytest.raises(ValueError, match="11 of 1000 visited"):
        log.add([report(10)], 4)
    log.visited = 5000  # eleven of five thousand are few
    log.add([report(10)], 4)
    log.add([{**report(row), "split": "validation"} for row in range(500)], 4)  # another data set's


def append_many(path: Path, first: int) -> None:
    log = SkipLog(path, [], {("d", "train")}, 10**6, max_fraction=1.0)
    for row in range(first, first + 150):
        log.add([report(row)], 1)


def test_processes_write_whole_lines_and_no_row_twice(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text(json.dumps(report(0)) + "\n" + json.dumps(report(1))[:30])  # a crash cut the last line off
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, first)) for first in (0, 50, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    lines = path.read_text().splitlines()
    whole = [json.loads(line)["row"] for number, line in enumerate(lines) if number != 1]
    assert sorted(whole) == list(range(250))


def test_validation_images_that_cannot_be_read_are_written_too(parts, tmp_path):
    shutil.copytree(parts / "good", tmp_path / "data")
    (tmp_path / "data" / "validation" / "2.png").write_bytes(b"")
    flags = ["--max_steps", "1", "--eval_split", "validation", "--max_skip_fraction", "0.3"]
    lines = run_stage1(tmp_path / "data", parts / "tower", tmp_path / "out", *flags)
    assert "eval_loss" in lines[-1]
    (found,) = skipped(tmp_path / "out")
    assert found["split"] == "validation" and found["reason"] == "the file is empty"
    with pytest.raises(ValueError, match="1 of 4 visited"):
        run_stage1(tmp_path / "data", parts / "tower", tmp_path / "strict", *flags[:4])


def test_a_weighted_mixture_with_tars_trains_and_resumes(parts, tmp_path, monkeypatch):
    make_tars(tmp_path / "tars", [6, 3])
    rows = [{"image": str(path), "text": "a square"} for path in sorted((parts / "good" / "train").glob("*.png"))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--dataset", str(tmp_path / "rows.json"), str(tmp_path / "tars"), "--dataset_weights", "1", "3"]
    flags += ["--text_column", "text", "--max_steps", "8", "--save_steps", "5", "--dataloader_num_workers", "2"]
    whole = run_stage1(parts / "good", parts / "tower", tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(5, patch)
        run_stage1(parts / "good", parts / "tower", tmp_path / "halves", *flags)
    resumed = run_stage1(parts / "good", parts / "tower", tmp_path / "halves", *flags)
    assert without_speed(resumed) == without_speed(whole) and not (tmp_path / "whole" / "skipped.jsonl").exists()
