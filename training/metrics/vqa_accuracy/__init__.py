"""VQA accuracy."""
