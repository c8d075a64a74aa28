"""CSV and TSV as spreadsheets, pandas and CC3M write them, and images that are addresses."""

import codecs
from pathlib import Path

import pytest

from blip2x_training.data.caption_dataset import CaptionDataset
from blip2x_training.data.evaluation_formats import evaluation_rows
from blip2x_training.data.formats import image_start, load_rows
from blip2x_training.evaluation.samples import EvaluationSet
from tests.helpers.training_parts import put_pictures


@pytest.fixture
def photos(tmp_path) -> Path:
    return put_pictures(tmp_path / "photos", ["one.jpg", "two.jpg"])


def captions_of(path: Path, content: str | bytes, **options) -> CaptionDataset:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    rows = load_rows(str(path), "train")
    data = CaptionDataset(rows, folder=image_start(str(path), None), **{"clean_captions": False} | options)
    assert len(data) == 0 or data[0, 0]["image"].size == (40, 30)
    return data


@pytest.mark.parametrize("ending, mark", [("csv", ","), ("csv", ";"), ("csv", "|"), ("csv", "\t"), ("tsv", "\t")])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_header_row_names_the_columns(photos, ending, mark, newline):
    rows = [
        ["image", " caption"],
        ["one.jpg", '"two, lines\nand ""quotes"""'],
        ["two.jpg", "none"],
        [""],
        ["two.jpg", "2"],
    ]
    content = newline.join(mark.join(row) for row in rows)
    data = captions_of(photos / f"rows.{ending}", content)
    assert data.texts == [['two, lines\nand "quotes"'], ["none"], ["2"]]
    assert data.image_ids == [0, 1, 1]


@pytest.mark.parametrize("bom, encoding", [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")])
def test_a_byte_order_mark_is_no_part_of_the_first_name(photos, bom, encoding):
    data = captions_of(photos / "rows.csv", bom + "file_name,text\none.jpg,ein Gelände\n".encode(encoding))
    assert data.texts == [["ein Gelände"]] and load_rows(str(photos / "rows.csv"), "all").column_names == [
        "image",
        "text",
    ]


def test_a_text_of_another_encoding_is_left_out_alone(photos):
    data = captions_of(photos / "rows.csv", b"image,text\none.jpg,caf\xe9\ntwo.jpg,tea\n")
    assert data.texts == [["tea"]] and "not UTF-8" in data.left_out[0]["reason"] and data.left_out[0]["row"] == 0


def test_questions_and_slices(photos):
    content = "image,question,answer\none.jpg,what is it?,red\ntwo.jpg,how many?,2\n"
    data = captions_of(photos / "rows.csv", content, prompt_column="auto", prompt="Question: {} Answer:")
    assert data[0, 1]["prompt"] == "Question: how many? Answer:" and data[0, 1]["text"] == "2"
    rows = evaluation_rows(str(photos / "rows.csv"), "all[1:]")
    samples = EvaluationSet(rows, task="vqa", folder=photos).samples
    assert [(one.question, one.references) for one in samples] == [("how many?", ["2"])]


def test_cc3m_has_no_header_and_lone_quotes(photos):
    content = '"a quote that nothing ends\tone.jpg\nthe end of "it"\ttwo.jpg\n"a ""quoted"" one"\ttwo.jpg\n'
    data = captions_of(photos / "Train_GCC-training.tsv", content)
    assert data.texts == [['"a quote that nothing ends'], ['the end of "it"'], ['a "quoted" one']]
    assert [Path(data.name(row)).name for row in range(3)] == ["one.jpg", "two.jpg", "two.jpg"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "one.jpg,a dog\n", r"a.csv has no header row: the first is \['one.jpg', 'a dog'\].*image,caption"),
        (
            "a.csv",
            "image,text\none.jpg,a dog, running\n",
            "a.csv, line 2: it has another number of cells than the 2 columns.*quotes",
        ),
        ("a.csv", 'image,text\none.jpg,"a\nb"\ntwo.jpg,"open\n', "a.csv, line 4: .*quote"),
        ("a.csv", 'image,text\none.jpg,"a "b" c"\n', "a.csv, line 2: .*written twice"),
        ("a.csv", "image,text,text\none.jpg,a,b\n", "has a name twice"),
        ("a.csv", "\n", "a.csv is empty. It needs a header row"),
        ("a.csv", "image,text\n", "has no rows"),
    ],
)
def test_what_cannot_be_read_is_named(photos, name, content, message):
    (photos / name).write_text(content)
    for read in (load_rows, evaluation_rows):
        with pytest.raises(ValueError, match=message):
            read(str(photos / name), "train")


def test_addresses_of_any_format_are_not_fetched(photos):
    data = captions_of(photos / "rows.csv", "image,text\none.jpg,red\nHTTPS://example.com/a.jpg,blue\n")
    (report,) = data.left_out
    assert report["name"] == "HTTPS://example.com/a.jpg" and "addresses are not fetched" in report["reason"]
    rows = load_rows(str(photos / "rows.csv"), "train[1:]")
    with pytest.raises(ValueError, match="HTTPS://example.com/a.jpg: it is an address, and addresses are not fetched"):
        EvaluationSet(rows, task="caption", folder=photos)
    with pytest.raises(ValueError, match="image of row 1 .HTTPS.*addresses are not fetched"):
        data.image(1)


def test_any_names_of_columns_can_be_chosen(photos):
    content = "filepath\ttitle\none.jpg\tred\n"  # two columns with names of their own are no caption and image
    data = captions_of(photos / "rows.tsv", content, image_column="filepath", text_column="title")
    assert data.texts == [["red"]]
    with pytest.raises(
        ValueError, match=r"--image_column is 'image', but the dataset has the columns \['filepath', 'title'\]"
    ):
        CaptionDataset(load_rows(str(photos / "rows.tsv"), "train"))


def test_addresses_of_cc3m_are_not_fetched(photos):
    (photos / "cc3m.tsv").write_text("a dog\thttps://example.com/a\n")
    with pytest.raises(
        ValueError, match="the first: row 0, https://example.com/a: it is an address, .* not fetched: download"
    ):
        CaptionDataset(load_rows(str(photos / "cc3m.tsv"), "train"), folder=photos)
