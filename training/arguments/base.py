"""What every class of fields is written with, and what is checked of all of them."""

from dataclasses import field
from pathlib import Path
from typing import ClassVar

BIG, TINY = float("inf"), 1e-12  # ends of a range that is open


def doc(default, text: str):
    """A dataclass field whose help text is `text`; lists and dicts are copied for each instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def looks_like_path(value: str) -> bool:
    """More than one slash, or a leading dot, slash or tilde: a path, not a hub id."""
    return value.startswith((".", "/", "~")) or value.count("/") > 1


class Arguments:
    """Base of the dataclasses that `parse_arguments` fills. A subclass names its fields and what they may hold."""

    REQUIRED: ClassVar[tuple[str, ...]] = ()
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}  # of a field, or of each item of a list
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {}  # smallest and largest value
    PATHS: ClassVar[tuple[str, ...]] = ()  # folders, files or hub ids

    def required(self) -> list[str]:
        return list(self.REQUIRED)

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each: flag, value, fix."""
        found = [
            f"--{name} is missing. Pass --{name} VALUE or set it in the YAML file."
            for name in self.required()
            if not getattr(self, name)
        ]
        for name in self.PATHS:
            value = getattr(self, name)
            if value and looks_like_path(value) and not Path(value).exists():
                found.append(f"--{name} is {value}: there is no such file or folder. Check the path, or give a hub id.")
        for name, allowed in self.CHOICES.items():
            value = getattr(self, name)
            items = value if isinstance(value, list) else [] if value is None else [value]
            verb = "holds" if isinstance(value, list) else "is"
            found += [
                f"--{name} {verb} {item!r}; choose from {', '.join(allowed)}." for item in items if item not in allowed
            ]
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                found.append(f"--{name} is {value}, but must {_lie_between(low, high)}.")
        return found


def _lie_between(low: float, high: float) -> str:
    if low == TINY:
        return "be above 0" if high == BIG else f"be above 0 and at most {high:g}"
    if high == BIG:
        return f"be at least {low:g}"
    return f"lie between {low:g} and {high:g}"
