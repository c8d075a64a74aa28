"""Evaluation of a checkpoint on a task, and the validation of a training run."""
