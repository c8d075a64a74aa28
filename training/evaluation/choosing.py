"""Closed sets of answers: each candidate is scored by the language model's likelihood, or by ITC for stage 1."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from modeling_blip2x.language_blip2x import IGNORE
from modeling_blip2x.outputs_blip2x import Blip2xImageFeatures
from modeling_blip2x.plain_words_blip2x import PlainWords

from ..data.collators import (
    CausalLMCollator,
    Seq2SeqLMCollator,
    collate_images,
    collate_prompts,
    filler_of,
    pad,
)
from ..data.rows import Rows
from ..data.transforms import clean_caption
from .evaluated_model import Checkpoint
from .samples import COLUMNS

PAIRS_AT_ONCE = 64  # (image, candidate), whose logits over the vocabulary are in memory together
Rank = Callable[[list[dict]], list[list[float]]]  # for each item a score for each candidate, the best is highest
WORDNET_ID = re.compile(r"n\d{8}")


def candidate_ranker(accelerator: Accelerator, checkpoint: Checkpoint, candidates: list[str]) -> Rank:
    """Scores by likelihood: the mean log-probability of a candidate's tokens and the end token after image and prompt.

    The mean makes long candidates comparable with short ones.
    """
    model, collator = checkpoint.model, checkpoint.language_collator()

    def rank(items: list[dict]) -> list[list[float]]:
        pixels = collate_images(items, collator.image_processor, collator.cropped)
        prompts = collate_prompts(items, collator.qformer_tokenizer, collator.max_text_length)
        inputs = {name: value.to(accelerator.device) for name, value in (pixels | prompts).items()}
        with accelerator.autocast():
            queries = model.get_image_features(**inputs).pooler_output  # (B, Q, width)
            encoded = [collator.answer(item["prompt"], text) for item in items for text in candidates]
            owners = torch.arange(len(items)).repeat_interleave(len(candidates))
            scores = [
                log_likelihoods(model, collator, queries[owners[part].to(queries.device)], [encoded[i] for i in part])
                for part in torch.arange(len(encoded)).split(PAIRS_AT_ONCE)
            ]
        return torch.cat(scores).view(len(items), len(candidates)).tolist()

    return rank


def log_likelihoods(
    model: torch.nn.Module,
    collator: CausalLMCollator | Seq2SeqLMCollator,
    queries: torch.Tensor,
    encoded: list[tuple[list[int], list[int]]],
) -> torch.Tensor:
    """Mean log-probability (B,) of each row's supervised tokens, given soft prompts (B, Q, width) and (ids, labels)."""
    ids, labels = zip(*encoded)
    labels = pad(list(labels), IGNORE).to(model.device)
    out = model(
        input_ids=pad(list(ids), filler_of(collator.tokenizer)).to(model.device),
        attention_mask=pad([[1] * len(row) for row in ids], 0).to(model.device),
        mm_encoder_outputs={"image": Blip2xImageFeatures(pooler_output=queries)},
        **({"decoder_input_ids": model.decoder_inputs_of(labels)} if model.config.is_encoder_decoder else {}),
    )
    logits = out.logits
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return (-losses.sum(1) / (labels != IGNORE).sum(1)).cpu()


@torch.no_grad()
def class_ranker(
    accelerator: Accelerator, checkpoint: Checkpoint, classes: list[str], templates: list[str], max_text_length: int
) -> Rank:
    """Cosines of ITC with each class, whose feature is the mean of those of its sentences, as CLIP has it."""
    model, words = checkpoint.model, PlainWords(checkpoint.processor.tokenizer)
    features = []
    for name in classes:
        sentences = [clean_caption(template.replace("{}", name)) for template in templates]
        encoded = words.batch(
            sentences, padding=True, truncation=True, max_length=max_text_length, return_tensors="pt"
        ).to(accelerator.device)
        of_class = model.get_text_features(encoded["input_ids"], encoded["attention_mask"]).pooler_output
        features.append(F.normalize(of_class.mean(0), dim=0))
    features = torch.stack(features)

    def rank(items: list[dict]) -> list[list[float]]:
        pixels = collate_images(items, checkpoint.processor.image_processor, False)["pixel_values"]
        images = model.get_image_features(pixels.to(accelerator.device)).pooler_output
        return model.itc_scores(images, features).float().tolist()

    return rank


def class_names(path: str | None, rows, column: str | None = None) -> list[str]:
    """Names of the classes in order: of a file, else as the data set calls those of the column, else its different labels.

    Raises ValueError for numbered classes without names.
    """
    if path is not None:
        return read_names(path)[0]
    column = label_column(rows, column)
    names = own_names(rows, column)
    if names:
        return names
    values = sorted({value for value in (rows[column][:] if column else [])} - {None}, key=str)
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError("The data set does not name its classes. Pass --classes FILE with a name for each.")
    return values


def label_column(rows, column: str | None) -> str | None:
    return column or next((name for name in COLUMNS["classification"] if name in rows.column_names), None)


def own_names(rows, column: str | None) -> list[str] | None:
    """What a data set calls its classes, in order: for class folders their names, sorted as text."""
    names = None if column is None or isinstance(rows, Rows) else getattr(rows.features[column], "names", None)
    return list(names) if names else None


def name_labels(
    labels: set[int | str], classes: list[str], by_id: dict[str, str], folders: list[str] | None
) -> dict[int | str, str]:
    """The class that each label stands for; a label without one is left out.

    A label is a class's name or id; where not all are, all are numbers of classes, or folders in the order of the classes.

    Args:
        labels: of the data, numbers or texts.
        by_id: names of ids, see `read_names`.
        folders: what the data set calls its classes, where it does.

    Raises ValueError where the labels can be read in two ways.
    """
    said = {label: by_id.get(str(label), str(label)) for label in labels if str(label) in {*classes, *by_id}}
    numbers = {label: classes[int(label)] for label in labels if is_number(label) and int(label) < len(classes)}
    if len(said) == len(labels):
        counted = any(isinstance(label, int) for label in labels) and len(numbers) == len(labels)
        if counted and not by_id and said != numbers:
            raise ValueError(
                "The labels are numbers, and --classes holds numbers in another order: 1 can be the class called 1 or the "
                'second class. Pass --classes as JSON that says which: {"0": "name of class 0", ...}.'
            )
        return said
    if folders is None or set(folders) == set(map(str, range(len(classes)))):
        return numbers if len(numbers) >= len(said) else said
    if len(folders) != len(classes):
        return said | numbers if "0" in folders else said
    if all(map(is_number, folders)) and folders != sorted(folders, key=int):
        raise ValueError(
            f"The class folders are called {folders[0]}, {folders[1]}, {folders[2]} ... in the order of texts, which is not "
            "that of the numbers, so that the order of the names in --classes can be either. Pass --classes as JSON that says "
            f'which: {{"{folders[0]}": "name", "{folders[1]}": "name", ...}}.'
        )
    return dict(zip(folders, classes))


def is_number(label: int | str) -> bool:
    return str(label).isdecimal()


def read_names(path: str) -> tuple[list[str], dict[str, str]]:
    """Names of a file, and those of ids: WordNet's such as n01440764, which ImageNet's folders are called, or JSON's keys.

    JSON: a list, or {"0": name} or {"0": [id, name]} as ImageNet's class index. Text: a name a line, or `id name, synonym`
    as ImageNet's LOC_synset_mapping.txt, whose first name counts.
    """
    file, by_id = Path(path), {}
    if file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict):
            keys = sorted(content, key=int) if all(map(is_number, content)) else list(content)
            content = {key: content[key] for key in keys}
            by_id = {key: plain_name(entry) for key, entry in content.items()}
        entries = content if isinstance(content, list) else list(content.values())
    else:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        pairs = [line.split(maxsplit=1) for line in lines]
        coded = all(len(pair) == 2 and WORDNET_ID.fullmatch(pair[0]) for pair in pairs)
        entries = [(pair[0], pair[1].split(",")[0]) for pair in pairs] if coded else lines
    by_id |= {entry[0]: plain_name(entry) for entry in entries if isinstance(entry, (list, tuple))}
    names = [plain_name(entry) for entry in entries]
    if len(names) < 2:
        raise ValueError(f"{path} holds {len(names)} names. Choosing takes two or more.")
    return names, by_id


def plain_name(entry: str | list | tuple) -> str:
    """The name of an entry, or of a pair of id and name."""
    return entry[1].replace("_", " ") if isinstance(entry, (list, tuple)) else str(entry)
