"""Texts that are no UTF-8: rows with such texts are left out, and what reports say of them can be written."""


def not_utf8(*values: object) -> str | None:
    """What is wrong with the first text, in lists or mappings too, that holds half of a surrogate pair; None: nothing.

    JSON spells one as `\\ud83d`; bytes of another encoding are read as such halves too.
    """
    for value in values:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                return f"the text is not UTF-8: {ascii(value[:100])}"
        elif isinstance(value, (list, dict)):
            fault = not_utf8(*(value.values() if isinstance(value, dict) else value))
            if fault is not None:
                return fault
    return None


def json_bytes(text: str) -> bytes:
    """JSON as UTF-8. Half of a surrogate pair is spelt `\\ud83d`, so that it reads back as it was."""
    return text.encode("utf-8", "backslashreplace")
