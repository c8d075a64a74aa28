"""Images, texts and files as people have them: read right, or refused with the reason that is the reason."""

import base64
import io
import json
import zipfile

import datasets
import pytest
from PIL import Image

from blip2x_training.bootstrap_captions import web_captions
from blip2x_training.data.caption_dataset import CaptionDataset, ImageDataset
from blip2x_training.data.evaluation_formats import evaluation_rows
from blip2x_training.data.formats import load_rows
from blip2x_training.data.images import image_name, open_image
from blip2x_training.data.rows import Rows
from blip2x_training.data.texts import bare_texts
from blip2x_training.evaluation.choosing import read_names
from blip2x_training.evaluation.samples import EvaluationSet


def png(colour=(200, 0, 0), side=40) -> bytes:
    Image.new("RGB", (side, side), colour).save(buffer := io.BytesIO(), "BMP")
    return buffer.getvalue()


TEXT = base64.b64encode(png()).decode()
VALUES = {"bytes": png(), "base64": TEXT, "URI": f"data:image/bmp;base64,{TEXT}", "list of one": [png()]}
REFUSED = {
    "http://host/a.png": "addresses are not fetched: download",
    "zip://0.png::/data/a.zip": "inside an archive: unpack",
    "data:image/png;base64,a": "cannot be decoded",
}


@pytest.mark.parametrize("kind", VALUES)
def test_an_image_in_another_form(kind):
    rows = Rows({"image": [VALUES[kind]], "text": ["red"]})
    assert open_image(VALUES[kind], None).getpixel((3, 3)) == (200, 0, 0)
    assert CaptionDataset(rows)[0, 0]["image"].getpixel((3, 3)) == (200, 0, 0)
    assert EvaluationSet(rows, task="caption").image(0).getpixel((3, 3)) == (200, 0, 0)
    assert len(image_name(VALUES[kind], None)) <= 100


@pytest.mark.parametrize("value", REFUSED)
def test_an_image_that_is_elsewhere_is_refused_with_that_reason(value):
    rows = Rows({"image": [value], "text": ["red"]})
    for kind in (lambda: CaptionDataset(rows), lambda: EvaluationSet(rows, task="caption")):
        with pytest.raises(ValueError, match=REFUSED[value]) as caught:
            kind()
        assert len(str(caught.value)) < 600


def test_several_images_in_a_row_are_refused():
    with pytest.raises(ValueError, match="2 images in one row"):
        CaptionDataset(Rows({"image": [[png(), png()]], "text": ["red"]}))


def test_base64_that_is_no_image_has_a_short_error():
    with pytest.raises(ValueError) as caught:
        open_image("A" * 96000, None)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("as_lines", [True, False])
def test_json_is_read_by_what_it_holds(name, as_lines, tmp_path):
    rows = [{"image": f"{number}.png", "caption": "naïve"} for number in range(3)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if as_lines else json.dumps(rows, indent=1)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(load_rows(str(tmp_path / name), "train")) == rows


def test_lists_that_are_written_as_text():
    assert bare_texts("['red', \"two 'reds'\"]") == ["red", "two 'reds'"]
    assert bare_texts("['red") == "['red" and bare_texts("[red]") == "[red]" and bare_texts("['a', 1]") == "['a', 1]"


def test_bootstrap_reads_captions_that_are_objects():
    rows = datasets.Dataset.from_dict({"captions": [[{"raw": "a dog", "sentid": 1}], [{"raw": "a cat", "sentid": 2}]]})
    assert web_captions(rows, None) == [["a dog"], ["a cat"]]


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (30, 30), (200, 0, 0)).save(tmp_path / "0.png")
    return tmp_path


TABLES = {
    "rows.csv": 'image,caption\n0.png,"a dog, red\nand old"\n',
    "captions.txt": 'image,caption\n0.png,"a dog, red\nand old"\n',
    "rows.tsv": 'file_name\tcaption\n0.png\t"a dog, red\nand old"\n',
    "cc3m.tsv": '"a dog, red\nand old"\t0.png\n',
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_text(name, mark, red):
    (red / name).write_bytes(mark + TABLES[name].encode())
    data = CaptionDataset(load_rows(str(red / name), "train"), folder=red, clean_captions=False)
    assert data.texts == [["a dog, red\nand old"]] and data[0, 0]["image"].getpixel((3, 3)) == (200, 0, 0)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is empty"),
        ("image,caption\n0.png,a,b\n", "line 2: it has another number of cells than the 2 columns"),
    ],
)
def test_tables_that_are_none(text, says, red):
    (red / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        load_rows(str(red / "rows.csv"), "train")


def test_a_folder_of_save_to_disk(red):
    rows = datasets.Dataset.from_dict({"image": [str(red / "0.png")] * 4, "caption": list("abcd")})
    rows.save_to_disk(red / "alone")
    datasets.DatasetDict({"train": rows, "validation": rows.select([3])}).save_to_disk(red / "splits")
    assert load_rows(str(red / "alone"), "train[1:3]")["caption"][:] == ["b", "c"]
    assert load_rows(str(red / "splits"), "validation")["caption"][:] == ["d"]
    assert load_rows(str(red / "splits"), "train[:1]+validation")["caption"][:] == ["a", "d"]
    with pytest.raises(ValueError, match="has no split 'test', only"):
        load_rows(str(red / "splits"), "test")
    assert CaptionDataset(load_rows(str(red / "alone"), "all"))[0, 2]["text"] == "c"


def test_an_imagefolder_in_a_zip_is_to_be_unpacked(red):
    (red / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "red"}))
    (red / "zipped").mkdir()
    with zipfile.ZipFile(red / "zipped" / "train.zip", "w") as archive:
        for name in ("0.png", "metadata.jsonl"):
            archive.write(red / name, name)
    with pytest.raises(ValueError, match="train.zip is a zip: unpack it, and name the folder"):
        load_rows(str(red / "zipped" / "train.zip"), "train")
    rows = load_rows(str(red / "zipped"), "train")  # datasets reads it, and names zip://0.png::.../train.zip
    for read in (
        lambda: CaptionDataset(rows),
        lambda: EvaluationSet(rows, task="caption"),
        lambda: ImageDataset(rows, "image").image(0),
    ):
        with pytest.raises(ValueError, match="it lies inside an archive: unpack that, and name the folder"):
            read()


def test_images_in_a_zip_beside_their_metadata_are_to_be_unpacked(red):
    with zipfile.ZipFile(red / "images.zip", "w") as archive:
        archive.write(red / "0.png", "0.png")
    (red / "0.png").unlink()
    rows = Rows({"image": ["0.png"], "text": ["red"]})
    for read in (
        lambda: CaptionDataset(rows, folder=red),
        lambda: EvaluationSet(rows, task="caption", folder=red),
        lambda: ImageDataset(rows, "image", red).image(0),
    ):
        with pytest.raises(ValueError, match="the file is missing, but images.zip lies there: unpack it"):
            read()


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\ndog\n")
    (tmp_path / "names.json").write_bytes(b'\xef\xbb\xbf["cat", "dog"]')
    (tmp_path / "qa.txt").write_bytes(b"\xef\xbb\xbfwhat is in the image3 ?\nlamp\n")
    (tmp_path / "Flickr8k.token.txt").write_bytes(b"\xef\xbb\xbf1.jpg#0\ta dog\n")
    for name in ("names.txt", "names.json"):
        assert read_names(str(tmp_path / name))[0] == ["cat", "dog"]
    assert evaluation_rows(str(tmp_path / "qa.txt"), "all")[0]["question"] == "what is ?"
    assert evaluation_rows(str(tmp_path / "Flickr8k.token.txt"), "all")[0]["image"] == "1.jpg"
