"""How a command ends: a mistake is one sentence, without a traceback."""

import sys
from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError

from modeling_blip2x.printable_blip2x import printable

# FloatingPointError: a loss or a gradient that is not finite. StrictDataclassError: a wrong field in a model's config.json.
MISTAKES = (ValueError, OSError, FloatingPointError, StrictDataclassError)


def run_command(main: Callable[[], None]) -> None:
    """Call `main`; one of MISTAKES ends the process with its sentence and 1. A fault of ours keeps its traceback."""
    try:
        main()
    except MISTAKES as error:
        sys.exit(f"error: {printable(str(error))}")
