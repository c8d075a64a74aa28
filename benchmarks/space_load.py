"""Many visitors of the Space at once: errors, mixed-up answers, seconds a request, memory before and after.

    PYTHONPATH=space_app python -m benchmarks.space_load [--clients 20] [--requests 50] [--output load.json]

A Space with a tiny random model runs on loopback. Each client asks random questions of random pictures; what the model says
to each pair is computed before, so that an answer that belongs to another visitor shows. Exits with 1 on any error or
mix-up.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

WORDS = ("red", "blue", "green", "two", "left", "right", "above", "below")
SETTINGS = {"num_beams": 1, "max_length": 8}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Load test of the Space.")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=50, help="Of each client.")
    parser.add_argument("--output", help="JSON file for the figures.")
    arguments = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.helpers.space_server import EXAMPLES, save_tiny, serving

    with tempfile.TemporaryDirectory() as folder:
        folders = save_tiny(Path(folder))
        expected = expectations(folders, EXAMPLES)
        with serving("--model", *folders) as (address, process):
            figures = measure(address, psutil.Process(process.pid), EXAMPLES, expected, arguments)
    for name, value in figures.items():
        print(f"{name:<30}{value}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    sys.exit(bool(figures["errors"] or figures["mixed up"]))


def expectations(folders: tuple[Path, Path], examples: list[Path]) -> dict[tuple[int, str], str]:
    """(number of the picture, question) -> answer, from the model itself."""
    import answers
    from models import load_models
    from settings import Settings
    from uploads import open_upload

    models = load_models([str(folder) for folder in folders], "cpu")
    expected = {}
    for number, path in enumerate(examples):
        for word in WORDS:
            question = f"is it {word} ?"
            *_, (text, _) = answers.answer(models, open_upload(path), question, [], Settings(**SETTINGS))
            expected[number, question] = text
    return expected


def measure(address: str, process: psutil.Process, examples: list[Path], expected: dict, arguments) -> dict:
    """Figures of the whole run; memory is the server's."""
    from gradio_client import Client, handle_file

    pairs, lock, seconds, errors, mixed_up, memory = sorted(expected), threading.Lock(), [], [], [], []

    def visit(seed: int, count: int) -> None:
        order, client = random.Random(seed), Client(address, verbose=False)
        for number, question in (order.choice(pairs) for _ in range(count)):
            begin = time.perf_counter()
            try:
                picture = handle_file(str(examples[number]))
                said = client.predict(picture, question, max_length=SETTINGS["max_length"], api_name="/answer")
            except Exception as error:  # every kind counts, and the others go on
                said = None
                errors.append(f"{type(error).__name__}: {error}")
            with lock:
                seconds.append(time.perf_counter() - begin)
                if said is not None and said != expected[number, question]:
                    mixed_up.append((number, question, said))
                if len(seconds) % 100 == 0:
                    memory.append(round(process.memory_info().rss / 1e6))

    visit(0, 20)  # warm-up: what the first request allocates belongs to the baseline
    seconds.clear()
    before = process.memory_info().rss / 1e6
    begin = time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as pool:
        list(pool.map(lambda seed: visit(seed, arguments.requests), range(1, arguments.clients + 1)))
    wall = time.perf_counter() - begin
    time.sleep(2)
    ordered = sorted(seconds)
    for message in sorted(set(errors))[:5]:
        print(message)
    return {
        "clients": arguments.clients,
        "requests": len(seconds),
        "different answers possible": len(set(expected.values())),
        "errors": len(errors),
        "mixed up": len(mixed_up),
        "seconds in all": round(wall, 1),
        "requests a second": round(len(seconds) / wall, 2),
        "seconds a request, median": round(ordered[len(ordered) // 2], 2),
        "seconds a request, 95 %": round(ordered[int(len(ordered) * 0.95)], 2),
        "memory before, MB": round(before),
        "memory each 100 requests, MB": memory,
        "memory after, MB": round(process.memory_info().rss / 1e6),
    }


if __name__ == "__main__":
    main()
