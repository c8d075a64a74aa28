"""A loader's worker that the system kills, mostly for want of memory, ends the run with a sentence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def workers_may_die(then: Callable[[], str]) -> Iterator[None]:
    """Within, the death of a worker becomes an OSError that says so and `then`, what to do.

    torch tells it by a RuntimeError wherever the main process happens to be, or a connection that it was reading breaks.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"A process that loads data has died ({reason}). {then()} If it was killed for want of memory, pass a smaller "
            "--dataloader_num_workers; 0 loads in the main process."
        ) from error
