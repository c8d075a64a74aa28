"""Loading checkpoints; LoRA, 4 bits, and the full tensors of sharded models."""
