"""How many texts are cut, told at the start of a run: a text that loses its end is not taught to end."""

from accelerate import Accelerator

from .caption_dataset import CaptionDataset, JointDataset
from .collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator

SAMPLE = 1000  # rows that are looked at
TOLERATED = 0.01  # share of cut texts that needs no advice


def sampled_texts(dataset: CaptionDataset | JointDataset) -> list[tuple[str, str]]:
    """Prompt and text of at most `SAMPLE` rows, evenly spaced, each with one of its questions and texts."""
    count = min(SAMPLE, len(dataset))
    return [dataset.text_of(number * len(dataset) // count, number) for number in range(count)]


def tell_what_is_cut(
    accelerator: Accelerator,
    dataset: CaptionDataset | JointDataset,
    collator: Stage1Collator | CausalLMCollator | Seq2SeqLMCollator,
    max_text_length: int,
) -> None:
    """Print how many of the texts are cut, and the flag that helps where that is many.

    max_text_length: what was asked for; the collator's is less where the language model has not as many positions.
    """
    if not accelerator.is_main_process:
        return
    lengths = [collator.length(prompt, text) for prompt, text in sampled_texts(dataset)]
    cut = sum(length > collator.max_text_length for length in lengths)
    if not cut:
        return
    capped = collator.max_text_length < max_text_length
    limit = f"the {collator.max_text_length}" if capped else f"--max_text_length {collator.max_text_length}"
    reads = " that the language model reads" if capped else ""
    line = f"{cut} of {len(lengths)} texts looked at are longer than {limit} tokens{reads} and are cut there"
    line += "." if isinstance(collator, Stage1Collator) else ": they are not taught to end."
    if cut > TOLERATED * len(lengths):
        longer = "" if capped else f"pass --max_text_length {max(lengths)}, or "
        line += f" The longest has {max(lengths)}: {longer}shorten the texts."
    print(line)
