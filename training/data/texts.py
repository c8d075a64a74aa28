"""The texts of a value as data sets hold them: VQAv2's answers and COCO's captions come as objects with a text inside."""

import ast
import math

TEXT_KEYS = ("answer", "raw", "caption", "text")


def bare_texts(value: object) -> object:
    """`value` with the text in place of each object: [{answer: "red", answer_id: 1}] is ["red"], and so are {answer: ["red"]}
    and the text "['red']".

    An object without any of TEXT_KEYS raises ValueError; all else stays as it is.
    """
    if isinstance(value, list):
        return [bare_texts(one) for one in value]
    if isinstance(value, str) and value[:2] in ("['", '["') and value.endswith("]"):  # A-OKVQA's list, written as text
        try:
            written = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
        return written if all(isinstance(one, str) for one in written) else value
    if not isinstance(value, dict):
        return value
    for key in TEXT_KEYS:
        if key in value:
            return value[key]
    raise ValueError(f"the text is no text, but an object without {', '.join(TEXT_KEYS)}: {str(value)[:100]}")


def not_a_text(value: object) -> str:
    """Why `value` cannot be used, in words: its beginning, and its type."""
    return f"the text is no text: {str(value)[:100]}, of type {type(value).__name__}"


def plain_texts(value: object, numbers: bool = False) -> list[str]:
    """A text, a list of them or nothing, as a list of texts; with `numbers`, also 2 or 3.5, as an answer that counts.

    Raises ValueError for all else: str() of it would be compared with captions as if it were one.
    """
    value = bare_texts(value)
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        number = isinstance(text, (int, float)) and not isinstance(text, bool) and math.isfinite(text)
        if not (text is None or isinstance(text, str) or (numbers and number)):
            raise ValueError(not_a_text(text))
    return [str(text) for text in texts if text is not None]
