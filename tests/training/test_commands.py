"""What a user gets who installs a wheel: commands that run in an empty folder, with the recipes and the page's template."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("stage1", "stage2", "finetune", "evaluate", "cache", "capfilt", "convert", "photos")


def run(*words: str | Path, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder into which a wheel of this checkout is installed; nothing is written into the checkout."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("modeling_blip2x", "training"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root / "dist", root, cwd=root)
    assert built.returncode == 0, built.stderr
    (wheel,) = (root / "dist").glob("*.whl")
    installed = run(*pip, "install", "--no-deps", "--target", root / "site", wheel, cwd=root)
    assert installed.returncode == 0, installed.stderr
    return root / "site"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_installed_and_helps(site, tmp_path, name):
    done = run(site / "bin" / f"blip2x-{name}", "--help", cwd=tmp_path, site=site)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_every_recipe_and_template_is_in_the_wheel(site):
    ours = {p.relative_to(ROOT / "training") for p in (ROOT / "training").rglob("*") if p.suffix in (".yaml", ".jinja")}
    assert len(ours) > 30
    theirs = {p.relative_to(site / "blip2x_training") for p in (site / "blip2x_training").rglob("*")}
    assert ours <= theirs


def test_a_recipe_is_found_by_its_name_and_a_mistake_is_one_line(site, tmp_path):
    command = site / "bin" / "blip2x-stage1"
    done = run(command, "--config", "paper/stage1_vit_g.yaml", cwd=tmp_path, site=site)
    assert done.returncode == 1 and "--output_dir is missing" in done.stderr and "cannot be read" not in done.stderr
    assert "Traceback" not in done.stderr
    done = run(command, "--config", "paper/none.yaml", cwd=tmp_path, site=site)
    assert done.returncode == 1 and "--config paper/none.yaml cannot be read" in done.stderr
