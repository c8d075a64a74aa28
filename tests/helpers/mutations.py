"""Inputs broken at random, from a seed, and what may come of them: nothing worse than a sentence."""

import json
import random
from collections.abc import Callable

JUNK = [None, True, -1, 0, 1.5, 1e300, 10**400, "", "x", "\x1b[2J", "\ud800", "{0}", [], [1], {}, {"a": 1}]


def broken_bytes(content: bytes, random_: random.Random) -> bytes:
    """The content with bits flipped, an end cut off, bytes put in, or a stretch of zeros."""
    content = bytearray(content)
    place = random_.randrange(len(content))
    kind = random_.choice(["flip", "cut", "insert", "zero", "beginning"])
    if kind == "flip":
        for _ in range(random_.choice([1, 5, 50])):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = random_.randbytes(random_.randrange(1, 20))
    elif kind == "zero":
        content[place : place + 500] = bytes(len(content[place : place + 500]))
    else:
        for _ in range(5):
            content[random_.randrange(min(500, len(content)))] = random_.randrange(256)
    return bytes(content)


def broken_json(content: dict | list, random_: random.Random) -> dict | list:
    """A copy of the content with a value or two replaced by junk, or taken out."""
    content = json.loads(json.dumps(content))
    for _ in range(random_.choice([1, 1, 2])):
        holder, key = random_.choice(list(places(content)))
        if random_.random() < 0.25:
            del holder[key]
        else:
            holder[key] = random_.choice(JUNK)
        if not content:
            break
    return content


def places(content: dict | list):
    """(holder, key) of every value at any depth."""
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from places(content[key])


def is_sentence(error: BaseException) -> bool:
    """Whether an error is one that commands print as a sentence, and does not come from deep inside as it is."""
    inner = isinstance(error, (UnicodeError, json.JSONDecodeError))
    return isinstance(error, (ValueError, OSError)) and not inner and " " in str(error)


def outcomes(count: int, seed: int, attempt: Callable[[random.Random], object]) -> tuple[int, list[str]]:
    """Run `attempt` so often; returns how often it failed with a sentence, and descriptions of what else it raised."""
    sentences, others = 0, []
    for number in range(count):
        try:
            attempt(random.Random(f"{seed}/{number}"))
        except Exception as error:
            if is_sentence(error):
                sentences += 1
            else:
                others.append(f"{seed}/{number}: {type(error).__name__}: {error}"[:300])
    return sentences, others
