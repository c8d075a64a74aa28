"""Images, texts and files as people have them: read right, or refused with the reason that is the reason."""

import base64
import io
import json

import datasets
import pytest
from PIL import Image

from blip2x_training.bootstrap_captions import web_captions
from blip2x_training.data.caption_dataset import CaptionDataset
from blip2x_training.data.formats import load_rows
from blip2x_training.data.images import image_name, open_image
from blip2x_training.data.rows import Rows
from blip2x_training.data.texts import bare_texts
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
