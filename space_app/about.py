"""What the page says of the models: figures read from what is loaded, licence and limits from the model card."""

import os
from html import escape
from pathlib import Path

import psutil
import torch
from huggingface_hub import ModelCard
from models import Models, Part

GENERAL_LIMITS = (
    "These models describe pictures with what they have seen in training. They invent details, count badly, read text badly, "
    "and repeat the biases of their data and language model. Do not use them to judge people or to decide anything that "
    "matters."
)
LONGEST_LIMITS = 1500  # characters taken from a card


def card_of(part: Part) -> ModelCard | None:
    """The model card: README.md of a folder, or of a hub repository; None where there is none."""
    local = Path(part.source) / "README.md"
    try:
        if os.path.isdir(part.source):
            return ModelCard.load(local) if local.exists() else None
        return ModelCard.load(part.source)
    except Exception:  # no network, no such file, a header that is not YAML: a page without a card is still a page
        return None


def limits_of(card: ModelCard) -> str:
    """The text under the card's headings that speak of limits, bias or risks."""
    taken, taking = [], False
    for line in card.text.splitlines():
        if line.startswith("#"):
            taking = any(word in line.lower() for word in ("limit", "bias", "risk"))
        elif taking:
            taken.append(line)
    return "\n".join(taken).strip()[:LONGEST_LIMITS]


def size_of(count: float, units: tuple[str, ...] = ("", " K", " M", " B")) -> str:
    """1234567 -> 1.2 M."""
    for unit in units[:-1]:
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}{units[-1]}"


def memory(device: torch.device) -> str:
    """Memory in use now."""
    used = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB of the process"
    if device.type == "cuda":
        used += f", {torch.cuda.memory_allocated(device) / 1e9:.2f} GB on the GPU"
    return used


def rows_of(part: Part) -> list[tuple[str, str]]:
    """(name, value) of a loaded checkpoint."""
    model, config = part.model, part.model.config
    kind = "stage 2, with a language model" if part.has_language_model else "stage 1, without a language model"
    rows = [("Checkpoint", part.name), ("Kind", kind)]
    rows.append(("Parameters", size_of(model.num_parameters())))
    base = model.model
    tower = sum(p.numel() for p in base.vision_model.parameters())
    qformer = sum(p.numel() for p in base.parameters()) - tower
    rows.append(("Vision tower", f"{config.vision_config.model_type}, {size_of(tower)}"))
    rows.append(("Q-Former", f"{config.num_query_tokens} queries, {size_of(qformer)}"))
    if part.has_language_model:
        language = sum(p.numel() for p in model.language_model.parameters())
        rows.append(("Language model", f"{config.text_config.model_type}, {size_of(language)}"))
    precision = str(model.dtype).removeprefix("torch.")
    rows.append(
        ("Precision", precision if part.quantization == "none" else f"{part.quantization} weights, {precision}")
    )
    rows.append(("Device", str(model.device)))
    return rows


def about(models: Models) -> str:
    """The page: a table for each checkpoint, licence, card and limits."""
    html = ['<div class="about-parts">']
    for part in models.parts:
        html.append("<div>")
        card = card_of(part)
        licence = "not stated" if card is None else str(card.data.get("license") or "not stated")
        rows = [*rows_of(part), ("Licence", licence)]
        body = "".join(f'<tr><th scope="row">{escape(n)}</th><td>{escape(v)}</td></tr>' for n, v in rows)
        html.append(f'<table class="about">{body}</table>')
        if not os.path.isdir(part.source):
            link = escape(f"https://huggingface.co/{part.source}", quote=True)
            html.append(f'<p><a href="{link}" target="_blank" rel="noopener">Model card of {escape(part.name)}</a></p>')
        elif card is None:
            html.append("<p>This folder has no model card (README.md).</p>")
        if card is not None and limits_of(card):
            html.append(f"<h3>Limits, from its model card</h3><p>{escape(limits_of(card))}</p>")
        html.append("</div>")
    html.append(f"</div><h3>Limits of all such models</h3><p>{escape(GENERAL_LIMITS)}</p>")
    html.append(f"<p>Memory now: {escape(memory(models.captioner.model.device))}</p>")
    return "".join(html)
