"""The processor: placeholders, padding, lengths, odd images, round trip, and the caller's tokenizer left alone."""

import base64
import functools
import http.server
import io
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoProcessor

from modeling_blip2x import Blip2xProcessor
from tests.helpers.tiny import (
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
    with pytest.raises(ValueError, match="has 2 <image> placeholders, but was given 1 image\\."):
        processor(image(), "<image> a <image> dog")
    with pytest.raises(ValueError, match="has 1 <image> placeholder, but was given 0 images"):
        processor(text="<image> a dog")
    with pytest.raises(ValueError, match="2 images and 1 text\\."):
        processor([image(), image()], "a dog")


def test_a_length_left_by_training_neither_cuts_nor_warns(tmp_path):
    """A tokenizer that has cut texts is saved with the length it cut them to."""
    trained = stage1_processor()
    trained.tokenizer(["a dog"], truncation=True, max_length=4)
    trained.save_pretrained(tmp_path)
    loaded = Blip2xProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.init_kwargs["max_length"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = loaded(text=["a red circle below the blue square", "a dog"], padding=True).input_ids
    assert [len(row) for row in ids] == [9, 9]


def test_bad_text_is_named():
    for text, message in (
        ([3], r"text\[0\] got 3"),
        (5, r"got 5 \(int\)"),
        (b"a dog", "got b'a dog'"),
        ({"a": 1}, "dict"),
    ):
        with pytest.raises(ValueError, match=f"text must be a string or a list of strings.*{message}"):
            stage2_processor()(image(), text)


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


def pixels_of(*images, **options):
    return stage2_processor()(*images, return_tensors="pt", **options).pixel_values


def half_hidden():
    """The right half is red under full transparency, which shows white."""
    picture = Image.new("RGBA", (40, 30), (0, 0, 255, 255))
    picture.paste((255, 0, 0, 0), (20, 0, 40, 30))
    return picture


def test_image_by_address(tmp_path):
    half_hidden().save(tmp_path / "half.png")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        pixels = pixels_of(f"{address}/half.png")
        with pytest.raises(ValueError, match=r"images\[1\]: the image .*/none.png' cannot be fetched: .*404"):
            stage2_processor()([image(), f"{address}/none.png"])
        server.shutdown()
    assert torch.equal(pixels, pixels_of(half_hidden()))


def test_an_image_in_every_wrapping(tmp_path):
    """File, bytes, base64 or open file: the pixels of the picture on white."""
    file = tmp_path / "half.png"
    half_hidden().save(file)
    content = file.read_bytes()
    text = base64.b64encode(content).decode()
    white = Image.new("RGB", (40, 30), "white")
    white.paste((0, 0, 255), (0, 0, 20, 30))
    expected = pixels_of(white)
    wrappings = [
        str(file), file, content, bytearray(content), io.BytesIO(content), text, f"data:image/png;base64,{text}",
        {"bytes": content, "path": None}, half_hidden(), np.asarray(half_hidden()),
    ]  # fmt: skip
    for given in wrappings:
        if hasattr(given, "read"):
            given.seek(0)
        assert torch.equal(pixels_of(given), expected), type(given)
    with file.open("rb") as opened:
        assert torch.equal(pixels_of([opened]), expected)


def test_every_iterable_of_images_and_texts(tmp_path):
    processor = stage2_processor()
    pictures, texts = [image(), image("blue")], ["a dog", "what is it ?"]
    expected = processor(pictures, texts, padding=True, return_tensors="pt")
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for picture, file in zip(pictures, files):
        picture.save(file)
    table = Dataset.from_dict(
        {"image": [str(file) for file in files], "text": texts},
        features=Features({"image": ImageFeature(), "text": Value("string")}),
    )
    levels = [np.asarray(picture) for picture in pictures]
    objects = np.empty(2, dtype=object)
    objects[:] = pictures
    for given in (
        tuple(pictures), iter(pictures), table["image"], files, np.array([str(file) for file in files]),
        np.stack(levels), torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2), objects,
    ):  # fmt: skip
        assert torch.equal(
            processor(given, texts, padding=True, return_tensors="pt").pixel_values, expected.pixel_values
        )
    for given in (tuple(texts), iter(texts), table["text"], np.array(texts)):
        assert torch.equal(processor(pictures, given, padding=True, return_tensors="pt").input_ids, expected.input_ids)


def test_what_is_no_image_is_named_by_its_place():
    processor = stage2_processor()
    one = image()
    for given, message in (
        ([one, None], r"images\[1\] is None"),
        ([[one], [None]], r"images\[1\]\[0\] is None"),
        ([[one], None], r"images\[1\] is None"),
        ([[one], one], r"images\[0\] is a list, not an image like those beside it"),
        ([one, "none.png"], r"images\[1\]: The image 'none.png' cannot be read: the file is missing"),
        ([[one], [one, 3]], r"images\[1\]\[1\]: An image is a int: 3"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            processor(given, ["a dog", "a cat"])
    with pytest.raises(ValueError, match="both are None or empty"):
        processor([])
    with pytest.raises(ValueError, match="text is an empty list"):
        processor([], [])
    with pytest.raises(ValueError, match=r"text\[1\] got None"):
        processor([image()] * 2, ["a dog", None])


def test_levels_of_ones_own_are_left_alone():
    """Who says that an array is not to be rescaled, or how it lies, has prepared it."""
    levels = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    options = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    assert torch.equal(pixels_of(levels, **options)[0], levels)
    assert torch.equal(
        pixels_of(levels.permute(1, 2, 0).numpy(), **options, input_data_format="channels_last")[0], levels
    )


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


def test_saving_with_push_uploads_every_component(tmp_path, monkeypatch):
    sent = {}

    def create_commit(self, repo_id, operations, **_):
        sent.setdefault(repo_id, set()).update(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=f"user/{repo_id}"))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    processor = stage2_processor(qformer_tokenizer=bert_tokenizer())
    processor.save_pretrained(tmp_path / "here")
    files = {str(file.relative_to(tmp_path / "here")) for file in (tmp_path / "here").rglob("*") if file.is_file()}
    assert "qformer_tokenizer/tokenizer.json" in files
    processor.save_pretrained(tmp_path / "named", push_to_hub=True)
    processor.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="other", commit_message="All of it")
    processor.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="third")  # nothing on the disk is new
    assert {repository: uploaded - {"README.md"} for repository, uploaded in sent.items()} == {
        "user/named": files, "user/other": files, "user/third": files,
    }  # fmt: skip


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


def test_decoding_takes_what_generate_gives():
    """Tensors, arrays, lists and generate's own output, with one or several sequences for each prompt."""
    model, processor = stage2("opt", std=0.5), stage2_processor()
    model.config.image_token_index = processor.image_token_id
    batch = processor([image(), image("blue")], ["a dog", "what is it ?"], padding=True, return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 4, "num_return_sequences": 2}
    output = model.generate(**batch, **options, return_dict_in_generate=True)
    ids, prompts = output.sequences, batch.input_ids
    new = processor.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
    expected = [text.strip() for text in new]
    assert len(expected) == 4 and all(expected)
    rows = [row.tolist() for row in ids]
    for given in (output, dict(output), ids, ids.numpy(), rows, list(ids), tuple(rows)):
        for asked in (prompts, prompts.numpy(), prompts.tolist(), list(prompts)):
            assert processor.batch_decode_new(given, asked) == expected
    assert processor.batch_decode_new(rows[0], prompts[0]) == expected[:1]
    with pytest.raises(ValueError, match="ids has 4 rows and input_ids 3"):
        processor.batch_decode_new(ids, prompts[[0, 0, 1]])


def test_decoding_stops_at_the_end_token():
    """Rows that are done may be padded with a word: "on on on"."""
    processor = stage2_processor()
    word = processor.tokenizer.convert_tokens_to_ids
    prompt = processor(image(), "a dog").input_ids
    answer = [word("red"), word("</s>"), word("on"), word("on")]
    assert processor.batch_decode_new([prompt[0] + answer], prompt) == ["red"]
    assert processor.batch_decode_new([[0, *answer]], prompt) == ["red"]  # an encoder-decoder's
    assert processor.batch_decode_new([[2, *answer]], prompt) == ["red"]  # whose decoder starts from </s>
    assert processor.batch_decode_new([answer], prompt) == ["red"]  # where generate was given inputs_embeds
    assert processor.batch_decode_new([prompt[0] + [word("</s>"), word("on")]], prompt) == [""]
    first = stage1_processor()
    word = first.tokenizer.convert_tokens_to_ids
    assert first.batch_decode_new([[word("[DEC]"), word("red"), word("[SEP]"), word("on")]]) == ["red"]


def test_a_processor_that_does_not_fit_is_named():
    model = stage2("opt", qformer={"vocab_size": 20, "bos_token_id": 19})
    reader = stage2_processor(qformer_tokenizer=bert_tokenizer())
    model.config.image_token_index = reader.image_token_id
    model.check_processor(stage2_processor())
    with pytest.raises(
        ValueError, match=f"tokenizer has {len(bert_tokenizer())} tokens, the Q-Former's embedding 20 rows"
    ):
        model.check_processor(reader)
    deaf = stage2("opt", qformer={"use_qformer_text_input": False})
    deaf.config.image_token_index = reader.image_token_id
    with pytest.raises(ValueError, match="has a Q-Former tokenizer, the Q-Former reads no text"):
        deaf.check_processor(reader)
    on = reader.tokenizer.convert_tokens_to_ids("on")
    model.generation_config.pad_token_id = on
    with pytest.raises(
        ValueError, match=f"pad_token_id is 0 in the processor, {on} in the model, where it is no special"
    ):
        model.check_processor(stage2_processor())
    model.generation_config.pad_token_id = None
    model.check_processor(stage2_processor())
