"""Training on an index: the run of the data set itself, and the same run after a kill, with workers and on more processes."""

import json
import os
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2x_training import index_dataset
from blip2x_training.data.caption_dataset import make_loader
from blip2x_training.data.first_index import first_index
from blip2x_training.data.index_images import open_split
from blip2x_training.data.indexed_dataset import IndexedCaptionDataset
from blip2x_training.data.shard_cache import ShardCache
from tests.helpers import shards
from tests.helpers.ranks import run
from tests.helpers.training_parts import SMALL_QFORMER, make_image_folder, make_vision_model
from tests.helpers.training_runs import interrupted_after, stage1, without_speed
from tests.helpers.web_files import serving

STEPS = ["--max_steps", "6", "--save_steps", "3"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """tower/, data/ as an imagefolder and as train-N.tar in tars/, and index/ of both splits of these."""
    root = tmp_path_factory.mktemp("indexed")
    make_image_folder(root / "data", {"train": 12, "validation": 6})
    make_vision_model(root / "tower")
    (root / "tars").mkdir()
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (root / "data" / split / "metadata.jsonl").read_text().splitlines()]
        for first in range(0, len(rows), 4):
            with tarfile.open(root / "tars" / f"{split}-{first:03d}.tar", "w") as tar:
                for number, row in enumerate(rows[first : first + 4], first):
                    image = (root / "data" / split / row["file_name"]).read_bytes()
                    said = json.dumps({"captions": row["captions"]}).encode()
                    for name, content in (
                        (f"{number:03d}.{row['file_name'].split('.')[-1]}", image),
                        (f"{number:03d}.json", said),
                    ):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
        index_dataset.main([str(root / "tars"), "--output", str(root / "index"), "--split", split])
    return root


def trained(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def whole(parts) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Lines and weights of the run on the tars themselves."""
    lines = stage1(parts, parts / "whole", "--dataset", str(parts / "tars"), "--eval_split", "validation", *STEPS)
    return without_speed(lines), trained(parts / "whole")


@pytest.mark.parametrize("flags", [[], ["--dataloader_num_workers", "2"]], ids=["alone", "workers"])
def test_the_run_is_that_of_the_tars(flags, parts, whole, tmp_path):
    lines = stage1(parts, tmp_path, "--dataset", str(parts / "index"), "--eval_split", "validation", *STEPS, *flags)
    assert without_speed(lines) == whole[0]
    assert all(torch.equal(tensor, trained(tmp_path)[name]) for name, tensor in whole[1].items())


def test_a_killed_run_goes_on(parts, whole, tmp_path, monkeypatch):
    flags = ["--dataset", str(parts / "index"), "--eval_split", "validation", *STEPS]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(3, patch)
        stage1(parts, tmp_path, *flags)
    assert without_speed(stage1(parts, tmp_path, *flags)) == whole[0]
    assert all(torch.equal(tensor, trained(tmp_path)[name]) for name, tensor in whole[1].items())


def test_a_killed_run_on_a_web_server_goes_on(parts, tmp_path, monkeypatch):
    """With a worker, and shards that come ahead; the run equals that of the same tars on the disk."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    local = stage1(parts, tmp_path / "local", "--dataset", f"{parts}/tars/train-{{000,004,008}}.tar", *STEPS)
    with serving(parts / "tars") as (_, root):
        flags = ["--dataset", f"{root}/train-{{000,004,008}}.tar", "--shard_cache", str(tmp_path / "shards"), *STEPS]
        flags += ["--dataloader_num_workers", "1"]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupted_after(3, patch)
            stage1(parts, tmp_path / "out", *flags)
        assert without_speed(stage1(parts, tmp_path / "out", *flags)) == without_speed(local)
    weights = trained(tmp_path / "local")
    assert all(torch.equal(tensor, trained(tmp_path / "out")[name]) for name, tensor in weights.items())
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 3


@pytest.mark.parametrize("kind", ["tars on a web server", "parquet on a web server", "parquet"])
def test_workers_read_what_is_in_no_cache(kind, tmp_path, monkeypatch):
    """By ranges, though the main process has used the network before them; and row groups, though it has used Arrow."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    local = (shards.tars if kind.startswith("tars") else shards.parquet)(tmp_path / "data")
    ending = "tar" if kind.startswith("tars") else "parquet"
    names = ",".join(path.stem for path in sorted((tmp_path / "data").glob(f"*.{ending}")))
    with serving(tmp_path / "data") as (_, root):
        if kind == "parquet":
            index_dataset.main([local, "--output", str(tmp_path / "index")])
        dataset = str(tmp_path / "index") if kind == "parquet" else f"{root}/{{{names}}}.{ending}"
        index = dataset if kind == "parquet" else first_index(dataset, "train")
        data = IndexedCaptionDataset(*open_split(index, "train"), cache=ShardCache(tmp_path / "shards", 100))
        keys = [[(0, 2 * number), (0, 2 * number + 1)] for number in range(7)]
        expected = [data[0, row]["text"] for row in range(14)]
        batches = list(make_loader(data, keys, texts_of, 1, pin_memory=False, timeout=120))
    assert [text for batch in batches for text in batch["texts"]] == expected


def texts_of(items: list[dict]) -> dict:
    return {"texts": [item["text"] for item in items]}


def test_a_run_does_not_go_on_with_another_index(parts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(3, patch)
        stage1(parts, tmp_path / "out", "--dataset", str(parts / "index"), *STEPS)
    index_dataset.main([str(parts / "tars" / "train-000.tar"), "--output", str(tmp_path / "less")])
    with pytest.raises(ValueError, match="there were 12 usable rows, now 4"):
        stage1(parts, tmp_path / "out", "--dataset", str(tmp_path / "less"), *STEPS)


def test_a_cut_off_tar_counts_as_left_out(parts, tmp_path):
    (tmp_path / "tars").mkdir()
    for path in sorted((parts / "tars").glob("train-*.tar")):
        (tmp_path / "tars" / path.name).write_bytes(path.read_bytes())
    os.truncate(path := tmp_path / "tars" / "train-004.tar", path.stat().st_size // 2)
    index_dataset.main([str(tmp_path / "tars"), "--output", str(tmp_path / "index")])
    flags = ["--dataset", str(tmp_path / "index"), "--max_steps", "2"]
    with pytest.raises(ValueError, match=r"Too many rows cannot be used: \d of (9|10|11) were left out at the start"):
        stage1(parts, tmp_path / "out", *flags)
    stage1(parts, tmp_path / "out", *flags, "--max_skip_fraction", "0.5")
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 1 and skipped[0]["name"] == str(path) and "no whole tar" in skipped[0]["reason"]


def test_two_processes_train_as_one(parts, tmp_path):
    common = ["--dataset", parts / "index", "--vision_model", parts / "tower", "--text_column", "captions"]
    common += ["--max_steps", "4", "--warmup_steps", "1", "--learning_rate", "1e-3", "--num_query_tokens", "4"]
    common += [
        "--min_word_count",
        "1",
        "--qformer_config",
        json.dumps({**SMALL_QFORMER, "attention_probs_dropout_prob": 0.0}),
    ]
    for processes in (1, 2):
        batch = ["--per_device_train_batch_size", 4 // processes]
        flags = [*common, *batch, "--output_dir", tmp_path / str(processes)]
        run(processes, [("pretrain_stage1", [*map(str, flags)])])
    one, two = (trained(tmp_path / name) for name in "12")
    assert all(torch.allclose(tensor, two[name], atol=1e-3) for name, tensor in one.items())
