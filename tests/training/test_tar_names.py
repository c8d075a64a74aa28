"""Samples of a tar that share a name."""

import io
import tarfile

import pytest

from blip2x_training.data.tars import read_index


@pytest.mark.parametrize(
    "names", [["a.jpg", "a.txt", "a.jpg", "a.txt"], ["a.jpg", "a.jpg", "a.txt", "a.txt"], ["a.jpg", "a.txt", "a.JPG"]]
)
def test_name_twice_is_refused(tmp_path, names):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"red"))
    with pytest.raises(ValueError, match=r"shard\.tar holds a\.\w+ twice in one sample"):
        list(read_index(str(path)))
