"""The Space in half precision, with quantized weights and from eight threads: what it says is what it should say."""

from concurrent.futures import ThreadPoolExecutor

import answers
import attention
import matching
import models as space_models
import pytest
import torch
import work
from settings import Settings
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, CLIPVisionConfig, OPTConfig

from modeling_blip2x import Blip2xConfig, Blip2xForConditionalGeneration
from tests.helpers.space_server import NEVER, TEXTS, WAIT
from tests.helpers.tiny import PATCH, QUERIES, SIZE, VOCABULARY, qformer_config, stage2_processor


def silent(*_):
    pass


def answered(models, *arguments) -> str:
    *_, (text, _) = answers.answer(models, *arguments)
    return text


def agreement(one, other) -> float:
    """Correlation of two tensors, or lists of numbers."""
    pair = [torch.as_tensor(values).float().flatten() for values in (one, other)]
    return torch.corrcoef(torch.stack(pair))[0, 1].item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_says_in_all_tabs_what_float32_says(loaded, pictures, dtype):
    half = space_models.load_models([part.source for part in loaded.parts], "cpu", dtype)
    assert [str(part.model.dtype) for part in half.parts] == [f"torch.{dtype}"] * 2
    scores, exact = (matching.match(models, pictures, TEXTS, NEVER, silent) for models in (half, loaded))
    assert torch.tensor(scores["itc"]).allclose(torch.tensor(exact["itc"]), atol=0.02)  # they spread over 0.8
    assert agreement(scores["itm"], exact["itm"]) > 0.97
    for part, whole in zip(half.parts, loaded.parts):
        assert agreement(part.see(pictures), whole.see(pictures)) > 0.999
        maps = attention.query_maps(part, pictures[0], None, None)
        others = [attention.query_maps(whole, picture, None, None) for picture in pictures]
        assert agreement(maps, others[0]) > 0.97 and max(agreement(maps, other) for other in others[1:]) < 0.8
    first_words = []
    for part in (half.speaker, loaded.speaker):
        with torch.no_grad():
            first_words.append(part.model(**answers.prompt_inputs(part, pictures[1], "a red")).logits[0, -1])
    assert agreement(*first_words) > 0.97
    inputs = half.speaker.processor(images=pictures[0], text="Question: what? Answer:", return_tensors="pt")
    ids = half.speaker.model.generate(**inputs, do_sample=False, max_new_tokens=9, min_new_tokens=1)
    expected = half.speaker.processor.batch_decode_new(ids, inputs["input_ids"])[0]
    assert answered(half, pictures[0], "what?", [], Settings(num_beams=1, max_length=9)) == expected != ""


def save_wide(folder):
    """A stage-2 checkpoint whose matrices are as wide as the kernels of bitsandbytes need: multiples of 64."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        num_hidden_layers=2,
        ffn_dim=128,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    processor = stage2_processor()
    config = Blip2xConfig(
        vision_config=vision.to_dict(),
        qformer_config=qformer_config(hidden_size=64, intermediate_size=128),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=processor.image_token_id,
    )
    torch.manual_seed(0)
    model = Blip2xForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("bits, least", [("8bit", 0.999), ("4bit", 0.97)])
def test_a_quantized_model_sees_what_float32_sees_and_says_what_the_library_says(tmp_path, pictures, bits, least):
    """On the CPU, where the tests run; the app itself offers it on a GPU only."""
    folder = save_wide(tmp_path)
    exact = space_models.load_part(folder, "cpu", "auto", "none")
    part = space_models.load_part(folder, "cpu", "auto", bits)
    assert not torch.equal(part.see(pictures), exact.see(pictures))  # it is quantized
    assert agreement(part.see(pictures), exact.see(pictures)) > least
    with torch.no_grad():
        seen, right = (one.model.get_image_features(vision_embeds=one.see(pictures)) for one in (part, exact))
    assert agreement(seen.pooler_output, right.pooler_output) > least
    assert agreement(seen.pooler_output, right.pooler_output.roll(1, 0)) < 0.95  # another picture's features
    assert agreement(*(attention.query_maps(one, pictures[0], None, None) for one in (part, exact))) > least
    quantized = BitsAndBytesConfig(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit")
    library = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=quantized, device_map="cpu")
    inputs = part.processor(images=pictures[0], text="Question: what? Answer:", return_tensors="pt")
    with torch.no_grad():
        ids = library.eval().generate(**inputs, do_sample=False, max_new_tokens=9, min_new_tokens=9)
    expected = part.processor.batch_decode_new(ids, inputs["input_ids"])[0]
    settings = Settings(num_beams=1, min_length=9, max_length=9)
    assert answered(space_models.Models(part, None), pictures[0], "what?", [], settings) == expected.strip() != ""


def test_eight_threads_with_one_model_get_what_one_gets(loaded, pictures):
    """Features and maps straight from eight threads; answers and words as the page asks for them, from its own thread."""
    settings = Settings(num_beams=1, max_length=6)

    def ask(number):
        part, picture = loaded.parts[number % 2], pictures[number % 3]
        prompt = "a" if part.has_language_model else ""
        features = part.see([picture, pictures[0]])
        maps = attention.query_maps(part, picture, None, number % 4)
        said = answered(loaded, picture, "what is it ?", [], settings)
        *_, (words, weights) = work.cancellable(
            lambda stop: attention.word_weights(part, picture, prompt, settings, stop), None
        )
        return features, maps, said, words, weights

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for part in loaded.parts:
                part.seen.clear()
            for got, right in zip(pool.map(ask, range(12), timeout=WAIT), alone):
                assert got[2:4] == right[2:4]
                for one, other in zip((*got[:2], got[4]), (*right[:2], right[4])):
                    assert torch.allclose(one, other, atol=1e-5)
    assert len({(said, *words) for _, _, said, words, _ in alone}) >= 6  # else a mix-up could not be seen
