"""The Match tab and the endpoint /match."""

import gradio as gr
import matching
from charts import AWAITED, chart
from controls import AS_SENT, CAPTIONED, EXAMPLES, MODEL_EVENT, notice, run_and_stop
from mistakes import Mistake
from models import NO_SCORES, Models
from settings import check_texts
from uploads import Gallery, open_images
from work import cancellable, with_plain_errors

# What the first examples show, and the same words in another order.
TEXTS = "\n".join([*CAPTIONED[:3], "a small green circle left of a big red circle"])


def build(models: Models) -> None:
    @with_plain_errors
    def match(images, texts: str, progress=gr.Progress()):
        lines, pictures = check_texts(texts), open_images(images)
        if not pictures:
            raise Mistake("There is no picture. Upload one or more, or load the examples.")
        yield from cancellable(lambda stop: matching.match(models, pictures, lines, stop, progress), gr.skip())

    on = notice(None if models.matcher else NO_SCORES)
    with gr.Row(visible=on):
        with gr.Column():
            images = Gallery(label="Pictures", columns=3, height=260, object_fit="contain", file_types=["image"])
            load = gr.Button("Load example pictures", size="sm")
            texts = gr.Textbox(TEXTS, label="Texts, one on each line", lines=4, max_lines=12)
            run, stop = run_and_stop("Match")
        with gr.Column():
            page = gr.HTML(AWAITED, label="Scores", elem_id="match-chart")
            with gr.Accordion("Numbers, as the API gives them", open=False):
                scores = gr.JSON(label="Scores: a row for each picture, a column for each text")
    load.click(lambda: [str(path) for path in EXAMPLES[:3]], None, images, api_visibility="private")
    event = run.click(
        match,
        [images, texts],
        scores,
        api_name="match",
        api_description="Scores of every picture with every text (one on each line): ITC cosines and ITM match probabilities, "
        "N x M.",
        **MODEL_EVENT,
    )
    event.success(
        lambda scores, images: chart(scores, open_images(images)),
        [scores, images],
        page,
        queue=False,
        api_visibility="private",
        **AS_SENT,
    )
    stop.click(None, cancels=[event])
