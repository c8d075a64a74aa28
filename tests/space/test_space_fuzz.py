"""Three hundred broken requests: each is answered, or refused in a sentence. Slow; run by make test-slow."""

import json
import random

import httpx
import pytest
from gradio_client import Client, handle_file

from tests.helpers.mutations import broken_json
from tests.helpers.space_server import EXAMPLES, WAIT, save_tiny, serving

pytestmark = pytest.mark.slow

SETTINGS = ["beam", 1, 1, 0.9, 1, 5, 1, 1, 0, 1]


def test_requests(tmp_path):
    log = tmp_path / "app.log"
    with serving("--model", *save_tiny(tmp_path / "models"), log=log) as (address, process):
        client = Client(address, verbose=False, httpx_kwargs={"timeout": WAIT})
        sent = httpx.post(f"{address}/gradio_api/upload", files={"files": EXAMPLES[0].open("rb")}, timeout=WAIT).json()
        picture = {"path": sent[0], "meta": {"_type": "gradio.FileData"}}
        requests = {
            "caption": [picture, "a", *SETTINGS],
            "answer": [picture, "what is it?", *SETTINGS],
            "match": [[{"image": picture, "caption": None}], "a red circle\nthe blue dog"],
            "search": ["a red circle", [{"image": picture, "caption": None}]],
            "attention": [picture, "average", "average", "average"],
        }
        known = {name.strip("/") for name in client.view_api(return_format="dict")["named_endpoints"]}
        assert requests.keys() <= known, known
        refused = 0
        for number in range(300):
            random_ = random.Random(f"0/{number}")
            name = random_.choice(sorted(requests))
            data = broken_json(requests[name], random_)
            body = json.dumps({"data": data} if random_.random() < 0.9 else broken_json({"data": data}, random_))
            base = f"{address}/gradio_api/call/{name}"
            reply = httpx.post(base, content=body, headers={"content-type": "application/json"}, timeout=WAIT)
            told = reply.text
            if reply.status_code == 200 and "event_id" in told:
                told = httpx.get(f"{base}/{reply.json()['event_id']}", timeout=WAIT).text
                assert "event: complete" in told or "event: error" in told, (name, data, told)
                if "event: error" in told:
                    refused += 1
                    assert " " in told.split("data: ")[1], f"no sentence: {name} {str(data)[:300]} {told}"
            else:
                refused += 1
                assert 400 <= reply.status_code < 500, (name, str(data)[:300], reply.status_code, told)
            assert process.poll() is None
        assert refused > 100
        client.predict(handle_file(str(EXAMPLES[0])), "a", *SETTINGS, api_name="/caption")
    assert "Traceback" not in log.read_text()
