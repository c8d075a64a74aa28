"""Recall of retrieval, both ways."""
