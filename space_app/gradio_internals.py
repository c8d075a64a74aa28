"""The one place that leans on what Gradio does not document, and why."""

import gradio as gr
from mistakes import UNREADABLE, Mistake
from sent import checked
from work import CLOSING, RESTARTS


class Page(gr.Blocks):
    """gr.Blocks that checks what is sent before it reads it, and answers in words where it cannot be read.

    `Blocks.preprocess_data` reads the inputs of a request, of every endpoint, before any function sees them: it downloads
    what a file's path names if that is an address, moves files, makes the components that a chat names, and where a
    component refuses its input the client is told "null" and the log gets a traceback. Events and components have no hook
    before it, and `validator=` runs after it.
    """

    async def preprocess_data(self, block_fn, inputs, *arguments, **keywords):
        try:
            if CLOSING.is_set():
                raise Mistake(RESTARTS)
            inputs = checked(block_fn.inputs, inputs)
            return await super().preprocess_data(block_fn, inputs, *arguments, **keywords)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # pydantic's, of a refused path, of a component: all are about what was sent
            raise Mistake(UNREADABLE) from error
