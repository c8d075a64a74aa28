"""Caption, ask, chat, match, search, and see where the queries look.

    python space_app/app.py --model FOLDER_OR_HUB_ID [FOLDER_OR_HUB_ID]

A stage-2 checkpoint captions and chats, its stage-1 checkpoint matches and searches; name either, both, or the output
folder of the quickstart. On a Hugging Face Space the environment says the same: BLIP2X_MODEL (several separated by commas),
BLIP2X_DEVICE, BLIP2X_DTYPE, BLIP2X_QUANTIZATION, BLIP2X_PROMPT, BLIP2X_TURNS.
"""

import argparse
import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
import time

SWEEP, KEPT = 600, 3600  # seconds: how often the cache is swept, and how old its files get
LEAVING = 4  # seconds that answers have to end when the process is told to; containers are killed after 10
QUEUE = 64  # requests in the queue; one more is refused and asked to try again
SESSIONS = 250  # visitors that Gradio remembers, at a quarter of a megabyte each; who was longest away is forgotten
PROMPT = "a picture of"
MOST_TURNS = 50


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    cache = own_cache()
    from models import find_checkpoints, load_models

    checkpoints = find_checkpoints(arguments.model)
    models = load_models(checkpoints, arguments.device, arguments.dtype, arguments.quantization)
    for part in models.parts:
        print(
            f"Loaded {part.source} on {part.model.device}, {str(part.model.dtype).removeprefix('torch.')}.", flush=True
        )
    prompt, turns = defaults(models, arguments)
    launch(build(models, prompt, turns), arguments.host, arguments.port, arguments.share, wait=False)
    serve_until_told(cache)


def parse(argv: list[str] | None) -> argparse.Namespace:
    def environment(name: str, default: str | None = None) -> str | None:
        return os.environ.get(f"BLIP2X_{name}") or default

    parser = argparse.ArgumentParser(description="The demo: caption, chat, match, search, look.")
    named = (environment("MODEL") or "").replace(",", " ").split()
    parser.add_argument(
        "--model",
        nargs="+",
        default=named,
        help="Folders or hub ids: a stage-2 checkpoint, a stage-1 checkpoint, or both.",
    )
    parser.add_argument("--device", default=environment("DEVICE", "auto"), help="auto, cpu, cuda, mps.")
    parser.add_argument("--dtype", default=environment("DTYPE", "auto"), help="auto, float32, bfloat16, float16.")
    parser.add_argument("--quantization", default=environment("QUANTIZATION", "none"), help="none, 8bit, 4bit.")
    parser.add_argument(
        "--prompt",
        default=environment("PROMPT"),
        help=f"What captions go on from; by default as the card says, or {PROMPT!r}.",
    )
    parser.add_argument(
        "--turns",
        type=number_of_turns,
        default=environment("TURNS"),
        help="Earlier turns of a chat that the model is told; by default as the card says, or 10.",
    )
    parser.add_argument("--host", help="Address to listen on; 127.0.0.1 by default, 0.0.0.0 on a Space.")
    parser.add_argument("--port", type=int, help="7860 by default, or the next free one.")
    parser.add_argument("--share", action="store_true", help="A public link through Gradio's servers.")
    return parser.parse_args(argv)


def number_of_turns(text: str) -> int:
    """A whole number from 0 to 50, as the page's slider has."""
    if not text.isdecimal() or int(text) > MOST_TURNS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MOST_TURNS}.")
    return int(text)


def own_cache() -> str | None:
    """Uploads of this run lie in a folder of their own, which goes when the run ends; None where one is given."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as a container is stopped
    if "GRADIO_TEMP_DIR" in os.environ:
        return None
    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="blip2x_space_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def serve_until_told(cache: str | None) -> None:
    """Waits for SIGTERM or Ctrl-C; then every answer that is being written ends with the sentence that the Space restarts."""
    from door import inside
    from work import close, is_at_rest

    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        told.wait()
    except KeyboardInterrupt:
        pass
    close()
    end = time.monotonic() + LEAVING
    while (inside or not is_at_rest()) and time.monotonic() < end:
        time.sleep(0.05)
    if not is_at_rest():  # a computation that does not look up, such as a large tower's: exit would wait for it
        if cache is not None:
            shutil.rmtree(cache, ignore_errors=True)
        os._exit(0)


def defaults(models, arguments: argparse.Namespace) -> tuple[str, int]:
    """Prompt and number of turns: as told, else as the model card's header says under `demo`, else the usual ones.

    Raises:
        ValueError: a header whose `demo` says something else than a text and a whole number.
    """
    from about import card_of
    from settings import MAX_TEXT, is_unicode

    card = card_of(models.captioner)
    stated = (card.data.to_dict().get("demo") if card else None) or {}
    wrong = f"The model card of {models.captioner.name} has in its header demo"
    if not isinstance(stated, dict):
        raise ValueError(f"{wrong}: {stated!r:.60}. Write demo: {{prompt: a photo of, turns: 0}}, or leave it out.")
    prompt, turns = stated.get("prompt", PROMPT), stated.get("turns", 10)
    if not isinstance(prompt, str) or len(prompt) > MAX_TEXT or not is_unicode(prompt):
        raise ValueError(f"{wrong}.prompt: {prompt!r:.60}. Write a text of at most {MAX_TEXT} characters.")
    if not isinstance(turns, int) or isinstance(turns, bool) or turns not in range(MOST_TURNS + 1):
        raise ValueError(f"{wrong}.turns: {turns!r:.60}. Write a whole number from 0 to {MOST_TURNS}.")
    prompt = arguments.prompt if arguments.prompt is not None else prompt
    return prompt, arguments.turns if arguments.turns is not None else turns


def build(models, prompt: str = PROMPT, turns: int = 10):
    """The page (gr.Blocks) for the loaded models."""
    import about
    import caption_tab
    import chat_tab
    import gradio as gr
    import look_tab
    import match_tab
    import search_tab
    from gradio_internals import Page

    names = " and ".join(part.name for part in models.parts)
    can = ["Caption pictures"]
    can += ["ask about them"] if models.speaker else []
    can += ["match and search them with words"] if models.matcher else []
    with Page(title=f"blip2x: {names}", analytics_enabled=False, delete_cache=(SWEEP, KEPT)) as page:
        gr.Markdown(f"# blip2x\n{', '.join(can)}, and see where the model looks. Here: {names}.", elem_id="title")
        with gr.Tabs():
            with gr.Tab("Caption"):
                caption_tab.build(models, prompt)
            with gr.Tab("Chat"):
                chat_tab.build(models, turns)
            with gr.Tab("Match"):
                match_tab.build(models)
            with gr.Tab("Search"):
                search_tab.build(models)
            with gr.Tab("Look"):
                look_tab.build(models, prompt)
            with gr.Tab("About") as tab:
                facts = gr.HTML(about.about(models))
                tab.select(
                    lambda: about.about(models),
                    None,
                    facts,
                    queue=False,
                    show_progress="hidden",
                    api_visibility="private",
                )
    return page


def launch(page, host: str | None = None, port: int | None = None, share: bool = False, wait: bool = True) -> str:
    """Serves the page; returns its address, at once if not `wait`."""
    from controls import FOLDER
    from door import Door
    from starlette.middleware import Middleware
    from theme import CSS, theme
    from uploads import MAX_MEGABYTES, MEGABYTE

    options = {
        "share": share,
        "theme": theme(),
        "css_paths": [CSS],
        "max_file_size": int(MAX_MEGABYTES * MEGABYTE),
        "allowed_paths": [str(FOLDER)],  # the page may show them from any working directory
        "app_kwargs": {"middleware": [Middleware(Door)]},
        "ssr_mode": False,
        "pwa": False,
        "footer_links": ["api", "settings"],
        "state_session_capacity": SESSIONS,
        "prevent_thread_lock": not wait,
    }
    try:
        return page.queue(max_size=QUEUE).launch(server_name=host, server_port=port, **options)[1]
    except (OSError, OverflowError) as error:
        where = "any port from 7860" if port is None else f"port {port}"
        raise ValueError(
            f"Cannot listen at {host or '127.0.0.1'}, {where}: it is taken, or no address of this machine. Name another by "
            "--port or --host."
        ) from error


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
