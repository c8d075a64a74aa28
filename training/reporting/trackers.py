"""--report_to: where the figures go beside metrics.jsonl."""

import importlib.util

from accelerate.utils import LoggerType


def choose_tracker(report_to: str | None) -> tuple[str | None, str | None]:
    """The tracker for accelerate's log_with, and a line to print if the default one is not there.

    report_to: a tracker's name, "none", or None for tensorboard where it is installed. Raises ValueError for a tracker
    that accelerate does not know, or that is not installed.
    """
    if report_to == "none":
        return None, None
    name = report_to or "tensorboard"
    known = sorted(kind.value for kind in LoggerType if kind is not LoggerType.ALL)
    if name not in known:
        raise ValueError(f"--report_to is {name!r}; choose from none, {', '.join(known)}.")
    if importlib.util.find_spec(name) is not None:  # trackers, modules and packages have the same names
        return name, None
    if report_to:
        raise ValueError(f"--report_to is {name}, which is not installed. Run: pip install {name}. Or pass none.")
    return (
        None,
        f"{name} is not installed: figures go to metrics.jsonl and curves.png alone (pip install {name}).",
    )
