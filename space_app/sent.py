"""What a client sends, checked before Gradio reads it.

Gradio opens, copies and builds by what the values of a request say: a file anywhere in them is moved, a message of a chat
may name a component to make. And it remembers them for the visitor's session. So nothing reaches it but short texts,
small numbers, and files of the upload folder where a picture belongs.
"""

import gradio as gr
from mistakes import UNREADABLE, Mistake
from settings import MAX_TEXT, MAX_TEXTS, is_unicode
from uploads import check_upload

LONGEST = (MAX_TEXT + 1) * MAX_TEXTS  # characters of one text: the box that takes one on each line
LARGEST = 2**53  # of a number: beyond, JavaScript's are not exact
DEEPEST = 20  # lists in lists
ROLES = ("user", "assistant")
ONLY_TEXTS = "The messages of a chat are texts; files and components are not taken. Send a picture as the picture."


def checked(blocks: list, sent: list) -> list:
    """The values of a request for the components `blocks`, those of a chat reduced to their texts.

    Raises:
        Mistake: a file that was not uploaded, or stands where no picture belongs; an address; a chat of anything but
            texts; a text that is too long or no Unicode; a number that is too large.
    """
    values = []
    for block, value in zip(blocks, sent, strict=True):
        _check(value, pictures=isinstance(block, (gr.Image, gr.Gallery)))
        values.append(chat_of_texts(value) if isinstance(block, gr.Chatbot) else value)
    return values


def _check(value: object, pictures: bool, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise Mistake(UNREADABLE)
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, (int, float)) and abs(value) > LARGEST:
        raise Mistake("A number of the request has too many digits. Send one that its slider can show.")
    elif isinstance(value, dict):
        _check_file(value, pictures)
        for name, part in value.items():
            _check_text(name)
            _check(part, pictures, depth + 1)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check(part, pictures, depth + 1)


def _check_text(text: str) -> None:
    if len(text) > LONGEST:
        raise Mistake(f"A text of the request has {len(text)} characters; at most {LONGEST} are taken. Shorten it.")
    if not is_unicode(text):
        raise Mistake("A text of the request has half a character (a lone surrogate). Write it anew.")


def _check_file(value: dict, pictures: bool) -> None:
    """Raises Mistake where the dict means a file, unless it was uploaded and a picture belongs there."""
    if value.get("path") is None and "url" not in value:
        return
    if "://" in str(value.get("path")):
        raise Mistake("Addresses are not fetched. Send the picture itself.")
    if not pictures:
        raise Mistake(UNREADABLE)
    check_upload(value)


def chat_of_texts(messages: object) -> list[dict]:
    """The messages of a chat as [{"role": user or assistant, "content": [{"type": "text", "text": ...}, ...]}, ...].

    Raises:
        Mistake: what is no such list, or a part that is no text: Gradio would make the component that it names.
    """
    if not isinstance(messages, list):
        raise Mistake(UNREADABLE)
    return [{"role": _role(message), "content": _texts(message.get("content"))} for message in messages]


def _role(message: object) -> str:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Mistake("A chat has messages of a user and of an assistant, and no others.")
    return message["role"]


def _texts(content: object) -> list[dict]:
    parts = content if isinstance(content, list) else [content]
    return [{"type": "text", "text": part if isinstance(part, str) else _text(part)} for part in parts]


def _text(part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise Mistake(ONLY_TEXTS)
    return part["text"]
