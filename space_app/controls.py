"""What several tabs show alike: the settings accordion, run and stop buttons, and the examples."""

from pathlib import Path

import gradio as gr
from settings import CAPTIONS, MODES, RANGES

FOLDER = Path(__file__).resolve().parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.png"))
CAPTIONED = [path.stem.partition("_")[2].replace("_", " ") for path in EXAMPLES]  # their names say what they show
QUESTIONS = [
    "what color is the big circle?",
    "how many squares are there?",
    "where is the red ring from the blue ring?",
    "what shape is the small yellow thing?",
]
# Inputs reach the functions as they were sent, and these check them in words: Gradio's own checks say "null" to a client
# of the API, or round in silence.
AS_SENT = {"preprocess": False}
# All that use the models wait in one line. Pictures of the next ones are decoded while the models' thread, which takes one
# request at a time (see work.py), is busy with the first.
MODEL_EVENT = {"concurrency_id": "models", "concurrency_limit": 4, **AS_SENT}


def settings_panel(longest: int = 30, beams: int = 5, captions: bool = False) -> list[gr.components.Component]:
    """The accordion; its components in the order of the fields of `Settings`, the last one only where `captions`."""
    starts = {"max_length": longest, "num_beams": beams}
    with gr.Accordion("Settings", open=False, elem_classes="settings"):
        panel = [
            gr.Radio(
                [("Beam search", MODES[0]), ("Nucleus sampling", MODES[1])],
                value=MODES[0],
                label="Decoding",
                info="Beam search finds the likeliest words; nucleus sampling draws them.",
            )
        ]
        with gr.Row(equal_height=False):
            for name, limits in RANGES.items():
                if name == "seed":
                    number = gr.Number(0, label=limits.label, info=limits.info, precision=0, minimum=0, min_width=220)
                    panel.append(number)
                    continue
                slider = gr.Slider(
                    limits.low,
                    limits.high,
                    value=starts.get(name, limits.start),
                    step=limits.step,
                    label=limits.label,
                    info=limits.info,
                    min_width=220,
                )
                panel.append(slider)
            if captions:
                panel.append(
                    gr.Slider(
                        CAPTIONS.low,
                        CAPTIONS.high,
                        value=CAPTIONS.start,
                        step=1,
                        label=CAPTIONS.label,
                        info=CAPTIONS.info,
                        min_width=220,
                    )
                )
    return panel


def picture_examples(image: gr.Image, count: int) -> None:
    """The first examples with what they show: Gradio's buttons of pictures alone have no name for those who cannot see."""
    shown = gr.Textbox(label="It shows", visible=False)
    rows = [[str(path), text] for path, text in zip(EXAMPLES[:count], CAPTIONED)]
    gr.Examples(rows, inputs=[image, shown], label="Examples", api_visibility="private")


def run_and_stop(label: str) -> tuple[gr.Button, gr.Button]:
    """The two buttons under a form."""
    with gr.Row(elem_classes="buttons"):
        return gr.Button(label, variant="primary", min_width=120, scale=3), gr.Button("Stop", min_width=80, scale=1)


def notice(sentence: str | None) -> bool:
    """Shows why a tab is switched off; returns whether it is on."""
    if sentence is not None:
        gr.Markdown(sentence, elem_classes="switched-off")
    return sentence is None
