"""--report_to: where the figures go beside metrics.jsonl, and how a run that continues goes on there too."""

import importlib.util
import json
import uuid
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import LoggerType

from ..system.atomic_files import write_whole


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


def start_trackers(accelerator: Accelerator, output_dir: Path, fields: dict) -> None:
    """Start the tracker with the run's fields as its configuration. wandb, swanlab and trackio keep runs of their own: they go
    on with the one whose id stands in tracker.json."""
    identity = run_id(output_dir / "tracker.json") if accelerator.is_main_process else None
    again = {"id": identity, "resume": "allow"}
    scalars = (int, float, str, bool)  # what TensorBoard takes
    config = {name: value if isinstance(value, scalars) else json.dumps(value) for name, value in fields.items()}
    given = {"wandb": again, "swanlab": again, "trackio": {"name": identity, "resume": "allow"}}
    accelerator.init_trackers(output_dir.name, config, given)


def run_id(path: Path) -> str:
    """The id that an earlier command left, or a new one, which is kept."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["run_id"]
        if isinstance(found, str):
            return found
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or damaged
        pass
    found = uuid.uuid4().hex[:12]
    write_whole(path, json.dumps({"run_id": found}) + "\n")
    return found
