"""Texts inside objects, in training and in evaluation."""

import pytest

from blip2x_training.data.caption_dataset import read_texts
from blip2x_training.data.images import BadRow
from blip2x_training.evaluation.samples import as_texts

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
