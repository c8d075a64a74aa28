"""The Caption tab and the endpoint /caption."""

from threading import Event

import answers
import gradio as gr
from controls import EXAMPLES, MODEL_EVENT, run_and_stop, settings_panel
from models import Models
from settings import Settings, check_text
from uploads import open_image, open_upload
from work import cancellable, with_plain_errors


def build(models: Models, prompt: str) -> None:
    """prompt: what captions go on from, unless the visitor writes another."""
    part = models.captioner
    takes_prompt = part.has_language_model
    prompt = prompt if takes_prompt else ""

    @with_plain_errors
    def caption(
        image,
        prompt: str = prompt,
        decoding: str = "beam",
        num_beams: int = 5,
        temperature: float = 1.0,
        top_p: float = 0.9,
        min_length: int = 1,
        max_length: int = 30,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        captions: int = 1,
    ):
        settings = Settings(
            decoding,
            num_beams,
            temperature,
            top_p,
            min_length,
            max_length,
            length_penalty,
            repetition_penalty,
            seed,
            captions,
        )
        picture, text = open_image(image), check_text(prompt, "The prompt", required=False)
        for found in cancellable(lambda stop: answers.caption(part, picture, text, settings, stop), gr.skip()):
            if isinstance(found, list):
                if len(found) < settings.captions:
                    gr.Info(f"{settings.captions} captions were drawn, only {len(found)} different.")
                found = "\n".join(found)
            yield found

    captioned = [
        [str(path), *answers.caption(part, open_upload(path), prompt, Settings(), Event())] for path in EXAMPLES
    ]
    with gr.Row():
        with gr.Column():
            image = gr.Image(label="Picture", sources=["upload", "webcam", "clipboard"], height=320)
            box = gr.Textbox(
                prompt,
                label="Prompt",
                info="The caption goes on from here; may be empty."
                if takes_prompt
                else "This checkpoint has no language model: its ITG head captions, and takes no prompt.",
                interactive=takes_prompt,
                max_length=500,
            )
            panel = settings_panel(captions=True)
            run, stop = run_and_stop("Caption")
        with gr.Column():
            text = gr.Textbox(label="Caption", lines=3, buttons=["copy"], elem_id="caption-text")
            gr.Examples(captioned, inputs=[image, text], label="Examples, captioned before", api_visibility="private")
    event = gr.on(
        [run.click, box.submit],
        caption,
        [image, box, *panel],
        text,
        api_name="caption",
        api_description="Captions of a picture, one on each line, that go on from the prompt.",
        **MODEL_EVENT,
    )
    stop.click(None, cancels=[event])
