"""What transformers' tools expect of a model: outputs on request, checkpointing, compiling, resizing, saved configs."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import logging as transformers_logging

from modeling_blip2x import (
    Blip2xConfig,
    Blip2xForConditionalGeneration,
    Blip2xForImageTextRetrieval,
    Blip2xForPreTraining,
    Blip2xModel,
    Blip2xProcessor,
    Blip2xQFormerConfig,
)
from tests.helpers.tiny import (
    QUERIES,
    batch,
    bert_tokenizer,
    config,
    image,
    image_processor,
    labels_of,
    prompt,
    stage1,
    stage1_processor,
    stage2,
    stage2_processor,
)

LANGUAGE_MODELS = ("opt", "llama", "t5")
VISION_LAYERS, QFORMER_LAYERS, CROSS_LAYERS, LLM_LAYERS = 2, 4, 2, 2


def inputs_of(model, **changes):
    inputs = prompt(model)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(len(inputs["input_ids"]), 3, dtype=torch.long)
    return {**inputs, **changes}


def check_vision_and_qformer(vision, qformer):
    assert len(vision.hidden_states) == VISION_LAYERS + 1 and len(vision.attentions) == VISION_LAYERS
    assert len(qformer.hidden_states) == QFORMER_LAYERS + 1 and len(qformer.attentions) == QFORMER_LAYERS
    assert len(qformer.cross_attentions) == CROSS_LAYERS
    assert vision.attentions[0].shape[1:] == (4, 5, 5)  # four patches and the class token
    assert qformer.attentions[0].shape[1:] == (4, QUERIES, QUERIES)
    assert qformer.cross_attentions[0].shape[1:] == (4, QUERIES, 5)
    for weights in (*vision.attentions, *qformer.attentions, *qformer.cross_attentions):
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@torch.no_grad()
def test_every_part_returns_hidden_states_and_attentions(language_model, implementation):
    """Under sdpa, too, which has no weights of its own to return; afterwards it is sdpa again."""
    model = stage2(language_model)
    model.set_attn_implementation(implementation)
    plain = model(**inputs_of(model))
    full = model(**inputs_of(model), output_hidden_states=True, output_attentions=True)
    assert torch.allclose(plain.logits, full.logits, atol=1e-5)
    assert plain.vision_outputs.hidden_states is None and plain.qformer_outputs.attentions is None
    check_vision_and_qformer(full.vision_outputs, full.qformer_outputs)
    prefix = "decoder_" if language_model == "t5" else ""
    assert len(full[f"{prefix}hidden_states"]) == LLM_LAYERS + 1
    assert len(full[f"{prefix}attentions"]) == LLM_LAYERS and full[f"{prefix}attentions"][0].ndim == 4
    for part in (model, model.language_model, model.model.vision_model, model.model.qformer):
        assert part.config._attn_implementation == implementation


@pytest.mark.parametrize("model_class", [Blip2xForPreTraining, Blip2xForImageTextRetrieval])
@torch.no_grad()
def test_stage1_returns_hidden_states_and_attentions(model_class):
    model = model_class(config()).eval()
    loss = {"return_loss": True} if model_class is Blip2xForImageTextRetrieval else {}
    assert model(**batch(), **loss).qformer_outputs is None
    for arguments in ({}, loss):
        out = model(**batch(), **arguments, output_hidden_states=True, output_attentions=True)
        check_vision_and_qformer(out.vision_outputs, out.qformer_outputs)
        assert len(out.text_outputs.hidden_states) == QFORMER_LAYERS + 1
        assert out.text_outputs.attentions[0].shape == (4, 4, 9, 9)


@torch.no_grad()
def test_hidden_states_of_chosen_layers():
    model = Blip2xModel(config()).eval()
    pixels = batch()["pixel_values"]
    everything = model(pixels, output_hidden_states=True).hidden_states
    chosen = model(pixels, output_hidden_states=[0, -1]).hidden_states
    assert torch.equal(chosen[0], everything[0]) and torch.equal(chosen[-1], everything[-1])
    assert chosen[1:-1] == (None,) * (len(everything) - 2)


@torch.no_grad()
def test_features_as_tuple_and_as_output():
    for model in (stage1().eval(), stage2("opt")):
        pixels = batch()["pixel_values"]
        out = model.get_image_features(pixels, output_hidden_states=True)
        assert out.last_hidden_state.shape == (4, 5, 48) and len(out.hidden_states) == VISION_LAYERS + 1
        assert torch.equal(model.get_image_features(pixels, return_dict=False)[1], out.pooler_output)
    text = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    model = stage1().eval()
    assert torch.equal(model.get_text_features(**text, return_dict=False)[1], model.get_text_features(**text)[1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [stage1, lambda: stage2("opt", std=0.1)], ids=["stage1", "stage2"])
def test_gradient_checkpointing_gives_the_same_gradients(make, reentrant):
    """Reentrant too, which loses the gradient of tensors that hide in tuples: keys and values of image and queries."""
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.model.qformer.config.attention_probs_dropout_prob = 0.0
    model.freeze_unimodal()
    model.train()
    inputs = batch() | {"negative_seed": 0} if isinstance(model, Blip2xForPreTraining) else prompt(model)
    if not isinstance(model, Blip2xForPreTraining):
        inputs |= {"labels": labels_of(model, inputs), "use_cache": False}

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    assert plain.keys() == again.keys() and len(plain) > 50
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], atol=1e-5), name


@pytest.mark.parametrize("tower", ["clip", "siglip", "vit", "dinov2", "eva"])
def test_every_trainable_parameter_gets_a_gradient(tower):
    """With the tower trained as well: pooling heads, which features do not depend on, are frozen from the start."""
    models = [
        Blip2xForPreTraining(config(tower)).train(),
        Blip2xForImageTextRetrieval(config(tower)).train(),
        stage2("opt", tower, qformer={"use_qformer_text_input": False}).train(),
    ]
    for model in models:
        inputs = batch() if not isinstance(model, Blip2xForConditionalGeneration) else prompt(model)
        if isinstance(model, Blip2xForImageTextRetrieval):
            inputs["return_loss"] = True
        if isinstance(model, Blip2xForConditionalGeneration):
            inputs["labels"] = labels_of(model, inputs)
        model(**inputs).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, (type(model).__name__, missing)


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_forward_compiles_to_one_graph(language_model):
    model = stage2(language_model)
    inputs = inputs_of(model, use_cache=False)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, compiled(**inputs).logits, atol=1e-5)


def test_resizing_the_stage1_vocabulary_keeps_its_parts_in_step(tmp_path):
    model = stage1().eval()
    model.resize_token_embeddings(70)
    assert model.config.qformer_config.vocab_size == 70 and len(model.itg_head.bias) == 70
    model.save_pretrained(tmp_path)
    again = Blip2xForPreTraining.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss, again(**batch()).loss)


def test_evaluation_repeats_and_training_draws_anew():
    model = stage1().eval()
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss_itm, model(**batch()).loss_itm)
        torch.manual_seed(0)
        model.training = True  # the modules within stay in evaluation: no dropout, only the draw differs
        assert len({model(**batch()).loss_itm.item() for _ in range(20)}) > 1


def test_attributes_hung_on_a_config_do_not_spoil_its_checkpoint(tmp_path):
    """Tools set what they like on configs; loading refuses unknown fields, so saving must not write them."""
    changed = config()
    changed.layer_norm_epsilon = changed.qformer_config.rms_norm_eps = 1.0
    changed.save_pretrained(tmp_path)
    again = Blip2xConfig.from_pretrained(tmp_path)
    assert not hasattr(again, "layer_norm_epsilon") and again.to_dict() == config().to_dict()


def test_dec_is_the_last_row_by_default():
    assert Blip2xQFormerConfig().bos_token_id == 30522 and Blip2xQFormerConfig(vocab_size=99).bos_token_id == 98


def test_generate_takes_images_or_text_first():
    """Text is the main input, whose size Trainer counts as tokens; in stage 1 it is the image, as in CLIP."""
    model = stage2("opt", std=0.5)
    assert model.main_input_name == "input_ids" and stage1().main_input_name == "pixel_values"
    inputs = prompt(model)
    arguments = {"max_new_tokens": 3, "do_sample": False, "attention_mask": inputs["attention_mask"]}
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    by_image = model.generate(pixels, input_ids=ids, **arguments)
    assert torch.equal(by_image, model.generate(ids, pixel_values=pixels, **arguments))
    with pytest.raises(ValueError, match="input_ids twice"):
        model.generate(ids, input_ids=ids, pixel_values=pixels, **arguments)


@pytest.mark.parametrize("language_model", ("opt", "llama", "gpt2", "t5"))
def test_ways_through_generate_agree(language_model):
    """Chunked prefill, static cache, no cache, prompt lookup, a streamer and given embeddings write what greedy does."""
    model = stage2(language_model, std=0.5)
    inputs = prompt(model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    arguments = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **arguments)
    ways = [{"use_cache": False}, {"cache_implementation": "static"}]
    if language_model != "t5":
        ways.append({"prefill_chunk_size": 4})
    for way in ways:
        assert torch.equal(expected, model.generate(**inputs, **arguments, **way)), way
    one = {name: value[:1] for name, value in inputs.items()}
    assert torch.equal(expected[:1], model.generate(**one, **arguments, prompt_lookup_num_tokens=2))
    streamed = []
    streamer = SimpleNamespace(put=lambda ids: streamed.append(ids.flatten()), end=lambda: streamed.append(None))
    model.generate(**one, **arguments, streamer=streamer)
    assert streamed.pop() is None and torch.equal(torch.cat(streamed), expected[0])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    new = model.generate(inputs_embeds=embeds, **rest, **arguments)
    assert torch.equal(expected[:, -5:], new[:, -5:])


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_a_model_that_sees_the_image_drafts_for_another(language_model):
    """Whatever it drafts, the text is greedy search's; with equal weights every draft is right, so few steps are left."""
    model = stage2(language_model, std=0.5)
    inputs = {name: value[:1] for name, value in prompt(model).items()}
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **arguments)
    assert torch.equal(expected, model.generate(**inputs, **arguments, assistant_model=stage2(language_model, seed=1)))
    twin = stage2(language_model, std=0.5)
    twin.generation_config.update(num_assistant_tokens=7, assistant_confidence_threshold=0)
    steps = []
    model.language_model.register_forward_hook(lambda *_: steps.append(1))
    assert torch.equal(expected, model.generate(**inputs, **arguments, assistant_model=twin))
    assert len(steps) <= 2


@torch.no_grad()
def test_arguments_of_decoder_only_models_are_checked():
    model = stage2("opt", std=0.5)
    inputs = prompt(model)
    labels = labels_of(model, inputs)
    assert model(**inputs, logits_to_keep=1).logits.shape[1] == 1
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.allclose(model(**inputs, labels=labels).loss, model(**inputs, shift_labels=shifted).loss)
    with pytest.raises(TypeError, match="'logits_to_kep'"):
        model(**inputs, logits_to_kep=1)
    encoder_decoder = stage2("t5")
    with pytest.raises(TypeError, match="t5 language model takes no argument 'position_ids'"):
        encoder_decoder(**inputs_of(encoder_decoder), position_ids=torch.zeros(2, 3))


def test_processor_keeps_defaults_of_its_tokenizer_and_gives_offsets():
    tokenizer = bert_tokenizer()
    tokenizer.init_kwargs |= {"padding": "max_length", "max_length": 17}
    ids = Blip2xProcessor(image_processor(), tokenizer)(image(), "a red square")["input_ids"]
    assert len(ids[0]) == 17
    out = stage2_processor()([image()] * 2, ["red", "what colour is it ?"], padding=True, return_offsets_mapping=True)
    for ids, offsets in zip(out["input_ids"], out["offset_mapping"]):
        assert len(ids) == len(offsets)
    assert out["offset_mapping"][1][-2:] == [(15, 17), (18, 19)]


def test_processor_and_model_must_fit():
    model, processor = stage2("opt"), stage2_processor()
    model.config.image_token_index = processor.image_token_id
    model.check_processor(processor)
    model.config.image_token_index = 7
    with pytest.raises(
        ValueError, match=f"image_token_id is {processor.image_token_id} in the processor, 7 in the model"
    ):
        model.check_processor(processor)
    with pytest.raises(ValueError, match="num_query_tokens is None in the processor, 6 in the model"):
        model.check_processor(stage1_processor())
    first = stage1()
    with pytest.raises(ValueError, match="bos_token_id .* in the processor, 60 in the model"):
        first.check_processor(stage1_processor())
    with pytest.raises(ValueError, match="num_query_tokens is 6 in the processor, None in the model"):
        first.check_processor(processor)


def test_t5_in_float16_warns(caplog):
    logging.Logger.warning_once.cache_clear()  # it is said once a process, maybe in a test before
    model = stage2("t5", std=0.3).half()
    given = prompt(model) | {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}
    given["pixel_values"] = given["pixel_values"].half()
    transformers_logging.enable_propagation()
    with torch.no_grad():
        model(**given)
    assert "overflows in float16" in caplog.text
