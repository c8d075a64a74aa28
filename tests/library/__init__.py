"""The library, without training and Space."""
