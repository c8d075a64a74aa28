"""What tells grounding from fluency: unlike texts, and what is lost with the images of other rows."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from blip2x_training import pretrain_stage2
from blip2x_training.evaluation.grounding import caption_grounding, others, variety
from blip2x_training.evaluation.image_worth import image_worth
from blip2x_training.metrics.caption.scores import caption_scores
from blip2x_training.reporting.health import Watch
from tests.helpers.evaluation_parts import coco_file, evaluate, make_photos, make_stage1, make_stage2, texts_of
from tests.helpers.training_parts import SMALL_QFORMER, make_image_folder, make_language_model, make_vision_model
from tests.helpers.training_runs import metrics

IMAGES = [3, 1, 1, 2, 5, 1, 4, 6]


@pytest.mark.parametrize(
    "images", (IMAGES, list(range(9)), ["a", "b"], [1, 1, 2, 2], ["b.png", "a.png", "b.png", "c", "d"])
)
def test_every_row_gets_the_image_of_another(images):
    partner = others(images)
    assert sorted(partner) == list(range(len(images))), "each is taken once"
    assert all(images[row] != images[other] for row, other in enumerate(partner))
    assert partner == others(images)


@pytest.mark.parametrize("images", ([1], [1, 1, 2], []))
def test_where_one_image_has_more_than_half_there_are_no_others(images):
    assert others(images) is None or not images


def test_captions_are_counted_and_scored_for_other_images():
    texts = [f"a {thing} in the snow" for thing in ("dog", "cat", "dog", "bird", "man", "cow", "car", "dog")]
    references = [[text, "something else"] for text in texts]
    assert variety(texts) == {"unique_texts": 6, "commonest_text": 37.5}
    found = caption_grounding(texts, references, list(range(8)))
    expected = caption_scores([texts[row] for row in (4, 5, 6, 7, 0, 1, 2, 3)], references)["CIDEr"]
    assert found["cider_other_images"] == expected < caption_scores(texts, references)["CIDEr"]
    assert "cider_other_images" not in caption_grounding(texts[:4], references[:4], range(4)), "too few to tell"
    assert variety([]) == {}


class Reader(torch.nn.Module):
    """Predicts each next token with the confidence that its image tells, or the same for all."""

    def __init__(self, is_encoder_decoder: bool, looks: bool):
        super().__init__()
        self.config = type("Config", (), {"is_encoder_decoder": is_encoder_decoder})
        self.looks = looks

    def forward(self, vision_embeds, labels):
        told = vision_embeds[:, 0, 0].long() if self.looks else torch.zeros(len(labels), dtype=torch.long)
        logits = 2.0 * torch.nn.functional.one_hot(told, 20).float()
        return type("Outputs", (), {"logits": logits[:, None].expand(-1, labels.shape[1], -1)})


class Rows:
    """Row n shows image n and its text is the token n, n % 3 + 1 times, after a place that is not supervised."""

    def __getitem__(self, key):
        return {"vision_embeds": torch.full((1, 1), float(key[1])), "text": [-100] + [key[1]] * (key[1] % 3 + 1)}


def collate(items):
    longest = max(len(item["text"]) for item in items)
    labels = [item["text"] + [-100] * (longest - len(item["text"])) for item in items]
    return {"vision_embeds": torch.stack([item["vision_embeds"] for item in items]), "labels": torch.tensor(labels)}


@pytest.mark.parametrize("is_encoder_decoder", (False, True))
def test_worth_of_an_image_by_hand(is_encoder_decoder):
    found = image_worth(Accelerator(), Reader(is_encoder_decoder, looks=True), Rows(), collate, range(12), 5)
    # log(e^2 + 19) - 2 with the own image; log(e^2 + 19) with another: 2 nats a token, whatever the text's length.
    assert found["image_worth"] == pytest.approx(2.0, abs=1e-5) and found["image_worth_error"] < 1e-6
    blind = image_worth(Accelerator(), Reader(is_encoder_decoder, looks=False), Rows(), collate, range(12), 5)
    assert blind == {"image_worth": 0.0, "image_worth_error": 0.0}
    assert image_worth(Accelerator(), Reader(is_encoder_decoder, True), Rows(), collate, [1] * 12, 5) == {}


@pytest.mark.parametrize(("worth", "error", "told"), [(0.0005, 0.0, True), (0.03, 0.02, True), (0.05, 0.02, False)])
def test_images_that_are_worth_nothing_are_told_once(worth, error, told):
    said = []
    watch = Watch(warmup_steps=0, say=said.append)
    for step in (10, 20):
        watch.look({"step": step, "eval_loss": 1.0, "eval_image_worth": worth, "eval_image_worth_error": error})
    assert len(said) == told
    assert not told or said[0].startswith("warning: Step 10: the images are worth nothing to the language model")


def test_stage2_logs_them(tmp_path):
    dataset = make_image_folder(tmp_path / "data", {"train": 8, "validation": 8})
    parts = {
        "dataset": dataset,
        "vision_model": make_vision_model(tmp_path / "tower"),
        "language_model": make_language_model(tmp_path / "language", "opt"),
        "qformer_config": json.dumps(SMALL_QFORMER),
        "output_dir": tmp_path / "out",
    }
    run = {"eval_split": "validation", "max_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 4}
    pretrain_stage2.main([word for name, value in (parts | run).items() for word in (f"--{name}", str(value))])
    trained, validated = metrics(tmp_path / "out")
    assert {"eval_unique_texts", "eval_commonest_text", "eval_cider_other_images"} <= validated.keys()
    assert math.isfinite(validated["eval_image_worth"]) and validated["eval_image_worth_error"] >= 0
    assert -1 <= trained["query_similarity"] <= 1, "in training too"


@pytest.mark.parametrize(("make", "llm"), [(make_stage2, "opt"), (make_stage2, "t5"), (make_stage1, None)])
def test_evaluation_tells_them(make, llm, tmp_path):
    count = 10
    photos = make_photos(tmp_path / "photos", count=count)
    captions = {number: [f"a {number} in the snow", f"number {number}"] for number in range(1, count + 1)}
    data = coco_file(tmp_path / "captions.json", captions)
    model = make(tmp_path / "model", llm) if llm else make(tmp_path / "model")
    found, records = evaluate(tmp_path / "out", model=model, task="caption", data=data, image_folder=photos)
    texts, partner = texts_of(records), others(list(captions))
    exchanged = caption_scores([texts[row] for row in partner], list(captions.values()))["CIDEr"]
    assert found["metrics"]["CIDEr_other_images"] == pytest.approx(100 * exchanged)
    assert found["metrics"]["unique_texts"] == len(set(texts))
    assert ("image_worth" in found["metrics"]) == (llm is not None)
    if llm:
        assert found["metrics"]["image_worth_error"] > 0 and abs(found["metrics"]["image_worth"]) < 5


def test_evaluation_without_looking(tmp_path):
    """--other_images: each sample is shown its partner's image, so what is written is the partner's."""
    captions = {number: [f"a {number} in the snow"] for number in range(1, 11)}
    given = {
        "model": make_stage2(tmp_path / "model", "opt"),
        "task": "caption",
        "data": coco_file(tmp_path / "captions.json", captions),
        "image_folder": make_photos(tmp_path / "photos", count=10),
    }
    plain, blind = (evaluate(tmp_path / str(other), **given, other_images=other) for other in (False, True))
    texts = texts_of(plain[1])
    assert texts_of(blind[1]) == [texts[row] for row in others(list(captions))] and len(set(texts)) > 1
    assert "image_worth" not in blind[0]["metrics"] and "images" in blind[0]["protocol"]
    with pytest.raises(ValueError, match="--other_images is for captions and answers, not for --task retrieval"):
        evaluate(tmp_path / "other", **given | {"task": "retrieval"}, other_images=True)
