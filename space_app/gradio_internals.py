"""The one place that leans on what Gradio does not document, and why."""

import gradio as gr
from mistakes import Mistake

UNREADABLE = (
    'The request cannot be read. A picture must be a file that is sent, handle_file("photo.jpg") of gradio_client, and '
    "pictures a list of them; paths and addresses of the server's side are not opened. client.view_api() lists what each "
    "endpoint takes."
)


class Page(gr.Blocks):
    """gr.Blocks that fetches no address, builds no component that a client describes, and refuses in words.

    `Blocks.preprocess_data` reads the inputs of a request before any function sees them: it downloads what a file's path
    names if that is an address, builds the component that a message of a chat describes, with the file that it names, and
    where a component refuses its input the client is told "null" and the log gets a traceback. Events and components have
    no hook before it, and `validator=` runs after it.
    """

    async def preprocess_data(self, block_fn, inputs, *arguments, **keywords):
        try:
            refuse_what_would_be_opened(inputs)
            return await super().preprocess_data(block_fn, inputs, *arguments, **keywords)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # pydantic's, of a refused path, of a component: all are about what was sent
            raise Mistake(UNREADABLE) from error


def refuse_what_would_be_opened(sent: object) -> None:
    """Raises Mistake where a file, at any depth of what was sent, is an address, or a message of a chat is no text."""
    if isinstance(sent, dict):
        if "component" in sent or sent.get("type") in ("component", "file"):
            raise Mistake("A chat holds texts alone: send pictures in the picture's field.")
        if "://" in str(sent.get("path")):
            raise Mistake("Addresses are not fetched. Send the picture itself.")
        sent = list(sent.values())
    if isinstance(sent, list):
        for part in sent:
            refuse_what_would_be_opened(part)
