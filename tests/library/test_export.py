"""torch.export and ONNX with a free batch: other numbers of rows than the example's, and other lengths of text."""

import re
from pathlib import Path

import pytest
import torch

from modeling_blip2x import Blip2xForImageTextRetrieval
from tests.helpers.tiny import batch, prompt, stage1, stage2

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
ROWS, LENGTH = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=2, max=60)
PAIRS = ({0: ROWS}, {0: ROWS, 1: LENGTH}, {0: ROWS, 1: LENGTH})


class Part(torch.nn.Module):
    """A call of a model as a module of its own."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model.eval(), call

    def forward(self, *inputs):
        return self.call(self.model, *inputs)


def features(model, pixels):
    return model.get_image_features(pixels).pooler_output


def informed_features(model, pixels, ids, mask):
    return model.get_image_features(pixels, qformer_input_ids=ids, qformer_attention_mask=mask).pooler_output


def scores(model, pixels, ids, mask):
    return (
        features(model, pixels),
        model.get_text_features(ids, mask).pooler_output,
        model.itm_logits(pixels, ids, mask),
    )


def logits_per_image(model, pixels, ids, mask):
    return model(pixels, ids, mask).logits_per_image


def logits(model, pixels, ids, mask):
    return model(pixels, ids, mask, use_cache=False).logits


def decoder_logits(model, pixels, ids, mask, decoder_ids):
    return model(pixels, ids, mask, decoder_input_ids=decoder_ids, use_cache=False).logits


@torch.no_grad()
def assert_exports(part, example, others, shapes, strict=False):
    """The exported program gives for other inputs what the module gives, which is not what the example has."""
    program = torch.export.export(part, example, dynamic_shapes=(shapes,), strict=strict).module()
    for inputs in others:
        expected, found = part(*inputs), program(*inputs)
        expected, found = (x if isinstance(x, tuple) else (x,) for x in (expected, found))
        assert len(found) == len(expected)
        for here, there in zip(found, expected):
            assert here.shape == there.shape and here.shape[0] == len(inputs[0])
            assert torch.allclose(here, there, atol=1e-5)


def pairs(rows, length, seed=0):
    made = batch(rows, length, seed)
    return made["pixel_values"], made["input_ids"], made["attention_mask"]


def prompts(model, rows, text, seed=0):
    made = prompt(model, rows, text, seed)
    return made["pixel_values"], made["input_ids"], made["attention_mask"]


@pytest.mark.parametrize("tower", ["clip", "eva"])
def test_image_features(tower):
    model = stage2("opt", tower, std=0.2)
    images = [(pairs(rows, 9, seed=rows)[0],) for rows in (2, 5, 1)]
    assert_exports(Part(model, features), images[0], images[1:], ({0: ROWS},))


@pytest.mark.parametrize("call, strict", [(scores, False), (scores, True), (informed_features, False)])
def test_pairs(call, strict):
    model = stage1() if call is scores else stage2("opt", std=0.2)
    assert_exports(Part(model, call), pairs(2, 9), [pairs(5, 12, 1), pairs(1, 4, 2)], PAIRS, strict)


def test_retrieval_of_other_numbers_of_images_and_texts():
    first = stage1()
    model = Blip2xForImageTextRetrieval(first.config)
    model.load_state_dict(first.state_dict())
    texts = torch.export.Dim("texts", min=1, max=64)
    shapes = ({0: ROWS}, {0: texts, 1: LENGTH}, {0: texts, 1: LENGTH})
    mixed = [(pairs(n, 9, n)[0], *pairs(m, length, m)[1:]) for n, m, length in ((2, 3, 9), (5, 4, 12), (1, 6, 5))]
    assert_exports(Part(model, logits_per_image), mixed[0], mixed[1:], shapes)


@pytest.mark.parametrize("language_model", ["opt", "llama", "t5"])
def test_generative_forward(language_model):
    model = stage2(language_model, std=0.2)
    example, *others = [prompts(model, rows, text, seed=rows) for rows, text in ((2, 5), (5, 8), (1, 3))]
    if language_model == "t5":
        example, *others = [(*inputs, inputs[1][:, -length:]) for inputs, length in ((example, 3), (others[0], 5))]
        targets = torch.export.Dim("targets", min=1, max=32)
        # strict, for without it transformers' T5 forbids targets that are as long as the example's prompt
        assert_exports(Part(model, decoder_logits), example, others, (*PAIRS, {0: ROWS, 1: targets}), strict=True)
    else:
        assert_exports(Part(model, logits), example, others, PAIRS)


def test_the_page_in_its_order(tmp_path, monkeypatch):
    """docs/export.md, block by block; its three ONNX files against the models, on other numbers of rows."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    stage1().eval().save_pretrained(tmp_path / "stage1")
    stage2("opt", std=0.2).save_pretrained(tmp_path / "stage2")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    generative, matching, run = names["generative"], names["matching"], names["run"]
    for rows, length in ((5, 11), (1, 4)):
        images, ids, mask = pairs(rows, length, seed=rows)
        expected = {
            "features.onnx": (names["ImageFeatures"](generative), (images,)),
            "scores.onnx": (names["Scores"](matching), (images, ids, mask)),
            "logits.onnx": (names["Logits"](generative), prompts(generative, rows, length)),
        }
        for file, (part, inputs) in expected.items():
            with torch.no_grad():
                wanted = part(*inputs)
            for here, there in zip(run(file, *inputs), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
                assert torch.allclose(torch.from_numpy(here), there, atol=1e-4), file
    again = torch.export.load("features.pt2").module()
    with torch.no_grad():
        assert torch.allclose(again(images), names["ImageFeatures"](generative)(images), atol=1e-5)
