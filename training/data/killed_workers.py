"""A loader's worker that hangs, or that the system kills, mostly for want of memory, ends the run with a sentence."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb


@contextmanager
def workers_may_die(then: Callable[[], str]) -> Iterator[None]:
    """Within, the death of a worker becomes an OSError that says so and `then`, what to do.

    torch tells it by a RuntimeError wherever the main process happens to be, or a connection to the worker fails. So does
    one that gives nothing for as long as the loader's timeout.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        if "DataLoader timed out" in str(error):
            raise OSError(
                f"The processes that load data have given nothing for --dataloader_timeout ({error}). {then()} A file system "
                "that hangs is the usual reason; 0 waits for ever."
            ) from error
        # First of all: torch's handler raises again whenever a child ends as long as the dead worker is known, also while
        # the error is looked at and while this process exits.
        handler = set_child_handler(signal.SIG_DFL)
        if "DataLoader worker" not in str(error) and not in_multiprocessing(error):
            if handler is not None:  # None: not set from Python, or not in the main thread
                set_child_handler(handler)
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"A process that loads data has died ({reason}). {then()} If it was killed for want of memory, pass a smaller "
            "--dataloader_num_workers; 0 loads in the main process."
        ) from error


def set_child_handler(handler: object) -> object:
    """Set what happens when a child process ends, and return what did before; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGCHLD, handler)


def in_multiprocessing(error: BaseException) -> bool:
    """Whether it was raised on the way to or from another process, by the module of python or that of torch."""
    return any(Path(frame.filename).parent.name == "multiprocessing" for frame in extract_tb(error.__traceback__))
