"""No visitor of the Space takes all of it: sizes of requests, of pictures together and of what is kept, and how it ends."""

import json
import threading
from pathlib import Path

import door
import httpx
import psutil
import pytest
import uploads
import work
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mistakes import Mistake
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from tests.helpers.space_server import EXAMPLES, WAIT, clean_environment, held_app, save_tiny, serving, until

SETTINGS = ["a", "beam", 1, 1, 0.9, 1, 5, 1, 1, 0, 1]  # what /caption takes after the picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


def gallery(path: Path, count: int) -> list[dict]:
    return uploads.Entries([{"path": str(path)}] * count).model_dump()


def test_pictures_of_a_request_are_measured_together_before_one_is_decoded(cache, monkeypatch):
    Image.new("1", (5000, 5000)).save(cache / "large.png")  # 25 megapixels in 4 KB
    Image.new("1", (12_000, 14_000)).save(cache / "bomb.png")  # 168: Pillow itself would decode it
    decoded = []
    monkeypatch.setattr(uploads, "upright", lambda image: decoded.append(image.size) or image)
    with pytest.raises(Mistake, match="1600 megapixels together; at most 200"):
        uploads.open_images(gallery(cache / "large.png", 64))
    with pytest.raises(Mistake, match="225 megapixels together"):
        uploads.open_images(gallery(cache / "large.png", 9))
    mixed = gallery(cache / "large.png", 2) + gallery(cache / "bomb.png", 1)
    with pytest.raises(Mistake, match="168 megapixels"):
        uploads.open_images(mixed)
    assert decoded == []
    monkeypatch.setattr(uploads, "MAX_REQUEST_MEGAPIXELS", 25)
    assert len(uploads.open_images(gallery(cache / "large.png", 1))) == 1 and decoded == [(5000, 5000)]


def test_what_is_kept_has_a_limit(cache, monkeypatch):
    picture = cache / "one" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(EXAMPLES[0].read_bytes())
    (cache / "large").write_bytes(bytes(100_000))
    assert uploads.bytes_kept() == 100_000 + 2**16
    monkeypatch.setattr(uploads, "MAX_KEPT", 150_000)
    for opened in (
        lambda: uploads.open_image({"path": str(picture)}),
        lambda: uploads.open_images(gallery(picture, 1)),
    ):
        with pytest.raises(Mistake, match="no room for more"):
            opened()
    (cache / "large").unlink()
    assert uploads.open_image({"path": str(picture)}).size == Image.open(picture).size


@pytest.fixture
def site(cache):
    """A server behind the door that says how many bytes it has read; and the requests that it has begun to read."""
    begun = []

    async def read(request):
        begun.append(request.url.path)
        return PlainTextResponse(str(len(await request.body())))

    paths = (
        "/gradio_api/upload",
        "/gradio_api/queue/join",
        "/gradio_api/call/caption",
        "/gradio_api/run/predict",
        "/config",
    )
    app = Starlette(routes=[Route(path, read, methods=["GET", "POST"]) for path in paths])
    return TestClient(door.Door(app)), begun


def in_parts(count: int):
    """A body whose length is not said."""
    return (bytes(2**16) for _ in range(count))


def test_the_door_refuses_large_bodies_unread(site, monkeypatch):
    client, begun = site
    monkeypatch.setattr(door, "MAX_BODY", 2**20)
    monkeypatch.setattr(door, "MAX_UPLOAD", 2**21)
    for path, limit in (("queue/join", 16), ("call/caption", 16), ("run/predict", 16), ("upload", 32), ("upload/", 32)):
        largest = client.post(f"/gradio_api/{path}", content=bytes(limit * 2**16))
        assert largest.status_code == 200 and largest.text == str(limit * 2**16)
        assert client.post(f"/gradio_api/{path}", content=in_parts(limit)).text == largest.text
        begun.clear()
        refused = client.post(f"/gradio_api/{path}", content=bytes(limit * 2**16 + 1))
        assert refused.status_code == 413 and "too large: at most" in refused.json()["detail"] and begun == []
        assert client.post(f"/gradio_api/{path}", content=in_parts(limit + 1)).status_code == 413
    assert not door.inside


def test_a_full_folder_takes_no_uploads_and_the_page_goes_on(site, cache, monkeypatch):
    client, _ = site
    monkeypatch.setattr(door, "MAX_KEPT", 300_000)
    (cache / "a").write_bytes(bytes(250_000))
    assert client.post("/gradio_api/upload", content=bytes(50_000)).status_code == 200
    refused = client.post("/gradio_api/upload", content=bytes(50_001))
    assert refused.status_code == 507 and refused.json()["detail"] == uploads.FULL
    assert (
        client.post("/gradio_api/queue/join", content=bytes(50_001)).status_code
        == client.get("/config").status_code
        == 200
    )


def test_a_door_that_closes_says_so(site, monkeypatch):
    client, begun = site
    monkeypatch.setattr(door, "CLOSING", threading.Event())
    door.CLOSING.set()
    refused = client.post("/gradio_api/queue/join", content=b"{}")
    assert refused.status_code == 503 and refused.json()["detail"] == work.RESTARTS and begun == []


def connect(address: str) -> Client:
    return Client(address, verbose=False, httpx_kwargs={"timeout": WAIT})


def test_pictures_are_decoded_while_the_models_are_busy_and_all_are_told_of_the_end(folders, tmp_path):
    """A caption whose writing ends only when it is told to stop; then SIGTERM, as a container is stopped."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "temp").mkdir()
    script = held_app(tmp_path)
    env = {"TMPDIR": str(tmp_path / "temp")}
    with serving("--model", *folders, script=script, log=tmp_path / "log", env=clean_environment(**env)) as (
        address,
        process,
    ):
        visitors = [connect(address) for _ in range(8)]
        example = handle_file(str(EXAMPLES[0]))
        held = visitors[0].submit(example, min_length=50, max_length=100, api_name="/caption")
        until((tmp_path / "held").exists)
        with pytest.raises(AppError, match="not a picture"):  # told although the models are held
            visitors[1].predict(handle_file(str(tmp_path / "text.png")), api_name="/caption")
        waiting = [one.submit(example, "what ?", max_length=100, api_name="/answer") for one in visitors[1:]]
        until(lambda: all(job.status().code.value != "STARTING" for job in waiting))
        process.terminate()
        for job in (held, *waiting):
            with pytest.raises(AppError, match="The Space restarts"):
                job.result(timeout=WAIT)
        assert process.wait(WAIT) == 0
    assert list((tmp_path / "temp").glob("blip2x_space_*")) == [] and "Traceback" not in (tmp_path / "log").read_text()


def refused_requests(address: str, count: int) -> None:
    """Every request of another visitor; each is refused, in another way."""
    with httpx.Client(base_url=f"{address}/gradio_api", timeout=WAIT) as client:
        for number in range(count):
            large = "a" * (5_000_000 if number % 5 == 0 else 900_000)
            data = [
                [large, *SETTINGS],
                [None, large, *SETTINGS[1:]],
                [{"path": large}, *SETTINGS],
                [[large], *SETTINGS],
            ]
            sent = {"data": data[number % 4], "session_hash": f"stranger{number}"}
            reply = client.post("/call/caption", content=json.dumps(sent), headers={"content-type": "application/json"})
            if number % 5 == 0:
                assert reply.status_code == 413
                continue
            told = client.get(f"/call/caption/{reply.json()['event_id']}").text
            assert "event: error" in told and len(told) < 1000


def growth(folders, first: int, count: int) -> float:
    """MB that a server grows by over `count` refused requests, once `first` have made what is made once."""
    with serving("--model", *folders) as (address, process):
        memory = psutil.Process(process.pid).memory_info
        refused_requests(address, first)
        before = memory().rss
        refused_requests(address, count)
        return (memory().rss - before) / 1e6


def test_refused_requests_leave_nothing_behind(folders):
    assert growth(folders, first=20, count=50) < 20  # of 85 MB that are sent


@pytest.mark.slow
def test_a_thousand_refused_requests_leave_nothing_behind(folders):
    """The first ones fill the sessions that Gradio remembers; after that the heap alone moves."""
    assert growth(folders, first=500, count=1000) < 60  # of 1700 MB that are sent
