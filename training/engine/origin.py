"""What a run is made from (data, prompt, frozen weights, preprocessing, tokenizers), kept in each checkpoint.

A run goes on with the same, or with a flag that says otherwise; what differs is told in words.
"""

import hashlib
import json

import torch
from accelerate import Accelerator

from modeling_blip2x import Blip2xProcessor

from ..arguments.training import RunArguments
from ..data.caption_dataset import CaptionDataset, JointDataset
from ..data.contents import changes_of_rows, describe_rows
from ..system.fingerprints import tensors_mark

PROBE = "A photo of 2 dogs, one cat."  # its ids tell how a tokenizer splits, begins and ends


def describe_data(train_set: CaptionDataset | JointDataset, eval_set: CaptionDataset | JointDataset | None) -> dict:
    """Of each data set of both splits, and the prompt."""
    splits = {"train": train_set} | ({"validation": eval_set} if eval_set is not None else {})
    described = {name: [describe_rows(part) for part in split.parts] for name, split in splits.items()}
    return described | {"prompt": train_set.parts[0].prompt}


def describe_model(model: torch.nn.Module, processor: Blip2xProcessor) -> dict:
    """Weights that do not train, what is done to images, and the tokenizers."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {"vision tower": [], "language model": [], "frozen Q-Former": []}
    for name, tensor in model.state_dict().items():
        part = next((part for part in parts if part.replace(" ", "_").replace("tower", "model") in name), None)
        if name not in trained and isinstance(tensor, torch.Tensor):
            parts[part or "frozen Q-Former"].append(tensor)
    described = {part: tensors_mark(tensors) for part, tensors in parts.items() if tensors}
    preprocessing = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
    described["image preprocessing"] = hashlib.sha256(preprocessing.encode()).hexdigest()[:16]
    described["tokenizer"] = describe_tokenizer(processor.tokenizer)
    if processor.qformer_tokenizer is not None:
        described["Q-Former's tokenizer"] = describe_tokenizer(processor.qformer_tokenizer)
    return described


def describe_tokenizer(tokenizer) -> dict:
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer(PROBE)["input_ids"]]
    mark = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
    return {"tokens": len(tokenizer), "mark": mark}


def changes(before: dict, now: dict) -> list[str]:
    """What is another than it was; what only one of the two describes is not compared."""
    found = []
    for name in ("train", "validation"):
        parts = (before.get(name), now.get(name))
        if None in parts:
            continue
        if len(parts[0]) != len(parts[1]):
            found.append(f"{name}: there were {len(parts[0])} data sets, now {len(parts[1])}")
            continue
        for number, (one, other) in enumerate(zip(*parts), 1):
            place = name if len(parts[0]) == 1 else f"{name}, data set {number}"
            found += [f"{place}: {change}" for change in changes_of_rows(one, other)]
    for name in ("prompt", "vision tower", "language model", "frozen Q-Former", "image preprocessing"):
        if name in before and name in now and before[name] != now[name]:
            found.append(f"prompt was {before[name]!r}, now {now[name]!r}" if name == "prompt" else f"another {name}")
    for name in ("tokenizer", "Q-Former's tokenizer"):
        if name in before and name in now and before[name] != now[name]:
            found.append(f"another {name} ({before[name]['tokens']} tokens then, {now[name]['tokens']} now)")
    return found


def same_times(before: dict, now: dict) -> bool:
    """Whether the files that were not read have the times that they had."""
    pairs = [pair for name in ("train", "validation") for pair in zip(before.get(name, []), now.get(name, []))]
    return all(one.get("times") == other.get("times") for one, other in pairs)


def check_origin(args: RunArguments, accelerator: Accelerator, state: dict, now: dict) -> None:
    """Raise ValueError where the run of `state` was made from something else, unless that is accepted; call it on all
    processes. Says what it accepts, and what it cannot compare."""
    if not state["step"]:
        return
    before = state.get("made_from")
    if before is None:
        accelerator.print(
            f"The checkpoint of step {state['step']} does not say what it was made from: an earlier version wrote it. Data, "
            "frozen weights and tokenizer are not compared."
        )
        return
    found = "; ".join(changes(before, now))
    if found and not args.accept_changes:
        raise ValueError(
            f"{args.output_dir} was begun with something else ({found}). Bring back what it was begun with, choose another "
            "--output_dir, pass --overwrite_output_dir to start over, or --accept_changes true to continue with what is there."
        )
    if found:
        accelerator.print(f"Continuing with something else, as --accept_changes says: {found}.")
    elif not same_times(before, now):
        accelerator.print(
            "Image files have other times than when the run began, as after a copy. All have the sizes that they had, and "
            "those that were read their content; it continues."
        )
