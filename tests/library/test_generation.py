"""Stage 2: placeholders, losses, and transformers' own generate, for decoder-only and encoder-decoder models."""

import pytest
import torch

from tests.helpers.tiny import LANGUAGE_MODELS, QUERIES, TOWERS, batch, prompt, stage2

ALL = tuple(LANGUAGE_MODELS)
STRONG = 0.5  # spread of weights at which tiny models really react to image and text


def labels_of(model, inputs):
    if model.config.is_encoder_decoder:
        return torch.randint(5, 60, (len(inputs["input_ids"]), 4), generator=torch.Generator().manual_seed(9))
    return inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_index, -100)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language_model", ALL)
def test_train_step_generate_save_and_reload(tower, language_model, tmp_path):
    """Gradients reach projection, queries and Q-Former, and nothing of the frozen tower and language model."""
    model = stage2(language_model, tower, std=0.1, qformer={"use_qformer_text_input": False})
    model.freeze_unimodal()
    model.train()
    inputs = prompt(model)
    if tower == "mobilenet":
        inputs["pixel_values"] = batch(rows=2, size=64)["pixel_values"]
    assert not model.language_model.training and not model.model.vision_model.training
    model(**inputs, labels=labels_of(model, inputs)).loss.backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("model.vision_model.", "language_model."))
        assert parameter.requires_grad != frozen, name
        if frozen:
            assert parameter.grad is None, name
        elif not name.endswith("key.bias"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    ids = model.eval().generate(**inputs, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert len(ids) == 2 and torch.equal(again.generate(**inputs, max_new_tokens=3, do_sample=False), ids)


@pytest.mark.parametrize("language_model", ALL)
@torch.no_grad()
def test_wrong_number_of_placeholders_names_both(language_model):
    model = stage2(language_model)
    inputs = prompt(model, rows=2)
    extra = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if model.config.is_encoder_decoder else {}
    fewer = {name: value[:, 1:] if name != "pixel_values" else value for name, value in inputs.items()}
    with pytest.raises(ValueError, match=f"{2 * QUERIES - 2} image tokens.*{2 * QUERIES} features"):
        model(**fewer, **extra)
    none = {
        **inputs,
        "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_index, 7),
    }
    with pytest.raises(ValueError, match=f"has 0 image tokens.*{2 * QUERIES} features"):
        model(**none, **extra)  # an image is never silently ignored
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match=f"{2 * QUERIES} image tokens.*give 0 features"):
        model(**without, **extra)
    with pytest.raises(ValueError, match="image tokens"):
        model.generate(**none, max_new_tokens=2)


@pytest.mark.parametrize("language_model", ALL)
def test_image_changes_the_answer(language_model):
    model = stage2(language_model, std=STRONG)
    inputs = prompt(model, rows=8)
    inputs["input_ids"] = inputs["input_ids"][:1].repeat(8, 1)  # one prompt, eight images
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert len({tuple(row) for row in ids.tolist()}) > 1


@pytest.mark.parametrize("language_model", ALL)
def test_image_is_encoded_once_whatever_the_beams(language_model):
    model = stage2(language_model, std=STRONG)
    calls = []
    model.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    ids = model.generate(**prompt(model), max_new_tokens=5, num_beams=3, num_return_sequences=2, do_sample=False)
    assert len(calls) == 1 and len(ids) == 4


@pytest.mark.parametrize("language_model", ("opt", "llama"))
def test_beams_read_the_prompt_once_and_write_the_same(language_model):
    """A static cache is laid out for all beams at once: there each beam reads the prompt for itself."""
    model = stage2(language_model, std=STRONG)
    inputs = prompt(model)
    image = inputs["input_ids"] == model.config.image_token_index
    both = inputs["input_ids"][:, : int(image[0].sum())]
    inputs["input_ids"] = torch.cat([both, inputs["input_ids"]], dim=1)  # two images a text
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(-1)])
    arguments = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "do_sample": False}
    arguments |= {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    rows = []
    model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    once = model.generate(**inputs, **arguments)
    assert rows == [2, 6, 6, 6, 6]
    each = model.generate(**inputs, **arguments, cache_implementation="static", disable_compile=True)
    assert rows[5:] == [6] * 5 and torch.equal(once.sequences, each.sequences)
    torch.testing.assert_close(once.logits, each.logits, rtol=1e-3, atol=1e-3)
    assert once.hidden_states[0][-1].shape == each.hidden_states[0][-1].shape


@pytest.mark.parametrize("language_model", ALL)
def test_batched_equals_one_by_one(language_model):
    """Prompts of different lengths, padded on the left; absolute (OPT, GPT-2) and rotary positions (Llama, Qwen)."""
    model = stage2(language_model, std=STRONG)
    long, short = prompt(model, rows=1, text=8, seed=1), prompt(model, rows=1, text=3, seed=2)
    pad = 5
    padded = {
        "pixel_values": torch.cat([long["pixel_values"], short["pixel_values"]]),
        "input_ids": torch.cat([long["input_ids"], torch.nn.functional.pad(short["input_ids"], (pad, 0))]),
        "attention_mask": torch.cat(
            [long["attention_mask"], torch.nn.functional.pad(short["attention_mask"], (pad, 0))]
        ),
    }
    arguments = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(**padded, **arguments)
    prompt_length = 0 if model.config.is_encoder_decoder else padded["input_ids"].shape[1]
    for row, alone in enumerate((long, short)):
        start = 0 if model.config.is_encoder_decoder else alone["input_ids"].shape[1]
        new = model.generate(**alone, **arguments)[0, start:]
        assert torch.equal(together[row, prompt_length : prompt_length + len(new)], new), row


@pytest.mark.parametrize("language_model", ALL)
def test_prompt_of_the_image_alone(language_model):
    model = stage2(language_model, std=STRONG)
    pixels = prompt(model)["pixel_values"]
    ids = model.generate(pixel_values=pixels, max_new_tokens=4, do_sample=False)
    explicit = model.image_prompt(2)
    again = model.generate(
        pixel_values=pixels,
        input_ids=explicit,
        attention_mask=torch.ones_like(explicit),
        max_new_tokens=4,
        do_sample=False,
    )
    assert torch.equal(ids, again)


@pytest.mark.parametrize("language_model", ALL)
@torch.no_grad()
def test_generate_accepts_cached_features(language_model):
    model = stage2(language_model, std=STRONG)
    inputs = prompt(model)
    embeds = model.model.get_vision_embeds(inputs["pixel_values"])
    direct = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    inputs.pop("pixel_values")
    assert torch.equal(direct, model.generate(**inputs, vision_embeds=embeds, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("language_model", ALL)
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_p": 0.9},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"cache_implementation": "static", "do_sample": False},
        {"repetition_penalty": 1.5, "do_sample": False},
        {"num_beams": 2, "length_penalty": -1.0, "do_sample": False},
        {"no_repeat_ngram_size": 1, "do_sample": False},
        {"use_cache": False, "do_sample": False},
    ],
    ids=lambda arguments: ",".join(arguments),
)
@torch.no_grad()
def test_ways_to_generate(language_model, arguments):
    """The same ids as the bare language model writes that is fed the same embeddings."""
    model = stage2(language_model, std=STRONG)
    inputs = prompt(model)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == model.config.image_token_index] = features.flatten(0, 1)
    fed = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    if not model.config.is_encoder_decoder:
        fed["input_ids"] = inputs["input_ids"]  # penalties count the words of the prompt
    arguments = {"max_new_tokens": 4, "suppress_tokens": [model.config.image_token_index], **arguments}
    torch.manual_seed(0)
    ids = model.generate(**inputs, **arguments)
    torch.manual_seed(0)
    # From embeddings alone a language model generates with its cache only.
    assert torch.equal(ids, model.language_model.generate(**fed, **{**arguments, "use_cache": True}))
    assert len(ids) == 2 * arguments.get("num_return_sequences", 1)


@torch.no_grad()
def test_only_labelled_tokens_are_supervised():
    model = stage2("opt", std=STRONG)
    inputs = prompt(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    out = model(**inputs, labels=labels)
    predicted = out.logits[:, -3:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(predicted, labels[:, -2:].flatten())
    assert torch.allclose(out.loss, expected)


@pytest.mark.parametrize("language_model", ["opt", "llama", "gpt2", "qwen", "t5"])
def test_training_computes_the_same_loss_from_fewer_logits(language_model):
    model = stage2(language_model, std=STRONG)
    model.freeze_unimodal()
    inputs = prompt(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_index, -100)
    labels[0, -1] = -100
    losses, gradients, widths = [], [], []
    for mode in (True, False):
        for part in model.train(mode).children():
            part.eval()  # no dropout
        out = model(**inputs, labels=labels)
        (gradient,) = torch.autograd.grad(out.loss, [model.language_projection.weight])
        losses.append(out.loss.detach())
        gradients.append(gradient)
        widths.append(out.logits.shape[1])
    assert torch.allclose(*losses, atol=1e-6) and torch.allclose(*gradients, atol=1e-6)
    if language_model != "t5":
        assert widths[0] == (labels[:, 1:] != -100).any(dim=0).sum() < widths[1]


@torch.no_grad()
def test_question_into_the_qformer():
    """On, it changes the query output; off, nothing depends on it."""
    model = stage2("opt", std=STRONG)
    inputs = prompt(model)
    question = {
        "qformer_input_ids": torch.tensor([[1, 9, 9], [1, 8, 7]]),
        "qformer_attention_mask": torch.ones(2, 3).long(),
    }
    plain = model.get_image_features(inputs["pixel_values"]).pooler_output
    read = model.get_image_features(inputs["pixel_values"], **question).pooler_output
    question["qformer_input_ids"] = question["qformer_input_ids"] + 1
    other = model.get_image_features(inputs["pixel_values"], **question).pooler_output
    assert not torch.allclose(plain, read, atol=1e-3) and not torch.allclose(read, other, atol=1e-3)


@torch.no_grad()
def test_placeholder_outside_the_vocabulary_is_never_looked_up():
    inside, outside = stage2("opt", std=STRONG), stage2("opt", std=STRONG, image_token_index=1000)
    outside.load_state_dict(inside.state_dict())
    a, b = inside(**prompt(inside)).logits, outside(**prompt(outside)).logits
    assert torch.equal(a, b)


def test_encoder_decoder_forward_says_what_it_needs():
    model = stage2("t5")
    with pytest.raises(ValueError, match="labels or decoder_input_ids"):
        model(**prompt(model))


def test_unknown_arguments_of_generate_are_refused():
    model = stage2("opt")
    with pytest.raises(ValueError, match="pixel_valves"):
        model.generate(**prompt(model), pixel_valves=torch.zeros(1), max_new_tokens=2)
