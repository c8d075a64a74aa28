"""No test may reach a hub; the Space's tiny models and pictures."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# evaluate and transformers copy modules and data into caches: here not those of the user, and one for all of a process,
# since a package that was imported from one cache does not look into another. The libraries read these names on import.
CACHES = tempfile.mkdtemp(prefix="blip2x_caches_")
atexit.register(shutil.rmtree, CACHES, ignore_errors=True)
for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
    os.environ[name] = os.path.join(CACHES, name)
torch.set_num_threads(1)  # tiny models: more threads only wait for one another (six times slower beside a busy core)


@pytest.fixture(scope="session", autouse=True)
def empty_working_directory(tmp_path_factory):
    """All tests run in an empty folder: runs/ and whatever else lies in the working copy changes none, and gets nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("working_directory"))
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Both tiny checkpoints, as the Space loads them."""
    from tests.helpers.space_server import load_tiny

    return load_tiny(tmp_path_factory.mktemp("space"))


@pytest.fixture(scope="module")
def pictures():
    """Three coarse pictures of 40 x 40."""
    from tests.helpers.space_server import noise_pictures

    return noise_pictures()
