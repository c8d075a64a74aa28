"""Where image tokens and special tokens stand in a prompt, several images in one, and every argument of tokenizers."""

import pytest
import torch
from tokenizers import processors
from transformers import ByT5Tokenizer

from modeling_blip2x import Blip2xProcessor
from tests.helpers.tiny import (
    QUERIES,
    bert_tokenizer,
    image,
    image_processor,
    llm_tokenizer,
    stage1_processor,
    stage2,
    stage2_processor,
)

RED, BLUE, GREEN = image(), image("blue"), image("green")
TEXT = "a dog is on the left of it"


def laid_out(processor, ids):
    """The tokens of a prompt, IMG for the tokens of one image."""
    tokens = " ".join(processor.tokenizer.convert_ids_to_tokens(ids))
    return tokens.replace(" ".join(["<image>"] * QUERIES), "IMG")


def rows_of(processor, *given, **options):
    return [laid_out(processor, ids) for ids in processor(*given, **options)["input_ids"]]


def special_tokens(template):
    """A stage-2 processor whose tokenizer puts its special tokens as this template says; None: it has none, as GPT-2's."""
    tokenizer = llm_tokenizer()
    post = processors.TemplateProcessing(single=template or "$A", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = post
    return Blip2xProcessor(image_processor(), tokenizer, num_query_tokens=QUERIES)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("<s> $A", id="llama"),
        pytest.param("<s> $A </s>", id="llama with add_eos, or BERT's [CLS] and [SEP]"),
        pytest.param("</s> $A", id="opt"),
        pytest.param("$A </s>", id="t5"),
        pytest.param(None, id="gpt2"),
    ],
)
def test_special_tokens_enclose_the_words(template):
    processor = special_tokens(template)
    before, after = ((template or "$A") + " ").split("$A")
    expected = {
        "a dog": "IMG {}a dog",  # the order of the official models
        "<image> a dog": "IMG {}a dog",
        "<image><image> a dog": "IMG IMG {}a dog",
        "a <image> dog": "{}a IMG dog",
        "a dog <image>": "{}a dog IMG",
        "<image> a <image> dog": "IMG {}a IMG dog",
        " <image> a dog": "IMG {}a dog",
    }
    for text, tokens in expected.items():
        images = [[RED] * max(1, text.count("<image>"))]
        assert rows_of(processor, images, [text]) == [(tokens.format(before) + after).rstrip()], text


def test_a_tokenizer_in_python_lays_out_the_same_way():
    processor = Blip2xProcessor(image_processor(), ByT5Tokenizer(), num_query_tokens=2)
    ids = processor([[RED, BLUE]], ["a<image>b<image>"]).input_ids[0]
    token = processor.image_token_id
    assert ids == [100, token, token, 101, token, token, 1]
    cut = processor([[RED, BLUE]], ["abc<image>def<image>"], truncation=True, max_length=7).input_ids[0]
    assert cut == [100, 101, token, token, token, token, 1]


def test_several_images_in_one_prompt():
    processor = stage2_processor()
    assert rows_of(processor, [[RED, BLUE]], "<image> a dog , <image> a cat") == ["IMG <s> a dog , IMG a cat"]
    assert rows_of(processor, [RED, BLUE], "<image> a dog , <image> a cat") == ["IMG <s> a dog , IMG a cat"]
    ragged = rows_of(processor, [[RED], [BLUE, GREEN], []], ["a dog", "a <image> dog <image>", "a dog"])
    assert ragged == ["IMG <s> a dog", "<s> a IMG dog IMG", "<s> a dog"]
    assert ragged[:2] == rows_of(processor, [RED, BLUE, GREEN], ["<image> a dog", "a <image> dog <image>"])
    assert rows_of(processor, [[RED, BLUE], [GREEN]]) == ["IMG IMG <s>", "IMG <s>"]
    many = "<image>" * QUERIES  # as many images as an image has tokens, or one that is laid out
    assert rows_of(processor, [[RED] * QUERIES], [many + "a"]) == [" ".join(["IMG"] * QUERIES) + " <s> a"]
    assert rows_of(processor, [[RED, BLUE]], [f"{many}a{many}dog"]) == ["IMG <s> a IMG dog"]


def test_pixels_are_in_order_of_appearance():
    processor = stage2_processor()
    given = processor([[RED], [], [BLUE, GREEN]], ["a dog", "a dog", "dog"], padding=True, return_tensors="pt")
    each = torch.cat([processor(one, return_tensors="pt").pixel_values for one in (RED, BLUE, GREEN)])
    assert torch.equal(given.pixel_values, each)
    assert "pixel_values" not in processor([[], []], ["a dog", "a cat"])


def test_images_and_texts_that_do_not_match_are_named():
    processor = stage2_processor()
    with pytest.raises(ValueError, match="2 images and 1 text"):
        processor([RED, BLUE], "a dog")
    with pytest.raises(ValueError, match="2 lists of images and 1 text"):
        processor([[RED], [BLUE]], "a dog")
    with pytest.raises(ValueError, match="'a <image>' has 1 <image> placeholder, but was given 2 images"):
        processor([[RED, BLUE]], "a <image>")
    with pytest.raises(ValueError, match="'<image> cat' has 1 <image> placeholder, but was given 0 images"):
        processor([[RED], []], ["a", "<image> cat"])


@torch.no_grad()
@pytest.mark.parametrize("reads", [False, True], ids=["", "the Q-Former reads the text"])
@pytest.mark.parametrize("language_model", ["opt", "llama", "gpt2", "t5"])
def test_a_batch_of_several_images_equals_its_rows(language_model, reads):
    model = stage2(language_model, std=0.5).double()  # such wide weights enlarge what floats round
    processor = stage2_processor(language_model != "t5", qformer_tokenizer=bert_tokenizer() if reads else None)
    model.config.image_token_index = processor.image_token_id
    rows = [[RED, BLUE], [], [GREEN]]
    texts = ["<image> a dog , <image> a cat", "how many ?", "is it <image> red"]
    whole = processor(rows, texts, padding=True, return_tensors="pt")
    start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if language_model == "t5" else {}
    together = model(**whole, **{name: ids.expand(3, 1) for name, ids in start.items()}).logits
    written = model.generate(**whole, max_new_tokens=4, num_beams=2, do_sample=False)
    answers = processor.batch_decode_new(written, whole.input_ids)
    for row in range(3):
        alone = processor([rows[row]], [texts[row]], return_tensors="pt")
        logits = model(**alone, **start).logits[0]
        assert torch.allclose(together[row, -len(logits) :], logits, atol=1e-8), texts[row]
        written = model.generate(**alone, max_new_tokens=4, num_beams=2, do_sample=False)
        assert processor.batch_decode_new(written, alone.input_ids) == [answers[row]]
    swapped = processor([[BLUE, RED]], texts[:1], return_tensors="pt")
    alone = processor(rows[:1], texts[:1], return_tensors="pt")
    assert not torch.allclose(model(**alone, **start).logits, model(**swapped, **start).logits, atol=1e-2)


def message(role, *content):
    texts = [part if isinstance(part, str) else None for part in content]
    parts = [{"type": "text", "text": t} if t else {"type": "image", "image": c} for t, c in zip(texts, content)]
    return {"role": role, "content": parts}


def test_chats_with_images_in_any_turn():
    processor = stage2_processor()
    expected = {
        "IMG <s> question : a dog ? answer :": [message("user", RED, "a dog ?")],
        "<s> the dog . IMG question : a ? answer :": [message("system", "the dog"), message("user", "a ?", RED)],
        "<s> question : a ? answer : a dog . IMG question : is it red ? answer :": [
            message("user", "a ?"), message("assistant", "a dog"), message("user", RED, "is it red ?"),
        ],
        "IMG IMG <s> question : is it red ? answer :": [message("user", RED, BLUE, "is it red ?")],
        "<s> question : IMG a , IMG dog ? answer :": [message("user", RED, "a ,", BLUE, "dog ?")],
    }  # fmt: skip
    for tokens, chat in expected.items():
        text = processor.apply_chat_template(chat).lower()
        images = [part["image"] for turn in chat for part in turn["content"] if part["type"] == "image"]
        assert rows_of(processor, [images], [text]) == [tokens]
        whole = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert whole["input_ids"][0].count(processor.image_token_id) == len(images) * QUERIES
        assert len(whole["pixel_values"]) == len(images)
    chats = list(expected.values())
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    each = [processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0] for chat in chats]
    assert batch["input_ids"] == each and len(batch["pixel_values"]) == 7


def test_only_words_are_cut():
    processor = stage2_processor()
    options = {"truncation": True, "max_length": QUERIES + 3}
    assert rows_of(processor, RED, TEXT, **options) == ["IMG <s> a dog"]
    assert rows_of(processor, RED, TEXT, max_length=QUERIES + 3) == ["IMG <s> a dog"]  # as transformers' tokenizers
    assert rows_of(processor, RED, "a dog is on <image> the left", **options) == ["<s> a dog IMG"]
    assert rows_of(processor, RED, "a <image> dog is on", **options) == ["<s> a IMG dog"]
    processor.tokenizer.truncation_side = "left"
    assert rows_of(processor, RED, "a dog is on <image> the left", **options) == ["<s> IMG the left"]
    assert rows_of(stage2_processor(False), RED, "a dog <image> is", **options) == ["a dog IMG </s>"]
    processor.tokenizer.model_max_length = QUERIES + 2  # what the language model reads, where no max_length is given
    assert rows_of(processor, RED, TEXT, truncation=True) == ["IMG <s> it"]
    with pytest.raises(
        ValueError, match=f"max_length=6 has no room for the {QUERIES} image tokens and 1 special token"
    ):
        processor(RED, TEXT, truncation=True, max_length=6)
    with pytest.raises(ValueError, match="max_length=20 is not a multiple of pad_to_multiple_of=8"):
        processor(RED, TEXT, padding=True, truncation=True, max_length=20, pad_to_multiple_of=8)


def test_the_qformers_text_is_cut_and_padded_too():
    processor = stage2_processor(qformer_tokenizer=bert_tokenizer())
    texts = [TEXT, "a dog"]

    def widths(**options):
        batch = processor([RED, BLUE], texts, return_tensors="pt", **options)
        assert batch.qformer_input_ids.shape == batch.qformer_attention_mask.shape
        return batch.input_ids.shape[1], batch.qformer_input_ids.shape[1]

    assert widths(padding=True) == (QUERIES + 9, 10)
    assert widths(padding=True, truncation=True, max_length=8) == (8, 8)
    assert widths(max_length=QUERIES + 3, padding="max_length", truncation=True) == (QUERIES + 3, QUERIES + 3)
    assert widths(padding="max_length", max_length=24) == (24, 24)
    assert widths(padding=True, pad_to_multiple_of=16) == (16, 16)
    processor.qformer_tokenizer.model_max_length = 5
    assert widths(padding="max_length", truncation=True, max_length=24) == (24, 5)
    assert widths(padding=True, truncation=True) == (QUERIES + 9, 5)
    batch = processor([RED, BLUE], texts, padding=True, padding_side="left", add_special_tokens=False)
    assert batch.qformer_attention_mask[1] == [1] * 4 + [0] * 6 and batch.qformer_input_ids[1][0] == 2


def test_the_qformer_reads_a_row_for_each_image():
    processor = stage2_processor(qformer_tokenizer=bert_tokenizer())
    texts = ["<image> a dog , <image> a cat", "how many ?", "is <image> red"]
    batch = processor([[RED, BLUE], [], [GREEN]], texts)
    plain = ["a dog , a cat", "a dog , a cat", "is red"]
    assert batch.qformer_input_ids == bert_tokenizer()(plain)["input_ids"]
    assert "qformer_input_ids" not in processor(text="how many ?")


def test_what_tokenizers_return_on_request():
    processor, tokenizer = stage2_processor(), llm_tokenizer()
    asked = ("return_special_tokens_mask", "return_offsets_mapping", "return_token_type_ids", "return_length")
    asked = dict.fromkeys(asked, True)
    options = {"padding": True, "padding_side": "left"} | asked
    texts = [TEXT, "a dog"]
    assert dict(processor(text=texts, **options)) == dict(tokenizer(texts, **options))  # without an image: the same
    row = processor([[RED, BLUE]], ["<image> a dog <image> cat"], **asked, return_mm_token_type_ids=True)
    image_tokens, length = [1] * QUERIES, 2 * QUERIES + 4
    assert row["special_tokens_mask"] == [[*image_tokens, 1, 0, 0, *image_tokens, 0]]
    assert row["mm_token_type_ids"] == [[*image_tokens, 0, 0, 0, *image_tokens, 0]]
    assert row["token_type_ids"] == [[0] * length] and row["length"] == [length]
    none = [(0, 0)] * QUERIES
    assert row["offset_mapping"] == [[*none, (0, 0), (8, 9), (10, 13), *none, (22, 25)]]
    reader = stage2_processor(qformer_tokenizer=bert_tokenizer())
    names = {"pixel_values", "input_ids", "qformer_input_ids"}
    assert set(reader(RED, "a dog", padding=True, return_attention_mask=False)) == names
    assert rows_of(processor, RED, "a dog", add_special_tokens=False) == ["IMG a dog"]


def test_the_answers_of_a_chat_can_be_found():
    template = (
        "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{%- else -%}{{ '<image>' + m['content'] }} {% endif -%}{%- endfor -%}"
    )
    chat = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "a dog"}]
    options = {"return_assistant_tokens_mask": True, "processor_kwargs": {"images": [RED]}}
    out = stage2_processor().apply_chat_template(chat, template, tokenize=True, return_dict=True, **options)
    assert out["assistant_masks"] == [[0] * (QUERIES + 5) + [1, 1]]


@pytest.mark.parametrize(
    "argument",
    [
        {"text_pair": "a cat"}, {"text_target": "a cat"}, {"text_pair_target": "a cat"}, {"stride": 2},
        {"is_split_into_words": True}, {"return_overflowing_tokens": True}, {"sanitize_control_tokens": True},
    ],
    ids=lambda argument: next(iter(argument)),
)  # fmt: skip
def test_arguments_without_a_meaning_for_prompts_are_refused_by_name(argument):
    (name, value) = next(iter(argument.items()))
    processor = stage2_processor()
    for given in (argument, {"text_kwargs": argument}):
        with pytest.raises(ValueError, match=f"^{name}={value!r} is not supported here: "):
            processor(RED, "a dog", **given)
    nothing = {"stride": 0, "return_overflowing_tokens": False, "is_split_into_words": False}
    assert processor(RED, "a dog", **nothing).input_ids == processor(RED, "a dog").input_ids


def test_a_misspelt_argument_is_named():
    for processor in (stage1_processor(), stage2_processor()):
        with pytest.raises(TypeError, match="takes no argument 'paddding'. Is it 'padding'?"):
            processor(RED, "a dog", paddding=True)
        with pytest.raises(TypeError, match="takes no argument 'do_resise' in images_kwargs. Is it 'do_resize'?"):
            processor(RED, "a dog", images_kwargs={"do_resise": True})
        with pytest.raises(TypeError, match="'padding' is given by itself and in text_kwargs"):
            processor(RED, "a dog", padding=True, text_kwargs={"padding": False})
        with pytest.raises(ValueError, match="foo"):
            processor(RED, "a dog", padding="foo")


def test_stage_1_hands_every_argument_to_the_tokenizer():
    processor, tokenizer = stage1_processor(), bert_tokenizer()
    for options in (
        {"text_pair": ["a cat"], "return_token_type_ids": True},
        {"truncation": True, "max_length": 5, "stride": 1, "return_overflowing_tokens": True},
        {"truncation": True, "max_length": 5, "return_special_tokens_mask": True, "return_offsets_mapping": True},
        {"padding": "max_length", "max_length": 16, "return_attention_mask": False, "return_length": True},
        {"max_length": 5, "add_special_tokens": False},
        {"padding": True, "pad_to_multiple_of": 8, "padding_side": "left"},
    ):
        expected = tokenizer([TEXT], **{"return_token_type_ids": False} | options)
        assert dict(processor(text=[TEXT], **options)) == dict(expected), options
    words = processor(text=TEXT.split(), is_split_into_words=True)
    assert words.input_ids == tokenizer([TEXT])["input_ids"]
