"""What a visitor did wrong: told in a sentence, and no traceback in the log, which is for the faults of the page."""

import gradio as gr


class Mistake(gr.Error):
    """A sentence for the visitor: what is wrong, the value, and the fix."""

    def __init__(self, sentence: str):
        super().__init__(sentence, print_exception=False)
