"""The model card: README.md of the checkpoint (what the hub shows) and the same as model_card.md, with these results.

Its headings are those of model_card.md at the top of the project, in that order. A checkpoint without a card gets one
whose sections tell of this checkpoint; of one that has a card, only the results of this evaluation are put in, in the
section Figures and in the metadata, in the place of an earlier evaluation of the same task, data and split.
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluated_model import Checkpoint
from ..fields import EvaluationArguments
from .figures import shown, title_of

NAMES = ("README.md", "model_card.md")
PIPELINES = {
    "caption": "image-to-text",
    "vqa": "visual-question-answering",
    "retrieval": "image-text-retrieval",
    "classification": "zero-shot-image-classification",
}
USE = {
    1: "Intended for research: scoring and retrieving images and texts, features of images, and as the start of a stage 2. Its "
    "captions are for looking at what stage 1 has learnt.",
    2: "Intended for research: captions of images and answers to questions about them.",
}
NOT_FOR = (
    "Not intended for decisions about people, for medical or legal use, or anywhere a wrong description does harm, without an "
    "evaluation on the images it will meet."
)
CLASSES = {1: "AutoModelForPreTraining", 2: "AutoModelForImageTextToText"}
LOADING = """
```python
import modeling_blip2x  # pip install blip2x; registers the classes
from transformers import {name}, AutoProcessor

model = {name}.from_pretrained("{source}")
processor = AutoProcessor.from_pretrained("{source}")
```"""
FAULTS = {
    1: "It may find likeness where there is none.",
    2: "It may describe things that are not there, and answers every question, also those that make no sense for the picture.",
}
LIMITS = (
    "{faults} It has the biases of what its parts were trained on, of the frozen {parts} as well as of the image-text pairs: it may guess "
    "gender, age, origin or occupation of people from how they look. Texts are in the language of its training data. The "
    "figures above hold for their data set and protocol alone."
)


def write_card(args: EvaluationArguments, summary: dict, checkpoint: Checkpoint) -> list[Path]:
    """Fill the card of the checkpoint's folder; of a checkpoint of the hub, the one in --output_dir."""
    folder = Path(args.model) if Path(args.model).is_dir() else Path(args.output_dir)
    path = folder / NAMES[0]
    card = ModelCard.load(path) if path.exists() else new_card(args, summary, checkpoint)
    if args.license:
        card.data.license = args.license
        card.text = put_section(card.text, "Licence", f"{args.license} (weights).")
    if args.training_data:
        card.text = put_section(card.text, "Training data", args.training_data)
    results = eval_results(args, summary)
    kept = [one for one in card.data.eval_results or [] if not any(one.is_equal_except_value(new) for new in results)]
    card.data.model_name = card.data.model_name or summary["name"]
    card.data.eval_results = kept + results
    card.text = put_figures(card.text, summary)
    for name in NAMES:
        card.save(folder / name)
    return [folder / name for name in NAMES]


def new_card(args: EvaluationArguments, summary: dict, checkpoint: Checkpoint) -> ModelCard:
    """A card for a checkpoint that has none: the template's headings with texts about this one."""
    parts = ["vision tower"] + (["language model"] if checkpoint.stage == 2 else [])
    texts = {
        "Parts": parts_table(checkpoint),
        "Training data": args.training_data or recorded_data(Path(args.model)),
        "Figures": "",
        "Use": f"{USE[checkpoint.stage]} {NOT_FOR}\n"
        + LOADING.format(name=CLASSES[checkpoint.stage], source=summary["name"]),
        "Limits and biases": LIMITS.format(faults=FAULTS[checkpoint.stage], parts=" and ".join(parts)),
        "Licence": f"{args.license} (weights)." if args.license else "Not stated.",
    }
    body = "\n\n".join(f"## {heading}\n\n{text}".strip() for heading, text in texts.items())
    intro = f"BLIP-2, stage {checkpoint.stage}, made with blip2x."
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if checkpoint.stage == 2 else "zero-shot-image-classification",
        license=args.license,
        tags=["blip-2", "q-former"],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {summary['name']}\n\n{intro}\n\n{body}\n")


def parts_table(checkpoint: Checkpoint) -> str:
    """The parts of the model with their kinds and sizes."""
    model, config = checkpoint.model, checkpoint.model.config
    shared = model.shared_model
    q = config.qformer_config
    shape = f"{q.num_hidden_layers} layers, {q.hidden_size} wide, {config.num_query_tokens} queries"
    rows = [("vision tower", config.vision_config.model_type, shared.vision_model), ("Q-Former", shape, shared.qformer)]
    if checkpoint.stage == 2:
        rows.append(("language model", config.text_config.model_type, model.language_model))
    lines = [f"| {name} | {what} | {count(part):,} |" for name, what, part in rows]
    return "\n".join(["| part | what | parameters |", "|---|---|---|", *lines])


def count(part) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def recorded_data(folder: Path) -> str:
    """What config.yaml of a training run says."""
    try:
        fields = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return "Not recorded. Pass --training_data."
    sets = fields["dataset"] if isinstance(fields["dataset"], list) else [fields["dataset"]]
    names = ", ".join(f"`{Path(name).name}`" for name in sets)
    starts = {
        "init_from": "the checkpoint",
        "vision_model": "the vision tower",
        "qformer_init": "the Q-Former's text side",
    }
    starts |= {"language_model": "the language model"}
    told = [f"{what} from `{Path(fields[key]).name}`" for key, what in starts.items() if fields.get(key)]
    started = f" It started with {', '.join(told)}; what those were trained on is part of it." if told else ""
    return f"{names}, split `{fields.get('train_split', 'train')}`.{started}"


def eval_results(args: EvaluationArguments, summary: dict) -> list[EvalResult]:
    """The figures for the metadata."""
    return [
        EvalResult(
            task_type=PIPELINES[args.task],
            dataset_type=Path(args.data.split(",")[0]).name,
            dataset_name=args.benchmark or Path(args.data.split(",")[0]).name,
            dataset_config=args.dataset_config,
            dataset_split=args.split,
            metric_type=name,
            metric_name=f"{name}, {args.score_mode}" if args.task == "retrieval" else None,
            metric_value=round(value, 2),
        )
        for name, value in summary["metrics"].items()
        if "/" not in name
    ]


def put_figures(text: str, summary: dict) -> str:
    """The figures of this evaluation as a part of the section Figures, in the place of an earlier one of its title."""
    title = title_of(summary)
    if "score_mode" in summary["protocol"]:  # of each mode a part of its own
        title += f", {summary['protocol']['score_mode']}"
    rows = [f"| {name} | {shown(value)} |" for name, value in summary["metrics"].items() if "/" not in name]
    protocol = ", ".join(
        f"{name} {value}"
        for name, value in summary["protocol"].items()
        if name not in ("data", "split", "model", "task") and (name, value) != ("benchmark", "none")
    )
    part = "\n".join([f"### {title}", "", "| metric | value |", "|---|---|", *rows, "", f"Protocol: {protocol}."])
    before = section(text, "Figures")
    parts = [one.strip() for one in re.split(r"^(?=### )", before, flags=re.MULTILINE)]
    kept = [one for one in parts if one and not one.startswith(f"### {title}\n")]
    return put_section(text, "Figures", "\n\n".join([*kept, part]))


def section(text: str, heading: str) -> str:
    """The text under a heading of the second level, empty where there is none."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def put_section(text: str, heading: str, body: str) -> str:
    """The card with this text under the heading, which is added at the end where there is none."""
    whole = f"## {heading}\n\n{body}\n\n"
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: whole, text, count=1).rstrip() + "\n"
    return f"{text.rstrip()}\n\n{whole}".rstrip() + "\n"
