"""What transformers, PEFT and TRL pass to every model: caches under either name, prefixes, keywords, label smoothing."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForMultimodalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from modeling_blip2x import Blip2xForConditionalGeneration
from tests.helpers.tiny import LANGUAGE_MODELS, QUERIES, prompt, stage2

DECODERS = [name for name in LANGUAGE_MODELS if name != "t5"]


def padded(model, text: int = 5, padding: int = 4) -> dict[str, torch.Tensor]:
    """Two prompts, of which the second has padding on the left."""
    inputs = prompt(model, text=text + padding)
    inputs["input_ids"][1] = torch.cat([torch.zeros(padding).long(), inputs["input_ids"][1, :-padding]])
    inputs["attention_mask"][1, :padding] = 0
    return inputs


@pytest.mark.parametrize("name", ("past_key_values", "cache"))
@pytest.mark.parametrize("language_model", DECODERS)
@torch.no_grad()
def test_a_forward_over_ones_own_cache_equals_one_forward(language_model, name):
    """Padding on the left, positions not passed: they are counted from the mask. The cache goes by either name."""
    model = stage2(language_model, std=0.3)
    inputs = padded(model)
    whole = model(**inputs).logits
    for cut in (1, 3):
        first = {key: value if key == "pixel_values" else value[:, :-cut] for key, value in inputs.items()}
        out = model(**first, use_cache=True)
        rest = model(
            input_ids=inputs["input_ids"][:, -cut:],
            attention_mask=inputs["attention_mask"],
            **{name: out.past_key_values},
        )
        torch.testing.assert_close(rest.logits, whole[:, -cut:], rtol=1e-4, atol=1e-5)
    assert out.past_key_values is out["past_key_values"]


@pytest.mark.parametrize("padding", (0, 4))
@pytest.mark.parametrize("language_model", DECODERS)
@torch.no_grad()
def test_prefix_tuning_generates_what_its_forward_says(language_model, padding):
    """PEFT hands its prefix over as a cache, which no position may be counted from alone."""
    base = stage2(language_model, std=0.3)
    inputs = padded(base) if padding else prompt(base)
    tuned = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    for parameter in tuned.prompt_encoder.parameters():
        parameter.normal_(0, 1)
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    arguments["suppress_tokens"] = [base.config.image_token_index]
    out = tuned.generate(**inputs, **arguments, return_dict_in_generate=True, output_logits=True)
    for step, logits in enumerate(out.logits):
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + step]
        mask = F.pad(inputs["attention_mask"], (0, step), value=1)
        whole = tuned(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=2e-5)
    with tuned.disable_adapter():
        assert not torch.allclose(base(**inputs).logits[:, -1], out.logits[0], atol=1e-2)  # the prefix counts


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: number + 3 for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | {"<pad>": 0, "<s>": 1, "</s>": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_stop_strings_end_the_text_where_they_stand(language_model):
    model, tokenizer = stage2(language_model, std=0.5), byte_tokenizer()
    inputs = prompt(model, rows=1)
    free = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(free, model.generate(**inputs, max_new_tokens=8, do_sample=False, tokenizer=tokenizer))
    start = 1 if language_model == "t5" else inputs["input_ids"].shape[1]
    third = tokenizer.decode(free[0, start + 2 : start + 3])
    stopped = model.generate(**inputs, max_new_tokens=8, do_sample=False, tokenizer=tokenizer, stop_strings=[third])
    ends = [place for place, token in enumerate(free[0, start:]) if tokenizer.decode([token]) == third]
    assert torch.equal(stopped[0], free[0, : start + ends[0] + 1])


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_token_healing_keeps_the_image(language_model):
    """No token of a byte tokenizer begins another, so nothing is healed, and what is written stays the same."""
    model = stage2(language_model, std=0.5)
    inputs = prompt(model, rows=1)
    arguments = {"max_new_tokens": 4, "do_sample": False, "tokenizer": byte_tokenizer()}
    assert torch.equal(model.generate(**inputs, **arguments), model.generate(**inputs, **arguments, token_healing=True))


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@torch.no_grad()
def test_keywords_that_say_nothing_change_nothing_and_typos_are_named(language_model):
    model = stage2(language_model, std=0.3)
    inputs = prompt(model)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_index, -100)
    expected = model(**inputs).loss
    silent = dict.fromkeys(("head_mask", "decoder_inputs_embeds", "decoder_head_mask", "cross_attn_head_mask"))
    passed = {"cache_position": torch.arange(3), "tokenizer": byte_tokenizer(), "position_ids": None}
    assert torch.equal(model(**inputs, **silent, **passed).loss, expected)
    for typo in (None, 1):
        with pytest.raises(TypeError, match="no argument 'decoder_inputs_embed'"):
            model(**inputs, decoder_inputs_embed=typo)
    if language_model != "t5":
        with pytest.raises(TypeError, match="no argument 'decoder_inputs_embeds'"):
            model(**inputs, decoder_inputs_embeds=torch.zeros(2, 3, 32))


@pytest.mark.parametrize("kind", (None, "SEQ_2_SEQ_LM"))
@torch.no_grad()
def test_lora_of_either_task_type_has_the_models_loss(kind):
    model = stage2("t5", std=0.3)
    inputs = prompt(model)
    labels = inputs["input_ids"][:, QUERIES:].contiguous()
    expected = model(**inputs, labels=labels).loss
    adapted = get_peft_model(model, LoraConfig(target_modules=["q", "v"], task_type=kind)).eval()
    assert torch.allclose(adapted(**inputs, labels=labels).loss, expected)


@torch.no_grad()
def test_given_embeddings_of_the_decoder_are_read():
    model = stage2("t5", std=0.3)
    ids = torch.tensor([[0, 9, 8], [0, 7, 6]])
    embeds = model.get_input_embeddings()(ids)
    by_ids = model(**prompt(model), decoder_input_ids=ids).logits
    assert torch.allclose(model(**prompt(model), decoder_inputs_embeds=embeds).logits, by_ids, atol=1e-6)


@pytest.mark.parametrize("negative", (None, "text"))
@pytest.mark.parametrize("language_model", DECODERS)
@torch.no_grad()
def test_guidance_weighs_the_image_against_the_text_without_it(language_model, negative):
    """The scores of the bare language model that is fed the same embeddings, and differ from those without guidance."""
    model = stage2(language_model, std=0.3)
    inputs = prompt(model)
    arguments = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**inputs, **arguments)
    arguments["guidance_scale"] = 3.0
    if negative:
        arguments["negative_prompt_ids"] = inputs["input_ids"][:, QUERIES:]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[inputs["input_ids"] == model.config.image_token_index] = features.flatten(0, 1)
    fed = {name: value for name, value in inputs.items() if name != "pixel_values"}
    expected = model.language_model.generate(inputs_embeds=embeds, **fed, **arguments)
    guided = model.generate(**inputs, **arguments)
    assert torch.equal(guided.sequences, expected.sequences)
    for ours, theirs, without in zip(guided.scores, expected.scores, plain.scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, without.log_softmax(-1), atol=1e-2)


@pytest.mark.parametrize("language_model", ("opt", "gpt2", "qwen", "t5"))
def test_trainers_label_smoothing_shifts_as_the_model_does(language_model, tmp_path):
    model = stage2(language_model, std=0.3, qformer={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    model.freeze_unimodal()
    inputs = prompt(model)
    if language_model == "t5":
        inputs["labels"] = inputs["input_ids"][:, QUERIES:].contiguous()
        inputs["decoder_input_ids"] = F.pad(inputs["labels"][:, :-1], (1, 0))  # Trainer takes the labels away
    else:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_index, -100)
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(2)]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=0.0, label_smoothing_factor=0.1, report_to=[],
        use_cpu=True, save_strategy="no", remove_unused_columns=False, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    with torch.no_grad():
        logits, labels = model.eval()(**inputs).logits, inputs["labels"]
    if language_model != "t5":
        logits, labels = logits[:, :-1], labels[:, 1:]
    right = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1).item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(right, abs=1e-4)


def test_the_model_is_still_called_by_its_name():
    assert repr(stage2("opt")).startswith("Blip2xForConditionalGeneration(\n  (model): Blip2xModel(")


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("language_model", DECODERS)
def test_placeholders_among_labels_are_never_counted(language_model, training):
    model = stage2(language_model, std=0.3)
    model.freeze_unimodal()
    inputs = prompt(model)
    ids = inputs["input_ids"]
    is_image = ids == model.config.image_token_index
    for part in model.train(training).children():
        part.eval()  # no dropout
    expected = model(**inputs, labels=ids.masked_fill(is_image, -100)).loss
    assert torch.equal(model(**inputs, labels=ids).loss, expected)
    assert torch.equal(model(**inputs, labels=ids.masked_fill(is_image, 7)).loss, expected)


@pytest.mark.parametrize("language_model", ("opt", "llama", "gpt2"))
@torch.no_grad()
def test_the_base_model_is_all_but_the_output_layer(language_model):
    """TRL's SFTTrainer multiplies by the output layer itself."""
    model = stage2(language_model, std=0.3)
    hidden = model.base_model(**padded(model), use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits, model(**padded(model)).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        stage2("t5").base_model(**prompt(stage2("t5")))


def test_the_auto_class_of_servers_knows_the_generative_model(tmp_path):
    model = stage2("opt")
    model.save_pretrained(tmp_path)
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert type(again) is Blip2xForConditionalGeneration
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
