"""Exact match of answers."""
