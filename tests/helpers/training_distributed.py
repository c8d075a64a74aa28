"""One process of the two-process test: dropout off, then training scripts. Argument: JSON list of [script, flags]."""

import importlib
import json
import sys

import torch

torch.set_num_threads(1)
# Dropout draws from each process's own random state; without it the losses of two processes can equal those of one.
torch.nn.Dropout.forward = lambda self, hidden: hidden
for script, flags in json.loads(sys.argv[1]):
    importlib.import_module(f"blip2x_training.{script}").main(flags)
