"""Official files that evaluation reads, and the retrieval that both training and evaluation score with."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from blip2x_training.data.evaluation_formats import evaluation_rows
from blip2x_training.evaluation.evaluated_model import load_checkpoint
from blip2x_training.evaluation.report.bars import score_bars, type_bars
from blip2x_training.evaluation.report.cases import choose_records, heading, score_text, tone, wanted
from blip2x_training.evaluation.report.figures import figure_table
from blip2x_training.evaluation.retrieval import (
    RetrievalSet,
    match_shortlists,
    mode_scores,
    ranked_scores,
    rerank,
    shortlists,
)
from blip2x_training.evaluation.samples import EvaluationSet
from blip2x_training.metrics.retrieval_recall.scores import recall_at_k
from tests.helpers.evaluation_parts import evaluate, make_photos, make_stage1, make_stage2, put, texts_of

WORDNET = Path(__file__).parents[1] / "fixtures" / "metrics" / "wordnet"


def read(data: str, task: str, folder: Path, split: str = "all", **options) -> EvaluationSet:
    return EvaluationSet(evaluation_rows(data, split, str(folder)), task=task, folder=folder, **options)


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> str:
    return make_stage2(tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> str:
    return make_stage1(tmp_path_factory.mktemp("models") / "stage1")


def test_gqa(tmp_path, opt):
    photos = make_photos(tmp_path / "images", "n{}.jpg")
    content = {
        f"2007{n}": {
            "imageId": f"n{n}", "question": "What is it?", "answer": "dog", "fullAnswer": "It is a dog.", "isBalanced": True,
            "types": {"structural": "query" if n < 3 else "verify", "semantic": "obj", "detailed": "x"},
        }
        for n in (1, 2, 3)
    }  # fmt: skip
    data = put(tmp_path / "testdev_balanced_questions.json", content)
    metrics, records = evaluate(
        tmp_path / "out", task="vqa", benchmark="gqa", data=data, image_folder=photos, model=opt, clean_questions=True,
        max_new_tokens=2,
    )  # fmt: skip
    assert [record["question_id"] for record in records] == list(content) and records[0]["question"] == "what is it?"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == [{"questionId": q, "prediction": t} for q, t in zip(content, texts_of(records))]
    assert {"exact_match", "question_type/query", "question_type/verify"} <= metrics["metrics"].keys()
    expected = 100 * sum(text == "dog" for text in texts_of(records)) / 3
    assert metrics["metrics"]["exact_match_as_written"] == pytest.approx(expected)


def test_daquar_text_file(tmp_path, opt):
    photos = make_photos(tmp_path / "nyu", "image{}.png")
    lines = ["what is on the left of the dog in the image1 ?", "chair, table", "how many dogs are in the image3 ?", "2"]
    data = put(tmp_path / "qa.894.raw.test.txt", "\n".join(lines) + "\n")
    samples = read(data, "vqa", photos).samples
    assert [sample.question for sample in samples] == ["what is on the left of the dog ?", "how many dogs are ?"]
    assert [sample.references for sample in samples] == [["chair, table"], ["2"]]
    metrics, records = evaluate(
        tmp_path / "out", task="vqa", benchmark="daquar", metric="wups", wordnet=WORDNET, data=data, image_folder=photos,
        model=opt, candidates=put(tmp_path / "answers.txt", "table\nchair\n"),
    )  # fmt: skip
    assert {"wups_0.9", "wups_0.0", "exact_match"} <= metrics["metrics"].keys()
    assert (tmp_path / "out" / "results.txt").read_text().splitlines() == texts_of(records)
    with pytest.raises(ValueError, match="question 1, 'what', names no image such as image3"):
        evaluation_rows(put(tmp_path / "other.txt", "what\nyes\n"), "all")


def test_flickr8k_text_file_and_karpathy(tmp_path):
    photos = make_photos(tmp_path / "Flicker8k_Dataset", "{}_a.jpg")
    lines = [f"{n}_a.jpg#{k}\tA dog {k} ." for n in (1, 2, 3) for k in range(5)]
    data = put(tmp_path / "Flickr8k.token.txt", "\n".join(lines))
    put(tmp_path / "Flickr_8k.testImages.txt", "3_a.jpg\n1_a.jpg\n")
    samples = read(data, "caption", photos, "test").samples
    assert [sample.image_id for sample in samples] == ["1_a.jpg", "3_a.jpg"] and len(samples[0].references) == 5
    assert len(read(data, "caption", photos)) == 3
    images = [
        {"filename": f"{n}_a.jpg", "imgid": n, "split": "test", "sentences": [{"raw": f"A dog {k}."} for k in range(5)]}
        for n in (1, 2)
    ]
    karpathy = put(tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    data = read(karpathy, "retrieval", photos, "test", clean_texts=True)
    assert data.texts[0][0] == "a dog 0" and [sample.image_id for sample in data.samples] == [1, 2]


def test_pairs_of_one_image_are_one_sample_and_questions_are_many(tmp_path):
    photos = make_photos(tmp_path / "photos")
    rows = [{"image": f"{n:012d}.jpg", "caption": text} for n, text in ((1, "a"), (2, "b"), (1, "c"))]
    samples = read(put(tmp_path / "pairs.json", rows), "caption", photos).samples
    assert [(sample.image_id, sample.references) for sample in samples] == [(1, ["a", "c"]), (2, ["b"])]
    rows = [{"image": f"{1:012d}.jpg", "questions": ["", "what ?", "who ?"], "answers": ["x", "cup, stand", "me"]}]
    samples = read(put(tmp_path / "many.json", rows), "vqa", photos).samples
    assert [(s.question, s.references) for s in samples] == [("what ?", ["cup, stand"]), ("who ?", ["me"])]
    assert len({sample.question_id for sample in samples}) == 2


# Retrieval


def retrieval_set(stage1: str, tmp_path: Path, images: int, texts: int, **options) -> RetrievalSet:
    photos = make_photos(tmp_path / "photos", count=images)
    words = "a the red green blue circle square dog cat left right above below and".split()
    rows = [
        {
            "image": f"{n:012d}.jpg",
            "caption": [" ".join(words[(n * k) % 7 :][: 3 + k % 5]) + f" {k}" for k in range(texts)],
        }
        for n in range(1, images + 1)
    ]
    checkpoint = load_checkpoint(stage1, "cpu")
    data = read(put(tmp_path / "rows.json", rows), "retrieval", photos, clean_texts=True)
    return RetrievalSet(checkpoint.model, data, checkpoint.stage1_collator(32), Accelerator(cpu=True), **options)


@pytest.mark.parametrize("keep_images", [True, False])
def test_grouped_pairs_equal_the_plain_pair_loop(stage1, tmp_path, monkeypatch, keep_images):
    monkeypatch.setattr("blip2x_training.evaluation.retrieval.PAIRS_AT_ONCE", 7)  # images are cut over several groups
    data = retrieval_set(stage1, tmp_path, images=5, texts=3, batch_size=2, keep_images=keep_images)
    listed = shortlists(data.cosines, 4)
    no_match, match = match_shortlists(data, listed)
    wanted = listed["i2t"] | listed["t2i"]
    assert listed["i2t"].sum() == 5 * 4 and listed["t2i"].sum() == 15 * 4 and not wanted.all()
    processor = load_checkpoint(stage1, "cpu").processor
    for image in range(5):
        pixels = processor.image_processor(images=[data.dataset.image_of(image)], return_tensors="pt")["pixel_values"]
        for text in range(15):
            encoded = processor.tokenizer([data.texts[text]], return_tensors="pt")
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            with torch.no_grad():
                alone = data.model.itm_logits(pixels, ids, mask)[0]
                features = data.model.get_image_features(pixels).pooler_output
                cosine = data.model.itc_scores(features, data.model.get_text_features(ids, mask).pooler_output)
            assert data.cosines[image, text] == pytest.approx(cosine.item(), abs=1e-5)
            expected = alone if wanted[image, text] else torch.zeros(2)
            found = torch.stack([no_match[image, text], match[image, text]])
            assert torch.allclose(found, expected, atol=1e-4)
    assert match[wanted].std() > 0.01  # the pairs differ, so the equality says something


def test_rerank_modes_are_what_they_say(stage1, tmp_path):
    data = retrieval_set(stage1, tmp_path, images=6, texts=2)
    found = rerank(data, 3, 0.1)
    listed = shortlists(data.cosines, 3)
    no_match, match = match_shortlists(data, listed)
    formulas = {
        "itm": match,
        "itm+itc": match + data.cosines,
        "itm+logits": data.cosines / 0.1 + (match - no_match) / 2,
    }
    for mode, scores in formulas.items():
        assert torch.equal(mode_scores(mode, data.cosines, no_match, match, 0.1), scores)
        for way, mask in listed.items():
            ranked = ranked_scores(scores, data.cosines, mask)
            assert ranked[mask].min() > ranked[~mask].max()
            outside = ranked[~mask].argsort()
            assert torch.equal(outside, data.cosines.double()[~mask].argsort())
            recalls = recall_at_k(ranked, data.owner)
            assert all(found[f"{name}_{mode}"] == value for name, value in recalls.items() if name.startswith(way))


def test_reranking_reads_each_image_once(stage1, tmp_path):
    """The Q-Former's keys of an image, which cost most, are computed once for all texts that it is matched with."""
    data = retrieval_set(stage1, tmp_path, images=4, texts=4)
    rows = []
    keys = [module for name, module in data.model.named_modules() if name.endswith("crossattention.key")]
    keys[0].register_forward_hook(lambda module, given, output: rows.append(len(given[0])))
    _, match = match_shortlists(data, shortlists(data.cosines, 16))
    grouped = sum(rows)
    rows.clear()
    for image in range(4):
        for text in range(16):
            pair = data.match_logits(torch.tensor([image]), torch.tensor([text]))
            assert pair[0, 1] == pytest.approx(match[image, text].item(), abs=1e-4)
    assert (grouped, sum(rows)) == (4, 64)


def test_the_report_shows_the_worst_case_of_different_images():
    """Two questions about each of nine images: one answered well, one badly on two images."""
    records = [
        {"number": 2 * image + turn, "image_id": image, "score": 0.0 if turn and image in (3, 5) else 100.0}
        for image in range(9)
        for turn in range(2)
    ]
    sections = choose_records(records, "vqa")
    assert [record["number"] for record in sections["Worst"]][:2] == [7, 11]
    assert all(record["score"] == 100 for record in sections["Best"])
    for chosen in sections.values():
        assert len({record["number"] for record in chosen}) == len(chosen)
    for title in ("Best", "Worst"):
        assert len({record["image_id"] for record in sections[title]}) == len(sections[title])


def ranked(*ranks: int) -> list[dict]:
    """Records of retrieval: each image's own text is called by its number, and found first where the rank is 1."""
    return [
        {"number": n, "image_id": n, "rank": rank, "score": 100 / rank, "references": [f"text {n}"]}
        | {"prediction": f"text {n}" if rank == 1 else "another"}
        for n, rank in enumerate(ranks)
    ]


def test_the_report_counts_ranks():
    bars = score_bars(ranked(1, 1, 1, 2, 3, 4, 5, 6, 10, 11, 40), "retrieval")
    assert [label for _, label in bars.ticks] == ["1", "2", "3", "4-5", "6-10", ">10"]
    assert bars.counts == [3, 1, 1, 2, 2, 2] and bars.tones == ["good", "", "", "", "", ""] and not bars.note


def test_a_text_that_is_word_for_word_the_images_own_is_no_bad_case():
    records = ranked(1, 1, 1, 1, 1, 1, 2, 5, 3)
    records[7]["prediction"] = "text 7"
    sections = choose_records(records, "retrieval")
    assert [record["number"] for record in sections["Worst"]] == [8, 6]
    assert score_text(records[7], "retrieval") == "own text at rank 5, tied: same words"
    assert [tone(records[n], "retrieval") for n in (0, 7, 8)] == ["good", "", ""]
    bars = score_bars(records, "retrieval")
    assert bars.counts == [6, 1, 1, 1, 0, 0] and bars.note.startswith("1 of the 3 images beyond rank 1")


def test_worst_are_wrong_ones_alone():
    answers = [{"number": n, "image_id": n, "score": 0.0 if n in (4, 9, 11) else 100.0} for n in range(30)]
    sections = choose_records(answers, "classification")
    assert [record["number"] for record in sections["Worst"]] == [4, 9, 11]
    assert heading("Worst", sections["Worst"], answers, "classification") == "Worst: all 3 images in a wrong class"
    assert heading("Best", sections["Best"], answers, "classification").startswith("Best: 4 of 27 ")
    assert "Worst" not in choose_records(answers[12:], "classification")
    captions = [
        {"number": n, "image_id": n, "score": 10.0 * n, "prediction": f"{n}", "references": ["0", "x"]}
        for n in range(9)
    ]
    assert [record["number"] for record in choose_records(captions, "caption")["Worst"]] == [1, 2, 3]


def test_right_or_wrong_has_two_bars_and_credit_one_for_each_value():
    records = [{"score": score, "groups": {"question_type": kind}} for score, kind in ((100.0, "is"), (0.0, "how"))]
    records += records[:1] * 3
    bars = score_bars(records, "vqa")
    assert bars.counts == [4, 1] and bars.tones == ["good", "bad"] and bars.title == "Right 4, wrong 1 of 5 answers"
    types = type_bars({"exact_match": 80.0, "question_type/how": 0.0, "question_type/is": 100.0}, records)
    assert types == {"question_type": [("is", 100.0, 4), ("how", 0.0, 1)]}
    bars = score_bars([*records, {"score": 30.0}, {"score": 60.0}, {"score": 30.0}], "vqa")
    assert bars.counts == [1, 2, 1, 4] and [label for _, label in bars.ticks] == ["0", "30", "60", "100"]
    bars = score_bars([{"score": score} for score in (0.0, 99.9, 250.0, 1000.0000001)], "caption")
    assert (
        bars.counts == [2, 0, 1, 0, 0, 0, 0, 0, 0, 1] and bars.ticks[-1] == (10.0, "1000") and set(bars.tones) == {""}
    )
    assert score_bars([{"prediction": "blind"}], "vqa") is None


def test_answers_of_many_people_are_counted():
    assert wanted({"references": ["no"] * 7 + ["blue"] * 3}, "vqa") == ["no ×7, blue ×3"]
    assert wanted({"references": ["cup", "stand"]}, "vqa") == ["cup", "stand"]
    assert wanted({"references": ["a dog", "a dog"]}, "caption") == ["a dog"]


def test_figures_of_several_rankings_stand_side_by_side():
    figures = {f"{way}_{name}": 50.0 for way in ("i2t", "t2i") for name in ("r1", "r5", "r10", "median_rank")}
    summary = {"metrics": figures, "protocol": {"task": "retrieval", "score_mode": "itc"}}
    heads, rows = figure_table(summary)
    assert heads == ["ITC"] and len(rows) == 8 and rows[0] == ("image to text, R@1", ["50.0"])
    summary["metrics"] = figures | {f"{name}_itc": 40.0 for name in figures}
    summary["protocol"]["score_mode"] = "itm"
    heads, rows = figure_table(summary)
    assert heads == ["re-ranked (itm)", "ITC alone"] and [cells for _, cells in rows] == [["50.0", "40.0"]] * 8
    domains = {"Bleu_4": 1.0, "CIDEr": 2.0, "Bleu_4_in": 3.0, "CIDEr_in": 4.0, "Bleu_4_out": 5.0, "itc_score": 6.0}
    heads, rows = figure_table({"metrics": domains, "protocol": {"task": "caption"}})
    assert heads == ["overall", "in", "out"] and dict(rows)["CIDEr"] == ["2.0", "4.0", ""]
    assert dict(rows)["ITC score"] == ["6.0", "", ""]
