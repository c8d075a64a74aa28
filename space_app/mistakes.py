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


class Page(gr.Blocks):
    """gr.Blocks that answers in words where a client of the API sends what a component cannot read.

    Gradio itself answers "null" there, and prints a traceback.
    """

    async def preprocess_data(self, *arguments, **keywords):
        try:
            return await super().preprocess_data(*arguments, **keywords)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # pydantic's, of a refused path, of a component: all are about what was sent
            raise Mistake(UNREADABLE) from error
