"""How the Space takes a request: what it refuses, and how it works and stops, without a server."""

import io
import os
import threading

import about
import answers
import app
import attention
import gradio as gr
import models as space_models
import pytest
import torch
import uploads
import work
from mistakes import Mistake
from PIL import Image, ImageFile
from sent import checked
from settings import RANGES, Settings, check_text, check_texts, check_whole

from tests.helpers.space_server import WAIT, hold_first_generation
from tests.helpers.tiny import image

# What is refused


@pytest.mark.parametrize("name", [*RANGES, "captions"])
def test_a_setting_outside_its_range_is_refused(name):
    high = 5 if name == "captions" else RANGES[name].high
    for wrong in (high + 1, -2, float("nan"), "3", None, True):
        with pytest.raises(gr.Error):
            Settings(**{name: wrong})


def test_settings_that_contradict_one_another_are_refused():
    with pytest.raises(gr.Error, match="whole number"):
        Settings(num_beams=2.5)
    with pytest.raises(gr.Error, match="Shortest"):
        Settings(min_length=20, max_length=10)
    with pytest.raises(gr.Error, match="beam or nucleus"):
        Settings("magic")
    with pytest.raises(gr.Error, match="501 characters"):
        check_text("a" * 501, "The prompt")
    with pytest.raises(gr.Error, match="at most 50"):
        check_texts("a\n" * 51)
    with pytest.raises(gr.Error, match="empty"):
        check_text("  ", "The question")
    with pytest.raises(gr.Error, match="Seed is 1.5; it must be a whole number"):
        Settings(seed=1.5)
    for wrong in (-1, 51, 2.5, "3", None, True, float("nan")):
        with pytest.raises(gr.Error, match="Earlier turns is .*whole number from 0 to 50"):
            check_whole(wrong, "Earlier turns", 50)
    assert check_whole(7.0, "Earlier turns", 50) == 7


HUGE = (10**400, -(10**400), float("inf"), float("nan"), "9" * 5000, [[0] * 5000], {"a": "b" * 5000})


@pytest.mark.parametrize("name", [*RANGES, "captions", "decoding"])
def test_a_setting_that_is_huge_is_refused_in_a_short_sentence(name):
    for wrong in HUGE:
        with pytest.raises(Mistake) as told:
            Settings(**{name: wrong})
        assert len(str(told.value)) < 200
    for wrong in HUGE:
        with pytest.raises(Mistake, match="Re-ranked is") as told:
            check_whole(wrong, "Re-ranked", 64)
        assert len(str(told.value)) < 200
        with pytest.raises(Mistake, match="The layer is") as told:
            attention.choice(wrong, [0, 2], "The layer")
        assert len(str(told.value)) < 200


def test_half_a_character_is_refused():
    for text in ("\ud800", "a \udfff b", "\udc80" * 3):
        with pytest.raises(Mistake, match="The prompt has half a character"):
            check_text(text, "The prompt", required=False)
        with pytest.raises(Mistake, match="Text 2 has half a character"):
            check_texts(f"a\n{text}")
    assert check_text("\U0001f600", "The prompt") == "\U0001f600"
    with pytest.raises(Mistake, match="must be one text"):
        check_texts(["a"])


@pytest.mark.parametrize("prompt", ["<image>", "<image><image>", "a <image> of </s> <pad>"])
def test_a_prompt_that_spells_special_tokens_is_words(loaded, prompt):
    part, picture = loaded.speaker, image("red")
    inputs = answers.prompt_inputs(part, picture, prompt)
    assert (inputs["input_ids"] == part.model.config.image_token_index).sum() == part.model.config.num_query_tokens
    settings = Settings(num_beams=1, max_length=3)
    assert len(answers.caption(part, picture, prompt, settings, threading.Event())) == 1
    asked = answers.answer(loaded, picture, prompt, [(prompt, prompt)], settings)
    assert isinstance(list(asked)[-1][0], str)


@pytest.mark.parametrize(
    "demo, said",
    [
        ("[1, 2]", "demo: "),
        ("yes", "demo: "),
        ("{turns: many}", "demo.turns: 'many'"),
        ("{turns: null}", "demo.turns: None"),
    ]
    + [("{turns: 2.5}", "demo.turns"), ("{turns: 51}", "demo.turns"), ("{turns: true}", "demo.turns")]
    + [("{prompt: [a]}", "demo.prompt"), ("{prompt: null}", "demo.prompt"), ("{prompt: 7}", "demo.prompt: 7")],
)
def test_a_model_card_of_wrong_types_is_a_sentence(loaded, tmp_path, demo, said):
    (tmp_path / "README.md").write_text(f"---\nlicense: [mit, 7]\ndemo: {demo}\n---\n# Toy\n")
    part = loaded.speaker
    carded = space_models.Models(space_models.Part("a/b", str(tmp_path), part.model, part.processor), None)
    with pytest.raises(ValueError, match="The model card of a/b has in its header") as told:
        app.defaults(carded, app.parse([]))
    assert said in str(told.value)
    assert "mit" in about.about(carded)


def test_a_visitors_mistake_leaves_no_traceback_in_the_log():
    with pytest.raises(Mistake) as told:
        Settings(num_beams=0)
    assert told.value.print_exception is False


def saved(tmp_path, name, picture, **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def test_uploads_are_turned_upright_and_flattened(tmp_path):
    half = Image.new("RGB", (60, 30), "red")
    half.paste("blue", (30, 0, 60, 30))
    exif = half.getexif()
    exif[274] = 6  # to be turned a quarter clockwise
    turned = uploads.open_upload(saved(tmp_path, "turned.png", half, exif=exif))
    assert turned.size == (30, 60) and turned.getpixel((15, 5))[0] > 200 and turned.getpixel((15, 55))[2] > 200
    clear = uploads.open_upload(saved(tmp_path, "clear.png", Image.new("RGBA", (9, 9), (0, 0, 0, 0))))
    assert clear.getpixel((4, 4)) == (255, 255, 255)
    assert uploads.open_upload(saved(tmp_path, "large.jpg", image("red", (3000, 2000)))).size == (1024, 683)
    for name in ("a.webp", "a.gif", "a.bmp"):
        assert uploads.open_upload(saved(tmp_path, name, image())).mode == "RGB"


def test_what_is_no_sound_picture_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(gr.Error, match="not a picture"):
        uploads.open_upload(tmp_path / "text.png")
    noise = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(noise, "PNG")
    (tmp_path / "cut.png").write_bytes(noise.getvalue()[: len(noise.getvalue()) // 2])
    with pytest.raises(gr.Error, match="damaged or cut off"):
        uploads.open_upload(tmp_path / "cut.png")
    bomb = saved(tmp_path, "bomb.png", Image.new("1", (30000, 30000)))
    assert bomb.stat().st_size < 1e6
    large = saved(tmp_path, "large.png", Image.new("1", (9000, 6000)))
    with monkeypatch.context() as header_only:
        header_only.setattr(ImageFile.ImageFile, "load", lambda picture: pytest.fail("its pixels were decoded"))
        with pytest.raises(gr.Error, match="megapixels"):
            uploads.open_upload(bomb)
        with pytest.raises(gr.Error, match="54 megapixels"):
            uploads.open_upload(large)
    monkeypatch.setattr(uploads, "MAX_MEGABYTES", 0.00001)
    with pytest.raises(gr.Error, match="MB"):
        uploads.open_upload(saved(tmp_path, "heavy.png", image()))
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(gr.Error):  # PostScript would run a program
        uploads.open_upload(tmp_path / "page.eps")


def test_only_files_that_were_uploaded_are_opened(tmp_path, monkeypatch):
    cache = tmp_path / "uploads"
    cache.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(cache))
    ours, theirs = saved(cache, "ours.png", image("red")), saved(tmp_path, "theirs.png", image("blue"))
    (cache / "link.png").symlink_to(theirs)
    assert uploads.open_image({"path": str(ours)}).getpixel((5, 5)) == image("red").getpixel((5, 5))
    elsewhere = (theirs, cache / ".." / "theirs.png", cache / "link.png", tmp_path / "uploads_too" / "a.png")
    for path in (*map(str, elsewhere), 7, None, "", "a\0b"):
        with pytest.raises(Mistake, match="are not opened"):
            uploads.open_image({"path": path})
    for wrong in ("photo.jpg", 7, []):
        with pytest.raises(Mistake, match="are not opened"):
            uploads.open_image(wrong)
    for gone in ("gone.png", "a" * 5000):  # the cache is swept
        with pytest.raises(Mistake, match="no longer here"):
            uploads.open_image({"path": str(cache / gone)})
    with pytest.raises(Mistake, match="as a file, not as a data address"):
        uploads.open_image({"path": str(ours), "url": "data:image/png;base64,AAAA"})
    with pytest.raises(Mistake, match="There is no picture"):
        uploads.open_image(None)


def test_a_gallery_holds_files_in_any_form_and_no_videos(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    colours = {name: {"path": str(saved(tmp_path, f"{name}.png", image(name)))} for name in ("red", "blue")}
    files = [{**file, "meta": {"_type": "gradio.FileData"}} for file in colours.values()]

    def first_pixels(sent):
        return [one.getpixel((5, 5)) for one in uploads.open_images(uploads.Entries(sent).model_dump())]

    expected = [image(name).getpixel((5, 5)) for name in colours]
    for sent in (files, [(file, "caption") for file in files], [{"image": file, "caption": None} for file in files]):
        assert first_pixels(sent) == expected
    with pytest.raises(Mistake, match="Videos are not taken"):
        first_pixels([{"video": files[0], "caption": None}])
    with pytest.raises(Mistake, match="These are 65 pictures; at most 64"):
        first_pixels(files[:1] * 65)
    with pytest.raises(ValueError, match="neither an image nor a video"):
        first_pixels([{"picture": files[0]}])


@pytest.fixture
def uploaded(tmp_path, monkeypatch):
    """A picture in the folder of uploads, as a client names it; the folder holds a pipe and ways out, too."""
    cache = tmp_path / "uploads"
    cache.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(cache))
    os.mkfifo(cache / "pipe.png")
    (cache / "link.png").symlink_to(saved(tmp_path, "theirs.png", image("blue")))
    (cache / "folder_link").symlink_to(tmp_path)
    return {"path": str(saved(cache, "ours.png", image("red")))}


def test_addresses_are_refused_at_any_depth(uploaded):
    picture = gr.Image(render=False)
    meta = {"meta": {"_type": "gradio.FileData"}}
    plain = [uploaded | meta, [{"image": uploaded}], "see http://127.0.0.1 for more"]
    assert checked([picture] * 3, plain) == plain
    for address in ("http://127.0.0.1/a.png", "HTTPS://example.com/a.png", "file:///etc/passwd"):
        for given in ({"path": address}, [{"image": {"path": address}, "caption": None}], {"a": [{"path": address}]}):
            with pytest.raises(Mistake, match="Addresses are not fetched"):
                checked([picture], [given])


FORGED = [
    {},
    {"meta": {"_type": "gradio.FileData"}},
    {"meta": None},
    {"is_stream": True},
    {"url": "/gradio_api/file=x"},
]


@pytest.mark.parametrize("more", FORGED)
def test_a_file_is_taken_where_a_picture_belongs_and_only_from_the_folder_of_uploads(uploaded, tmp_path, more):
    cache = tmp_path / "uploads"
    missing, there = tmp_path / "missing.png", tmp_path / "theirs.png"
    outside = [missing, there, cache / "link.png", cache / ".." / "theirs.png", cache / "folder_link" / "theirs.png"]
    told = set()
    for path in (*map(str, outside), "/dev/zero", "/etc/passwd", "~/a.png", "", 7, ["a"], {"path": "a"}):
        for wrap in (
            lambda file: file,
            lambda file: [file],
            lambda file: [{"image": file}],
            lambda file: [{"video": file}],
        ):
            for component in (gr.Image, gr.Gallery, gr.JSON, gr.Textbox, gr.Number, gr.Dataset, gr.Radio):
                with pytest.raises(Mistake) as refused:
                    checked([component(render=False)], [wrap({"path": path, **more})])
                told.add(str(refused.value))
    assert len(told) == 1, "what is said depends on what lies there"
    for name in ("pipe.png", "", "gone.png"):
        with pytest.raises(Mistake, match="no longer here"):
            checked([gr.Image(render=False)], [{"path": str(cache / name), **more}])
    for component in (gr.JSON, gr.Textbox, gr.Chatbot):
        with pytest.raises(Mistake):
            checked([component(render=False)], [[uploaded | more]])
    assert checked([gr.Image(render=False)], [uploaded | more]) == [uploaded | more]


def test_a_chat_is_texts(uploaded):
    chat = gr.Chatbot(render=False)

    def texts(*contents, role="user"):
        return checked([chat], [[{"role": role, "content": content, "metadata": None} for content in contents]])[0]

    text, other = {"type": "text", "text": "what ?"}, {"type": "text", "text": "b"}
    sent_and_taken = [
        ("b", [other]),
        ([text], [text]),
        ([text, "b"], [text, other]),
        (text | {"more": 7}, [text]),
        ([], []),
    ]
    for content, taken in sent_and_taken:
        assert texts(content) == [{"role": "user", "content": taken}]
    assert chat.data_model.model_validate(texts("b", text)).model_dump()[1]["content"][0]["text"] == "what ?"
    component = {"type": "component", "component": "image", "value": {"path": "/etc/passwd"}, "props": {}}
    file = {"type": "file", "file": uploaded}
    wrong = [
        component,
        [component],
        [text, component],
        [component | {"text": "what ?"}],
        [file],
        uploaded,
        [[text]],
        7,
        None,
    ]
    for content in (*wrong, {"type": "text", "text": {"path": "a"}}, component | {"component": "html", "value": "<b>"}):
        with pytest.raises(Mistake):
            texts(content)
    for messages in (None, 7, "a", {"role": "user"}, [7], [None], [{"content": "a"}], [["a", "b"]]):
        with pytest.raises(Mistake):
            checked([chat], [messages])
    with pytest.raises(Mistake, match="of a user and of an assistant"):
        texts("a", role="system")


def test_texts_and_numbers_that_no_page_sends_are_refused_in_a_sentence():
    boxes = [gr.Textbox(render=False), gr.JSON(render=False), gr.Chatbot(render=False)]
    for wrong, sentence in (
        ("\ud800", "half a character"),
        ("a" * 30_000, "30000 characters; at most 25050"),
        (10**400, "too many digits"),
        (-(10**400), "too many digits"),
        (float("inf"), "too many digits"),
    ):
        for box in boxes:
            for given in (wrong, [["what ?", wrong]], [{"role": "user", "content": wrong}], {"a": {"b": [wrong]}}):
                with pytest.raises(Mistake, match=sentence):
                    checked([box], [given])
    with pytest.raises(Mistake, match="half a character"):
        checked(boxes[:1], [{"\ud800": 1}])
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(Mistake, match="cannot be read"):
        checked(boxes[:1], [deep])


# Work


def test_closing_a_stream_frees_the_models_thread(loaded, pictures, monkeypatch):
    """The generation waits at its fifth token for its end, so that the order of the two is the same on any machine."""
    steps, held = [], threading.Event()
    monkeypatch.setattr(work.StopWhenTold, "__call__", hold_first_generation(work.StopWhenTold, held.set))
    handle = loaded.speaker.model.language_model.register_forward_pre_hook(lambda *_: steps.append(1))
    settings = Settings(num_beams=1, min_length=40, max_length=40)
    stream = answers.answer(loaded, pictures[0], "what ?", [], settings)
    next(stream)
    assert held.wait(WAIT)
    stream.close()
    handle.remove()
    assert work.MODEL_THREAD.submit(lambda: True).result(timeout=WAIT)
    assert len(steps) == 5


def test_an_error_reaches_the_visitor_as_a_sentence_and_the_next_request_is_fine():
    def failing(error):
        def work_(_):
            raise error

        yield from work.cancellable(work_, None)

    for error, sentence in (
        (torch.OutOfMemoryError("CUDA out of memory"), "ran out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "ran out of memory"),
        (KeyError("/secret/path"), "Something went wrong"),
        (gr.Error("plain"), "plain"),
    ):
        with pytest.raises(gr.Error, match=sentence):
            list(work.with_plain_errors(failing)(error))
    assert list(work.cancellable(lambda _: 7, None))[-1] == 7


def test_an_error_while_streaming_ends_the_stream(loaded):
    def generate(streamer, stop):
        raise MemoryError

    with pytest.raises(MemoryError):
        list(work.streamed(generate, loaded.speaker.processor.tokenizer))
