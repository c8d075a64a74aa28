"""Which files of a tar are one sample."""

import io
import tarfile

import pytest

from blip2x_training.data.tars import read_index, tar_rows


def write_tar(path, names):
    """A tar whose files hold their own names, in this order."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return str(path)


def pairs(path):
    """Image and text of each sample; the text is the name of its file."""
    return [(name if offset >= 0 else None, columns.get("text")) for name, (offset, _), columns in read_index(path)]


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.txt", "a.jpg", "a.txt"],
        ["a.jpg", "a.jpg", "a.txt", "a.txt"],
        ["a.jpg", "a.txt", "a.JPG"],
        ["a.jpg", "b.jpg", "a.jpg", "a.txt"],  # apart: whose is the text?
        ["a.jpg", "a.txt", "b.jpg", "a.png"],
        ["i.v1.jpg", "i.v1.txt", "i.v1.jpg"],
    ],
)
def test_name_twice_is_refused(tmp_path, names):
    with pytest.raises(ValueError, match=r"shard\.tar holds \S+ twice in one sample"):
        list(read_index(write_tar(tmp_path / "shard.tar", names)))


@pytest.mark.parametrize(
    "names, expected",
    [
        (["1.jpg", "2.jpg", "2.txt", "1.txt"], [("1.jpg", "1.txt"), ("2.jpg", "2.txt")]),
        (["i.v1.jpg", "i.v1.txt", "i.v2.jpg", "i.v2.txt"], [("i.v1.jpg", "i.v1.txt"), ("i.v2.jpg", "i.v2.txt")]),
        (["i.jpg", "i.v2.txt", "i.v2.jpg", "i.txt"], [("i.jpg", "i.txt"), ("i.v2.jpg", "i.v2.txt")]),
        (["1.jpg", "1.txt", "1.seg.png", "1.seg.npy"], [("1.jpg", "1.txt")]),
        (["1.jpg", "1.v2.jpg"], [("1.jpg", None), ("1.v2.jpg", None)]),  # without texts none is another's
        (["v1.0/1.jpg", "v1.0/1.txt", "v1.1/1.jpg", "v1.1/1.txt"],
         [("v1.0/1.jpg", "v1.0/1.txt"), ("v1.1/1.jpg", "v1.1/1.txt")]),
        (["1.jpg", "1.txt", "2.jpg", "2.txt", "1.jpg", "1.txt"],
         [("1.jpg", "1.txt"), ("1.jpg", "1.txt"), ("2.jpg", "2.txt")]),
        (["._1.jpg", "1.jpg", "._1.txt", "1.txt"], [("1.jpg", "1.txt")]),
        (["1.txt", "2.jpg"], [(None, "1.txt"), ("2.jpg", None)]),
    ],
    ids=["unsorted", "dots", "dots in some", "another picture", "no texts", "dots in folders", "two whole", "hidden", "apart"],
)  # fmt: skip
def test_what_belongs_together(names, expected, tmp_path):
    assert pairs(write_tar(tmp_path / "shard.tar", names)) == expected


def test_a_name_in_two_tars_is_two_samples(tmp_path):
    paths = [write_tar(tmp_path / "a.tar", ["1.jpg", "1.txt"]), write_tar(tmp_path / "b.tar", ["1.jpg"])]
    rows = tar_rows(paths)
    assert [(row["image"]["tar"], row.get("text")) for row in rows] == [(paths[0], "1.txt"), (paths[1], None)]
