"""run_evaluation.py where it ranks: retrieval, classes and closed sets of answers, against one pair at a time."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip2x_training.data.transforms import clean_caption
from blip2x_training.evaluation.choosing import name_labels
from blip2x_training.metrics.retrieval_recall.scores import recall_at_k
from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor
from tests.helpers.evaluation_parts import coco_file, evaluate, make_photos, make_stage1, make_stage2, put, texts_of

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square", "dog", "cat")
TEXTS = {
    number: [
        f"a {COLOURS[number % 3]} {SHAPES[number % 4]}",
        f"{SHAPES[number % 4]} on the {COLOURS[number % 3]} {side}",
    ]
    for number, side in enumerate(("left", "right", "picture") * 4, start=1)
}
CLASSES = {
    "n01440764": "red square",
    "n01443537": "green dog",
    "n01484850": "blue circle",
    "n01491361": "cat",
    "n01494475": "left",
    "n01496331": "a dog on the right",
    "n01498041": "two circle below",
}
RERANK_K = 3


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """photos/ of 12 images, captions.json with two texts of each, stage1/, opt/ and t5/."""
    root = tmp_path_factory.mktemp("choosing")
    make_photos(root / "photos", count=len(TEXTS))
    coco_file(root / "captions.json", TEXTS)
    make_stage1(root / "stage1")
    make_stage2(root / "opt")
    make_stage2(root / "t5", "t5")
    return root


@pytest.fixture(scope="module")
def pairs(parts) -> dict[str, torch.Tensor]:
    """Cosines and both ITM logits (12, 24) of each image with each text by itself, and the temperature."""
    model = Blip2xForPreTraining.from_pretrained(parts / "stage1").eval()
    processor = Blip2xProcessor.from_pretrained(parts / "stage1")
    cosines, logits = [], []
    with torch.no_grad():
        for number in TEXTS:
            pixels = pixels_of(processor, parts / "photos" / f"{number:012d}.jpg")
            image = model.get_image_features(pixels).pooler_output
            for text in (text for texts in TEXTS.values() for text in texts):
                words = processor.tokenizer(clean_caption(text), return_tensors="pt")
                ids, mask = words["input_ids"], words["attention_mask"]
                cosines.append(model.itc_scores(image, model.get_text_features(ids, mask).pooler_output)[0, 0])
                logits.append(model.itm_logits(pixels, ids, mask)[0])
    no_match, match = torch.stack(logits).double().T.reshape(2, len(TEXTS), -1)
    cosines = torch.stack(cosines).double().view_as(match)
    return {"cosines": cosines, "no_match": no_match, "match": match, "temperature": model.temperature.item()}


def pixels_of(processor: Blip2xProcessor, path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("score_mode", ["itc", "itm", "itm+itc", "itm+logits"])
def test_retrieval_by_the_script(parts, pairs, tmp_path, score_mode):
    metrics, records = evaluate(
        tmp_path, task="retrieval", model=parts / "stage1", data=parts / "captions.json", image_folder=parts / "photos",
        score_mode=score_mode, rerank_k=RERANK_K, report=True,
    )  # fmt: skip
    assert metrics["protocol"]["score_mode"] == score_mode
    cosines, match = pairs["cosines"], pairs["match"]
    scores = {
        "itc": cosines,
        "itm": match,
        "itm+itc": match + cosines,
        "itm+logits": cosines / pairs["temperature"] + (match - pairs["no_match"]) / 2,
    }[score_mode]
    owner = torch.arange(2 * len(TEXTS)) // 2
    for way, queries in (("i2t", 1), ("t2i", 0)):
        listed = cosines.argsort(queries, descending=True).argsort(queries) < RERANK_K  # by the rank in the ITC order
        ranked = cosines if score_mode == "itc" else scores.where(listed, cosines - 1000)
        expected = {name: value for name, value in recall_at_k(ranked, owner).items() if name.startswith(way)}
        assert {name: metrics["metrics"][name] for name in expected} == pytest.approx(expected)
        assert 0 < expected[f"{way}_r5"] < 100
        if way == "i2t":
            own = ranked.where(owner == torch.arange(len(TEXTS))[:, None], -torch.inf).amax(1, keepdim=True)
            ranks = 1 + ((ranked >= own) & (owner != torch.arange(len(TEXTS))[:, None])).sum(1)
            assert [record["rank"] for record in records] == ranks.tolist()
    assert [record["references"] for record in records] == [list(map(clean_caption, texts)) for texts in TEXTS.values()]


@pytest.mark.parametrize("kind", ["stage1", "opt", "t5"])
def test_classification_of_folders_named_by_wordnet(parts, tmp_path, kind):
    for number, code in enumerate(CLASSES):
        make_photos(tmp_path / "val" / code, f"{number}" + "{:03d}.jpg", 2)
    listed = "".join(f"{code} {name}, another name\n" for code, name in CLASSES.items())
    fields = {
        "task": "classification", "model": parts / kind, "data": tmp_path / "val", "split": "train", "report": True,
        "classes": put(tmp_path / "LOC_synset_mapping.txt", listed),
    }  # fmt: skip
    metrics, records = evaluate(tmp_path / "out", **fields)
    assert len(records) == metrics["protocol"]["samples"] == 2 * len(CLASSES)
    assert [record["references"] for record in records] == [[name] for name in CLASSES.values() for _ in range(2)]

    model = (Blip2xForPreTraining if kind == "stage1" else Blip2xForConditionalGeneration).from_pretrained(parts / kind)
    processor, first, five = Blip2xProcessor.from_pretrained(parts / kind), 0, 0
    prompt = metrics["protocol"]["templates" if kind == "stage1" else "prompt"].strip("'")
    photos = [path for code in CLASSES for path in sorted((tmp_path / "val" / code).iterdir())]
    for record, path in zip(records, photos, strict=True):
        if kind == "stage1":
            scores = {name: cosine(model.eval(), processor, path, prompt.format(name)) for name in CLASSES.values()}
        else:
            scores = {name: likelihood(model.eval(), processor, path, prompt, name) for name in CLASSES.values()}
        best = sorted(scores, key=scores.get, reverse=True)
        assert record["prediction"] == best[0] and [name for name, _ in record["top"]] == best[:5]
        first, five = first + (best[0] in record["references"]), five + (record["references"][0] in best[:5])
    assert metrics["metrics"]["top1"] == pytest.approx(100 * first / len(records))
    assert metrics["metrics"]["top5"] == pytest.approx(100 * five / len(records)) and five < len(records)


TWELVE = [str(number) for number in range(1, 13)]
FLOWERS = [f"flower {number}" for number in TWELVE]


@pytest.mark.parametrize("order", [sorted(TWELVE), TWELVE])
@pytest.mark.parametrize("labels", [set(TWELVE), set(range(1, 13))])
def test_labels_called_1_to_12_are_the_classes_of_that_name(order, labels):
    folders = sorted(TWELVE) if "1" in labels else None
    for named in (folders, None):
        assert name_labels(labels, order, {}, named) == {label: str(label) for label in labels}


def test_class_folders_called_1_to_12_by_the_script(parts, tmp_path):
    for name in TWELVE:
        make_photos(tmp_path / "val" / name, f"{name}_" + "{}.jpg", 1)
    fields = {"task": "classification", "model": parts / "stage1", "data": tmp_path / "val", "split": "train"}
    flowers = dict(zip(TWELVE, FLOWERS))
    (tmp_path / "folders.txt").write_text("\n".join(sorted(TWELVE)))
    (tmp_path / "keys.json").write_text(json.dumps(flowers))
    (tmp_path / "flowers.txt").write_text("\n".join(FLOWERS))
    for file, names in ((None, {}), ("folders.txt", {}), ("keys.json", flowers)):
        classes = {"classes": tmp_path / file} if file else {}
        _, records = evaluate(tmp_path / f"out_{file}", **fields, **classes)
        found = {Path(record["image"]).name.split("_")[0]: record["references"] for record in records}
        assert found == {name: [names.get(name, name)] for name in TWELVE}
    # In the order of the numbers, or in that of the folders? Nobody can say.
    with pytest.raises(ValueError, match='called 1, 10, 11 .* can be either.*JSON that says which: {"1": "name", "10"'):
        evaluate(tmp_path / "out", **fields, classes=tmp_path / "flowers.txt")


def test_numbers_name_classes_from_0_where_nothing_else_fits():
    names = [f"name {number}" for number in range(12)]
    counted = {number: f"name {number}" for number in range(12)}
    assert name_labels(set(range(12)), names, {}, None) == counted
    as_text = {str(number): name for number, name in counted.items()}  # a tar's .cls, or folders as ImageNetV2 has them
    assert name_labels(set(as_text), names, {}, None) == as_text
    assert name_labels(set(as_text), names, {}, sorted(as_text)) == as_text
    nine = sorted(TWELVE[:9])  # folders whose order as texts is that of the numbers
    assert name_labels(set(nine), names[:9], {}, nine) == dict(zip(nine, names))
    assert 12 not in name_labels({1, 12}, names, {}, None), "there is no class 12"
    assert name_labels({1, 2}, FLOWERS, dict(zip(TWELVE, FLOWERS)), None) == {1: "flower 1", 2: "flower 2"}
    with pytest.raises(ValueError, match="1 can be the class called 1 or the second class"):
        name_labels({0, 1, 2}, ["2", "1", "0"], {}, None)


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_candidates_are_ranked_by_their_mean_likelihood(parts, tmp_path, llm):
    rows = [{"image": f"{n:012d}.jpg", "question": "what colour ?", "answer": "red"} for n in (1, 2, 3)]
    candidates = ["red", "green dog", "a blue circle on the left", "yes"]
    fields = {
        "task": "vqa", "model": parts / llm, "data": put(tmp_path / "rows.json", rows), "image_folder": parts / "photos",
        "candidates": put(tmp_path / "answers.json", candidates),
    }  # fmt: skip
    _, records = evaluate(tmp_path / "all", **fields)
    _, single = evaluate(tmp_path / "one", **fields, batch_size=1)
    assert texts_of(records) == texts_of(single)
    model = Blip2xForConditionalGeneration.from_pretrained(parts / llm).eval()
    processor = Blip2xProcessor.from_pretrained(parts / llm)
    prompt = "Question: what colour ? " + ("Short answer:" if llm == "t5" else "Answer:")
    photo = parts / "photos" / f"{1:012d}.jpg"
    scores = {text: likelihood(model, processor, photo, prompt, text) for text in candidates}
    assert dict(records[0]["top"]) == pytest.approx(scores, abs=1e-4)
    assert [text for text, _ in records[0]["top"]] == sorted(scores, key=scores.get, reverse=True)


def cosine(model: Blip2xForPreTraining, processor: Blip2xProcessor, photo: Path, text: str) -> float:
    words = processor.tokenizer(clean_caption(text), return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(pixels_of(processor, photo)).pooler_output
        return model.itc_scores(image, model.get_text_features(**words).pooler_output).item()


def likelihood(
    model: Blip2xForConditionalGeneration, processor: Blip2xProcessor, photo: Path, prompt: str, text: str
) -> float:
    """Mean log-probability of the text's tokens and the end token after image and prompt."""
    with Image.open(photo) as image:
        image = image.convert("RGB")
    if model.config.is_encoder_decoder:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        labels = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        inputs = processor(images=image, text=f"{prompt} {text}", return_tensors="pt")
        end = torch.tensor([[processor.tokenizer.eos_token_id]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], end], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        labels = inputs["input_ids"].clone()
        labels[:, : -1 - len(text.split())] = -100
    with torch.no_grad():
        return -model(**inputs, labels=labels).loss.item()  # the mean over supervised tokens
