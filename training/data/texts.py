"""The texts of a value as data sets hold them: VQAv2's answers and COCO's captions come as objects with a text inside."""

import ast

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
