"""What a visitor did wrong: told in a sentence, and no traceback in the log, which is for the faults of the page."""

import gradio as gr

UNREADABLE = (
    'The request cannot be read. A picture must be a file that is sent, handle_file("photo.jpg") of gradio_client, and '
    "pictures a list of them; paths and addresses of the server's side are not opened. client.view_api() lists what each "
    "endpoint takes."
)


class Mistake(gr.Error):
    """A sentence for the visitor: what is wrong, the value, and the fix."""

    def __init__(self, sentence: str):
        super().__init__(sentence, print_exception=False)
