"""The Space's functions on tiny models, without a server."""

import socket
import threading

import answers
import app
import attention
import gradio as gr
import matching
import models as space_models
import numpy as np
import pytest
import torch
import work
from PIL import Image
from settings import Settings

from blip2x_training.evaluation.evaluated_model import load_checkpoint
from blip2x_training.evaluation.report.attention import query_maps
from blip2x_training.evaluation.report.page import heat_maps
from tests.helpers.space_server import NEVER, TEXTS
from tests.helpers.tiny import bert_tokenizer, llm_tokenizer


def silent(*_):
    pass


def answered(loaded, *arguments):
    *_, (text, dropped) = answers.answer(loaded, *arguments)
    return text, dropped


# Checkpoints


def test_each_checkpoint_takes_the_role_it_can(loaded):
    assert loaded.speaker.has_language_model and not loaded.matcher.has_language_model
    assert loaded.captioner is loaded.speaker


def test_two_of_a_kind_and_wrong_options_are_refused(loaded):
    with pytest.raises(ValueError, match="both stage-1 checkpoints"):
        space_models.load_models([loaded.matcher.source] * 2, "cpu")
    with pytest.raises(ValueError, match="dtype is 'half'"):
        space_models.load_models([], dtype="half")
    with pytest.raises(ValueError, match="needs a GPU"):
        space_models.load_models([], "cpu", quantization="4bit")


def test_another_kind_of_checkpoint_says_how_to_convert(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(ValueError, match="blip-2 checkpoint.*modeling_blip2x.convert"):
        space_models.load_models([str(tmp_path)], "cpu")


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, loaded, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(ValueError, match="opt checkpoint, no BLIP-2 model"):  # a language model cannot be converted
        space_models.load_models([str(tmp_path)], "cpu")
    with pytest.raises(ValueError, match="no folder runs/nowhere here, and it was not found on the hub"):
        space_models.load_models(["runs/nowhere"], "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        space_models.load_models([str(tmp_path / "empty")], "cpu")
    monkeypatch.setattr(space_models.importlib.util, "find_spec", lambda name: None)  # as where blip2x is not installed
    with pytest.raises(ValueError, match="does not carry its code.*save_with_code"):
        space_models.load_models([loaded.matcher.source], "cpu")


@pytest.mark.parametrize("device", ["cudaa", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_named(device):
    with pytest.raises(ValueError, match=f"The device {device} is not available here"):
        space_models.load_models([], device)


def test_wrong_options_are_refused_in_a_line(capsys, monkeypatch):
    for turns in ("-4", "51", "two"):
        with pytest.raises(SystemExit):
            app.parse(["--turns", turns])
        assert f"'{turns}' is not a whole number from 0 to 50" in capsys.readouterr().err
    monkeypatch.setenv("BLIP2X_TURNS", "3")
    assert app.parse([]).turns == 3
    with socket.socket() as taken, gr.Blocks() as page:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"Cannot listen at 127.0.0.1, port {port}: it is taken"):
            app.launch(page, "127.0.0.1", port, wait=False)


def test_the_quickstart_output_of_the_clone_is_found_and_no_other(tmp_path, monkeypatch):
    def put(root):
        folders = [root / "runs" / "quickstart" / stage for stage in ("stage2", "stage1")]
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        return [str(folder) for folder in folders]

    put(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(space_models, "__file__", str(tmp_path / "clone" / "space_app" / "models.py"))
    with pytest.raises(ValueError, match="make demo"):
        space_models.find_checkpoints([])
    assert space_models.find_checkpoints(["runs/quickstart"]) == [f"runs/quickstart/{s}" for s in ("stage2", "stage1")]
    assert space_models.find_checkpoints(["someone/model"]) == ["someone/model"]
    ours = put(tmp_path / "clone")
    assert space_models.find_checkpoints([]) == ours


def test_the_tower_sees_a_picture_once(loaded, pictures):
    part, calls = loaded.matcher, []
    part.seen.clear()
    handle = part.model.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    first = part.see(pictures)
    again = part.see(pictures[::-1])
    handle.remove()
    assert len(calls) == 1 and torch.equal(first.flip(0), again)
    for number in range(space_models.REMEMBERED + 5):
        part.see([Image.new("RGB", (8, 8), (number, 0, 0))])
    assert len(part.seen) == space_models.REMEMBERED


# Captions and answers


def test_a_caption_is_what_generate_says(loaded, pictures):
    part = loaded.speaker
    inputs = part.processor(images=pictures[0], text="a photo of", return_tensors="pt")
    ids = part.model.generate(**inputs, num_beams=3, num_return_sequences=2, max_new_tokens=7, min_new_tokens=1)
    expected = part.processor.batch_decode_new(ids, inputs["input_ids"])
    assert (
        answers.caption(part, pictures[0], "a photo of", Settings(num_beams=3, max_length=7, captions=2), NEVER)
        == expected
    )
    assert (
        answers.caption(part, pictures[1], "a photo of", Settings(num_beams=3, max_length=7, captions=2), NEVER)
        != expected
    )


def test_what_visitors_write_are_words(loaded, pictures, monkeypatch):
    """Special tokens that a prompt, a question or an earlier answer spells, with the chat template here and another."""
    part, spelt = loaded.speaker, "a <image> dog </s> <pad>"
    processor = part.processor
    image, bos, end = processor.image_token_id, processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    queries = part.model.config.num_query_tokens

    def counts(inputs):
        ids = inputs["input_ids"][0].tolist()
        return [ids.count(token) for token in (image, bos, end)]

    assert counts(answers.prompt_inputs(part, pictures[0], spelt)) == [queries, 1, 0]
    asked = (part, pictures[0], spelt, [(spelt, spelt)], Settings(max_length=1))
    assert counts(answers.question_inputs(*asked)[0]) == [queries, 1, 0]
    template = "{{ bos_token }}{%- for m in messages -%}{{ m['content'] }}{{ eos_token }}{%- endfor -%}"
    monkeypatch.setattr(processor, "chat_template", template)
    assert counts(answers.question_inputs(*asked)[0]) == [queries, 1, 3]  # those of the template


def test_stage1_captions_by_its_itg_head(loaded, pictures):
    part = loaded.matcher
    pixels = part.processor(images=pictures[0], return_tensors="pt")["pixel_values"]
    ids = part.model.generate(pixels, num_beams=2, max_new_tokens=9, min_new_tokens=1)
    expected = [text.strip() for text in part.processor.batch_decode(ids, skip_special_tokens=True)]
    assert answers.caption(part, pictures[0], "", Settings(num_beams=2, max_length=9), NEVER) == expected
    with pytest.raises(gr.Error, match="takes no prompt"):
        answers.caption(part, pictures[0], "a photo of", Settings(), NEVER)


def test_sampling_follows_the_seed(loaded, pictures):
    def drawn(seed):
        return answers.caption(loaded.speaker, pictures[0], "a", Settings("nucleus", max_length=12, seed=seed), NEVER)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed)[0] for seed in range(5)}) > 1


def test_a_caption_that_is_drawn_twice_is_shown_once(loaded, pictures):
    same = Settings("nucleus", top_p=0.1, temperature=0.5, max_length=2, captions=5)
    texts = answers.caption(loaded.speaker, pictures[0], "a", same, NEVER)
    assert len(texts) == len(set(texts)) < 5
    assert answers.different([" a dog", "two", "a dog "]) == ["a dog", "two"]


def test_an_answer_streams_and_is_what_generate_says(loaded, pictures):
    part = loaded.speaker
    inputs = part.processor(images=pictures[0], text="Question: what colour is it? Answer:", return_tensors="pt")
    ids = part.model.generate(**inputs, do_sample=False, max_new_tokens=9, min_new_tokens=1)
    expected = part.processor.batch_decode_new(ids, inputs["input_ids"])[0]
    said = [
        text
        for text, _ in answers.answer(
            loaded, pictures[0], "what colour is it?", [], Settings(num_beams=1, max_length=9)
        )
    ]
    assert said[-1] == expected
    assert len(set(said)) > 2 and all(expected.startswith(text) for text in said)
    beams = answered(loaded, pictures[0], "what colour is it?", [], Settings(num_beams=2, max_length=9))[0]
    ids = part.model.generate(**inputs, num_beams=2, max_new_tokens=9, min_new_tokens=1)
    assert beams == part.processor.batch_decode_new(ids, inputs["input_ids"])[0]


def test_history_is_told_by_the_template_and_trimmed_to_the_room(loaded, pictures):
    part = loaded.speaker
    assert answers.chat_text(part, "and now?", [("is it red?", "yes.")]) == (
        "Question: is it red? Answer: yes. Question: and now? Answer:"
    )
    short, dropped = answered(
        loaded, pictures[0], "is it red ?", [("two dog", "no")], Settings(num_beams=1, max_length=5)
    )
    assert dropped == 0
    assert short != answered(loaded, pictures[0], "is it red ?", [], Settings(num_beams=1, max_length=5))[0]
    long = [("is there a red dog on the left ?", "yes")] * 8
    settings = Settings(num_beams=1, max_length=10)
    inputs, dropped = answers.question_inputs(part, pictures[0], "is it red ?", long, settings)
    assert 0 < dropped < 8
    assert inputs["input_ids"].shape[1] + 10 <= answers.room_of(part) == 64
    one_more, _ = answers.question_inputs(
        part, pictures[0], "is it red ?", long[: 8 - dropped + 1], Settings(num_beams=1, max_length=1)
    )
    assert one_more["input_ids"].shape[1] > inputs["input_ids"].shape[1] - 1
    with pytest.raises(gr.Error, match="too long"):
        answered(loaded, pictures[0], "red " * 80, [], settings)


def test_stage1_alone_cannot_answer_and_stage2_alone_cannot_match(loaded, pictures):
    with pytest.raises(gr.Error, match="no language model"):
        answered(space_models.Models(None, loaded.matcher), pictures[0], "what?", [], Settings())
    with pytest.raises(gr.Error, match="cannot score"):
        matching.match(space_models.Models(loaded.speaker, None), pictures, TEXTS, NEVER, silent)


@pytest.mark.parametrize("history", ["text", [["one"]], [["a", 3]], [["a" * 600, "b"]], [["a", "b"]] * 51, {"a": "b"}])
def test_a_wrong_history_is_refused(history):
    with pytest.raises(gr.Error):
        answers.check_history(history)


# Matching and searching


def test_scores_are_those_of_the_model(loaded, pictures):
    part = loaded.matcher
    found = matching.match(loaded, pictures, TEXTS, NEVER, silent)
    inputs = part.processor(images=pictures, text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        visual = part.model.get_image_features(inputs["pixel_values"]).pooler_output
        textual = part.model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        assert torch.tensor(found["itc"]).allclose(part.model.itc_scores(visual, textual), atol=1e-4)
        assert torch.tensor(found["itm"]).allclose(part.model.itm_scores(**inputs, grid=True), atol=1e-4)
    assert torch.tensor(found["itc"]).std() > 1e-3


def test_rankings_agree_with_the_scores(loaded, pictures):
    scores = matching.match(loaded, pictures, TEXTS, NEVER, silent)
    by_itc = matching.rank_images(loaded, pictures, TEXTS[0], 0, NEVER, silent)
    column = [row[0] for row in scores["itc"]]
    assert [row["itc"] for row in by_itc] == sorted(column, reverse=True)
    assert all(row["itm"] is None and column[row["image"]] == row["itc"] for row in by_itc)
    reranked = matching.rank_images(loaded, pictures, TEXTS[0], 2, NEVER, silent)
    assert {row["image"] for row in reranked[:2]} == {row["image"] for row in by_itc[:2]}
    assert reranked[2] == by_itc[2]
    assert all(row["itm"] == pytest.approx(scores["itm"][row["image"]][0], abs=1e-4) for row in reranked[:2])
    texts = matching.rank_texts(loaded, pictures[0], TEXTS, 3, NEVER, silent)
    assert sorted(row["text"] for row in texts) == sorted(TEXTS)
    for row in texts:
        assert row["itm"] == pytest.approx(scores["itm"][0][TEXTS.index(row["text"])], abs=1e-4)


def test_a_stopped_search_stops(loaded, pictures):
    stop = threading.Event()
    stop.set()
    with pytest.raises(work.Stopped):
        matching.rank_images(loaded, pictures, "a", 3, stop, silent)


# Looking


@pytest.mark.parametrize("which", ["speaker", "matcher"])
def test_maps_are_the_models_cross_attention(loaded, pictures, which):
    part = getattr(loaded, which)
    maps = attention.query_maps(part, pictures[0], 2, 1)
    pixels = part.processor.image_processor(pictures[0], return_tensors="pt")["pixel_values"]
    tower = part.model.get_image_features(pixels).last_hidden_state
    queries = part.model.get_image_features(vision_embeds=tower, output_attentions=True).qformer_outputs
    weights = queries.cross_attentions[1][0, 1, :, 1:]  # without the class token
    assert maps.shape == (6, 2, 2)
    assert torch.allclose(maps.flatten(1), weights / weights.sum(-1, keepdim=True), atol=1e-6)
    average = attention.query_maps(part, pictures[0], None, None)
    assert torch.allclose(average.sum((1, 2)), torch.ones(6), atol=1e-5)


@pytest.mark.parametrize("which", ["speaker", "matcher"])
def test_space_and_report_show_the_same(loaded, pictures, which):
    part, picture = getattr(loaded, which), pictures[0].resize((60, 40))
    checkpoint = load_checkpoint(part.source, "cpu")
    in_report = dict(heat_maps({"number": 7}, {(0, 7): {"image": picture, "prompt": ""}}, checkpoint))
    maps = attention.query_maps(part, picture, None, None)
    assert torch.allclose(maps, torch.from_numpy(query_maps(checkpoint, {"image": picture, "prompt": ""})), atol=1e-6)
    for name, query in (("mean of 6 queries", None), ("query 3", 3)):
        (in_space,) = attention.drawn(part, picture, [attention.average_map(maps, query)])
        levels = [np.asarray(drawn).astype(int) for drawn in (in_report[name], in_space)]
        assert np.abs(levels[0] - levels[1]).max() <= 1, name


@pytest.mark.parametrize("which", ["speaker", "matcher"])
def test_every_word_of_a_caption_gets_a_map(loaded, pictures, which):
    part = getattr(loaded, which)
    settings = Settings(num_beams=1, max_length=6)
    prompt = "a photo of" if part.has_language_model else ""
    words, weights = attention.word_weights(part, pictures[0], prompt, settings, NEVER)
    assert " ".join(words) == answers.caption(part, pictures[0], prompt, settings, NEVER)[0]
    assert weights.shape == (len(words), 6) and torch.allclose(weights.sum(-1), torch.ones(len(words)), atol=1e-5)
    shown = attention.word_overlays(part, pictures[0], prompt, settings, None, None, NEVER)
    assert [word for _, word in shown] == words


def test_tokens_become_words():
    tokenizer = llm_tokenizer()
    ids = tokenizer("red circle left", add_special_tokens=False)["input_ids"]
    words, weights = attention.words_of(tokenizer, [1, *ids, 2], torch.arange(5.0)[:, None])
    assert words == ["red", "circle", "left"] and weights[:, 0].tolist() == [1, 2, 3]
    assert attention.words_of(bert_tokenizer(), [3], torch.ones(1, 2))[0] == []


def test_a_layer_or_head_that_there_is_not_is_named():
    with pytest.raises(gr.Error, match="The layer is '1'"):
        attention.choice("1", [0, 2], "The layer")
    for wrong in (1.5, True, "two", [0]):
        with pytest.raises(gr.Error, match="choose average or one of 0, 2"):
            attention.choice(wrong, [0, 2], "The layer")
    assert attention.choice("average", [0], "The head") is None
    assert attention.choice("2", [0, 2], "The layer") == attention.choice(2, [0, 2], "The layer") == 2
