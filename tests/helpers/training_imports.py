"""What the server that test processes are forked from imports, once."""

import importlib

import torch
import transformers

for module in ("blip2x_training.pretrain_stage1", "blip2x_training.pretrain_stage2", "tests.helpers.processes"):
    importlib.import_module(module)
for name in ("AutoImageProcessor", "AutoModel", "AutoTokenizer"):
    getattr(transformers, name)  # imports its module
torch.set_num_threads(1)
