"""The Chat tab and the endpoint /answer. A chat lives in its visitor's page and nowhere else."""

import answers
import gradio as gr
from controls import EXAMPLES, MODEL_EVENT, QUESTIONS, notice, settings_panel
from models import NO_LANGUAGE_MODEL, Models
from settings import MAX_TURNS, Settings, check_text, check_whole
from uploads import open_image
from work import with_plain_errors


def left_out(turns: int) -> str:
    """What the visitor is told where the first turns of a chat had no room."""
    which = "its first turn was" if turns == 1 else f"its first {turns} turns were"
    return f"The language model has no room for the whole chat: {which} left out."


def turns_of(messages: list[dict]) -> list[tuple[str, str]]:
    """[(question, answer), ...] of a chatbot's messages that were answered."""
    texts = [(message["role"], _text_of(message["content"])) for message in messages]
    return [
        (asked, answered)
        for (asker, asked), (answerer, answered) in zip(texts, texts[1:])
        if (asker, answerer) == ("user", "assistant")
    ]


def _text_of(content) -> str:
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


# What a page sends may arrive in another order: its clock, as the first input, says which came first.
SENT_AT = "(_, ...given) => [Date.now(), ...given]"


class Visit:
    """What a visitor's page waits for, in milliseconds of its clock.

    Cancelling is not enough: a page cannot cancel an answer that it has only just sent for, and cancels what it
    should not when the reply to a new picture comes late.
    """

    since: float = 0.0  # its last question, or the last time the chat was emptied
    question: float | None = None  # the question whose answer may go into the chat, if it waits for one


def ask(sent_at: float, visit: Visit, question: str, messages: list[dict]):
    """Puts a question into the chat, and empties the box."""
    asked = {"role": "user", "content": check_text(question, "The question")}
    visit.question = visit.since = sent_at
    return sent_at, "", [*messages, asked]


def start_anew(sent_at: float, visit: Visit):
    """An empty chat, unless a question was asked since. An answer that is still being written is cancelled."""
    if sent_at < visit.since:
        return gr.skip(), gr.skip()
    visit.question, visit.since = None, sent_at
    return [], ""


def undo(messages: list[dict]):
    """Takes the last question and what follows it off, and puts it back into the box."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return "", []
    return _text_of(messages[last]["content"]), messages[:last]


def build(models: Models, turns: int) -> None:
    """turns: how many earlier turns the model is told unless the visitor chooses another number."""

    @with_plain_errors
    def answer(
        image,
        question: str,
        history: list | None = None,
        turns: int = turns,
        decoding: str = "beam",
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.9,
        min_length: int = 1,
        max_length: int = 20,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ):
        settings = Settings(
            decoding, num_beams, temperature, top_p, min_length, max_length, length_penalty, repetition_penalty, seed
        )
        for text, _ in _answers(image, question, history, turns, settings):
            yield text

    @with_plain_errors
    def reply(asked_at: float, visit: Visit, image, messages: list[dict], turns: int, *chosen):
        if visit.question != asked_at:
            return
        question, before = _text_of(messages[-1]["content"]), turns_of(messages[:-1])[-MAX_TURNS:]
        told = False
        for text, dropped in _answers(image, question, [list(turn) for turn in before], turns, Settings(*chosen)):
            if visit.question is None:
                yield [], ""  # words that were on their way when the chat was emptied may have come after
            if visit.question != asked_at:
                return
            if dropped and not told:
                told = True
                gr.Info(left_out(dropped))
            note = left_out(dropped) if dropped else ""
            yield [*messages, {"role": "assistant", "content": text or "…"}], note
        if not text:
            yield [*messages, {"role": "assistant", "content": "(no answer)"}], note

    def _answers(image, question, history, turns, settings: Settings):
        picture, asked = open_image(image), check_text(question, "The question")
        count, before = check_whole(turns, "Earlier turns", MAX_TURNS), answers.check_history(history)
        told = before[-count:] if count else []
        yield from answers.answer(models, picture, asked, told, settings)

    on = notice(None if models.speaker else NO_LANGUAGE_MODEL)
    with gr.Row(visible=on):
        with gr.Column():
            image = gr.Image(
                label="Picture", sources=["upload", "webcam", "clipboard"], height=543, elem_classes="tall"
            )
        with gr.Column():
            chat = gr.Chatbot(
                label="Chat",
                height=380,
                placeholder="Choose a picture, then ask about it.",
                render_markdown=False,
                buttons=[],
                group_consecutive_messages=False,
            )
            note = gr.Markdown(elem_classes="note")
            box = gr.Textbox(
                label="Question", placeholder="what color is the big circle?", max_length=500, submit_btn="Ask", lines=1
            )
            with gr.Row(elem_classes="buttons"):
                stop = gr.Button("Stop", min_width=80)
                clear = gr.Button("Clear", min_width=80)
    with gr.Column(visible=on):
        with gr.Accordion("Memory", open=False):
            remembered = gr.Slider(
                0,
                MAX_TURNS,
                value=turns,
                step=1,
                label="Earlier turns told",
                info="Models tuned on single questions answer best with 0.",
            )
        panel = settings_panel(longest=20, beams=1)
        pairs = [[str(path), question] for path, question in zip(EXAMPLES, QUESTIONS)]
        gr.Examples(pairs, inputs=[image, box], label="Examples", api_visibility="private")

    private = {"api_visibility": "private"}
    visit = gr.State(Visit())  # one a visitor: Gradio copies it
    clock = gr.Number(visible=False)
    ordered = {"js": SENT_AT, "queue": False, **private}
    asking, asked_in = [clock, visit, box, chat], [clock, box, chat]
    given = [clock, visit, image, chat, remembered, *panel]
    asked = box.submit(ask, asking, asked_in, **ordered)
    replied = asked.success(reply, given, [chat, note], **private, **MODEL_EVENT)
    again = chat.retry(lambda messages: undo(messages), chat, [box, chat], queue=False, **private)
    again = again.success(ask, asking, asked_in, **ordered)
    again = again.success(reply, given, [chat, note], **private, **MODEL_EVENT)
    stop.click(None, cancels=[replied, again])
    chat.undo(undo, chat, [box, chat], queue=False, **private)
    # A new picture is a new chat.
    gr.on([clear.click, image.change], start_anew, [clock, visit], [chat, note], **ordered)

    with gr.Row(visible=False):
        history = gr.JSON([], label="history")
        said = gr.Textbox(label="answer")
        endpoint = gr.Button("answer")
    endpoint.click(
        answer,
        [image, box, history, remembered, *panel],
        said,
        api_name="answer",
        api_description="Answers a question on a picture. history: [[question, answer], ...] of the chat so far. Streams.",
        **MODEL_EVENT,
    )
