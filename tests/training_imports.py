"""What the server that test processes are forked from imports, once."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import pretrain_stage1  # noqa: E402, F401
import pretrain_stage2  # noqa: E402, F401
import processes  # noqa: E402, F401
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer  # noqa: E402, F401
