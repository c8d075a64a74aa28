"""The processor: placeholders, padding, lengths, odd images, round trip, and the caller's tokenizer left alone."""

import functools
import http.server
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    QUERIES,
    SIZE,
    bert_tokenizer,
    image,
    image_processor,
    llm_tokenizer,
    stage1_processor,
    stage2,
    stage2_processor,
)
from transformers import AutoProcessor

from modeling_blip2x import Blip2xProcessor


def test_placeholders_stand_before_bos():
    processor = stage2_processor()
    ids = processor(image(), "what colour is it ?", return_tensors="pt").input_ids[0].tolist()
    assert ids[:QUERIES] == [processor.image_token_id] * QUERIES
    assert ids[QUERIES] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(ids[QUERIES + 1 :]) == "what colour is it ?"


def test_padding_never_comes_between_image_and_text():
    processor = stage2_processor()
    batch = processor([image(), image()], ["a dog", "what colour is the dog ?"], padding=True, return_tensors="pt")
    ids, mask = batch.input_ids[0].tolist(), batch.attention_mask[0].tolist()
    first = mask.index(1)
    assert set(mask[:first]) == {0} and set(mask[first:]) == {1}
    assert ids[first : first + QUERIES] == [processor.image_token_id] * QUERIES


def test_callers_tokenizer_is_not_changed():
    tokenizer, before = llm_tokenizer(), len(llm_tokenizer())
    side = tokenizer.padding_side
    Blip2xProcessor(image_processor(), tokenizer, num_query_tokens=QUERIES)
    assert len(tokenizer) == before and tokenizer.padding_side == side
    bert = bert_tokenizer()
    Blip2xProcessor(image_processor(), bert)
    assert bert.bos_token is None


def test_length_is_honoured_with_and_without_an_image():
    processor = stage2_processor()
    text = "a red dog and a green cat on the left of it"
    alone = processor(text=text, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    assert alone.input_ids.shape == (1, 8) and processor.image_token_id not in alone.input_ids
    both = processor(image(), text, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    assert both.input_ids.shape == (1, 12) and (both.input_ids == processor.image_token_id).sum() == QUERIES
    with pytest.raises(ValueError, match=f"max_length=4 has no room for the {QUERIES} image tokens"):
        processor(image(), text, truncation=True, max_length=4)


def test_image_alone_and_text_alone():
    processor = stage2_processor()
    alone = processor(image(), return_tensors="pt")
    assert alone.input_ids.tolist() == [[processor.image_token_id] * QUERIES + [1]]
    assert set(processor(text="a dog", return_tensors="pt")) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="both are None"):
        processor()


def test_image_token_in_the_text():
    processor = stage2_processor()
    plain = processor(image(), "a dog").input_ids
    assert processor(image(), "<image>a dog").input_ids == plain
    assert processor(image(), "<image>" * QUERIES + "a dog").input_ids == plain
    inside = processor(image(), "this picture <image> is a dog").input_ids[0]
    assert inside.count(processor.image_token_id) == QUERIES and inside[0] != processor.image_token_id
    with pytest.raises(ValueError, match="has 2 <image> placeholders but there is 1 image"):
        processor(image(), "<image> a <image> dog")
    with pytest.raises(ValueError, match="has 1 <image> placeholders but there is 0 image"):
        processor(text="<image> a dog")
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        processor([image(), image()], "a dog")


def test_bad_text_is_named():
    with pytest.raises(ValueError, match="got 3"):
        stage2_processor()(image(), [3])


def odd_images(folder):
    animated = folder / "animated.gif"
    image().save(animated, save_all=True, append_images=[image("blue")])
    return {
        "RGBA": image().convert("RGBA"),
        "L": image().convert("L"),
        "P": image().convert("P"),
        "CMYK": image().convert("CMYK"),
        "16 bit": Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)),
        "1 x 1": image(size=(1, 1)),
        "animated": Image.open(animated),
        "numpy": np.zeros((30, 40, 3), dtype=np.uint8),
        "torch": torch.zeros(3, 30, 40, dtype=torch.uint8),
        "path": str(animated),
    }


def test_odd_images(tmp_path):
    for name, picture in odd_images(tmp_path).items():
        pixels = stage2_processor()(picture, "a dog", return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, SIZE, SIZE) and torch.isfinite(pixels).all(), name


def test_exif_rotation_is_honoured(tmp_path):
    """A photo lying on its side, with the note to turn it, gives the pixels of the upright one, whichever way it comes."""
    upright = Image.fromarray(np.tile(np.arange(0, 240, 8, dtype=np.uint8)[:, None, None], (1, 40, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6  # lying; turn by 270 degrees
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "lying.png", exif=exif)
    processor = stage2_processor()
    expected = processor(upright, return_tensors="pt").pixel_values
    assert not torch.equal(processor(lying, return_tensors="pt").pixel_values, expected)
    for given in (
        Image.open(tmp_path / "lying.png"),
        str(tmp_path / "lying.png"),
        [Image.open(tmp_path / "lying.png")],
    ):
        assert torch.equal(processor(given, return_tensors="pt").pixel_values, expected)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_image_by_address(tmp_path):
    image().save(tmp_path / "red.png")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/red.png"
        pixels = stage2_processor()(address, return_tensors="pt").pixel_values
        server.shutdown()
    assert torch.equal(pixels, stage2_processor()(image(), return_tensors="pt").pixel_values)


def test_texts_that_are_cut_and_padded_raise_no_warning(recwarn):
    cut = stage1_processor()(text=["a red dog"] * 2, padding=True, truncation=True, max_length=3, return_tensors="pt")
    assert cut.input_ids.shape == (2, 3)
    assert [str(warning.message) for warning in recwarn if "max_length" in str(warning.message)] == []


def test_stage1_processor_adds_dec_and_pads_on_the_right():
    processor = stage1_processor()
    assert processor.tokenizer.bos_token == "[DEC]"
    batch = processor([image(), image()], ["a dog", "a red dog on the left"], padding=True, return_tensors="pt")
    assert batch.input_ids[0, 0] == processor.tokenizer.cls_token_id
    assert batch.attention_mask[0, 0] == 1 and batch.attention_mask[0, -1] == 0


def test_round_trip_of_both_kinds(tmp_path):
    for name, processor in {
        "stage1": stage1_processor(),
        "stage2": stage2_processor(),
        "instruct": stage2_processor(qformer_tokenizer=bert_tokenizer()),
    }.items():
        processor.save_pretrained(tmp_path / name)
        again = AutoProcessor.from_pretrained(tmp_path / name)
        assert type(again) is Blip2xProcessor
        assert len(again.tokenizer) == len(processor.tokenizer)
        assert (again.qformer_tokenizer is None) == (processor.qformer_tokenizer is None)
        a, b = processor(image(), "a dog", return_tensors="pt"), again(image(), "a dog", return_tensors="pt")
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def test_question_goes_to_the_qformer_too():
    batch = stage2_processor(qformer_tokenizer=bert_tokenizer())(image(), "what is it ?", return_tensors="pt")
    assert batch.qformer_input_ids[0, 0] == 2 and batch.qformer_attention_mask.all()
    assert "qformer_input_ids" not in stage2_processor()(image(), "what is it ?")


def test_chat_turns():
    processor = stage2_processor()
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "what colour ?"}]},
    ]
    text = processor.apply_chat_template(chat, tokenize=False)
    assert text.replace("<image>", "") == "Question: what is it ? Answer: a dog. Question: what colour ? Answer:"
    assert processor(image(), text).input_ids[0].count(processor.image_token_id) == QUERIES


@pytest.mark.parametrize("language_model, bos", [("opt", True), ("t5", False)])
def test_new_text_without_the_prompt(language_model, bos):
    """One contract for both kinds: the answer, never the question."""
    model, processor = stage2(language_model, std=0.5), stage2_processor(bos)
    model.config.image_token_index = processor.image_token_id
    batch = processor([image(), image("blue")], ["a dog", "what is it ?"], padding=True, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=4, do_sample=False)
    answers = processor.batch_decode_new(ids, batch.input_ids)
    new = ids if language_model == "t5" else ids[:, batch.input_ids.shape[1] :]
    assert answers == [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    sampled = model.generate(**batch, max_new_tokens=2, do_sample=True, num_return_sequences=3)
    assert len(processor.batch_decode_new(sampled, batch.input_ids)) == 6
