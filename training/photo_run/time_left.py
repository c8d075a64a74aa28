"""Which part of a long run is on, and about how long the rest takes."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..system.atomic_files import write_whole
from ..system.json_lines import read_json_object


def duration(seconds: float) -> str:
    """In words of two sizes at most: 2 h 05 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class Progress:
    """Runs the parts of a run one after another, and keeps the seconds that each has taken in a file.

    expected: seconds of each part on the machine where they were measured; the parts that have ended tell how much faster
        or slower this one is.
    took: seconds of each part over all runs of the command, those that were stopped included; `ended` are those that are
        done.
    """

    expected: dict[str, float]
    file: Path
    took: dict[str, float] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.file.exists():
            kept = read_json_object(self.file, "It holds times alone: delete it.")
            self.took, self.ended = kept["took"], kept["ended"]

    @property
    def pace(self) -> float:
        """Seconds here for one expected second."""
        return sum(self.took[name] for name in self.ended) / sum(self.expected[name] for name in self.ended)

    def left(self, names: list[str]) -> str:
        """Time that parts will take, in words."""
        expected = sum(max(0.0, self.expected[name] - self.took.get(name, 0.0)) for name in names)
        return duration(expected * (self.pace if self.ended else 1.0))

    def run(self, name: str, part: Callable[[], object]) -> None:
        """Says what begins and what is left, does it, and keeps its time."""
        names = list(self.expected)
        number = names.index(name)
        if name not in self.ended:
            guess = "at the pace of what is done" if self.ended else "as measured on two cores, docs/photos.md"
            waiting = [other for other in names[number:] if other not in self.ended]
            print(
                f"\n[{number + 1} of {len(names)}] {name}: about {self.left([name])}; with what comes after it: about "
                f"{self.left(waiting)} ({guess})",
                flush=True,
            )
        begin, before = time.perf_counter(), self.took.get(name, 0.0)
        try:
            part()
            done = [] if name in self.ended else [name]
        except BaseException:
            done = []
            raise
        finally:
            if name not in self.ended:  # that of a part that is done is the second in which it says so
                self.took[name] = before + time.perf_counter() - begin
                self.ended += done
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.file, json.dumps({"took": self.took, "ended": self.ended}, indent=1).encode())

    def __str__(self) -> str:
        lines = [f"{duration(seconds):>12}  {name}" for name, seconds in self.took.items()]
        return "\n".join([*lines, f"{duration(sum(self.took.values())):>12}  in all"])
