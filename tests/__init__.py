"""Tests: of the library, of training and of the Space, on tiny random models, without network."""
