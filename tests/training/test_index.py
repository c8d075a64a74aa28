"""The index of a data set: the visits of the data set itself, whatever its format, and what happens when files change."""

import base64
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest

from blip2x_training import index_dataset
from blip2x_training.data import indexing
from blip2x_training.data.caption_dataset import CaptionDataset, Sampling
from blip2x_training.data.first_index import first_index
from blip2x_training.data.formats import load_rows
from blip2x_training.data.index_images import open_split
from blip2x_training.data.indexed_dataset import IndexedCaptionDataset
from blip2x_training.data.order import visit_order
from tests.helpers.shards import FORMATS, ROWS, SHARDS, picture, tars, write_tar


def indexed(dataset: str, output: Path, split: str = "train", **changes) -> IndexedCaptionDataset:
    name = split.split("[")[0]
    index_dataset.main([dataset, "--output", str(output), "--split", name, "--num_workers", "1"])
    return IndexedCaptionDataset(*open_split(str(output), split), source=(dataset, split), **changes)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("crop", [None, (24, 24)])
def test_visits_are_those_of_the_data_set_itself(kind, crop, folder, tmp_path):
    dataset = FORMATS[kind](folder)
    asks = {"prompt_column": "auto", "prompt": "Q: {}"} if kind == "jsonl" else {}
    sampling = Sampling(seed=3, crop_size=crop)
    eager = CaptionDataset(
        load_rows(dataset, "train"), folder=folder, sampling=sampling, source=(dataset, "train"), **asks
    )
    lazy = indexed(dataset, tmp_path / "index", sampling=sampling, **asks)
    assert len(lazy) == len(eager) == SHARDS * ROWS and not lazy.left_out
    numbers = {}
    for epoch in range(2):
        for row in range(len(eager)):
            one, other = eager[epoch, row], lazy[epoch, row]
            assert one.keys() == other.keys()
            assert [one[name] for name in ("text", "prompt", "draw")] == [
                other[name] for name in ("text", "prompt", "draw")
            ]
            assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))
            assert numbers.setdefault(one["image_id"], other["image_id"]) == other["image_id"]
    assert len(set(numbers.values())) == len(numbers) == 8, "two rows show one picture"
    assert lazy.texts == eager.texts and lazy.text_of(3, 1) == eager.text_of(3, 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_validation_and_slices_of_an_index(kind, folder, tmp_path):
    dataset = FORMATS[kind](folder)
    lazy = indexed(dataset, tmp_path / "index", "train[2:7]+train[11:]", sampling=Sampling(seed=0))
    rows = load_rows(str(tmp_path / "index"), "train[2:7]+train[11:]")
    eager = CaptionDataset(rows, folder=folder, sampling=Sampling(seed=0))
    assert len(rows) == len(lazy) == len(eager) == 9
    assert [lazy[0, row]["text"] for row in range(9)] == [eager[0, row]["text"] for row in range(9)]
    with pytest.raises(ValueError, match="is an index of train. Name one of these, or index 'test' too"):
        load_rows(str(tmp_path / "index"), "test")


def test_the_order_is_that_of_the_tars(folder, tmp_path):
    dataset = tars(folder)
    lazy, eager = indexed(dataset, tmp_path / "index"), load_rows(dataset, "train")
    one, other = (visit_order([15], [shards], None, 7) for shards in (lazy.shards, eager.shards))
    assert [one(position) for position in range(45)] == [other(position) for position in range(45)]
    for weights in (None, [3, 1]):
        one, other = (visit_order([15, 20], [shards, None], weights, 7) for shards in (lazy.shards, eager.shards))
        assert [one(position) for position in range(2000)] == [other(position) for position in range(2000)]


def test_bad_rows_are_found_at_the_visit(folder, tmp_path):
    write_tar(
        folder / "0.tar",
        {
            "1.jpg": picture(1),
            "1.txt": b"one",
            "2.jpg": b"no picture",
            "2.txt": b"two",
            "3.jpg": picture(3),
            "3.txt": b" ",
        },
    )
    lazy = indexed(str(folder), tmp_path / "index")
    assert len(lazy) == 3
    reasons = {report["row"]: report for row in range(3) for report in lazy[0, row]["skipped"]}
    assert all(lazy[0, row]["text"] == "one" for row in range(3))
    assert reasons.keys() == {1, 2} and reasons[1]["name"].endswith("0.tar/2.jpg") and "empty" in reasons[2]["reason"]


def test_a_cut_off_tar_is_left_out_and_counted(folder, tmp_path, capsys):
    dataset = tars(folder)
    cut = folder / "001.tar"
    os.truncate(cut, cut.stat().st_size // 2)
    lazy = indexed(dataset, tmp_path / "index")
    assert len(lazy) == 10 and lazy.num_rows == 10 + lazy.left_out[0]["rows"] and 1 <= lazy.left_out[0]["rows"] < ROWS
    assert "is no whole tar" in lazy.left_out[0]["reason"] and lazy.left_out[0]["name"] == str(cut)
    assert "Left out: " in capsys.readouterr().out
    assert {lazy[0, row]["text"] for row in range(10)} == {f"a photo of thing {n}" for n in (*range(5), *range(10, 15))}


@pytest.mark.parametrize("change", ["longer", "touched", "gone"])
def test_an_index_whose_files_have_changed_is_refused(change, folder, tmp_path):
    dataset = tars(folder)
    indexed(dataset, tmp_path / "index")
    path = folder / "001.tar"
    if change == "gone":
        path.unlink()
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        with open(path, "ab") as file:
            file.write(b"\0" * 512)
    with pytest.raises(
        ValueError, match=r"001\.tar (has changed since|is in the index .* but cannot be found).*index_dataset.py"
    ):
        open_split(str(tmp_path / "index"), "train")


def test_tars_are_indexed_at_their_first_use(folder, tmp_path, monkeypatch):
    """And again where a file has changed, is there no more, or the index is damaged."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    dataset, written = tars(folder), []
    real = indexing.part_of_tar
    monkeypatch.setattr(indexing, "part_of_tar", lambda path: written.append(path) or real(path))
    home = Path(first_index(dataset, "train"))
    assert len(written) == 3 and first_index(dataset, "train[:5]") == str(home) and len(written) == 3
    os.utime(folder / "001.tar", ns=(1, 1))
    assert first_index(dataset, "train") == str(home) and len(written) == 6
    (home / "train" / "rows.bin").write_bytes(b"")
    assert first_index(dataset, "train") == str(home) and len(written) == 9
    (folder / "002.tar").unlink()
    assert len(open_split(first_index(dataset, "train"), "train")[0]) == 10


def test_processes_wait_for_the_one_that_indexes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    dataset, written = tars(folder), []
    real = indexing.part_of_tar
    monkeypatch.setattr(indexing, "part_of_tar", lambda path: written.append(path) or real(path))
    with ThreadPoolExecutor(4) as pool:  # a lock of its own for each opening of the file, as for each process
        homes = set(pool.map(lambda _: first_index(dataset, "train"), range(4)))
    assert len(homes) == 1 and len(written) == 3


def test_a_killed_indexing_continues(folder, tmp_path, monkeypatch, capsys):
    dataset, output = tars(folder), tmp_path / "index"
    real, done = indexing.part_of_tar, []

    def killed(path: str):
        done.append(path)
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(indexing, "part_of_tar", killed)
    with pytest.raises(KeyboardInterrupt):
        index_dataset.main([dataset, "--output", str(output), "--num_workers", "1"])
    assert not (output / "train" / "index.json").exists()
    with pytest.raises(ValueError):
        open_split(str(output), "train")
    lazy = indexed(dataset, output)
    assert len(done) == 4 and len(lazy) == 15 and not (output / "train" / "parts").exists()
    assert "2 of 3 shards are indexed already" in capsys.readouterr().out
    indexed(dataset, output)
    assert len(done) == 4, "an index that is there is not written again"


def test_damage_of_an_index_is_told(folder, tmp_path):
    dataset = tars(folder)
    indexed(dataset, tmp_path / "index")
    for name, damage in (("texts.bin", b"x"), ("rows.bin", b"")):
        path = tmp_path / "index" / "train" / name
        whole = path.read_bytes()
        path.write_bytes(damage)
        with pytest.raises(
            ValueError, match=rf"{name} has {len(damage)} bytes, not {len(whole)}. Write the index again"
        ):
            open_split(str(tmp_path / "index"), "train")
        path.write_bytes(whole)
    (tmp_path / "index" / "train" / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged"):
        open_split(str(tmp_path / "index"), "train")


def test_images_that_are_no_files(folder, tmp_path):
    uri = "data:image/jpeg;base64," + base64.b64encode(picture(1)).decode()
    rows = [{"image": uri, "text": "a"}, {"image": "https://nowhere/1.jpg", "text": "b"}, {"image": None, "text": "c"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    lazy = indexed(str(folder / "rows.json"), tmp_path / "index")
    items = [lazy[0, row] for row in range(3)]
    assert [item["text"] for item in items] == ["a", "a", "a"] and items[0]["image"].size == (40, 30)
    reasons = {report["row"]: report["reason"] for item in items for report in item["skipped"]}
    assert "addresses are not fetched" in reasons[1] and reasons[2] == "no image"


def test_images_embedded_in_a_saved_data_set_are_told_how_to_index(tmp_path):
    saved = datasets.Dataset.from_dict({"image": [{"bytes": picture(1), "path": None}], "text": ["a"]})
    saved.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "data")
    with pytest.raises(
        ValueError, match="The image of row 0 is embedded in .*data. Index its parquet files by a pattern"
    ):
        indexed(str(tmp_path / "data"), tmp_path / "index")


def test_parallel_indexing_gives_the_same(folder, tmp_path):
    for number in range(20):
        write_tar(folder / f"{number:02d}.tar", {"1.jpg": picture(number), "1.txt": str(number).encode()})
    for name, workers in (("one", "1"), ("two", "2")):
        index_dataset.main([str(folder), "--output", str(tmp_path / name), "--num_workers", workers])
    one, two = ((tmp_path / name / "train" / "texts.bin").read_bytes() for name in ("one", "two"))
    assert one == two
    assert open_split(str(tmp_path / "one"), "train")[0].digest == open_split(str(tmp_path / "two"), "train")[0].digest
