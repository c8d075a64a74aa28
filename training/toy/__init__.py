"""The quickstart's toys: scenes, a vision tower and a language model, and how they are scored."""
