"""One model called from several threads gives what it gives called alone, and is left as it was."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

from modeling_blip2x.vision_blip2x import with_eager_attention
from tests.helpers.tiny import LANGUAGE_MODELS, batch, image, prompt, stage1, stage1_processor, stage2, stage2_processor

THREADS, CALLS = 8, 200
COLOURS = ["red", "green", "blue", "black"]


def implementations(model):
    return {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}


def tensors_of(output):
    """Every tensor of an output, in order, whatever holds it."""
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else []
    return [tensor for item in items for tensor in tensors_of(item)]


def call(model, processor, number):
    """The number-th call: every kind of call in turn, none like its neighbours."""
    with torch.no_grad():
        inputs = batch(rows=2, seed=number // 5)
        kind = number % 5
        if kind == 0:
            return model.get_image_features(inputs["pixel_values"], output_attentions=True)
        if kind == 1:
            return model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
        if kind == 2:
            return model.itm_scores(**inputs)
        if kind == 3:
            return model(**inputs, output_attentions=True)
        pictures = [image(COLOURS[number % 4]), image(COLOURS[number % 3])]
        return processor(pictures, ["a red dog", "a cat on the left"], padding=True, return_tensors="pt").data


def test_many_threads_get_what_one_gets():
    """On a model never called before: what transformers sets up at the first call is set up among the threads."""
    processor = stage1_processor()
    alone = stage1(vision_feature_layer=-2).eval()
    expected = [tensors_of(call(alone, processor, number)) for number in range(CALLS)]
    model = stage1(vision_feature_layer=-2).eval()
    with ThreadPoolExecutor(THREADS) as threads:
        got = list(threads.map(lambda number: tensors_of(call(model, processor, number)), range(CALLS)))
    for number, (here, there) in enumerate(zip(got, expected)):
        assert len(here) == len(there) > 0, number
        assert all(torch.equal(a, b) for a, b in zip(here, there)), number
    assert implementations(model) == {"sdpa"}


def use(model, processor, number):
    """The number-th call of what an application calls, each kind in turn."""
    pictures, texts = [image(COLOURS[number % 4]), image(COLOURS[number % 3])], ["a red dog", "a cat on the left"]
    inputs = processor(pictures, texts, padding=True, return_tensors="pt")
    kind, pixels = number % 4, inputs["pixel_values"]
    with torch.no_grad():
        if kind == 0:
            return inputs.data
        if kind == 1:
            return model.query_attention(pixels)
        if kind == 2:
            return model.get_image_features(pixels)
        given = inputs if model.config.text_config is not None else {"pixel_values": pixels}
        return model.generate(**given, max_new_tokens=4, num_beams=1 + number % 3)


@pytest.mark.parametrize("calls", [5, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [1, 2])
def test_an_application_with_many_threads(stage, calls):
    """Each of the threads makes as many calls of every kind."""
    processor = stage1_processor() if stage == 1 else stage2_processor()

    def fresh():
        if stage == 1:
            return stage1().eval()
        return stage2("opt", std=0.3, image_token_index=processor.image_token_id).eval()

    alone, model = fresh(), fresh()
    expected = [tensors_of(use(alone, processor, number)) for number in range(12)]  # of 4 kinds, with 4 and 3 pictures
    total = THREADS * calls * 4
    with ThreadPoolExecutor(THREADS) as threads:
        got = list(threads.map(lambda number: tensors_of(use(model, processor, number)), range(total)))
    for number, here in enumerate(got):
        there = expected[number % 12]
        assert len(here) == len(there) > 0, number
        assert all(torch.equal(a, b) for a, b in zip(here, there)), number
    assert implementations(model) == {"sdpa"}


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_an_eager_view_computes_the_same_on_the_same_tensors(language_model):
    model = stage2(language_model, std=0.3).language_model
    view = with_eager_attention(model)
    assert implementations(model) == {"sdpa"} and implementations(view) == {"eager"}
    named = dict(model.named_parameters())
    assert all(tensor is named[name] for name, tensor in view.named_parameters())
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    decoder = {"decoder_input_ids": ids} if language_model == "t5" else {}
    gradients = []
    for each in (model, view):
        model.zero_grad()
        output = each(input_ids=ids, output_attentions=each is view, **decoder)
        output.logits.float().logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    weights = output["decoder_attentions" if decoder else "attentions"]
    layers = model.config.num_hidden_layers
    assert len(weights) == layers and all(torch.allclose(layer.sum(-1), torch.ones(())) for layer in weights)
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*gradients))


def test_a_view_of_a_wrapped_model():
    """Adapters, hooks of offloading and the hooks of a user go with the view; a compiled forward does not."""
    model = stage2("llama", std=0.3).language_model
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        seen = []
        model.model.layers[0].register_forward_hook(lambda *arguments: seen.append(arguments[0]))
        wrapped.compile(backend="eager")
        cpu_offload(wrapped, execution_device=torch.device("cpu"))
        view = with_eager_attention(wrapped)
        output = view(input_ids=ids, output_attentions=True)
        again = wrapped(input_ids=ids).logits
    assert torch.allclose(output.logits, expected, atol=1e-4) and torch.allclose(again, expected, atol=1e-4)
    assert len(output.attentions) == 2 and output.attentions[0] is not None
    assert len(seen) == 2 and seen[0] is not seen[1], "the hook ran for the view, then for the model"
    assert all(parameter.is_meta for parameter in wrapped.parameters()), "offloaded again"


def test_attentions_of_the_whole_model_in_both_stages():
    model = stage2("opt", std=0.3)
    inputs = prompt(model)
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
        assert torch.allclose(output.logits, model(**inputs).logits, atol=1e-4)
    tower = output.vision_outputs.attentions
    assert len(tower) == 2 and all(torch.allclose(layer.sum(-1), torch.ones(())) for layer in tower)
    assert implementations(model) == {"sdpa"}
