"""A loader's worker that the system kills, mostly for want of memory, ends the run with a sentence."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb


@contextmanager
def workers_may_die(then: Callable[[], str]) -> Iterator[None]:
    """Within, the death of a worker becomes an OSError that says so and `then`, what to do.

    torch tells it by a RuntimeError wherever the main process happens to be, or a connection to the worker fails.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        if "DataLoader worker" not in str(error) and not in_multiprocessing(error):
            raise
        # torch's handler would raise again whenever the dead worker is looked at, also while this process exits.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"A process that loads data has died ({reason}). {then()} If it was killed for want of memory, pass a smaller "
            "--dataloader_num_workers; 0 loads in the main process."
        ) from error


def in_multiprocessing(error: BaseException) -> bool:
    """Whether it was raised on the way to or from another process, by the module of python or that of torch."""
    return any(Path(frame.filename).parent.name == "multiprocessing" for frame in extract_tb(error.__traceback__))
