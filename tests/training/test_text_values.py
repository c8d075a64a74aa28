"""Texts inside objects, in training and in evaluation."""

import re

import pytest

from blip2x_training.bootstrap_captions import web_captions
from blip2x_training.data.caption_dataset import read_texts, read_turns
from blip2x_training.data.images import BadRow
from blip2x_training.data.rows import Rows
from blip2x_training.evaluation.samples import as_texts, check_texts

SHAPES = [
    [{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}],
    {"answer": ["red", "blue"], "answer_id": [1, 2]},
    [{"raw": "red", "tokens": ["red"]}, {"raw": "blue"}],
]


@pytest.mark.parametrize("value", SHAPES)
def test_texts_inside_objects_are_read_alike(value):
    assert as_texts(value) == read_texts(value, clean=False) == ["red", "blue"]


def test_object_without_text_is_refused():
    with pytest.raises(ValueError, match="an object without answer, raw, caption, text: {'score': 1}"):
        as_texts([{"score": 1}])
    with pytest.raises(BadRow, match="an object without"):
        read_texts([{"score": 1}], clean=False)


NO_TEXTS = {"bytes": b"a" * 500, "bool": True, "list": [["a"]] * 200, "float": float("nan")}


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_a_column_of_no_texts_is_named_with_its_type_and_a_short_value(kind):
    rows = Rows({"image": [None] * 2, "caption": ["a dog", [NO_TEXTS[kind]]]})
    for read in (lambda: web_captions(rows, None), lambda: check_texts(rows["caption"][:], "caption")):
        with pytest.raises(ValueError, match=f"Column 'caption', row 1: .*, of type {kind}. Name the column") as caught:
            read()
        assert len(str(caught.value)) < 300
    _, fault = read_turns(Rows({"caption": ["a dog", [NO_TEXTS[kind]]]}), "caption", None, clean=False)
    assert re.match(r"column 'caption': the text is no text: \[.*, of type list$", str(fault)) and len(str(fault)) < 300


def test_answers_that_count_are_numbers():
    assert as_texts([2, "two", None]) == ["2", "two"]
