"""The Space as it runs: its endpoints by gradio_client, and what a stranger may try."""

import random
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import answers
import attention
import httpx
import matching
import models as space_models
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from settings import Settings
from uploads import open_upload

from tests.helpers.space_server import (
    EXAMPLES,
    NEVER,
    ROOT,
    SPACE,
    WAIT,
    clean_environment,
    copy_of_the_app,
    held_app,
    save_tiny,
    serving,
    until,
)

TEXTS = "a red circle\nthe blue dog"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def served(folders, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "app.log"
    with serving("--model", *folders, log=log) as (address, process):
        yield address, process, log


def connect(address: str) -> Client:
    return Client(address, verbose=False, httpx_kwargs={"timeout": WAIT})


@pytest.fixture(scope="module")
def client(served):
    return connect(served[0])


@pytest.fixture(scope="module")
def loaded(folders):
    return space_models.load_models([str(folder) for folder in folders], "cpu")


def files(*numbers):
    return [{"image": handle_file(str(EXAMPLES[number])), "caption": None} for number in numbers]


def test_caption(client, loaded):
    given = {"num_beams": 3, "captions": 2, "max_length": 9}
    said = client.predict(handle_file(str(EXAMPLES[1])), "a photo of", **given, api_name="/caption")
    expected = answers.caption(loaded.speaker, open_upload(EXAMPLES[1]), "a photo of", Settings(**given), NEVER)
    assert said == "\n".join(expected)
    defaults = answers.caption(loaded.speaker, open_upload(EXAMPLES[1]), "a picture of", Settings(), NEVER)
    assert client.predict(handle_file(str(EXAMPLES[1])), api_name="/caption") == defaults[0]


def test_answer_streams(client, loaded):
    history = [["is it red ?", "no"]]
    job = client.submit(handle_file(str(EXAMPLES[0])), "what is it ?", history, max_length=12, api_name="/answer")
    settings = Settings(num_beams=1, max_length=12)
    *_, (expected, _) = answers.answer(
        loaded, open_upload(EXAMPLES[0]), "what is it ?", [("is it red ?", "no")], settings
    )
    assert job.result(timeout=WAIT) == expected
    assert len(set(job.outputs())) > 2
    forgotten = client.predict(
        handle_file(str(EXAMPLES[0])), "what is it ?", history, 0, max_length=12, api_name="/answer"
    )
    *_, (expected, _) = answers.answer(loaded, open_upload(EXAMPLES[0]), "what is it ?", [], settings)
    assert forgotten == expected != job.result(timeout=WAIT)


def test_match_and_search(client, loaded):
    pictures = [open_upload(path) for path in EXAMPLES[:3]]
    scores = client.predict(files(0, 1, 2), TEXTS, api_name="/match")
    assert scores == matching.match(loaded, pictures, TEXTS.splitlines(), NEVER, print)
    ranking = client.predict(files(0, 1, 2), "a red circle", 2, api_name="/search")
    assert ranking == matching.rank_images(loaded, pictures, "a red circle", 2, NEVER, print)
    ranking = client.predict(handle_file(str(EXAMPLES[0])), TEXTS, api_name="/search_texts")
    assert ranking == matching.rank_texts(loaded, pictures[0], TEXTS.splitlines(), 16, NEVER, print)


def test_attention(client, loaded):
    part, picture = loaded.speaker, open_upload(EXAMPLES[0])
    path = client.predict(handle_file(str(EXAMPLES[0])), "2", "1", 3, api_name="/attention")
    heat = attention.average_map(attention.query_maps(part, picture, 2, 1), 3)
    expected = attention.drawn(part, picture, [heat])[0]
    assert list(Image.open(path).convert("RGB").getdata()) == list(expected.getdata())
    words = client.predict(handle_file(str(EXAMPLES[0])), max_length=5, api_name="/attention_words")
    caption = answers.caption(part, picture, "a picture of", Settings(num_beams=1, max_length=5), NEVER)[0]
    assert " ".join(word["caption"] for word in words) == caption


def test_endpoints_have_names_types_and_docs(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {
        "/caption",
        "/answer",
        "/match",
        "/search",
        "/search_texts",
        "/attention",
        "/attention_words",
    }
    for endpoint in endpoints.values():
        assert endpoint["description"]
        assert all(p["type"] and p["parameter_name"].isidentifier() for p in endpoint["parameters"])
    names = [p["parameter_name"] for p in endpoints["/caption"]["parameters"]]
    assert names[:4] == ["image", "prompt", "decoding", "num_beams"]
    assert [p["parameter_name"] for p in endpoints["/answer"]["parameters"]][:3] == ["image", "question", "history"]


@pytest.mark.parametrize(
    "wrong", [{"num_beams": 11}, {"num_beams": 2.5}, {"temperature": 0.4}, {"top_p": 2}, {"length_penalty": -2}, {"captions": 9}]
    + [{"seed": -1}, {"repetition_penalty": 6}, {"max_length": 101}, {"decoding": "magic"}, {"prompt": "a" * 501}],
)  # fmt: skip
def test_the_api_refuses_what_the_sliders_refuse(client, wrong):
    with pytest.raises(AppError):
        client.predict(handle_file(str(EXAMPLES[0])), **wrong, api_name="/caption")


@pytest.mark.parametrize(
    "wrong, said", [({"num_beams": "many"}, "Beams must be a number, not 'many'"), ({"num_beams": None}, "not None")]
    + [({"seed": 1.5}, "Seed is 1.5; it must be a whole number"), ({"decoding": "magic"}, "magic")],
)  # fmt: skip
def test_the_api_says_which_setting_is_wrong(client, wrong, said):
    with pytest.raises(AppError, match=said):
        client.predict(handle_file(str(EXAMPLES[0])), **wrong, api_name="/caption")


def test_the_api_says_what_else_is_wrong(client, served):
    for sent in (7, "photo.jpg", ["photo.jpg"]):
        with pytest.raises(AppError, match="A picture must be a file"):
            client.predict(sent, api_name="/caption")
    for sent in (7, ["photo.jpg"], [{"picture": "photo.jpg"}]):
        with pytest.raises(AppError, match="pictures a list of them"):
            client.predict(sent, TEXTS, api_name="/match")
    with pytest.raises(AppError, match="The history must be a list"):  # also where no turns of it are told
        client.predict(handle_file(str(EXAMPLES[0])), "what ?", [["is it red ?"]], 0, api_name="/answer")
    with pytest.raises(AppError, match="Earlier turns is 1.5"):
        client.predict(handle_file(str(EXAMPLES[0])), "what ?", [], 1.5, api_name="/answer")
    with pytest.raises(AppError, match="Re-ranked is 'all'"):
        client.predict(files(0), "a red circle", "all", api_name="/search")
    assert "are not opened" in post(
        served[0], "caption", [file_data("/etc/passwd"), "a", "beam", 1, 1, 0.9, 1, 5, 1, 1, 0, 1]
    )


def test_plain_lists_of_pictures_are_taken(client):
    plain = [handle_file(str(path)) for path in EXAMPLES[:2]]
    expected = client.predict(files(0, 1), TEXTS, api_name="/match")
    assert client.predict(plain, TEXTS, api_name="/match") == expected
    assert client.predict([(file, "a caption") for file in plain], TEXTS, api_name="/match") == expected
    assert client.predict(plain, "a red circle", api_name="/search") == client.predict(
        files(0, 1), "a red circle", api_name="/search"
    )


def test_visitors_mistakes_leave_no_traceback_in_the_log(client, served):
    for wrong in ({"num_beams": "many"}, {"num_beams": 99}, {"decoding": "magic"}):
        with pytest.raises(AppError):
            client.predict(handle_file(str(EXAMPLES[0])), **wrong, api_name="/caption")
    with pytest.raises(AppError):
        client.predict(7, api_name="/caption")
    client.predict(files(0, 1), TEXTS, api_name="/match")
    log = served[2].read_text()
    assert "Loaded" in log and "Traceback" not in log and "max_length" not in log


def post(address: str, endpoint: str, data: list) -> str:
    """What a client that keeps to no rules is told: the event stream of a call."""
    base = f"{address}/gradio_api/call/{endpoint}"
    event = httpx.post(base, json={"data": data}, timeout=WAIT).json()
    if "event_id" not in event:
        return str(event)
    return httpx.get(f"{base}/{event['event_id']}", timeout=WAIT).text


def file_data(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "file:///etc/passwd", str(EXAMPLES[0]), "CONFIG"])
def test_no_path_of_a_client_is_opened(served, folders, path):
    path = path.replace("CONFIG", str(folders[0] / "config.json"))
    settings = ["a", "beam", 1, 1, 0.9, 1, 5, 1, 1, 0, 1]
    for told in (
        post(served[0], "caption", [file_data(path), *settings]),
        post(served[0], "caption", [file_data(path, url=path, is_stream=True), *settings]),
        post(served[0], "match", [[{"image": file_data(path), "caption": None}], TEXTS]),
    ):
        assert "event: error" in told or "error" in told.lower()
        assert "event: complete" not in told and "root:" not in told and "blip2x" not in told


def test_no_address_is_fetched(served):
    settings = ["a", "beam", 1, 1, 0.9, 1, 5, 1, 1, 0, 1]
    for address in (f"{served[0]}/config", "http://169.254.169.254/latest/meta-data", "https://127.0.0.1:1/a.png"):
        for given in (file_data(address), file_data(address, url=address)):
            assert "Addresses are not fetched" in post(served[0], "caption", [given, *settings])
    told = post(served[0], "caption", [file_data("x.png", url="data:image/png;base64,AAAA"), *settings])
    assert "event: complete" not in told
    good = post(served[0], "caption", [file_data("/etc/passwd", url="data:image/png;base64,AAAA"), *settings])
    assert "event: complete" not in good


def test_nothing_but_the_cache_is_served(served, folders):
    for path in ("/etc/passwd", str(folders[0] / "config.json"), str(SPACE / "app.py"), "../../etc/passwd"):
        for route in ("file=", "gradio_api/file="):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{served[0]}/{route}{path}", timeout=WAIT)
            assert refused.value.code in (403, 404)


def test_a_bad_upload_is_refused_in_words_and_the_next_one_is_fine(client, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    (tmp_path / "heavy.png").write_bytes(EXAMPLES[0].read_bytes() + bytes(21_000_000))
    (tmp_path / "cut.png").write_bytes(EXAMPLES[0].read_bytes()[:3000])
    said = {"text.png": "not a picture", "bomb.png": "megapixels", "cut.png": "damaged or cut off"}
    for name, message in said.items():
        with pytest.raises(AppError, match=message):
            client.predict(handle_file(str(tmp_path / name)), api_name="/caption")
    with pytest.raises(Exception, match="(?i)size|413|large"):  # refused while it is uploaded
        client.predict(handle_file(str(tmp_path / "heavy.png")), api_name="/caption")
    with pytest.raises(AppError, match="There is no picture"):
        client.predict(None, api_name="/caption")
    assert isinstance(client.predict(handle_file(str(EXAMPLES[0])), api_name="/caption"), str)


def test_cancelling_frees_the_model(folders, loaded, tmp_path):
    """A caption whose writing ends only when it is told to stop: the next request would wait for it for ever."""
    with serving("--model", *folders, script=held_app(tmp_path), log=tmp_path / "log") as (address, _):
        client = connect(address)
        slow = client.submit(
            handle_file(str(EXAMPLES[0])), num_beams=10, min_length=50, max_length=100, api_name="/caption"
        )
        until((tmp_path / "held").exists)
        assert slow.cancel()
        said = client.submit(handle_file(str(EXAMPLES[0])), "what ?", max_length=3, api_name="/answer")
        settings = Settings(num_beams=1, max_length=3)
        *_, (expected, _) = answers.answer(loaded, open_upload(EXAMPLES[0]), "what ?", [], settings)
        assert said.result(timeout=WAIT) == expected


LEAK = 1_000_000  # bytes that 40 requests may leave behind, once the server has warmed up
ROUNDS = 40  # until it has: threads share their heaps anew each time, and a leak would show in every round


def test_many_visitors_at_once_get_their_own_answers_and_memory_stays_flat(served, loaded):
    asked = [(number, f"is it {word} ?") for number in range(4) for word in ("red", "blue", "two", "left")]
    settings = Settings(num_beams=1, max_length=8)
    expected = {}
    for number, question in asked:
        *_, (expected[number, question], _) = answers.answer(
            loaded, open_upload(EXAMPLES[number]), question, [], settings
        )
    assert len(set(expected.values())) > 8  # else a mix-up could not be seen

    # The same visitors each time: Gradio remembers every page that was opened, up to ten thousand of them.
    visitors = [connect(served[0]) for _ in range(8)]

    def visit(seed: int) -> list[str]:
        order = random.Random(seed)
        visitor, wrong = visitors[seed % len(visitors)], []
        for number, question in (order.choice(asked) for _ in range(5)):
            said = visitor.predict(handle_file(str(EXAMPLES[number])), question, max_length=8, api_name="/answer")
            if said != expected[number, question]:
                wrong.append(f"{number} {question}: {said!r}, not {expected[number, question]!r}")
        return wrong

    process, grown = psutil.Process(served[1].pid), []
    with ThreadPoolExecutor(8) as pool:
        for round_ in range(ROUNDS):
            before = process.memory_info().rss
            assert [line for lines in pool.map(visit, range(8 * round_, 8 * round_ + 8)) for line in lines] == []
            grown.append(process.memory_info().rss - before)
            if grown[-1] < LEAK:
                break
    assert grown[-1] < LEAK, grown  # what is made once is made by then; a leak goes on


def test_a_stage1_checkpoint_alone_says_what_it_cannot_do_and_the_cache_goes_with_the_run(folders, loaded, tmp_path):
    with serving("--model", folders[1], env=clean_environment(TMPDIR=str(tmp_path))) as (address, _):
        client = connect(address)
        with pytest.raises(AppError, match="no language model"):
            client.predict(handle_file(str(EXAMPLES[0])), "what?", api_name="/answer")
        expected = answers.caption(loaded.matcher, open_upload(EXAMPLES[0]), "", Settings(), NEVER)
        assert client.predict(handle_file(str(EXAMPLES[0])), api_name="/caption") == expected[0]
        assert client.predict(handle_file(str(EXAMPLES[0])), max_length=4, api_name="/attention_words")
        assert set(client.predict(files(0), TEXTS, api_name="/match")) == {"texts", "itc", "itm"}
        assert len(list(tmp_path.glob("blip2x_space_*/*"))) > 1
    assert list(tmp_path.glob("blip2x_space_*")) == []


def test_the_folder_alone_suffices_with_a_checkpoint_that_carries_its_code(folders, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from modeling_blip2x.saving_code_blip2x import save_with_code

    shutil.copytree(folders[0], tmp_path / "trained")
    (tmp_path / "trained" / "README.md").write_text("---\ndemo: {prompt: a photo of, turns: 0}\n---\n")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    save_with_code(model, AutoProcessor.from_pretrained(tmp_path / "trained"), tmp_path / "carried")
    copy_of_the_app(tmp_path)
    hide = (
        "import runpy, sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        f"sys.path = [p for p in sys.path if p not in ('', {str(ROOT)!r})] + [{str(tmp_path / 'space')!r}];"
        "sys.path_hooks = [h for h in sys.path_hooks if 'editable' not in repr(h).lower()];"
        "import importlib.util; assert importlib.util.find_spec('modeling_blip2x') is None;"
        f"sys.argv[0] = 'app.py'; runpy.run_path({str(tmp_path / 'space' / 'app.py')!r}, run_name='__main__')"
    )
    (tmp_path / "hidden.py").write_text(hide)
    env = clean_environment(HF_HOME=str(tmp_path / "hf"), BLIP2X_MODEL=str(tmp_path / "carried"), PYTHONPATH="")
    with serving(script=tmp_path / "hidden.py", env=env, log=tmp_path / "log") as (address, _):
        client = connect(address)
        endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
        assert endpoints["/caption"]["parameters"][1]["parameter_default"] == "a photo of"
        assert endpoints["/answer"]["parameters"][3]["parameter_default"] == 0  # as the model card says
        assert isinstance(client.predict(handle_file(str(EXAMPLES[0])), api_name="/caption"), str)
        with pytest.raises(AppError, match="cannot score"):
            client.predict(files(0), TEXTS, api_name="/match")


def test_without_a_model_one_line_says_how_to_get_one(tmp_path):
    """Also where a quickstart output lies in the folder that it is started from: which model is served is no accident."""
    (tmp_path / "runs" / "quickstart" / "stage1").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "stage1" / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    app = copy_of_the_app(tmp_path / "elsewhere") / "app.py"
    with pytest.raises(RuntimeError, match="make demo"), serving(script=app, log=tmp_path / "log", cwd=tmp_path):
        pass
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_no_picture_of_the_server_comes_back(served, folders, tmp_path):
    """Not by a file without `meta`, which Gradio itself lets through, nor by an endpoint of the page alone."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "theirs.png")
    picture = {"path": str(tmp_path / "theirs.png")}
    for told in (
        post(served[0], "caption", [picture, "a", "beam", 1, 1, 0.9, 1, 5, 1, 1, 0, 1]),
        post(served[0], "attention", [picture, "average", "average", "average"]),
        post(served[0], "match", [[{"image": picture}], TEXTS]),
        post(served[0], "match", [[picture], TEXTS]),
    ):
        assert "are not opened" in told and "event: complete" not in told
    config = httpx.get(f"{served[0]}/config", timeout=WAIT).json()
    given = {
        "image": picture,
        "gallery": [{"image": picture, "caption": None}],
        "json": [{"image": 0, "itc": 0.5, "itm": None}],
        "textbox": "a",
        "chatbot": [{"role": "user", "content": [{"type": "text", "text": "what ?"}]}],
    }
    kinds = {component["id"]: component["type"] for component in config["components"]}
    tried = 0
    for number, event in enumerate(config["dependencies"]):
        if not {"image", "gallery"} & {kinds[one] for one in event["inputs"]} or event["queue"] is not False:
            continue
        data = [given.get(kinds[one], 1) for one in event["inputs"]]
        sent = {"data": data, "fn_index": event.get("id", number), "session_hash": "stranger"}
        reply = httpx.post(f"{served[0]}/gradio_api/run/predict", json=sent, timeout=WAIT)
        assert reply.status_code != 200 and "url" not in reply.text
        tried += 1
    assert tried >= 2  # the chart of Match and the ranking of Search


def event_stream(address: str, number: int, data: list, visitor: str) -> str:
    """What any event of the page, private ones too, tells a client that calls it by its number."""
    sent = {"data": data, "fn_index": number, "session_hash": visitor}
    reply = httpx.post(f"{address}/gradio_api/queue/join", json=sent, timeout=WAIT)
    if reply.status_code != 200:
        return reply.text
    told = []
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash={visitor}", timeout=WAIT) as stream:
        for line in stream.iter_lines():
            told.append(line)
            if "process_completed" in line or "close_stream" in line:
                break
    return "\n".join(told)


def test_no_component_of_a_chat_is_built(served, tmp_path):
    """A message may name a component and its value: asked, undone, tried again or answered, nothing of it is opened."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "theirs.png")
    component = {
        "type": "component",
        "component": "image",
        "value": {"path": str(tmp_path / "theirs.png")},
        "props": {},
    }
    picture = {"type": "file", "file": {"path": str(tmp_path / "theirs.png")}}
    config = httpx.get(f"{served[0]}/config", timeout=WAIT).json()
    kinds = {one["id"]: one["type"] for one in config["components"]}
    tried = 0
    for number, event in enumerate(config["dependencies"]):
        if "chatbot" not in [kinds[one] for one in event["inputs"]]:
            continue
        for content in ([component], [{"type": "text", "text": "a"}, component], [component | {"value": 7}], [picture]):
            given = {"chatbot": [{"role": "user", "content": content}], "textbox": "what ?"}
            data = [given.get(kinds[one], 1 if kinds[one] == "number" else None) for one in event["inputs"]]
            tried += 1
            told = event_stream(served[0], event.get("id", number), data, f"stranger{tried}")
            assert "messages of a chat are texts" in told or "are not opened" in told
            assert "theirs.png" not in told
    assert tried >= 5 * 4  # ask, ask again, reply, reply again, undo and retry
    assert "Traceback" not in served[2].read_text()
