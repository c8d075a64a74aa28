"""No test may reach a hub, and helpers beside the tests import as modules."""

import os
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # tiny models: more threads only wait for one another (six times slower beside a busy core)
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "training"))  # as when a script there runs
