"""Import time of modeling_blip2x; time and peak memory of from_pretrained. Each measurement is a process of its own.

Import: against the imports from outside the package that its modules make, by themselves. Loading: 0.6 GB of bfloat16
safetensors (the models of generation.py), files in the page cache, against transformers' Blip2ForConditionalGeneration of
the same weights; warm times. Peaks are those of a process's first load, beyond what it was after the imports, over the
size of the weights file. The file is mapped into memory, so that its pages come when weights are first read: the second
peak has all of them. Resident pages count (VmHWM), in the last line the anonymous ones alone (RssAnon): pages of the
file can be dropped by the system at any time.
"""

import ast
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.generation import models
from benchmarks.measure import Row, faster

ROOT = Path(__file__).parent.parent
IMPORTS = 3
IMPORT_AIM, PEAK_AIM = 1.1, 1.15

TIMED = """
import time
start = time.perf_counter()
{imports}
print(time.perf_counter() - start)
"""

LOADING = """
import json, sys, threading, time
import torch
from {module} import {name}
from transformers.models import blip_2, opt
from transformers.models.blip_2 import modeling_blip_2
from transformers.models.opt import modeling_opt

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def watch():
    while not done.wait(0.001):
        anonymous.append(status("RssAnon"))

def load():
    return {name}.from_pretrained(sys.argv[1], dtype=torch.bfloat16)

resident, anonymous, done = status("VmRSS"), [status("RssAnon")], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load()
peak = status("VmHWM") - resident
for parameter in model.parameters():
    parameter.sum()
done.set()
watcher.join()
read_peak = status("VmHWM") - resident
seconds = []
for _ in range(5):
    start = time.perf_counter()
    load()
    seconds.append(time.perf_counter() - start)
print(json.dumps([sorted(seconds)[2], peak, read_peak, max(anonymous) - anonymous[0]]))
"""


def in_process(code: str, *arguments: str) -> str:
    """Last line that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.splitlines()[-1]


def outside_imports() -> str:
    """The import statements of the package's modules that `import modeling_blip2x` runs, but for those of each other."""
    code = "import sys, modeling_blip2x; print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('modeling_blip2x')])"
    found = []
    for file in in_process(code).split():
        nodes = ast.parse(Path(file).read_text(encoding="utf-8")).body
        found += [node for node in nodes if isinstance(node, ast.Import)]
        found += [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return "\n".join(dict.fromkeys(map(ast.unparse, found)))


def import_rows() -> list[Row]:
    codes = {"ours": "import modeling_blip2x", "theirs": outside_imports()}
    seconds = {name: [] for name in codes}
    for _ in range(IMPORTS):
        for name, imports in codes.items():
            seconds[name].append(float(in_process(TIMED.format(imports=imports))))
    ours, theirs = (statistics.median(values) for values in seconds.values())
    row = faster("loading", "import, against its imports from outside", "cpu", "", ours, theirs, "s", None)
    row.aim, row.met = 1 / IMPORT_AIM, row.ratio >= 1 / IMPORT_AIM
    return [row]


def load_rows() -> list[Row]:
    classes = {
        "ours": ("modeling_blip2x", "Blip2xForConditionalGeneration"),
        "theirs": ("transformers", "Blip2ForConditionalGeneration"),
    }
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: str(Path(folder) / name) for name in classes}
        logging.disable_progress_bar()
        for model, path in zip(models("cpu", torch.bfloat16), folders.values()):
            model.save_pretrained(path)
        weights = {name: (Path(path) / "model.safetensors").stat().st_size for name, path in folders.items()}
        found = {name: [] for name in classes}
        for _ in range(2):
            for name, (module, class_name) in classes.items():
                code = LOADING.format(module=module, name=class_name)
                found[name].append(json.loads(in_process(code, folders[name])))
    medians = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in found.items()}
    (seconds, *peaks), (their_seconds, *their_peaks) = medians["ours"], medians["theirs"]
    rows = [faster("loading", "from_pretrained", "cpu", "bfloat16", seconds, their_seconds, "s", None)]
    cases = ("from_pretrained", "from_pretrained and every weight read", "the same, anonymous pages alone")
    for case, ours, baseline in zip(cases, peaks, their_peaks):
        ours, baseline = ours / weights["ours"], baseline / weights["theirs"]
        case = f"peak of {case}"
        row = faster("loading", case, "cpu", "bfloat16", ours, baseline, "x weights", None)
        row.met = ours <= PEAK_AIM
        rows.append(row)
    return rows


def run(device: str) -> list[Row]:
    return import_rows() + load_rows()
