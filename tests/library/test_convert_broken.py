"""Files that are no checkpoints, or broken ones: each is a sentence that names the file, and nothing is left behind."""

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration

from modeling_blip2x.convert import command, convert
from modeling_blip2x.printable_blip2x import printable
from modeling_blip2x.weight_files_blip2x import read_weights
from tests.helpers.golden import Golden
from tests.helpers.official_checkpoints import golden_config, their_config, write_official


@pytest.fixture(scope="module")
def official():
    return Golden("stage1").official


def refused(path, says, **options):
    """The conversion fails with such a sentence; OUT and what was written for it are not there."""
    out = path.with_name("out")
    with pytest.raises(ValueError, match=says):
        convert(str(path), str(out), **options)
    assert not [left for left in path.parent.iterdir() if "out" in left.name]


def packed_again(path, compression):
    other = path.with_name("again.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return other


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_that_was_zipped_again_gives_the_same_tensors(compression, official, tmp_path):
    write_official("stage1", tmp_path / "a.pth")
    found = read_weights(packed_again(tmp_path / "a.pth", compression))
    assert set(found) == set(official)
    assert all(torch.equal(found[name].read(), official[name]) for name in official)


def test_the_torch_format_of_before_2020_gives_the_same_tensors(official, tmp_path):
    torch.save({"model": official}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read_weights(tmp_path / "old.pth")
    assert all(torch.equal(found[name].read(), official[name]) for name in official)


def test_a_flipped_bit_is_found_by_the_checksum(official, tmp_path):
    write_official("stage1", tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of some tensor
    (tmp_path / "flipped.pth").write_bytes(content)
    refused(tmp_path / "flipped.pth", r"^\S*flipped.pth is damaged: the checksum of", config=golden_config("stage1"))


CONTENTS = {
    "list": (lambda official: [1, 2], "holds list, not tensors by name"),
    "tensor": (lambda official: torch.ones(2), "holds Tensor, not tensors by name"),
    "number": (lambda official: 3, "holds int, not tensors by name"),
    "numbers as names": (lambda official: {1: torch.ones(1), **official}, "has 1 where the name of a tensor belongs"),
    "a list inside": (lambda official: {"model": [1]}, "values that are no tensors: model"),
    "no query tokens": (lambda official: {n: t for n, t in official.items() if n != "query_tokens"}, "no tensor for"),
    "a number for queries": (lambda official: {**official, "query_tokens": torch.tensor(1.0)}, "2 dimensions"),
    "whole numbers": (lambda official: {n: t.long() for n, t in official.items()}, "of another kind: .*int64, not"),
    "eight bits": (lambda official: {n: as_float8(t) for n, t in official.items()}, "is torch.float8_e4m3fn"),
    "sparse": (lambda official: {**official, "query_tokens": torch.eye(3).to_sparse()}, "is torch.sparse_coo"),
    "a layer less": (lambda official: {n: t for n, t in official.items() if ".layer.0." not in n}, "has layers"),
    "half a bias": (lambda official: {n: t for n, t in official.items() if not n.endswith("v_bias")}, "no v_bias"),
}


def as_float8(tensor):
    return tensor.to(torch.float8_e4m3fn) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", CONTENTS)
def test_a_pth_with_something_else_in_it(name, official, tmp_path):
    content, says = CONTENTS[name]
    torch.save(content(official), tmp_path / "a.pth")
    refused(tmp_path / "a.pth", says, config=golden_config("stage1"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint64, torch.complex64])
def test_safetensors_of_kinds_that_have_no_place(dtype, official, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in official.items()}
    save_file({**tensors, "extra": torch.ones(3).to(dtype)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "holds 1 tensors of a kind that is not converted: 'extra'")


@pytest.mark.parametrize("content", [b"", b"hello", b"{}", b"PK\x03\x04", bytes(1000)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_a_file_of_something_else(suffix, content, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refused(path, f"a{suffix} (is not a whole|holds)")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "is not a file")


@pytest.mark.parametrize(
    "index, says",
    [
        ("[]", "is not an index"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "which is not a file beside it"),
        ('{"weight_map": {"a": 3}}', "is not an index"),
    ],
)
def test_an_index_of_shards_that_is_broken(index, says, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=says):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "part, field, value, says",
    [
        (None, "vision_config", [1], "cannot be converted"),
        ("text_config", "vocab_size", "many", "cannot be converted.*vocab_size"),
        ("text_config", "activation_function", "x", "cannot be converted"),
        ("qformer_config", "hidden_size", -1, "hidden_size must be a multiple"),
        ("vision_config", "hidden_size", 10**30, "cannot be converted"),
    ],
)
def test_a_config_with_a_broken_field(part, field, value, says, tmp_path):
    folder = tmp_path / "theirs"
    Blip2ForConditionalGeneration(their_config(Blip2Config, "opt", "small")).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part])[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, says)


def test_names_with_escape_sequences_are_printed_escaped(tmp_path, monkeypatch):
    torch.save({"Qformer.\x1b[2J\x07": torch.ones(1)}, tmp_path / "a.pth")
    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "a.pth"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        command()
    assert r"Qformer.\x1b[2J\x07" in stopped.value.code and "\x1b" not in stopped.value.code
    assert printable("a\ud800 \u202eb\té\n") == "a\\ud800 \\u202eb\té\n"
