"""Attention word by word as the Space computes it: for the ITG head, an encoder-decoder model, and long texts."""

import answers
import attention
import matching
import models as space_models
import pytest
import torch
from settings import Settings
from uploads import open_upload

from tests.helpers.space_server import (
    EXAMPLES,
    NEVER,
    save_tiny,
)
from tests.helpers.tiny import stage1, stage2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def loaded(folders):
    return space_models.load_models([str(folder) for folder in folders], "cpu")


def test_itg_attentions_sum_to_one():
    model = stage1().eval()
    out = model.generate(
        torch.randn(2, 3, 28, 28), max_new_tokens=3, output_attentions=True, return_dict_in_generate=True
    )
    for step, layers in enumerate(out.attentions):
        assert len(layers) == 4
        for weights in layers:
            assert weights.shape == (2, 4, step + 1, 6 + step + 1)
            assert torch.allclose(weights.sum(-1), torch.ones(2, 4, step + 1), atol=1e-5)


def test_an_encoder_decoder_model_answers_and_gets_word_maps_too():
    from tests.helpers.tiny import stage2_processor

    processor = stage2_processor(bos=False)
    model = stage2("t5", std=0.5, image_token_index=processor.image_token_id)
    part = space_models.Part("t5", "t5", model, processor)
    settings = Settings(num_beams=1, max_length=5)
    words, weights = attention.word_weights(part, open_upload(EXAMPLES[0]), "a photo of", settings, NEVER)
    assert weights.shape == (len(words), 6) and len(words) > 1
    assert " ".join(words) == answers.caption(part, open_upload(EXAMPLES[0]), "a photo of", settings, NEVER)[0]
    inputs = processor(images=open_upload(EXAMPLES[0]), text="Question: is it red? Answer:", return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=5, min_new_tokens=1)
    *_, (said, _) = answers.answer(
        space_models.Models(part, None), open_upload(EXAMPLES[0]), "is it red?", [], settings
    )
    assert said == processor.batch_decode_new(ids, inputs["input_ids"])[0] != ""


def test_a_text_longer_than_the_qformer_reads_is_cut(loaded):
    long = ["red " * 120, "a dog"]
    assert len(matching.match(loaded, [open_upload(EXAMPLES[0])], long, NEVER, print)["itc"][0]) == 2
