"""What the Space uses of Gradio that Gradio does not document: name and parameters, so that a release that changes them fails here."""

import inspect

import gradio as gr
import pytest

SPACE = [  # dotted name, parameters, what for
    (
        "gradio.Blocks.preprocess_data",
        ["self", "block_fn", "inputs", "state", "explicit_call"],
        "gradio_internals.Page overrides it: an address is refused before Gradio downloads it, and a request that cannot be "
        "read is answered in words, where Gradio says null and logs a traceback.",
    ),
]


@pytest.mark.parametrize("name, parameters, purpose", SPACE)
def test_a_private_name_of_gradio_is_what_it_was(name, parameters, purpose):
    found = gr
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert list(inspect.signature(found).parameters) == parameters, purpose
