"""Tensors that no model can read are a sentence: in the processor, in both stages, from every way in."""

import pytest
import torch

from tests.helpers.tiny import LANGUAGE_MODELS, image, prompt, stage1, stage1_processor, stage2, stage2_processor

NAN, INFINITE = float("nan"), float("inf")


def pixels(rows: int, wrong: float | None = None) -> torch.Tensor:
    """(rows, 3, 28, 28); the last row with one wrong value."""
    values = torch.rand(rows, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    if wrong is not None:
        values[-1, 1, 2, 3] = wrong
    return values


def calls_of_stage1(ids: torch.Tensor) -> list:
    """Everything that takes images, as functions of a model and of pixel_values or vision_embeds by name."""
    return [
        lambda model, images: model(**images, input_ids=ids),
        lambda model, images: model.get_image_features(**images),
        lambda model, images: model.query_attention(**images),
        lambda model, images: model.generate(**images, max_new_tokens=2),
        lambda model, images: model.itm_scores(**images, input_ids=ids),
        lambda model, images: model.itm_scores(**images, input_ids=ids, grid=True),
        lambda model, images: model.get_multimodal_features(**images, input_ids=ids),
    ]


def calls_of_stage2(ids: torch.Tensor, decoder: dict) -> list:
    return [
        lambda model, images: model(**images, input_ids=ids, **decoder),
        lambda model, images: model.get_image_features(**images),
        lambda model, images: model.query_attention(**images),
        lambda model, images: model.generate(**images, input_ids=ids, max_new_tokens=2),
        lambda model, images: model.generate(**images, max_new_tokens=2),
    ]


def refused_in_words(model, calls: list) -> None:
    for call in calls:
        for wrong in (NAN, INFINITE, -INFINITE):
            with pytest.raises(ValueError, match="pixel_values has NaN or infinite values in row 1"):
                call(model, {"pixel_values": pixels(2, wrong)})
        with pytest.raises(ValueError, match=r"pixel_values has no image: its shape is \(0, 3, 28, 28\)"):
            call(model, {"pixel_values": pixels(0)})
        features = model.get_image_features(pixels(2)).last_hidden_state
        assert call(model, {"vision_embeds": features}) is not None
        for row in (features[:0], features * torch.tensor([1.0, NAN])[:, None, None]):
            with pytest.raises(ValueError, match="vision_embeds has (no image|NaN or infinite values in row 1)"):
                call(model, {"vision_embeds": row})


@torch.no_grad()
def test_images_that_are_none_in_stage1():
    refused_in_words(stage1().eval(), calls_of_stage1(torch.tensor([[2, 6, 7, 3]] * 2)))


@torch.no_grad()
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_images_that_are_none_in_stage2(language_model):
    model = stage2(language_model).eval()
    given = prompt(model)
    decoder = {"decoder_input_ids": given["input_ids"][:, -1:]} if language_model == "t5" else {}
    refused_in_words(model, calls_of_stage2(given["input_ids"], decoder))


@torch.no_grad()
@pytest.mark.parametrize(
    "shape, said",
    [((1, 5000), "has 5000 tokens but max_position_embeddings is 64"), ((0, 5), "is empty"), ((1, 0), "is empty")],
)
def test_texts_that_the_qformer_cannot_read(shape, said):
    model, ids = stage1().eval(), torch.full(shape, 6)
    calls = [lambda: model.get_text_features(ids), lambda: model.itm_scores(pixels(1), ids, grid=True)]
    if len(ids):
        calls += [lambda: model(pixel_values=pixels(1), input_ids=ids), lambda: model.itm_scores(pixels(1), ids)]
    for call in calls:
        with pytest.raises(ValueError, match=f"The text for the Q-Former {said}"):
            call()


@torch.no_grad()
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_prompts_that_the_language_model_cannot_read(language_model):
    processor = stage2_processor(bos=language_model != "t5")
    model = stage2(language_model, image_token_index=processor.image_token_id).eval()
    longest = getattr(model.config.text_config, "max_position_embeddings", None)
    if language_model == "qwen":  # whose rotary positions have no table, and by default no end for this test
        longest = model.config.text_config.max_position_embeddings = 64
    inputs = processor(image("red"), "red " * 5000, return_tensors="pt")
    if longest is not None:
        with pytest.raises(
            ValueError, match=f"tokens, those of images included, but the language model reads {longest}"
        ):
            model.generate(**inputs, max_new_tokens=1)
        with pytest.raises(ValueError, match=f"but the language model reads {longest}"):
            model(**inputs)
        # Padding takes no position: as many tokens as there is room for, and many places of padding before them.
        short = processor(image("red"), "red " * 5, padding="max_length", max_length=longest + 20, return_tensors="pt")
        assert short["input_ids"].shape[1] == longest + 20
        assert torch.isfinite(model(**short).logits).all()
    decoder = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if language_model == "t5" else {}
    for empty in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="The prompt is empty"):
            model(input_ids=torch.zeros(empty, dtype=torch.long), **decoder)


@pytest.mark.parametrize("make", [stage1_processor, stage2_processor])
def test_a_processor_refuses_what_is_empty_or_no_number(make):
    processor = make()
    for nothing in ({"text": []}, {"images": image("red"), "text": []}, {"images": [], "text": []}):
        with pytest.raises(ValueError, match="text is an empty list"):
            processor(**nothing)
    for nothing in ({}, {"images": []}, {"images": None, "text": None}, {"images": torch.zeros(0, 3, 28, 28)}):
        with pytest.raises(ValueError, match="both are None or empty"):
            processor(**nothing)
    for wrong in (NAN, INFINITE):
        with pytest.raises(ValueError, match=r"images\[1\].*NaN or infinite"):
            processor(images=pixels(2, wrong), text=["a dog"] * 2)
    ids = processor(images=image("red"), text="red " * 5000)["input_ids"]
    while isinstance(ids[0], list):
        ids = ids[0]
    assert len(ids) >= 5000  # nothing is cut unless it is asked for
