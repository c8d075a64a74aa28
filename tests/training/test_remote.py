"""Data at addresses: an S3 server and a web server on loopback, connections that break off, a cache with a limit, the hub."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from blip2x_training.data import remote, shard_cache
from blip2x_training.data.caption_dataset import CaptionDataset, Sampling
from blip2x_training.data.first_index import first_index
from blip2x_training.data.formats import load_rows
from blip2x_training.data.index_images import open_split
from blip2x_training.data.indexed_dataset import IndexedCaptionDataset
from blip2x_training.data.order import BatchOrder, visit_order
from blip2x_training.data.shard_cache import Prefetcher, ShardCache, start_prefetcher
from blip2x_training.data.shard_files import shard_files
from tests.helpers.shards import parquet, tars, write_tar
from tests.helpers.web_files import serving


@pytest.fixture
def web(tmp_path, monkeypatch):
    """(server, address, folder): a web server of the folder, and caches of this test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as (server, root):
        yield server, root, tmp_path / "served"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The environment of an S3 server on loopback."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        yield names | {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def braces(folder: Path, root: str, kind: str) -> str:
    return f"{root}/{{{','.join(path.stem for path in sorted(folder.glob(f'*.{kind}')))}}}.{kind}"


def opened(dataset: str, tmp_path: Path, limit: int = 10**9) -> IndexedCaptionDataset:
    split = open_split(first_index(dataset, "train"), "train")
    return IndexedCaptionDataset(*split, sampling=Sampling(seed=1), cache=ShardCache(tmp_path / "shards", limit))


def assert_same(lazy, local) -> None:
    assert len(lazy) == len(local)
    for row in range(len(local)):
        one, other = lazy[0, row], local[0, row]
        assert one["text"] == other["text"] and not one["skipped"]
        assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))


def local_rows(dataset: str) -> CaptionDataset:
    return CaptionDataset(load_rows(dataset, "train"), sampling=Sampling(seed=1))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_web_server(kind, web, tmp_path):
    _, root, folder = web
    name = {"tar": tars, "parquet": parquet}[kind](folder)
    lazy, local = opened(braces(folder, root, kind), tmp_path), local_rows(name)
    assert_same(lazy, local)
    assert not list((tmp_path / "shards").glob("*")), "without a prefetcher rows are read by their ranges"
    for shard in lazy.index.shards:
        assert lazy.cache.fetch(shard, set())
    assert_same(lazy, local)
    rows = load_rows(braces(folder, root, kind), "train[3:6]")
    assert len(rows) == 3
    assert_same(
        CaptionDataset(rows, sampling=Sampling(seed=1)),
        CaptionDataset(load_rows(name, "train[3:6]"), sampling=Sampling(seed=1)),
    )


def test_s3(s3, tmp_path, monkeypatch):
    import boto3

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "data").mkdir()
    name = tars(tmp_path / "data")
    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="pairs")
    for path in sorted((tmp_path / "data").glob("*.tar")):
        client.upload_file(str(path), "pairs", f"deep/train-{path.name}")
    client.put_object(Bucket="pairs", Key="deep/readme.txt", Body=b"no data")
    for dataset in ("s3://pairs/deep/train-{000..002}.tar", "s3://pairs/deep/*.tar", "s3://pairs/deep"):
        lazy = opened(dataset, tmp_path)
        assert_same(lazy, local_rows(name))
    with pytest.raises(ValueError, match="There is nothing at s3://pairs/nowhere/. Check the address"):
        shard_files("s3://pairs/nowhere", "train")


def test_the_hub(web, tmp_path, monkeypatch):
    server, root, folder = web
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", root)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    below = folder / "datasets/user/name/resolve/main/data"
    below.mkdir(parents=True)
    name = parquet(below)
    listing = ["README.md", *(f"data/{path.name}" for path in sorted(below.glob("*.parquet")))]
    monkeypatch.setattr(remote.huggingface_hub, "list_repo_files", lambda repository, **_: listing)
    for dataset in ("hf://datasets/user/name", "hf://datasets/user/name/data/train-{000..002}.parquet"):
        assert_same(opened(dataset, tmp_path), local_rows(name))
    assert {authorization for *_, authorization in server.asked} == {"Bearer hf_secret"}


def test_connections_that_break_off_are_made_again(web, tmp_path, monkeypatch):
    server, root, folder = web
    name = tars(folder)
    monkeypatch.setattr(remote, "PART", 4000)
    server.faults = 3
    lazy = opened(braces(folder, root, "tar"), tmp_path)
    assert server.faults == 0
    for faults, shard in zip((1, 2, 0), lazy.index.shards):
        server.faults = faults
        assert lazy.cache.fetch(shard, set())
    for shard, path in zip(lazy.index.shards, sorted(folder.glob("*.tar"))):
        assert lazy.cache.path(shard).read_bytes() == path.read_bytes()
    assert_same(lazy, local_rows(name))


def test_a_dead_server_ends_with_a_sentence(web, tmp_path, monkeypatch):
    server, root, folder = web
    tars(folder)
    lazy = opened(braces(folder, root, "tar"), tmp_path)
    monkeypatch.setattr(remote, "RETRY", {"max_retries": 0})
    remote.store_of.cache_clear()
    server.shutdown()
    server.server_close()
    with pytest.raises(
        ValueError, match=r"000\.tar cannot be read \(.*Check the address, the network and the credentials"
    ):
        lazy[0, 0]
    remote.store_of.cache_clear()


def test_what_is_not_there(web, tmp_path):
    _, root, folder = web
    with pytest.raises(ValueError, match=r"/none\.tar cannot be read"):
        opened(f"{root}/none.tar", tmp_path)
    with pytest.raises(ValueError, match="a web server does not tell what it has. Name the files"):
        opened(f"{root}/data", tmp_path)
    with pytest.raises(ValueError, match=r"only \.tar and \.parquet files are read from an address"):
        opened(f"{root}/rows.json", tmp_path)


def test_shards_are_fetched_ahead_and_the_cache_keeps_to_its_limit(web, tmp_path, monkeypatch):
    """Eight shards at a time are shuffled together; with room for ten, the ones to come take the place of those read."""
    _, root, folder = web
    for shard in range(24):
        write_tar(folder / f"{shard:03d}.tar", {f"{n}.{e}": b"x" * 9000 for n in range(4) for e in ("jpg", "txt")})
    size = (folder / "000.tar").stat().st_size
    lazy = opened(braces(folder, root, "tar"), tmp_path, limit=10 * size)
    monkeypatch.setattr(shard_cache, "AHEAD", 10)
    order = visit_order([len(lazy)], [lazy.shards], None, 3)
    prefetcher = start_prefetcher(lazy, visit_order([len(lazy)], [lazy.shards], None, 3), 0)
    largest, present = 0, 0
    for batch in BatchOrder(order, 4, 48, prefetcher=prefetcher):
        wanted = {lazy.remote_shard(row) for _, row in batch}
        for _ in range(12_000):
            if all(lazy.cache.find(shard) for shard in wanted):
                break
            time.sleep(0.01)
        present += all(lazy.cache.find(shard) for shard in wanted)
        largest = max(largest, lazy.cache.used())
    prefetcher.join(timeout=60)
    assert present == 48 and size * 8 <= largest <= size * 10 and not prefetcher.is_alive()


def test_a_shard_that_has_changed_is_not_taken(web, tmp_path):
    _, root, folder = web
    tars(folder)
    lazy = opened(braces(folder, root, "tar"), tmp_path)
    os.utime(folder / "001.tar", ns=(1, 1))
    with pytest.raises(ValueError, match=r"001\.tar has changed since it was indexed"):
        lazy.cache.fetch(lazy.index.shards[1], set())
    assert not lazy.cache.find(lazy.index.shards[1])


def test_a_shard_larger_than_the_cache_is_read_by_ranges(web, tmp_path):
    _, root, folder = web
    name = tars(folder)
    lazy = opened(braces(folder, root, "tar"), tmp_path, limit=100)
    prefetcher = Prefetcher(lazy.cache, visit_order([15], [lazy.shards], None, 0), lazy.remote_shard, 0, 100)
    prefetcher.start()
    assert_same(lazy, local_rows(name))
    prefetcher.stop()
    prefetcher.join(timeout=60)
    assert not prefetcher.is_alive() and not list((tmp_path / "shards").glob("*"))


def test_a_shard_that_the_cache_lets_go_of_meanwhile_is_read_by_ranges(web, tmp_path, monkeypatch):
    _, root, folder = web
    name = tars(folder)
    lazy = opened(braces(folder, root, "tar"), tmp_path)
    monkeypatch.setattr(lazy.cache, "find", lambda shard: str(tmp_path / "gone" / f"{shard.rows}.tar"))
    assert_same(lazy, local_rows(name))


@pytest.mark.parametrize("limit", [10**9, 100], ids=["fetched", "larger than the cache"])
def test_a_shard_that_changes_during_a_run_ends_it(limit, web, tmp_path):
    """Not read by ranges, which would be those of other images."""
    _, root, folder = web
    tars(folder)
    lazy = opened(braces(folder, root, "tar"), tmp_path, limit)
    os.utime(folder / "001.tar", ns=(1, 1))
    prefetcher = start_prefetcher(lazy, visit_order([15], [lazy.shards], None, 0), 0)
    prefetcher.join(timeout=60)
    with pytest.raises(ValueError, match=r"001\.tar has changed since it was indexed"):
        prefetcher.advance(4)


def test_a_remote_data_set_that_has_changed_is_indexed_again(web, tmp_path):
    """At the next start; but not because its server is away."""
    server, root, folder = web
    tars(folder)
    dataset = braces(folder, root, "tar")
    home = Path(first_index(dataset, "train"))
    before = (home / "train" / "index.json").read_text()
    assert first_index(dataset, "train") == str(home) and (home / "train" / "index.json").read_text() == before
    write_tar(folder / "001.tar", {"1.jpg": b"x", "1.txt": b"another"})
    assert len(open_split(first_index(dataset, "train"), "train")[0]) == 11
    (folder / "002.tar").rename(folder / "away")
    with pytest.raises(ValueError, match=r"002\.tar cannot be read"):
        first_index(dataset, "train")
    assert (home / "train" / "index.json").exists()
