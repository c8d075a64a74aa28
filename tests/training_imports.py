"""What the server that test processes are forked from imports, once."""

import pretrain_stage1  # noqa: F401
import pretrain_stage2  # noqa: F401
import processes  # noqa: F401
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer  # noqa: F401

torch.set_num_threads(1)
