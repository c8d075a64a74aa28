"""What every class of fields is written with."""

from dataclasses import field


def doc(default, text: str):
    """A dataclass field whose help text is `text`; lists and dicts are copied for each instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def looks_like_path(value: str) -> bool:
    """And not like a hub id, which has one slash at most."""
    return value[0] in "./~" or value.count("/") > 1
