"""The Look tab and the endpoints /attention and /attention_words."""

import attention
import gradio as gr
from attention import AVERAGE
from controls import MODEL_EVENT, picture_examples, run_and_stop
from models import Models
from settings import Settings, check_text
from uploads import open_image
from work import cancellable, with_plain_errors


def build(models: Models, prompt: str) -> None:
    """prompt: what the caption that is followed word by word goes on from."""
    part = models.captioner
    prompt = prompt if part.has_language_model else ""
    layers, heads, queries = attention.shape_of(part)

    def checked(layer, head) -> tuple[int | None, int | None]:
        chosen_layer = attention.choice(layer, layers, "The layer")
        return chosen_layer, attention.choice(head, list(range(heads)), "The head")

    @with_plain_errors
    def look(image, layer: str = AVERAGE, head: str = AVERAGE, query: str = AVERAGE):
        picture, where = open_image(image), checked(layer, head)
        chosen = attention.choice(query, list(range(queries)), "The query")

        def work(stop):
            heat = attention.average_map(attention.query_maps(part, picture, *where), chosen)
            return attention.drawn(part, picture, [heat])[0]

        yield from cancellable(work, gr.skip())

    @with_plain_errors
    def look_again(image, layer, head, query):
        if image is not None:
            yield from look(image, layer, head, query)

    @with_plain_errors
    def look_at_words(image, layer: str = AVERAGE, head: str = AVERAGE, prompt: str = prompt, max_length: int = 20):
        picture, where = open_image(image), checked(layer, head)
        text = check_text(prompt, "The prompt", required=False)
        settings = Settings(num_beams=1, max_length=max_length)
        yield from cancellable(
            lambda stop: attention.word_overlays(part, picture, text, settings, *where, stop), gr.skip()
        )

    gr.Markdown(
        f"The model sees a picture through {queries} learned queries. Each looks at some places (cross-attention) and sums up "
        "what is there; hot places are looked at most. The picture is shown as the model sees it."
    )
    with gr.Row():
        with gr.Column():
            image = gr.Image(
                label="Picture", sources=["upload", "webcam", "clipboard"], height=430, elem_classes="tall"
            )
            with gr.Row():
                layer = _choices("Layer", layers)
                head = _choices("Head", range(heads))
                query = _choices("Query", range(queries))
            run, stop = run_and_stop("Show where it looks")
        with gr.Column():
            heat = gr.Image(
                label="Where the queries look",
                height=340,
                interactive=False,
                format="png",
                buttons=["fullscreen", "download"],
                elem_id="heat",
            )
            picture_examples(image, 3)
    with gr.Accordion("Word by word", open=True):
        gr.Markdown(
            "A caption is written, and each word shows the places that it drew on more than the other words did (its attention "
            "to the queries, theirs to the picture)."
        )
        words_prompt = gr.Textbox(
            prompt, label="Prompt of the caption", interactive=part.has_language_model, max_length=500
        )
        longest = gr.Slider(1, 40, value=20, step=1, label="Longest", info="New tokens, at most.")
        run_words, stop_words = run_and_stop("Caption, word by word")
        words = gr.Gallery(
            label="Words",
            show_label=False,
            columns=6,
            object_fit="contain",
            height="auto",
            interactive=False,
            format="png",
            elem_id="words",
        )
    event = run.click(
        look,
        [image, layer, head, query],
        heat,
        api_name="attention",
        api_description="The picture under a heat map of where the queries look: of a layer, head and query, or averaged.",
        **MODEL_EVENT,
    )
    for chosen in (layer, head, query):
        chosen.input(look_again, [image, layer, head, query], heat, api_visibility="private", **MODEL_EVENT)
    stop.click(None, cancels=[event])
    words_event = run_words.click(
        look_at_words,
        [image, layer, head, words_prompt, longest],
        words,
        api_name="attention_words",
        api_description="A heat map for each word of a caption: where it looked when it was written.",
        **MODEL_EVENT,
    )
    stop_words.click(None, cancels=[words_event])


def _choices(label: str, numbers) -> gr.Dropdown:
    return gr.Dropdown([AVERAGE, *map(str, numbers)], value=AVERAGE, label=label, min_width=130, filterable=False)
