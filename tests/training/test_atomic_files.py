"""Files that appear whole: what is in the way of their unfinished forms, and the modes they end with."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from blip2x_training.engine.checkpoint import save_root
from blip2x_training.reporting.curves import draw_curves
from blip2x_training.system.atomic_files import even_modes, whole_folder, write_whole


def test_a_link_under_the_unfinished_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".state.json.tmp").symlink_to(victim)
    write_whole(tmp_path / "state.json", "{}")
    (tmp_path / ".curves.png.tmp").symlink_to(victim)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n')
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert victim.read_text() == "precious"
    assert (tmp_path / "state.json").read_text() == "{}" and not (tmp_path / "state.json").is_symlink()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_link_to_a_folder_under_the_unfinished_name_is_not_followed(tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").write_text("precious")
    (tmp_path / ".step_1.tmp").symlink_to(tmp_path / "others")
    with whole_folder(tmp_path / "step_1") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "others" / "file").read_text() == "precious"
    assert (tmp_path / "step_1" / "file").read_text() == "new" and not (tmp_path / "step_1").is_symlink()


def test_a_block_that_raises_leaves_the_older_file(tmp_path):
    write_whole(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a", None)
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_all_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "step_1") as folder:
            save_file({"a": torch.ones(1)}, folder / "a.safetensors")
            (folder / "state.json").write_text("{}")
        write_whole(tmp_path / "step_1" / "best.json", "{}")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "step_1").iterdir()}
    assert modes == dict.fromkeys(["a.safetensors", "state.json", "best.json"], 0o640)


def test_the_root_of_a_run_has_one_mode_too(tmp_path):
    class Part:
        def save_pretrained(self, folder):
            (folder / "merged").mkdir(parents=True)
            save_file({"a": torch.ones(1)}, folder / "merged" / "model.safetensors")
            (folder / "config.json").write_text("{}")

    save_root(tmp_path, Part())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "plain").write_text("")
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_a_link_in_a_folder_keeps_its_target_as_it_is(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "secret")
    even_modes(tmp_path / "folder")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
