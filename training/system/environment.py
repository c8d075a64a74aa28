"""What a run's figures depend on beside its fields: environment.json."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from modeling_blip2x import __version__

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numpy", "pillow")


def describe_environment(seed: int, num_processes: int) -> dict:
    """Seed, processes, versions, hardware, and the git revision where the code lies in a checkout."""
    return {
        "seed": seed,
        "num_processes": num_processes,
        "python": platform.python_version(),
        "packages": {"blip2x": __version__} | {name: version_of(name) for name in PACKAGES},
        "hardware": hardware(),
        "git": git_revision(Path(__file__).resolve().parent),
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> str:
    """One line: GPUs, if any, processor, its threads and how many of them torch uses, memory, system."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    names = [f"{gpus.count(name)} x {name}" for name in sorted(set(gpus))]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    threads = f"{os.cpu_count()} threads, {torch.get_num_threads()} used"
    return ", ".join([*names, processor(), threads, f"{memory:.0f} GiB", platform.platform()])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def git_revision(folder: Path) -> dict | None:
    """{"revision", "dirty"}, or None outside a checkout or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
