"""What one process of several does for all of them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .run_lock import locked_folder


def on_main(accelerator: Accelerator, work: Callable):
    """What `work` returns on the main process, on all; an error that tells of a mistake is raised on all, so none waits."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


@contextmanager
def folder_of_run(folder: str | Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder that all processes of a run write: the main one locks it."""
    with ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(locked_folder(folder, accelerator.print)))
        yield
