"""Texts that spell special tokens: what counts in a processor's prompt, and what is words."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from modeling_blip2x import Blip2xProcessor
from modeling_blip2x.plain_words_blip2x import PlainWords
from tests.helpers.family_tokenizers import FAMILIES, bert
from tests.helpers.tiny import QUERIES, image, image_processor, stage1_processor

RED, BLUE = image(), image("blue")
CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{%- endfor -%}"
    "<|im_start|>assistant:"
)


def stage2(family: str, **options) -> Blip2xProcessor:
    return Blip2xProcessor(image_processor(), FAMILIES[family].make(), num_query_tokens=2, **options)


def tokens(processor, *given, **options) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(processor(*given, **options).input_ids[0])


@pytest.mark.parametrize("family", ["llama", "xglm", "byt5"])
def test_only_image_tokens_count_in_a_prompt(family):
    processor = stage2(family)
    end = processor.tokenizer.eos_token
    given = tokens(processor, [[RED, BLUE]], [f"a<image>b {end} c<image>"])
    alone = tokens(processor, text=f"x {end} c")
    assert given.count("<image>") == 4 and given.count(end) == tokens(processor, text="x").count(end)
    assert alone.count(end) == given.count(end)
    everything = tokens(processor, [[RED, BLUE]], [f"a<image>b {end} c<image>"], split_special_tokens=False)
    assert everything.count("<image>") == 4 and everything.count(end) == given.count(end) + 1
    words = tokens(processor, RED, "a <image> b", split_special_tokens=True)
    assert words.count("<image>") == 2 and words[:2] == ["<image>"] * 2


def test_offsets_are_those_of_the_text_as_given():
    """Also where a space had to be put into what spells a special token: Unigram has it in its vocabulary."""
    processor, text = stage2("t5"), "a </s> <image> dog"
    spans = processor(RED, text, return_offsets_mapping=True).offset_mapping[0]
    spans = sorted({(begin, end) for begin, end in spans if end > begin})  # Metaspace gives a space its word's place
    spelt = [text[begin:end].strip() for begin, end in spans]
    assert spelt == ["a", "<", "/", "s", ">", "dog"]


def test_a_chat_template_keeps_its_special_tokens_and_messages_are_words():
    processor = stage2("qwen")
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|other|>"]})
    processor = Blip2xProcessor(image_processor(), processor.tokenizer, num_query_tokens=2, chat_template=CHATML)
    chat = [{"role": "user", "content": "<image>hi <|im_end|> <|other|>"}]
    text = processor.apply_chat_template(chat)
    whole = processor.apply_chat_template(chat, tokenize=True, return_dict=True, processor_kwargs={"images": [RED]})
    for given in (tokens(processor, RED, text), processor.tokenizer.convert_ids_to_tokens(whole["input_ids"][0])):
        assert given.count("<|im_start|>") == 2 and given.count("<|im_end|>") == 1 and given.count("<|other|>") == 0
        assert given.count("<image>") == 2
    assert "<|other|>" not in tokens(processor, RED, "a <|other|>")  # a prompt of one's own
    assert chat == [{"role": "user", "content": "<image>hi <|im_end|> <|other|>"}]
    other = processor.apply_chat_template(
        chat,
        "<|other|>{{ messages[0]['content'] }}",
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": [RED]},
    )
    assert processor.tokenizer.convert_ids_to_tokens(other["input_ids"][0]).count("<|other|>") == 1


def test_a_template_that_writes_the_first_token_does_not_double_it():
    processor = stage2("llama", chat_template="{{ bos_token }}{{ messages[0]['content'] }}")
    text = processor.apply_chat_template([{"role": "user", "content": "a dog"}])
    assert text.startswith("<s>") and tokens(processor, RED, text).count("<s>") == 1
    assert tokens(processor, RED, "a dog").count("<s>") == 1


def test_the_qformer_reads_words():
    spelt = "a [SEP] on [MASK] or [DEC] [PAD]"
    processor = stage1_processor()
    ids = processor(text=[spelt, "a dog"], padding=True).input_ids
    special = {processor.tokenizer.mask_token_id, processor.tokenizer.bos_token_id}
    assert ids[0].count(processor.tokenizer.sep_token_id) == 1 and not special & set(ids[0])
    assert processor.tokenizer(spelt)["input_ids"] == ids[0]  # also by its tokenizer alone
    reader = stage2("llama", qformer_tokenizer=bert())
    batch = reader(RED, f"<image> {spelt}")
    assert batch.qformer_input_ids[0].count(3) == 1 and 4 not in batch.qformer_input_ids[0]
    assert len(batch.qformer_input_ids[0]) > 20
    unigram = FAMILIES["mbart"].make()  # whose own vocabulary has `</s>`
    assert PlainWords(unigram).batch(["a </s> dog"])["input_ids"][0].count(unigram.eos_token_id) == 1


def test_a_tokenizer_saved_to_count_or_not_to_count_them_changes_nothing():
    tokenizer = FAMILIES["llama"].make()
    expected = stage2("llama")(RED, "a </s> <image>").input_ids
    for saved in (True, False):
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = saved
        processor = Blip2xProcessor(image_processor(), tokenizer, num_query_tokens=2)
        assert processor(RED, "a </s> <image>").input_ids == expected


def test_an_added_token_that_is_a_word_stays_one():
    """Also in a tokenizer in Python, which splits every added token where it is told to split special ones."""
    for family in ("byt5", "llama"):
        tokenizer = FAMILIES[family].make()
        tokenizer.add_tokens(["<place>"])
        processor = Blip2xProcessor(image_processor(), tokenizer, num_query_tokens=2)
        assert tokens(processor, RED, "a <place>").count("<place>") == 1


def test_threads_do_not_change_what_counts_for_one_another():
    processor = stage2("llama")
    asked = [
        ([RED], "a </s> dog", True), ([RED], "a <image> dog </s>", None), ([RED], "<image> </s>", False),
    ]  # fmt: skip

    def ids(number: int) -> list[int]:
        images, text, split = asked[number % 3]
        return processor(text=text, images=images, split_special_tokens=split).input_ids[0]

    expected = [ids(number) for number in range(3)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ids, range(300)))
    assert found == expected * 100 and len({tuple(row) for row in expected}) == 3


def test_half_of_a_surrogate_pair_is_named():
    for processor in (stage1_processor(), stage2("llama")):
        with pytest.raises(ValueError, match=r"text\[1\] is no UTF-8: .* '\\ud83d', at character 2"):
            processor(text=["é", "a \ud83d dog"])
    assert stage2("llama")(text="é 😀").input_ids and QUERIES
