"""Features of the frozen tower on disk: written by the script, read in training, refused where they do not belong."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip2x_training import cache_features
from blip2x_training.data.caption_dataset import CaptionDataset, ImageDataset, Sampling
from blip2x_training.data.feature_cache import FeatureCache, images_fingerprint, load_features
from blip2x_training.data.formats import load_rows
from tests.helpers.training_parts import make_image_folder, make_vision_model, run_stage1

PLAIN = ("--max_steps", "3", "--no_augment", "--eval_split", "validation")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Folder with data/ and tower/."""
    root = tmp_path_factory.mktemp("cache")
    make_image_folder(root / "data", {"train": 20, "validation": 6})
    make_vision_model(root / "tower")
    return root


@pytest.fixture(scope="module")
def uncached(parts, tmp_path_factory) -> list[dict]:
    return run_stage1(parts / "data", parts / "tower", tmp_path_factory.mktemp("uncached") / "out", *PLAIN)


def write(parts: Path, cache: Path, *flags: str) -> None:
    given = ["--dataset", str(parts / "data"), "--vision_model", str(parts / "tower"), "--output_dir", str(cache)]
    cache_features.main([*given, *flags])


def losses(lines: list[dict]) -> list[float]:
    return [line[name] for line in lines for name in sorted(line) if "loss" in name]


def largest_difference(one: list[dict], other: list[dict]) -> float:
    assert len(losses(one)) == len(losses(other)) >= 12
    return np.abs(np.subtract(losses(one), losses(other))).max()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float16", 1e-5), ("bfloat16", 1e-4)])
def test_cached_features_give_the_same_losses(parts, uncached, tmp_path, dtype, tolerance):
    cache, cached = tmp_path / "cache", ("--feature_cache", str(tmp_path / "cache"))
    write(parts, cache, "--dtype", dtype, "--batch_size", "7", "--shard_size", "8")
    lines = run_stage1(parts / "data", parts / "tower", tmp_path / "out", *PLAIN, *cached)
    assert largest_difference(lines, uncached) < tolerance
    if dtype == "float32":  # what the tolerances are worth: with each shard's rows one place on, losses do change
        for path in cache.glob("train-*.npy"):
            np.save(path, np.roll(np.load(path), 1, axis=0))
        lines = run_stage1(parts / "data", parts / "tower", tmp_path / "moved", *PLAIN, *cached)
        assert largest_difference(lines, uncached) > 100 * tolerance


def test_shards_hold_all_rows_in_order(parts, tmp_path):
    caches = {}
    for dtype, size in (("float32", "100"), ("bfloat16", "8"), ("float16", "1")):
        write(parts, tmp_path / dtype, "--dtype", dtype, "--shard_size", size)
        caches[dtype] = load_features(str(tmp_path / dtype), "train", {})
    names = sorted(path.name for path in (tmp_path / "bfloat16").glob("train*"))
    assert names == [*(f"train-{shard:05d}-of-00003.npy" for shard in range(3)), "train.json"]
    assert np.load(tmp_path / "bfloat16" / names[0]).dtype == np.uint16
    for row in range(20):
        exact = caches["float32"].read(row)
        assert exact.shape == (5, 48) and exact.dtype == torch.float32
        assert torch.equal(caches["bfloat16"].read(row), exact.bfloat16().float())
        assert torch.equal(caches["float16"].read(row), exact.half().float())


def test_no_more_shards_are_open_than_a_process_may(parts, tmp_path, monkeypatch):
    write(parts, tmp_path / "cache", "--shard_size", "1", "--splits", "train")
    monkeypatch.setattr("blip2x_training.data.feature_cache.OPEN_SHARDS", 3)
    cache = load_features(str(tmp_path / "cache"), "train", {})
    before = [cache.read(row) for row in range(20)]
    assert len(cache.opened) <= 3 and all(torch.equal(cache.read(row), one) for row, one in enumerate(before))


def test_cached_views_are_crops_and_flips_drawn_each_visit(parts, tmp_path):
    write(parts, tmp_path / "plain", "--dtype", "float32")
    write(parts, tmp_path / "views", "--dtype", "float32", "--views", "3", "--dataloader_num_workers", "1")
    plain, views = (load_features(str(tmp_path / name), "train", {}) for name in ("plain", "views"))
    assert views.layout.shape == (20, 3, *plain.layout.shape[2:]) and len(views) == 20
    one, *crops = (views.read(0, view) for view in range(3))
    assert torch.allclose(one, plain.read(0), atol=1e-5)
    assert not torch.allclose(crops[0], one, atol=1e-3) and not torch.allclose(crops[0], crops[1], atol=1e-3)
    assert load_features(str(tmp_path / "views"), "validation", {}).views == 1

    rows = load_rows(str(parts / "data"), "train")
    for draw_text, drawn in ((True, {0, 1, 2}), (False, {0})):
        data = CaptionDataset(
            rows, image_column="image", text_column="captions", sampling=Sampling(draw_text=draw_text)
        )
        data.use_features(views)
        seen = [data[epoch, 0]["vision_embeds"] for epoch in range(20)]
        assert {next(v for v in range(3) if torch.equal(views.read(0, v), one)) for one in seen} == drawn
    lines = run_stage1(
        parts / "data", parts / "tower", tmp_path / "out", *PLAIN, "--feature_cache", str(tmp_path / "views")
    )
    assert lines[0]["loss_itc"] > 0


def test_a_cache_of_something_else_is_refused(parts, tmp_path):
    cache = tmp_path / "cache"
    write(parts, cache)
    flags = (*PLAIN, "--feature_cache", str(cache))
    make_vision_model(tmp_path / "other", "vit")
    with pytest.raises(ValueError, match="does not belong to this run .*weights"):
        run_stage1(parts / "data", tmp_path / "other", tmp_path / "out", *flags)
    processor = json.loads((parts / "tower" / "preprocessor_config.json").read_text())
    shutil.copytree(parts / "tower", tmp_path / "brighter")
    (tmp_path / "brighter" / "preprocessor_config.json").write_text(json.dumps(processor | {"rescale_factor": 0.005}))
    with pytest.raises(ValueError, match=r"does not belong to this run \(preprocessing"):
        run_stage1(parts / "data", tmp_path / "brighter", tmp_path / "out", *flags)
    shutil.copytree(parts / "data", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "train" / "1.png", tmp_path / "data" / "train" / "0.png")  # a name is not enough
    with pytest.raises(ValueError, match=r"does not belong to this run \(images"):
        run_stage1(tmp_path / "data", parts / "tower", tmp_path / "out", *flags)
    with pytest.raises(ValueError, match="no whole cache of split 'validation.:3.'"):
        run_stage1(parts / "data", parts / "tower", tmp_path / "out", *flags, "--eval_split", "validation[:3]")


@pytest.mark.parametrize("same_time", [False, True])
def test_a_cache_of_images_that_were_replaced_is_refused(parts, tmp_path, same_time):
    """New content under the same names and sizes, and with the same time of change."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(parts / "data", data)
    for path in (data / "train").glob("*.png"):
        with Image.open(path) as image:
            image.save(path, "BMP")  # without compression: of one size
    given = ["--dataset", str(data), "--vision_model", str(parts / "tower"), "--output_dir", str(cache)]
    cache_features.main(given)
    one, other = data / "train" / "0.png", data / "train" / "1.png"
    before = one.stat()
    assert before.st_size == other.stat().st_size and one.read_bytes() != other.read_bytes()
    one.write_bytes(other.read_bytes())
    if same_time:
        os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"does not belong to this run \(images was .* contents and the order"):
        run_stage1(data, parts / "tower", tmp_path / "out", *PLAIN, "--feature_cache", str(cache))
    with pytest.raises(ValueError, match="holds another cache of split 'train' .images was"):
        cache_features.main(given)


def test_a_cache_without_features_is_not_called_whole(parts, tmp_path, capsys):
    shutil.copytree(parts / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "train").glob("*.png"):
        path.write_bytes(b"no image")
    given = ["--dataset", str(tmp_path / "data"), "--vision_model", str(parts / "tower"), "--splits", "train"]
    for _ in range(2):  # the same command again does not make it whole either
        with pytest.raises(ValueError, match="20 of 20 images of split 'train' could not be read.*row 0 .*0.png"):
            cache_features.main([*given, "--output_dir", str(tmp_path / "cache")])
    assert not (tmp_path / "cache" / "train.json").exists() and "whole" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no whole cache of split 'train'"):
        load_features(str(tmp_path / "cache"), "train", {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_tower_that_gives_no_numbers_is_named_with_the_row(parts, tmp_path, monkeypatch, value, dtype):
    features, seen = cache_features.vision_features, []

    def broken(tower, pixels, layer):
        output = features(tower, pixels, layer)
        for _ in range(len(pixels) if len(pixels) > 1 else 0):
            seen.append(len(seen))
            if seen[-1] == 13:
                output.last_hidden_state[13 % len(pixels), 2, 5] = value
        return output

    monkeypatch.setattr(cache_features, "vision_features", broken)
    with pytest.raises(ValueError, match="tower gives features that are not finite for row 13 of split 'train'"):
        write(parts, tmp_path / "cache", "--dtype", dtype)
    assert not (tmp_path / "cache" / "train.json").exists()


def test_embedded_images_are_told_apart_by_their_bytes(parts):
    rows = load_rows(str(parts / "data"), "train")
    by_name = images_fingerprint(ImageDataset(rows, "image"))
    assert by_name == images_fingerprint(ImageDataset(load_rows(str(parts / "data"), "train[:20]"), "image"))
    assert by_name != images_fingerprint(ImageDataset(rows.select(range(19, -1, -1)), "image"))


def test_a_run_that_was_stopped_goes_on_with_the_missing_shards(parts, tmp_path, monkeypatch, capsys):
    flags = ("--shard_size", "6", "--views", "2", "--batch_size", "4")
    write(parts, tmp_path / "whole", *flags)
    replace, cache = cache_features.os.replace, tmp_path / "cache"

    def stopped(source, target):
        if Path(target).name == "train-00002-of-00004.npy":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_features.os, "replace", stopped)
        write(parts, cache, *flags)
    with pytest.raises(ValueError, match="no whole cache of split 'train'.*the same command again"):
        load_features(str(cache), "train", {})
    with pytest.raises(ValueError, match=r"holds another cache of split 'train' \(seed was 42, is now 7\)"):
        write(parts, cache, *flags, "--seed", "7")
    written = (cache / "train-00000-of-00004.npy").stat().st_mtime_ns
    capsys.readouterr()
    write(parts, cache, *flags)
    assert "4 shard(s) of which 2 are there" in capsys.readouterr().out
    assert (cache / "train-00000-of-00004.npy").stat().st_mtime_ns == written
    names = {path.name for path in cache.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()} and len(names) == 7
    assert all((cache / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)

    write(parts, cache, *flags, "--seed", "7", "--overwrite_output_dir")
    assert (cache / "train-00000-of-00004.npy").stat().st_mtime_ns > written
    (cache / "train-00003-of-00004.npy").write_bytes((cache / "train-00003-of-00004.npy").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="train-00003-of-00004.npy is cut off"):
        load_features(str(cache), "train", {})


def test_a_full_disk_is_noticed_before_anything_is_written(parts, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_features.shutil, "disk_usage", lambda path: usage(10**6, 0, 24_000))
    with pytest.raises(ValueError, match="take 24960 bytes, but .* has 24000 bytes free"):
        write(parts, tmp_path / "cache", "--dtype", "float32")  # 26 images x 5 x 48 x 4 bytes = 24 960
    assert not (tmp_path / "cache").exists()
    write(parts, tmp_path / "cache", "--dtype", "float16")
    assert "To write: 12480 bytes. Free in" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_named_and_not_made_up(parts, tmp_path, capsys):
    shutil.copytree(parts / "data", tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes(b"no image")
    given = ["--dataset", str(tmp_path / "data"), "--vision_model", str(parts / "tower"), "--splits", "train"]
    cache_features.main([*given, "--output_dir", str(tmp_path / "cache")])
    assert "row 3 " in capsys.readouterr().err
    cache: FeatureCache = load_features(str(tmp_path / "cache"), "train", {})
    assert cache.read(2).isfinite().all() and cache.read(4).isfinite().all()
    row = next(
        row for row in range(20) if "3.png" == Path(load_rows(str(parts / "data"), "train")[row]["image"].filename).name
    )
    with pytest.raises(ValueError, match=f"The image of row {row} could not be read"):
        cache.read(row)


def test_features_that_a_dtype_cannot_hold_are_named(parts, tmp_path, monkeypatch):
    features = cache_features.vision_features

    def larger(tower, pixels, layer):
        output = features(tower, pixels, layer)
        output.last_hidden_state = output.last_hidden_state * 1e6
        return output

    monkeypatch.setattr(cache_features, "vision_features", larger)
    with pytest.raises(ValueError, match="rows 0 to 19 are not finite in float16; their largest is .*--dtype bfloat16"):
        write(parts, tmp_path / "cache")
    write(parts, tmp_path / "cache", "--dtype", "bfloat16", "--overwrite_output_dir")
    assert load_features(str(tmp_path / "cache"), "train", {}).read(0).isfinite().all()


def test_wrong_fields_are_reported_together(parts):
    with pytest.raises(ValueError, match="(?s)--vision_model is missing.*--dtype is 'float8'.*--shard_size is 0"):
        cache_features.main(["--dataset", "x", "--output_dir", "y", "--dtype", "float8", "--shard_size", "0"])


@pytest.mark.parametrize(
    "changed", [{"shard_size": 0}, {"shard_size": -1}, {"shape": [4, 1, 10**400, 2]}, {"shape": [4]}]
)
def test_sizes_that_are_none_are_no_cache(tmp_path, changed):
    described = {"shape": [4, 1, 2, 2], "dtype": "float16", "shard_size": 4, **changed}
    (tmp_path / "train.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="has no whole cache of split 'train'"):
        load_features(str(tmp_path), "train", {})
