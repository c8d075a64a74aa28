"""No test may reach a hub, and helpers beside the tests import as modules."""

import os
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # tiny models: more threads only wait for one another (six times slower beside a busy core)
ROOT = Path(__file__).parent.parent
# As when a script of one of these folders runs: its modules import one another by name.
sys.path[:0] = [str(ROOT / folder) for folder in ("training", "tests", "benchmarks", "space_app")]
