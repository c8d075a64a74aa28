"""Settings of generation: their ranges, said once for the sliders and for the API, and what `generate` is given."""

from dataclasses import dataclass

from mistakes import Mistake

MAX_TEXT = 500  # characters of a prompt, question or text
MAX_TEXTS = 50  # lines
MAX_TURNS = 50  # of a history
LONGEST_SHOWN = 40  # characters of a value in a sentence that refuses it
MODES = ("beam", "nucleus")


@dataclass(frozen=True)
class Range:
    """A slider's limits, its step and its first value."""

    label: str
    low: float
    high: float
    step: float
    start: float
    info: str = ""


# The ranges of the official demo.
RANGES = {
    "num_beams": Range("Beams", 1, 10, 1, 5, "Beam search only; 1 is greedy, and streams words as they come."),
    "temperature": Range("Temperature", 0.5, 1, 0.1, 1, "Nucleus sampling only; lower is safer."),
    "top_p": Range("Top-p", 0.1, 1, 0.05, 0.9, "Nucleus sampling only; the share of likely words to draw from."),
    "min_length": Range("Shortest", 0, 50, 1, 1, "New tokens, at least."),
    "max_length": Range("Longest", 1, 100, 1, 30, "New tokens, at most."),
    "length_penalty": Range("Length penalty", -1, 2, 0.2, 1, "Beam search only; above 0 favours longer texts."),
    "repetition_penalty": Range("Repetition penalty", 1, 5, 0.5, 1, "Above 1 avoids words said before."),
    "seed": Range("Seed", 0, 2**31 - 1, 1, 0, "The same seed draws the same words."),
}
CAPTIONS = Range("Captions", 1, 5, 1, 1, "How many; draws that turn out the same are shown once.")


@dataclass(frozen=True)
class Settings:
    """Checked settings; names and meaning as in `RANGES`."""

    decoding: str = "beam"
    num_beams: int = 5
    temperature: float = 1.0
    top_p: float = 0.9
    min_length: int = 1
    max_length: int = 30
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    captions: int = 1

    def __post_init__(self):
        if self.decoding not in MODES:
            raise Mistake(f"Decoding is {shown(self.decoding)}; choose beam or nucleus.")
        for name, limits in {**RANGES, "captions": CAPTIONS}.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise Mistake(f"{limits.label} must be a number, not {shown(value)}.")
            if not limits.low <= value <= limits.high:
                raise Mistake(
                    f"{limits.label} is {shown(value)}; it must lie between {limits.low:g} and {limits.high:g}."
                )
            if isinstance(limits.step, int):
                if value != int(value):
                    raise Mistake(f"{limits.label} is {shown(value)}; it must be a whole number.")
                object.__setattr__(self, name, int(value))
        if self.min_length > self.max_length:
            raise Mistake(f"Shortest ({self.min_length}) is above longest ({self.max_length}).")

    @property
    def streams(self) -> bool:
        """transformers' streamers follow one sequence, so beams cannot be streamed."""
        return self.captions == 1 and (self.decoding == "nucleus" or self.num_beams == 1)

    def generation_arguments(self, max_length: int | None = None) -> dict:
        """Arguments of transformers' generate. max_length: less than asked for, where there is no room for more."""
        longest = self.max_length if max_length is None else min(max_length, self.max_length)
        arguments = {
            "max_new_tokens": longest,
            "min_new_tokens": min(self.min_length, longest),
            "repetition_penalty": float(self.repetition_penalty),
            "num_return_sequences": self.captions,
        }
        if self.decoding == "nucleus":
            sampling = {"do_sample": True, "num_beams": 1, "temperature": float(self.temperature)}
            return arguments | sampling | {"top_p": float(self.top_p), "top_k": 0}
        beams = max(self.num_beams, self.captions)  # several captions are the best of as many beams
        arguments |= {"do_sample": False, "num_beams": beams}
        return arguments | ({"length_penalty": float(self.length_penalty)} if beams > 1 else {})


def shown(value: object) -> str:
    """A value of a visitor's as a sentence may show it: in a few characters."""
    if isinstance(value, int) and abs(value) >= 10**LONGEST_SHOWN:
        return "a number of very many digits"
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def check_text(text: str | None, what: str, required: bool = True) -> str:
    """The text without outer spaces. Raises Mistake where it is missing, too long or not a text."""
    if text is not None and not isinstance(text, str):
        raise Mistake(f"{what} must be a text, not {type(text).__name__}.")
    text = " ".join((text or "").split())
    if not is_unicode(text):
        raise Mistake(f"{what} has half a character (a lone surrogate). Write it anew.")
    if required and not text:
        raise Mistake(f"{what} is empty. Write something first.")
    if len(text) > MAX_TEXT:
        raise Mistake(f"{what} has {len(text)} characters; at most {MAX_TEXT} are taken.")
    return text


def is_unicode(text: str) -> bool:
    """False where JSON's escapes have left half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_texts(texts: str | None) -> list[str]:
    """The lines of a text box that are not empty."""
    if not isinstance(texts, (str, type(None))):
        raise Mistake(f"The texts must be one text with a line for each, not {type(texts).__name__}.")
    lines = [line for line in (texts or "").splitlines() if line.strip()]
    if not lines:
        raise Mistake("There is no text. Write one on each line.")
    if len(lines) > MAX_TEXTS:
        raise Mistake(f"These are {len(lines)} texts; at most {MAX_TEXTS} are taken.")
    return [check_text(line, f"Text {number}") for number, line in enumerate(lines, 1)]


def check_whole(value: object, what: str, high: int) -> int:
    """The whole number from 0 to `high`. Raises Mistake for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value not in range(high + 1):
        raise Mistake(f"{what} is {shown(value)}; it must be a whole number from 0 to {high}.")
    return int(value)
