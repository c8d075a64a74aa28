"""Metrics. Each folder loads by `evaluate.load("training/metrics/NAME")`, offline; plain functions are in its scores.py."""
