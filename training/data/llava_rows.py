"""LLaVA's lists: [{id, image, conversations: [{from: human, value: "<image>\\nquestion"}, {from: gpt, value: answer}, ...]}]."""

import warnings

from .rows import Rows


def llava_rows(content: list[dict], name: str) -> Rows:
    """A row an image, with lists of its `questions` and `answers`, one each for a human turn and the gpt turn after it.

    Rows without image are text alone: they are left out, and a warning counts them. Raises ValueError where no row has one.
    """
    shown = [row for row in content if row.get("image")]
    if not shown:
        raise ValueError(
            "no row of its conversations has an `image`. They are text alone, which has nothing to train on here"
        )
    if len(shown) < len(content):
        warnings.warn(
            f"{len(content) - len(shown)} of {len(content)} conversations of {name} are left out: they have no image.",
            stacklevel=2,
        )
    return Rows.from_dicts([{"image": row["image"], **read_turns(row)} for row in shown])


def read_turns(row: dict) -> dict[str, list[str]]:
    """Questions and answers of a row. Unequal in number where a turn is missing, so that the row is left out later."""
    turns = row.get("conversations") or []
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        return {"questions": [], "answers": []}
    turns = turns[1:] if turns and turns[0].get("from") == "system" else turns
    questions = [turn["value"].replace("<image>", "").strip() for turn in turns[::2]]
    answers = [turn["value"].strip() for turn in turns[1::2]]
    in_turn = all(turn.get("from") == ("gpt" if number % 2 else "human") for number, turn in enumerate(turns))
    return {"questions": questions, "answers": answers if in_turn else []}
