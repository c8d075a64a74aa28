"""A run goes on with what it was begun with, and with something else only where it is told to."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blip2x_training.data import contents
from blip2x_training.data.caption_dataset import CaptionDataset
from blip2x_training.data.contents import changes_of_rows, describe_rows
from blip2x_training.data.formats import load_rows
from blip2x_training.system.fingerprints import tensors_mark
from tests.helpers.evaluation_parts import coco_file, evaluate, make_photos, make_stage1, texts_of
from tests.helpers.training_parts import make_image_folder, make_language_model, make_tars, make_vision_model
from tests.helpers.training_runs import interrupted_after, metrics, stage1, stage2


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Folder with data/, tower/, opt/, and half/, a stage 1 that was stopped after 2 of 4 steps."""
    root = tmp_path_factory.mktemp("origin")
    make_image_folder(root / "data", {"train": 8, "validation": 4})
    make_vision_model(root / "tower")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(2, patch)
        run(root, root / "half")
    return root


def run(parts: Path, out: Path, *flags: str) -> list[dict]:
    return stage1(parts, out, "--max_steps", "4", "--save_steps", "2", "--eval_split", "validation", *flags)


@pytest.fixture
def copy(parts, tmp_path) -> Path:
    """All of it elsewhere, to change."""
    for name in ("data", "tower", "half"):
        shutil.copytree(parts / name, tmp_path / name)
    return tmp_path


def test_a_moved_data_set_continues(copy, capsys):
    (copy / "data").rename(copy / "elsewhere")
    assert [line["step"] for line in run(copy, copy / "half", "--dataset", str(copy / "elsewhere"))] == [1, 2, 3, 4, 4]
    said = capsys.readouterr().out
    assert "after step 2 of 4" in said and "something else" not in said and "times" not in said


def rows_of(copy: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (copy / "data" / split / "metadata.jsonl").read_text().splitlines()]


def write_rows(copy: Path, rows: list[dict], split: str = "train") -> None:
    (copy / "data" / split / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def remove_rows(copy: Path) -> None:
    write_rows(copy, rows_of(copy)[:6])
    for number in (6, 7):
        (copy / "data" / "train" / f"{number}.png").unlink()


def reorder_rows(copy: Path) -> None:
    for one, other in ((0, 5), (1, 6)):
        first, second = (copy / "data" / "train" / f"{number}.png" for number in (one, other))
        first.rename(copy / "aside"), second.rename(first), (copy / "aside").rename(second)
    rows = rows_of(copy)
    for one, other in ((0, 5), (1, 6)):
        rows[one]["captions"], rows[other]["captions"] = rows[other]["captions"], rows[one]["captions"]
    write_rows(copy, rows)


def replace_captions(copy: Path) -> None:
    write_rows(copy, [{**row, "captions": [text + "!x" for text in row["captions"]]} for row in rows_of(copy)])


def replace_images_by_some_of_their_size(copy: Path) -> None:
    for path in (copy / "data" / "train").glob("*.png"):
        size = path.stat().st_size
        Image.new("RGB", (2, 2), (int(path.stem), 9, 9)).save(path)
        path.write_bytes(path.read_bytes() + b"\0" * (size - path.stat().st_size))
        assert path.stat().st_size == size


def change_the_tower(copy: Path) -> None:
    weights = load_file(copy / "tower" / "model.safetensors")
    name = next(name for name in weights if weights[name].ndim == 2)
    weights[name][-1, -1] += 1e-3
    save_file(weights, copy / "tower" / "model.safetensors", metadata={"format": "pt"})


def change_validation(copy: Path) -> None:
    write_rows(copy, [{**row, "captions": ["a dog"]} for row in rows_of(copy, "validation")], "validation")


CHANGES = {
    remove_rows: "train: there were 8 usable rows, now 6",
    reorder_rows: "train: the rows are in another order",
    replace_captions: "train: texts or questions have changed; another tokenizer",
    replace_images_by_some_of_their_size: r"\(train: images were replaced\)",
    change_the_tower: r"\(another vision tower\)",
    change_validation: r"\(validation: texts or questions have changed\)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_told_and_refused(copy, change):
    change(copy)
    before = (copy / "half" / "config.yaml").read_bytes(), metrics(copy / "half")
    with pytest.raises(ValueError, match=f"was begun with something else.*{CHANGES[change]}.*--accept_changes true"):
        run(copy, copy / "half")
    assert ((copy / "half" / "config.yaml").read_bytes(), metrics(copy / "half")) == before


def test_it_continues_where_that_is_accepted_and_the_next_time_compares_with_what_it_accepted(
    copy, capsys, monkeypatch
):
    replace_images_by_some_of_their_size(copy)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(3, patch)
        run(copy, copy / "half", "--accept_changes", "true", "--save_steps", "1")
    assert "as --accept_changes says: train: images were replaced." in capsys.readouterr().out
    assert "accept_changes" not in (copy / "half" / "config.yaml").read_text()
    assert run(copy, copy / "half")[-1]["step"] == 4
    assert "something else" not in capsys.readouterr().out
    replace_captions(copy)  # of a run that is finished by now
    with pytest.raises(ValueError, match="texts or questions have changed"):
        run(copy, copy / "half")


def test_a_checkpoint_of_an_earlier_version_continues_with_a_line(copy, capsys):
    path = copy / "half" / "checkpoints" / "step_2" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: state[name] for name in ("step", "samples_seen", "num_processes", "best")}))
    change_the_tower(copy)
    assert run(copy, copy / "half")[-1]["step"] == 4
    assert capsys.readouterr().out.count("step 2 does not say what it was made from: an earlier version wrote it") == 1


def test_stage2_notices_another_language_model_prompt_and_tokenizer(parts, tmp_path):
    for name, seed in (("opt", 0), ("other", 1)):
        make_language_model(tmp_path / name, "opt")
        if seed:
            weights = load_file(tmp_path / name / "model.safetensors")
            save_file(
                {key: weight + 0.01 for key, weight in weights.items()},
                tmp_path / name / "model.safetensors",
                metadata={"format": "pt"},
            )
    for name in ("data", "tower"):
        (tmp_path / name).symlink_to(parts / name)
    run(tmp_path, tmp_path / "stage1")
    flags = ["--max_steps", "2", "--save_steps", "2", "--prompt", "a photo of"]
    stage2(tmp_path, tmp_path / "out", "opt", *flags)
    with pytest.raises(ValueError, match=r"\(prompt was 'a photo of', now 'a drawing of'; another language model\)"):
        stage2(tmp_path, tmp_path / "out", "other", *flags, "--prompt", "a drawing of", "--max_steps", "3")
    tokens = tmp_path / "opt" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"red"', '"rad"'))
    with pytest.raises(ValueError, match=r"\(another tokenizer \((\d+) tokens then, \1 now\)\)"):
        stage2(tmp_path, tmp_path / "out", "opt", *flags, "--max_steps", "3")


def described(rows, **given) -> dict:
    return describe_rows(CaptionDataset(rows, **{"text_column": "captions"} | given))


def test_tars_and_embedded_images_are_told_apart_as_files_are(parts, tmp_path):
    rows = load_rows(str(parts / "data"), "train").cast_column("image", datasets.Image(decode=False))
    records = [
        {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}, "captions": row["captions"]}
        for row in rows
    ]
    kinds = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    embedded = described(datasets.Dataset.from_list(records, features=kinds))
    assert embedded == described(rows)  # the same bytes
    other = [{**record, "image": records[0]["image"]} for record in records]
    assert changes_of_rows(embedded, described(datasets.Dataset.from_list(other, features=kinds))) == [
        "images were replaced"
    ]
    (tar,) = make_tars(tmp_path / "one", [5])
    Path(tmp_path / "two").mkdir()
    moved = shutil.copy(tar, tmp_path / "two" / "renamed.tar")
    before, after = (described(load_rows(str(path), "train"), text_column="text") for path in (tar, moved))
    assert before == after
    content = bytearray(Path(moved).read_bytes())
    place = content.find(b"JFIF") + 200
    content[place] ^= 1
    Path(moved).write_bytes(content)
    assert changes_of_rows(before, described(load_rows(str(moved), "train"), text_column="text")) == [
        "images were replaced"
    ]


def test_of_a_large_data_set_sizes_and_a_drawing_are_covered_and_new_times_alone_refuse_nothing(
    copy, monkeypatch, capsys
):
    monkeypatch.setattr(contents, "IMAGES", 2)
    shutil.rmtree(copy / "half")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(2, patch)
        run(copy, copy / "half")
    for path in (copy / "data").rglob("*.png"):
        os.utime(path, (1, 1))
    run(copy, copy / "half")
    assert capsys.readouterr().out.count("Image files have other times than when the run began") == 1
    replace_images_by_some_of_their_size(copy)
    with pytest.raises(ValueError, match="images were replaced"):
        run(copy, copy / "half", "--max_steps", "5")


def test_a_quick_mark_of_weights_finds_one_changed_number_and_another_order():
    weights = [torch.arange(100_000.0), torch.ones(3, dtype=torch.bfloat16), torch.tensor(1)]
    mark = tensors_mark(weights)
    assert tensors_mark([one.clone() for one in weights]) == mark
    for place in (1, 50_001, 99_999):
        changed = weights[0].clone()
        changed[place] = torch.nextafter(changed[place], torch.tensor(torch.inf))
        assert tensors_mark([changed, *weights[1:]]) != mark
    for other in (weights[0].flip(0), weights[0].view(1000, 100), weights[0].half().float()):
        assert tensors_mark([other, *weights[1:]]) != mark
    part = torch.arange(10, dtype=torch.uint8)[3:]  # of a larger storage, from a place that no integer starts at
    assert tensors_mark([part]) == tensors_mark([part.clone()]) != tensors_mark([part.flip(0)])


def test_an_evaluation_does_not_go_on_over_other_images(tmp_path, capsys):
    """The same names and sizes, and texts, as before."""
    make_photos(tmp_path / "photos")
    data, model = coco_file(tmp_path / "captions.json"), make_stage1(tmp_path / "stage1")
    fields = {"task": "caption", "model": model, "data": data, "image_folder": tmp_path / "photos", "max_new_tokens": 4}
    _, before = evaluate(tmp_path / "out", **fields)
    (tmp_path / "photos").rename(tmp_path / "moved")
    again = evaluate(tmp_path / "out", **fields | {"image_folder": tmp_path / "moved"})[1]
    assert texts_of(again) == texts_of(before) and "Going on after 3 of 3" in capsys.readouterr().out
    for path in (tmp_path / "moved").iterdir():
        size = path.stat().st_size
        Image.new("RGB", (40, 30), (int(path.stem) * 60, 0, 0)).save(path, quality=30)
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    fields["image_folder"] = tmp_path / "moved"
    with pytest.raises(
        ValueError, match=r"holds another evaluation \(images was '\w+', is now '\w+'\).*--overwrite_out"
    ):
        evaluate(tmp_path / "out", **fields)
    assert evaluate(tmp_path / "out", **fields, overwrite_output_dir=True)[0]["counts"]["scored"] == 3
    assert "Going on" not in capsys.readouterr().out
