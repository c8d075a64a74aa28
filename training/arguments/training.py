"""The fields of the training scripts, with their defaults and help; parsing.py reads them.

    python training/pretrain_stage1.py --config training/configs/flickr8k_stage1.yaml --dataset DIR --vision_model DIR

Names follow `transformers.TrainingArguments` where it has one.
"""

from dataclasses import dataclass
from pathlib import Path

from .base import doc, looks_like_path


@dataclass
class PretrainingArguments:
    """What both stages need."""

    output_dir: str | None = doc(None, "Folder of the run. Its root becomes a complete checkpoint. Required.")
    dataset: list[str] = doc(
        [],
        "Hub id, folder (imagefolder with metadata.jsonl, parquet, webdataset tars), tars by a pattern, or JSON (COCO "
        "captions, Karpathy, QUESTIONS,ANNOTATIONS of VQAv2, LAVIS and plain lists). One or more of them. Required.",
    )
    dataset_weights: list[float] | None = doc(
        None, "How often each data set is visited, such as 3 1; null: as often as it is large."
    )
    train_split: str = doc("train", "Split to train on; slices such as 'train[:1000]' work.")
    eval_split: str | None = doc(None, "Split to validate on every eval_steps and at the end; null for none.")
    image_folder: str | None = doc(None, "Where relative paths of images in JSON files start; null: at the JSON file.")
    image_column: str = doc("image", "Column with the image: an image, or a path.")
    text_column: str | None = doc(
        None,
        "Column with the text, or with a list of them, of which each visit draws one; null takes the first of text, "
        "caption, captions, text_output, answer, answers.",
    )
    max_skip_fraction: float = doc(
        0.01, "Bad rows are skipped and listed in skipped.jsonl; a larger share stops the run."
    )
    clean_captions: bool = doc(True, 'Lower-case and strip . ! " ( ) * # : ; ~ as published; at most 50 words.')
    max_text_length: int = doc(32, "Longest text in tokens; longer ones are cut.")
    augment: bool = doc(True, "RandomResizedCrop(0.5, 1, bicubic) and horizontal flip of training images.")
    image_size: int | None = doc(None, "Side of the square image in pixels; null takes the image processor's own.")
    feature_cache: str | None = doc(
        None, "Folder written by cache_features.py: skips the frozen tower; needs augment false."
    )

    vision_model: str | None = doc(None, "Id or folder of the frozen vision tower. Required unless init_from is given.")
    vision_feature_layer: int = doc(-1, "Hidden layer of the tower to use; -2 for CLIP ViT-L.")
    num_query_tokens: int = doc(32, "Number of learned queries.")
    qformer_init: str | None = doc(
        None, "Id or folder of a BERT checkpoint that initialises the Q-Former; null for random."
    )
    qformer_config: dict | str | None = doc(
        None, "Q-Former config fields (a mapping; JSON on the command line) for random init."
    )
    qformer_tokenizer: str | None = doc(
        None, "Id or folder of the Q-Former's tokenizer; null takes qformer_init's or builds one."
    )

    lora: str | None = doc(
        None,
        "Trains a LoRA adapter on the linear layers of a part: lm, qformer, vision, or a regular expression over module "
        "names; null for none.",
    )
    merge_lora: bool = doc(False, "Also write merged/, the model with the adapter added to its weights.")

    max_steps: int | None = doc(None, "Optimiser steps; null derives them from num_train_epochs.")
    num_train_epochs: float = doc(10.0, "Passes over the images, used when max_steps is null.")
    per_device_train_batch_size: int = doc(32, "Pairs a process sees in one forward.")
    per_device_eval_batch_size: int | None = doc(
        None, "Pairs a process validates in one forward; null: as in training."
    )
    gradient_accumulation_steps: int = doc(1, "Forwards for one optimiser step. Adds no negatives to ITC and ITM.")
    learning_rate: float = doc(1e-4, "Peak learning rate.")
    min_learning_rate: float = doc(1e-5, "Learning rate at the end of the cosine.")
    warmup_steps: int = doc(2000, "Steps of linear warm-up from 1e-6.")
    weight_decay: float = doc(0.05, "AdamW weight decay; never on biases, norms and other 1-d parameters.")
    adam_beta1: float = doc(0.9, "AdamW beta 1.")
    adam_beta2: float = doc(0.98, "AdamW beta 2.")
    max_grad_norm: float = doc(1.0, "Gradients are clipped to this norm; 0 for no clipping.")
    ema_decay: float | None = doc(
        None, "Decay of an average of the trained weights over steps, which is validated and saved; null for none."
    )
    bf16: bool = doc(False, "bfloat16 autocast; trainable parts and losses stay in float32.")
    fp16: bool = doc(False, "float16 autocast with a loss scaler.")
    gradient_checkpointing: bool = doc(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = doc(False, "Compile the model with torch.compile.")
    seed: int = doc(42, "Fixes initialisation, order of data, drawn captions, crops, dropout and negatives.")
    dataloader_num_workers: int = doc(0, "Processes that load data; 0 loads in the main one.")

    logging_steps: int = doc(10, "Steps averaged into one line of metrics.jsonl.")
    eval_steps: int | None = doc(None, "Steps between validations; null validates at the end only.")
    eval_samples: int = doc(
        200, "Validation images that are captioned, or asked, and scored: CIDEr and BLEU-4, or accuracy; 0 for none."
    )
    save_steps: int = doc(1000, "Steps between checkpoints to resume from.")
    save_total_limit: int | None = doc(2, "Newest checkpoints kept, and the best one; null keeps all.")
    metric_for_best_model: str = doc("eval_loss", "Figure of the validation that tells the best checkpoint.")
    greater_is_better: bool | None = doc(None, "Whether more of it is better; null: unless its name holds loss.")
    load_best_model_at_end: bool = doc(False, "The root gets the weights of the best checkpoint, not the last step's.")
    overwrite_output_dir: bool = doc(False, "Start over instead of continuing from output_dir.")
    report_to: str | None = doc(
        None,
        "Tracker beside metrics.jsonl and curves.png: tensorboard, wandb or another of accelerate's log_with, or none; "
        "null: tensorboard where it is installed.",
    )

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size or self.per_device_train_batch_size

    @property
    def best_is_greatest(self) -> bool:
        return "loss" not in self.metric_for_best_model if self.greater_is_better is None else self.greater_is_better

    def required(self) -> list[str]:
        return ["output_dir", "dataset"]

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each: flag, value, fix."""
        found = [
            f"--{name} is missing. Pass --{name} VALUE or set it in the YAML file."
            for name in self.required()
            if not getattr(self, name)
        ]
        for dataset in self.dataset:
            pattern = any(character in dataset for character in "*?{") or ".json," in dataset
            if looks_like_path(dataset) and not pattern and not Path(dataset).exists():
                found.append(
                    f"--dataset is {dataset}: there is no such file or folder. Check the path, or give a hub id."
                )
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset):
            found.append(
                f"--dataset_weights has {len(self.dataset_weights)} weights for {len(self.dataset)} data sets. Give one each."
            )
        if any(weight <= 0 for weight in self.dataset_weights or ()):
            found.append(f"--dataset_weights is {self.dataset_weights}, but all must be above 0. Leave a data set out.")
        if self.feature_cache and len(self.dataset) > 1:
            found.append("--feature_cache is of one data set, but --dataset names several. Drop one.")
        for name in (
            "image_folder",
            "vision_model",
            "qformer_init",
            "qformer_tokenizer",
            "init_from",
            "language_model",
        ):
            value = getattr(self, name, None)
            if value and looks_like_path(value) and not Path(value).exists():
                found.append(f"--{name} is {value}: there is no such folder. Check the path, or give a hub id.")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not low <= value <= high:
                found.append(f"--{name} is {value}, but must lie between {low:g} and {high:g}.")
        if self.bf16 and self.fp16:
            found.append("--bf16 and --fp16 are both true. Choose one.")
        if self.feature_cache and self.augment:
            found.append(
                "--augment is true, but --feature_cache holds features of images already encoded. Pass --augment false, and "
                "for augmented views write the cache with cache_features.py --views."
            )
        if self.merge_lora and not self.lora:
            found.append("--merge_lora is true, but there is no --lora. Name a part, or leave it out.")
        if self.merge_lora and getattr(self, "load_in_4bit", False):
            found.append(
                "--merge_lora and --load_in_4bit are both true. Merging into 4 bits loses the adapter: drop one."
            )
        if self.min_learning_rate > self.learning_rate:
            found.append(
                f"--min_learning_rate is {self.min_learning_rate}, above --learning_rate {self.learning_rate}. Lower "
                "it."
            )
        if self.load_best_model_at_end and not self.eval_split:
            found.append(
                "--load_best_model_at_end is true, but there is no --eval_split to tell the best by. Name one."
            )
        if self.eval_steps and not self.eval_split:
            found.append(f"--eval_steps is {self.eval_steps}, but there is no --eval_split to validate on. Name one.")
        return found


@dataclass
class Stage1Arguments(PretrainingArguments):
    """Stage 1: representation learning with the frozen vision tower."""

    init_from: str | None = doc(None, "Stage-1 folder to continue from with fresh optimiser and schedule.")
    image_text_hidden_size: int = doc(256, "Width of the space in which ITC compares images and texts.")
    objectives: list[str] = doc(["itc", "itm", "itg"], "Losses that are computed and trained.")
    hard_negative_steps: int = doc(
        0,
        "Steps over which ITM's negatives go from evenly drawn to the paper's hard ones. 0: hard from the start, as in "
        "the paper, which leaves ITM of a short run at the constant predictor (loss 0.6365).",
    )
    itc_chunk_size: int | None = doc(
        None,
        "Pairs whose activations are held at a time: the gradient stays that of the whole batch, for a tenth to a third "
        "more time. null: all of per_device_train_batch_size.",
    )
    min_word_count: int = doc(
        5, "Word count in the training captions above which a built vocabulary keeps a word whole."
    )
    rerank_k: int = doc(16, "Candidates that ITM re-ranks in the validation at the end; 0 for no re-ranking.")

    def required(self) -> list[str]:
        return super().required() + ([] if self.init_from else ["vision_model"])

    def problems(self) -> list[str]:
        found = super().problems() + unknown_objectives(self.objectives)
        if self.itc_chunk_size and self.torch_compile:
            found.append(
                "--torch_compile is true, but with --itc_chunk_size the compiled forward is never called. Drop one."
            )
        if self.qformer_init and self.qformer_config:
            found.append(
                "--qformer_init and --qformer_config are both given. A BERT checkpoint brings its own shape: drop one."
            )
        return found


@dataclass
class Stage2Arguments(PretrainingArguments):
    """Stage 2: generative learning with the frozen vision tower and the frozen LLM."""

    init_from: str | None = doc(None, "Stage-1 folder whose vision tower, Q-Former and queries are taken over.")
    language_model: str | None = doc(None, "Id or folder of the frozen LLM, decoder-only or encoder-decoder. Required.")
    load_in_4bit: bool = doc(False, "The language model in 4 bits; with --lora lm this is QLoRA. Needs bitsandbytes.")
    prompt: str = doc("", "Text before each supervised text; it is not supervised itself.")
    prompt_column: str | None = doc(
        None, "Column with a prompt for the texts, or with one for each; null finds it where `prompt` has a {} for it."
    )
    qformer_text_input: bool = doc(
        False, "The Q-Former reads the prompt too; needs init_from, whose text branch it keeps."
    )
    min_learning_rate: float = doc(5e-5, "Learning rate at the end of the cosine.")

    def required(self) -> list[str]:
        return super().required() + ["language_model"] + ([] if self.init_from else ["vision_model"])

    def problems(self) -> list[str]:
        found = super().problems()
        if self.qformer_text_input and not self.init_from:
            found.append("--qformer_text_input is true, but there is no --init_from whose Q-Former can read. Give one.")
        if self.prompt_column and self.prompt and "{}" not in self.prompt:
            found.append(f"--prompt is {self.prompt!r}, but needs {{}} where the text of --prompt_column goes.")
        return found


TASKS = {  # task: its prompt, whether crops and flips are harmless, whether captions are cleaned
    "caption": ("a photo of", True, True),
    "vqa": ("Question: {} Answer:", False, False),  # a flip turns left into right, a crop changes counts
    "instruct": ("{}", False, False),
    "retrieval": ("", True, True),
}


@dataclass
class FinetuneArguments(PretrainingArguments):
    """Fine-tuning of a stage-2 model on caption, vqa or instruct, or of a stage-1 model on retrieval."""

    task: str | None = doc(None, f"One of {', '.join(TASKS)}. Required.")
    init_from: str | None = doc(None, "Checkpoint folder or id to tune: stage 2, or stage 1 for retrieval. Required.")
    language_model: str | None = doc(None, "Id or folder of the frozen LLM, where init_from is a stage-1 folder.")
    load_in_4bit: bool = doc(False, "The language model in 4 bits; with --lora lm this is QLoRA. Needs bitsandbytes.")
    prompt: str | None = doc(
        None,
        "Text before the supervised one; {} stands for the question. null takes the task's; kept in the checkpoint.",
    )
    prompt_column: str | None = doc(None, "Column with the question or instruction; null finds it.")
    qformer_text_input: bool = doc(False, "The Q-Former reads the prompt too.")
    train_vision: bool = doc(False, "Train the vision tower too, as the paper does in fine-tuning.")
    layer_decay: float = doc(1.0, "Each layer of the tower trains at this share of the learning rate of the one above.")
    augment: bool | None = doc(
        None, "Random crops and flips; null is what suits the task, that is not vqa and instruct."
    )
    clean_captions: bool | None = doc(None, "As in pre-training; null is what suits the task.")
    num_train_epochs: float = doc(5.0, "Passes over the images, used when max_steps is null.")
    learning_rate: float = doc(1e-5, "Peak learning rate.")
    min_learning_rate: float = doc(0.0, "Learning rate at the end of the cosine.")
    warmup_steps: int = doc(1000, "Steps of linear warm-up from 1e-6.")
    adam_beta2: float = doc(0.999, "AdamW beta 2.")
    objectives: list[str] = doc(["itc", "itm", "itg"], "Retrieval: losses that are computed and trained.")
    hard_negative_steps: int = doc(0, "Retrieval: as in stage 1.")
    itc_chunk_size: int | None = doc(None, "Retrieval with a frozen tower: as in stage 1.")
    rerank_k: int = doc(16, "Retrieval: candidates that ITM re-ranks in the validation at the end; 0 for none.")

    def __post_init__(self):
        if self.task in TASKS:
            prompt, augment, clean = TASKS[self.task]
            self.prompt = prompt if self.prompt is None else self.prompt
            self.augment = (augment and not self.feature_cache) if self.augment is None else self.augment
            self.clean_captions = clean if self.clean_captions is None else self.clean_captions

    def required(self) -> list[str]:
        return super().required() + ["task", "init_from"]

    def problems(self) -> list[str]:
        found = super().problems()
        if self.task and self.task not in TASKS:
            found.append(f"--task is {self.task!r}; choose from {', '.join(TASKS)}.")
        if self.task in ("vqa", "instruct") and "{}" not in self.prompt:
            found.append(f"--prompt is {self.prompt!r}, but needs {{}} where the question goes.")
        if self.train_vision and self.feature_cache:
            found.append("--train_vision is true, but --feature_cache skips the tower. Drop one.")
        if self.layer_decay != 1.0 and not self.train_vision:
            found.append(f"--layer_decay is {self.layer_decay}, but the tower is frozen. Pass --train_vision true.")
        return found + unknown_objectives(self.objectives)


def unknown_objectives(objectives: list[str]) -> list[str]:
    known = ["itc", "itm", "itg"]
    return [f"--objectives holds {n!r}; choose from {', '.join(known)}." for n in objectives if n not in known]


BIG = float("inf")
TINY = 1e-12
RANGES = {  # field: smallest and largest value
    "max_skip_fraction": (0, 1),
    "max_text_length": (2, BIG),
    "image_size": (1, BIG),
    "num_query_tokens": (1, BIG),
    "max_steps": (1, BIG),
    "num_train_epochs": (TINY, BIG),
    "per_device_train_batch_size": (1, BIG),
    "per_device_eval_batch_size": (1, BIG),
    "gradient_accumulation_steps": (1, BIG),
    "learning_rate": (TINY, 10),
    "min_learning_rate": (0, 10),
    "warmup_steps": (0, BIG),
    "weight_decay": (0, 1),
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "max_grad_norm": (0, BIG),
    "seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, 1024),
    "logging_steps": (1, BIG),
    "eval_steps": (1, BIG),
    "eval_samples": (0, BIG),
    "save_steps": (1, BIG),
    "save_total_limit": (1, BIG),
    "image_text_hidden_size": (1, BIG),
    "hard_negative_steps": (0, BIG),
    "itc_chunk_size": (1, BIG),
    "min_word_count": (1, BIG),
    "rerank_k": (0, BIG),
    "layer_decay": (TINY, 1),
    "ema_decay": (0, 0.999999),
}
