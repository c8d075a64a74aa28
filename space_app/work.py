"""How a request runs: in the one thread that has the models, where it can be told to stop, with errors as sentences.

Gradio closes a generator when its visitor presses Stop or leaves. So every long function is a generator that looks up
five times a second; closing it sets `stop`, which `generate` reads before each token and loops before each image.
"""

import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import gradio as gr
import torch
from mistakes import Mistake
from transformers import StoppingCriteria, TextIteratorStreamer

LOOK_UP = 0.2  # seconds
Result = TypeVar("Result")
# One thread: models, seeds and memory are for one request at a time, and its pool of threads is made once.
MODEL_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="models")
RUNNING: set["Running"] = set()
CLOSING = threading.Event()  # set once, when the process is told to end
RESTARTS = "The Space restarts. Send this again in a minute."
logger = logging.getLogger("space_app")
OUT_OF_MEMORY = "The machine ran out of memory. Try fewer beams, captions or pictures, or a shorter text."


class StopWhenTold(StoppingCriteria):
    """Ends transformers' generate before its next token."""

    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device, dtype=torch.bool)


class Stopped(Exception):
    """Raised in work whose visitor has left."""


class Running:
    """Work in the models' thread. Leaving the `with` tells it to stop and waits until it has."""

    def __init__(self, work: Callable[[threading.Event], Result], when_done: Callable[[], None] | None = None):
        self.stop, self.done = threading.Event(), threading.Event()
        self.result, self.error = None, None
        self._work, self._when_done = work, when_done

    def _run(self) -> None:
        try:
            if not self.stop.is_set():
                self.result = self._work(self.stop)
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that waits
            self.error = error
        finally:
            if self._when_done is not None:
                self._when_done()
            self.done.set()

    def __enter__(self) -> "Running":
        RUNNING.add(self)
        self._turn = MODEL_THREAD.submit(self._run)
        if CLOSING.is_set():  # after `close` looked
            self.stop.set()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        if CLOSING.is_set():
            return
        if not self._turn.cancel():
            self.done.wait()
        RUNNING.discard(self)

    def wait_a_moment(self) -> bool:
        """Whether the work is done now. Raises Mistake where the Space ends."""
        done = self.done.wait(LOOK_UP)
        if CLOSING.is_set():
            raise Mistake(RESTARTS)
        return done


def close() -> None:
    """Tells all work to stop, and its visitors, and those who come, that the Space restarts."""
    CLOSING.set()
    for running in list(RUNNING):
        running.stop.set()


def is_at_rest() -> bool:
    """Whether the models' thread has nothing to do."""
    return all(running.done.is_set() for running in list(RUNNING))


def cancellable(work: Callable[[threading.Event], Result], waiting: object) -> Iterator[object]:
    """Yields `waiting` while the work goes on, then its result."""
    with Running(work) as running:
        while not running.wait_a_moment():
            yield waiting
    if running.error is not None:
        raise running.error
    yield running.result


def streamed(generate: Callable[[TextIteratorStreamer, threading.Event], None], tokenizer) -> Iterator[str]:
    """The text so far, each time a word is added, and unchanged five times a second, so that it can be closed."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=LOOK_UP, skip_special_tokens=True)
    text = ""
    # Where generate fails it does not end the stream.
    with Running(lambda stop: generate(streamer, stop), when_done=streamer.end) as running:
        while True:
            try:
                text += next(streamer)
            except queue.Empty:
                pass
            except StopIteration:
                break
            if CLOSING.is_set():
                break
            yield text
    if CLOSING.is_set():  # what there is of the text is cut off
        raise Mistake(RESTARTS)
    if running.error is not None:
        raise running.error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine had no memory left, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def with_plain_errors(function: Callable) -> Callable:
    """A generator function whose errors reach the visitor as a sentence; what is not meant for them goes to the log."""

    @functools.wraps(function)
    def wrapped(*arguments, **keywords):
        try:
            yield from function(*arguments, **keywords)
        except gr.Error:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                logger.warning("%s ran out of memory: %s", function.__name__, error)
                raise Mistake(OUT_OF_MEMORY) from error
            logger.exception("%s failed", function.__name__)
            raise Mistake("Something went wrong here, not with what you sent. Try again.") from error

    return wrapped
