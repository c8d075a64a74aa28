"""The Search tab and the endpoints /search (pictures for a text) and /search_texts (texts for a picture)."""

import gradio as gr
import matching
from charts import AWAITED, text_ranking, verdict
from controls import AS_SENT, CAPTIONED, EXAMPLES, MODEL_EVENT, notice, picture_examples, run_and_stop
from match_tab import TEXTS
from mistakes import Mistake
from models import NO_SCORES, Models
from settings import check_text, check_texts, check_whole
from uploads import MAX_IMAGES, Gallery, open_image, open_images
from work import cancellable, with_plain_errors


def build(models: Models) -> None:
    @with_plain_errors
    def search(images, query: str, rerank: int = matching.RERANKED, progress=gr.Progress()):
        text, count = check_text(query, "The query"), check_whole(rerank, "Re-ranked", MAX_IMAGES)
        pictures = open_images(images)
        if not pictures:
            raise Mistake("There is no picture to search. Upload some, or load the examples.")
        yield from cancellable(
            lambda stop: matching.rank_images(models, pictures, text, count, stop, progress), gr.skip()
        )

    @with_plain_errors
    def search_texts(image, texts: str, rerank: int = matching.RERANKED, progress=gr.Progress()):
        picture, lines = open_image(image), check_texts(texts)
        count = check_whole(rerank, "Re-ranked", MAX_IMAGES)
        yield from cancellable(
            lambda stop: matching.rank_texts(models, picture, lines, count, stop, progress), gr.skip()
        )

    on = notice(None if models.matcher else NO_SCORES)
    with gr.Column(visible=on):
        with gr.Tabs():
            with gr.Tab("Pictures for a text"), gr.Row():
                with gr.Column():
                    gallery = Gallery(
                        label="Your pictures", columns=4, height=320, object_fit="contain", file_types=["image"]
                    )
                    load = gr.Button("Load example pictures", size="sm")
                    query = gr.Textbox(label="Query", placeholder=CAPTIONED[2], max_length=500)
                    rerank = _rerank()
                    run, stop = run_and_stop("Search")
                with gr.Column():
                    doubt = gr.Markdown(elem_classes="verdict", elem_id="doubt", visible=False)
                    found = gr.Gallery(
                        label="Best first",
                        show_label=False,
                        columns=3,
                        height=420,
                        object_fit="contain",
                        interactive=False,
                        elem_id="found",
                    )
                    with gr.Accordion("Numbers, as the API gives them", open=False):
                        ranking = gr.JSON(label="Ranking; pictures are counted from 0")
            with gr.Tab("Texts for a picture"), gr.Row():
                with gr.Column():
                    image = gr.Image(label="Picture", sources=["upload", "webcam", "clipboard"], height=260)
                    texts = gr.Textbox(TEXTS, label="Texts, one on each line", lines=4, max_lines=12)
                    rerank_texts = _rerank()
                    run_texts, stop_texts = run_and_stop("Rank texts")
                    picture_examples(image, 3)
                with gr.Column():
                    page = gr.HTML(AWAITED, label="Best first", elem_id="text-ranking")
                    with gr.Accordion("Numbers, as the API gives them", open=False):
                        text_order = gr.JSON(label="Ranking")
    load.click(lambda: [str(path) for path in EXAMPLES], None, gallery, api_visibility="private")
    event = gr.on(
        [run.click, query.submit],
        search,
        [gallery, query, rerank],
        ranking,
        api_name="search",
        api_description="Pictures for a text, best first: [{image: number from 0, itc: cosine, itm: match probability or null}].",
        **MODEL_EVENT,
    )
    event.success(
        lambda images, ranking: show_ranking(open_images(images), ranking),
        [gallery, ranking],
        [found, doubt],
        queue=False,
        api_visibility="private",
        **AS_SENT,
    )
    stop.click(None, cancels=[event])
    text_event = run_texts.click(
        search_texts,
        [image, texts, rerank_texts],
        text_order,
        api_name="search_texts",
        api_description="Texts (one on each line) for a picture, best first.",
        **MODEL_EVENT,
    )
    text_event.success(text_ranking, text_order, page, queue=False, api_visibility="private")
    stop_texts.click(None, cancels=[text_event])


def show_ranking(images, ranking: list[dict] | None):
    """The ranked pictures with their scores below them, and a sentence where none matches."""
    shown, sentence = [], verdict(ranking)
    for place, row in enumerate(ranking or [], 1):
        if row["image"] >= len(images):  # taken away while the search went on
            return [], gr.Markdown(visible=False)
        match = "" if row["itm"] is None else f", ITM {row['itm']:.2f}"
        shown.append((images[row["image"]], f"{place}. ITC {row['itc']:.2f}{match}"))
    return shown, gr.Markdown(sentence, visible=bool(sentence))


def _rerank() -> gr.Slider:
    with gr.Accordion("Settings", open=False):
        return gr.Slider(
            0,
            MAX_IMAGES,
            value=matching.RERANKED,
            step=1,
            label="Re-ranked by ITM",
            info="ITC ranks all; ITM, slower and finer, orders this many of the best again.",
        )
