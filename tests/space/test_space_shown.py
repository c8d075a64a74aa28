"""What the Space's pages show: escaped texts, matrices, searches, examples, the model card; without a server."""

import about
import app
import charts
import chat_tab
import models as space_models
import pytest
import search_tab
from PIL import Image

from blip2x_training.toy.examples import draw_examples
from tests.helpers.space_server import EXAMPLES, SPACE
from tests.helpers.tiny import image

MATCH_TEXTS = "Texts, one on each line"


def test_texts_from_outside_are_escaped():
    evil = "<img src=x onerror=alert(1)>"
    scores = {"texts": [evil], "itc": [[0.5]], "itm": [[0.25]]}
    pages = [
        charts.chart(scores, [image()]),
        charts.chart({"texts": [evil], "itc": [[0.5]] * 2, "itm": [[0.25]] * 2}, [image()] * 2),
    ]
    pages.append(charts.text_ranking([{"text": evil, "itc": 0.5, "itm": None}]))
    for page in pages:
        assert "<img src=x" not in page and "&lt;img" in page and "0.500" in page
    assert "0.250" in pages[0] and "picture 2" in pages[1] and charts.chart(None, []) == ""


def test_a_matrix_has_a_row_for_each_text_and_a_column_for_each_picture():
    scores = {
        "texts": ["one", "two", "three"],
        "itc": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
        "itm": [[0.7] * 3, [0.8] * 3],
    }
    page = charts.chart(scores, [image("red"), image("blue")])
    rows = page.split("<tr>")[1:]
    assert len(rows) == 4 and rows[0].count('<img src="data:image/jpeg;base64,') == 2
    assert ">two<" in rows[2] and "ITC 0.200" in rows[2] and "ITC 0.500" in rows[2] and "ITC 0.300" not in rows[2]
    assert "<small>ITM</small> <b>0.800</b>" in rows[2]
    assert charts.chart(scores, [image()]) == ""  # a picture was taken away in the meantime


def test_a_search_that_finds_nothing_says_so():
    def ranking(*matches):
        return [{"image": i, "text": "a", "itc": 0.5, "itm": match} for i, match in enumerate(matches)]

    assert "the highest ITM is 0.02" in charts.verdict(ranking(0.02, 0.01, None))
    assert charts.verdict(ranking(0.01, 0.5)) == charts.verdict(ranking(None)) == charts.verdict(None) == ""
    assert "Nothing here matches well" in charts.text_ranking(ranking(0.1))
    shown, sentence = search_tab.show_ranking(["a", "b"], ranking(0.1, 0.2))
    assert [label for _, label in shown] == ["1. ITC 0.50, ITM 0.10", "2. ITC 0.50, ITM 0.20"] and sentence.visible
    assert search_tab.show_ranking(["a"], ranking(0.1, 0.2))[0] == []  # a picture was taken away in the meantime


def test_match_starts_with_what_its_pictures_show_and_a_text_with_their_words_in_another_order(loaded, tmp_path):
    boxes = [block for block in app.build(loaded).blocks.values() if getattr(block, "label", None) == MATCH_TEXTS]
    drawn = [caption for _, caption in draw_examples(tmp_path)]
    assert len(boxes) == 2  # of Match, and of Search by a picture
    for box in boxes:
        *shown, swapped = box.value.splitlines()
        assert shown == drawn[:3]
        assert swapped not in drawn and sorted(swapped.split()) in [sorted(caption.split()) for caption in shown]


@pytest.mark.parametrize(
    "roles, promised", [((1, 1), "ask about them, match and search"), ((1, 0), "ask"), ((0, 1), "match")]
)
def test_the_headline_promises_what_is_there(loaded, roles, promised):
    parts = [part if there else None for part, there in zip(loaded.parts, roles)]
    with_tabs = app.build(space_models.Models(*parts)).blocks.values()
    headline = next(block.value for block in with_tabs if getattr(block, "elem_id", None) == "title")
    assert promised in headline and ("ask" in headline) == roles[0] and ("match" in headline) == roles[1]


def test_turns_that_are_left_out_are_counted():
    assert "its first turn was left out" in chat_tab.left_out(1)
    assert "its first 2 turns were left out" in chat_tab.left_out(2)


def test_about_reads_the_model_card(loaded, tmp_path):
    part = loaded.matcher
    page = about.about(loaded)
    assert f"{about.size_of(part.model.num_parameters())}" in page and "float32" in page and "not stated" in page
    assert str(part.source) not in page  # where it lies is nobody's business
    text = "---\nlicense: mit\ndemo: {turns: 2}\n---\n# Toy\n## Limits and biases\nOnly <b>shapes</b>.\n## Use\nNo.\n"
    (tmp_path / "README.md").write_text(text)
    carded = space_models.Part("a/b", str(tmp_path), part.model, part.processor)
    page = about.about(space_models.Models(None, carded))
    assert "mit" in page and "Only &lt;b&gt;shapes" in page and "No." not in page
    assert about.card_of(carded).data.to_dict()["demo"] == {"turns": 2}


def test_examples_are_what_the_project_draws(tmp_path):
    for path, caption in draw_examples(tmp_path):
        ours = SPACE / "examples" / path.name
        assert ours in EXAMPLES and caption.replace(" ", "_") in ours.name
        assert list(Image.open(ours).convert("RGB").getdata()) == list(Image.open(path).convert("RGB").getdata())
    assert len(EXAMPLES) == 6
