"""Where texts begin and end: the same ids in training and in use, for the families of language models."""

import copy

import pytest
import torch
from transformers import BartConfig, GPT2Config, MBartConfig

from blip2x_training.data.collators import CausalLMCollator, Seq2SeqLMCollator, language_collator
from blip2x_training.models.loading import agree_on_texts, load_language_tokenizer
from modeling_blip2x import Blip2xConfig, Blip2xForConditionalGeneration, Blip2xProcessor
from modeling_blip2x.plain_words_blip2x import PlainWords
from tests.helpers.family_tokenizers import FAMILIES, Family
from tests.helpers.tiny import QUERIES, TOWERS, image, image_processor, llm_tokenizer, qformer_config

SPELT = "a </s> on <image> or [SEP] <|endoftext|> <eos> here"
every_family = pytest.mark.parametrize("family", list(FAMILIES.values()), ids=list(FAMILIES))


def parts(family: Family, max_text_length: int = 64):
    """A processor as training leaves it, and the collator of the kind."""
    tokenizer = family.make()
    kind = Seq2SeqLMCollator if family.is_encoder_decoder else CausalLMCollator
    options = {"num_query_tokens": 2, "is_encoder_decoder": family.is_encoder_decoder}
    processor = Blip2xProcessor(image_processor(), tokenizer, **options)
    collator = kind(None, processor.tokenizer, 2, processor.image_token_id, max_text_length, cropped=False)
    return processor, collator


def encoded(family: Family, collator, prompt: str, text: str):
    """What the model is given, and its labels."""
    draw = (0.0,) if family.is_encoder_decoder else ()
    return collator.encode(prompt, text, *draw)


def tokens(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens(ids)


def laid_out(processor, template: str, text: str) -> list[str]:
    """The template's special tokens around the words of a text, which the tokenizer itself gives."""
    words = processor.tokenizer.tokenize(text) if text else []
    before, after = template.split("{}")
    return [*before.split(), *words, *after.split()]


@every_family
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_training_and_use_give_equal_ids(family, prompt):
    """By processor, run_evaluation and training: the prompt begins and ends as the family's, and what is written too."""
    processor, collator = parts(family)
    used = processor(image(), prompt).input_ids[0]
    assert tokens(processor, used) == ["<image>"] * 2 + laid_out(processor, family.prompt, prompt)
    item = {"vision_embeds": torch.zeros(3, 4), "prompt": prompt}
    assert collator.prompts([item])["input_ids"][0].tolist() == used
    assert processor(image(), prompt, split_special_tokens=True).input_ids[0] == used  # the Space's
    assert collator.answer(prompt, "red dog")[0][: len(used)] == used
    text = "red dog"
    given, labels = encoded(family, collator, prompt, text)
    written = [label for label in labels if label != -100]
    if family.is_encoder_decoder and not prompt:  # its first token is in the encoder
        first = given[2 + family.prompt.split().index("{}")]
        opening = len(family.written.split("{}")[0].split())
        written.insert(opening, first)
        given.remove(first)
    if not family.is_encoder_decoder:
        assert labels[: len(used)] == [-100] * len(used) and given[len(used) :] == labels[len(used) :] == written
        spelt = processor.tokenizer.tokenize(f"{prompt} {text}" if prompt else text)
        text_tokens = spelt[len(processor.tokenizer.tokenize(prompt)) if prompt else 0 :]
        assert tokens(processor, written) == [*text_tokens, *family.written.split("{}")[1].split()]
    else:
        assert tokens(processor, written) == laid_out(processor, family.written, text)
    assert given[: len(used)] == used
    end = processor.text_layout.end
    assert written.count(end) == 1 and written[-1] == end
    assert collator.answer(prompt, text)[1][-1] == end


@every_family
def test_what_spells_a_special_token_is_words(family):
    """`</s>` and `<image>` in texts and prompts are characters, and plain text has the ids that it always had."""
    processor, collator = parts(family, max_text_length=500)
    words, end = PlainWords(processor.tokenizer), processor.text_layout.end
    assert not {processor.image_token_id, end} & set(words.row(SPELT)["input_ids"])
    asked = processor(image(), SPELT, split_special_tokens=True).input_ids[0]
    empty = processor(image(), "").input_ids[0]
    assert [asked.count(token) for token in (processor.image_token_id, end)] == [2, empty.count(end)]
    assert encoded(family, collator, SPELT, "dog")[0][: len(asked)] == asked
    labels = encoded(family, collator, "what", SPELT)[1]
    assert labels.count(end) == 1 and processor.image_token_id not in labels
    spelt = processor.tokenizer.decode(words.row(SPELT)["input_ids"]).replace("<unk>", "")
    assert spelt.replace(" ", "").lower() == SPELT.replace(" ", "").lower()
    plain = "a photo of 3 dogs, on the left: what?"
    given = processor.tokenizer(plain, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert words.row(plain)["input_ids"] == given


@every_family
def test_a_text_that_is_cut_does_not_end(family):
    processor, collator = parts(family, max_text_length=9)
    end = processor.text_layout.end
    for prompt in ("", "of"):
        labels = encoded(family, collator, prompt, "many dogs on a photo")[1]
        assert end not in labels and labels[-1] != -100
        assert collator.length(prompt, "many dogs on a photo") > 9 >= collator.length("", "a dog")
        assert end in encoded(family, collator, "", "a dog")[1]


def model_of(text_config, processor) -> Blip2xForConditionalGeneration:
    torch.manual_seed(0)
    config = Blip2xConfig(
        vision_config=TOWERS["clip"].to_dict(),
        qformer_config=qformer_config(),
        text_config=text_config.to_dict(),
        num_query_tokens=2,
        image_token_index=processor.image_token_id,
    )
    return Blip2xForConditionalGeneration(config).eval()


def config_of(family: str, tokenizer, **changes):
    sizes = {"vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    if family.startswith("mbart"):
        return MBartConfig(**sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2, **changes)
    if family == "bart":
        return BartConfig(**sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)
    return GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, **changes)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "mbart", "mbart to another language", "mbart50"])
def test_the_decoder_starts_in_training_where_generate_starts(name):
    family = FAMILIES[name]
    processor, _ = parts(family)
    model = model_of(config_of(name, processor.tokenizer), processor)
    agree_on_texts(model, processor)
    collator = language_collator(model, processor, 64, cropped=False)
    labels = collator.encode("what", "red dog", 0.0)[1]
    decoder = model.decoder_inputs_of(torch.tensor([[*labels, -100]]))[0].tolist()
    start = (
        processor.tokenizer.convert_tokens_to_ids(family.start) if family.start else (2 if name != "mbart50" else None)
    )
    start = model.generation_config.decoder_start_token_id if start is None else start
    assert decoder == [start, *labels] and model.generation_config.decoder_start_token_id == start
    inputs = processor(image(), "what", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0].tolist()
    opening = processor.text_layout.opening
    assert ids[: 1 + len(opening)] == [start, *opening]


@torch.no_grad()
def test_an_image_alone_is_what_the_processor_makes_of_it():
    """generate(pixel_values) has no tokenizer: what stands after the image is kept in the config."""
    for name in ("gpt2", "bert", "xglm", "bart"):
        processor, _ = parts(FAMILIES[name])
        model = model_of(config_of(name, processor.tokenizer), processor)
        agree_on_texts(model, processor)
        inputs = processor(image(), return_tensors="pt")
        assert model.image_prompt(1).tolist() == inputs.input_ids.tolist(), name
        again = Blip2xConfig.from_dict(model.config.to_dict())
        assert again.empty_prompt == inputs.input_ids[0, 2:].tolist()


def test_a_processor_that_was_told_nothing_learns_the_kind_of_model():
    """A tokenizer that appends its end token may be a decoder-only model's or an encoder-decoder's."""
    processor = Blip2xProcessor(image_processor(), FAMILIES["bart"].make(), num_query_tokens=2)
    model = model_of(config_of("gpt2", processor.tokenizer), processor)
    collator = language_collator(model, processor, 64, cropped=False)
    item = {"vision_embeds": torch.zeros(3, 4), "prompt": "what"}
    used = processor(image(), "what").input_ids[0]
    assert collator.prompts([item])["input_ids"][0].tolist() == used
    assert processor.tokenizer.eos_token_id not in used


@torch.no_grad()
def test_generate_ends_where_the_tokenizer_ends_a_text(tmp_path):
    """A language model whose config names another end than its tokenizer, as those with BERT's tokenizers do."""
    processor, _ = parts(FAMILIES["bert"])
    end = processor.tokenizer.sep_token_id
    model = model_of(config_of("bert", processor.tokenizer, eos_token_id=50256), processor)
    assert processor.tokenizer.eos_token_id == end
    agree_on_texts(model, processor)
    assert model.generation_config.eos_token_id == [end]  # 50256 lies outside of the vocabulary
    model.language_model.lm_head.weight = torch.nn.Parameter(model.language_model.lm_head.weight.clone().zero_())
    model.language_model.lm_head.weight[end] = 1.0
    model.language_model.transformer.ln_f.bias.fill_(1.0)
    inputs = processor(image(), "a", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert ids[0, inputs.input_ids.shape[1] :].tolist() == [end]
    processor.save_pretrained(tmp_path)
    assert Blip2xProcessor.from_pretrained(tmp_path).is_encoder_decoder is False


def test_a_tokenizer_that_ends_no_text_is_refused_before_anything_is_read(tmp_path):
    tokenizer = llm_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    GPT2Config(eos_token_id=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no token that ends a text .* Pass --end_token .* such as '</s>'"):
        load_language_tokenizer(str(tmp_path), None)
    assert load_language_tokenizer(str(tmp_path), "</s>").eos_token_id == 2
    with pytest.raises(ValueError, match="--end_token '<end>' is no token of the tokenizer"):
        load_language_tokenizer(str(tmp_path), "<end>")
    with pytest.raises(ValueError, match="--end_token does"):
        CausalLMCollator(None, copy.deepcopy(tokenizer), QUERIES, 99, 8, cropped=False)
