"""Training, evaluation and data."""
