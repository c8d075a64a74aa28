"""The fields that every training has: its data, its schedule, and when it is logged, validated and saved.

pretraining.py adds those of the two stages, finetuning.py those of fine-tuning. Names follow
`transformers.TrainingArguments` where it has one.
"""

from dataclasses import dataclass
from pathlib import Path

from modeling_blip2x.lora_blip2x import check_expression

from .base import BIG, TINY, Arguments, doc, looks_like_path


@dataclass
class RunArguments(Arguments):
    """What every training needs: data, a schedule, and how often it is logged, validated and saved."""

    output_dir: str | None = doc(None, "Folder of the run. Its root becomes a complete checkpoint. Required.")
    dataset: list[str] = doc(
        [],
        "Hub id, folder (imagefolder with metadata.jsonl, parquet, webdataset tars), tars by a pattern, or JSON (COCO "
        "captions, Karpathy, QUESTIONS,ANNOTATIONS of VQAv2, LAVIS, LLaVA and plain lists), CSV, TSV. One or more. Required.",
    )
    dataset_config: list[str] | None = doc(
        None, "Configuration of each data set, `default` for one that has none; null where no data set has several."
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
    max_text_length: int = doc(32, "Longest text in tokens; longer ones are cut, and not taught to end.")
    augment: bool = doc(True, "RandomResizedCrop(0.5, 1, bicubic) and horizontal flip of training images.")
    position_dropout: float = doc(
        0.0,
        "Share of an image's positions that training leaves out, anew at each visit, for all queries alike; small data.",
    )
    feature_dropout: float = doc(0.0, "Share of an image's features that are zero in training, likewise.")
    image_size: int | None = doc(None, "Side of the square image in pixels; null takes the image processor's own.")
    shard_cache: str | None = doc(
        None, "Folder that remote shards are fetched to, ahead of their visits; null: beside the cache of the hub."
    )
    shard_cache_gb: float = doc(100.0, "Most that it takes, in GB (10^9 bytes).")
    feature_cache: str | None = doc(
        None, "Folder written by cache_features.py: skips the frozen tower; needs augment false."
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
    # Peak, warm-up, weight decay and betas are those of the paper's pre-training (section 3.4).
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
    bf16: bool | None = doc(
        None, "bfloat16 autocast; trainable parts and losses stay in float32. null: on a GPU that has bfloat16."
    )
    fp16: bool = doc(False, "float16 autocast with a loss scaler.")
    frozen_dtype: str | None = doc(
        None,
        "dtype in which tower and language model are held while nothing of them is trained: bfloat16, float16 or float32; "
        "null: bfloat16 under bf16, else that of their files. Of a 4-bit language model it is not changed.",
    )
    gradient_checkpointing: bool = doc(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = doc(False, "Compile the model with torch.compile.")
    seed: int = doc(42, "Fixes initialisation, order of data, drawn captions, crops, dropout and negatives.")
    dataloader_num_workers: int | None = doc(
        None,
        "Processes that load data, for each process that trains; 0 loads in that one. null: as many as there are cores for, "
        "at most 8, with a GPU and without a feature cache; else 0.",
    )
    dataloader_timeout: int = doc(
        600, "Seconds that these processes may take for a batch before the run ends, and says so; 0: any time."
    )

    process_timeout: int = doc(
        7200,
        "Seconds that a process waits for the others, such as for one that validates or saves, before the run ends.",
    )

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
    accept_changes: bool = doc(
        False, "Continue though data, frozen weights, tokenizer or prompt are not those that the run began with."
    )
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

    # What only some trainings have as a field, and every training reads.
    prompt_column = None
    layer_decay = 1.0
    pretrained_lr_scale = 1.0
    pretrained = None
    word_dropout = 0.0
    load_in_4bit = False

    REQUIRED = ("output_dir", "dataset")
    PATHS = ("image_folder",)
    CHOICES = {"frozen_dtype": ("bfloat16", "float16", "float32")}
    RANGES = {
        "max_skip_fraction": (0, 1),
        "shard_cache_gb": (0, BIG),
        "max_text_length": (2, BIG),
        "position_dropout": (0, 0.9),
        "feature_dropout": (0, 0.9),
        "image_size": (1, BIG),
        "max_steps": (1, BIG),
        "num_train_epochs": (TINY, BIG),
        "per_device_train_batch_size": (1, BIG),
        "per_device_eval_batch_size": (1, BIG),
        "gradient_accumulation_steps": (1, BIG),
        "learning_rate": (TINY, 10),
        "min_learning_rate": (0, 10),
        "warmup_steps": (0, BIG),
        "weight_decay": (0, 1),
        "adam_beta1": (0, 0.999999),  # at 1 an average would stay at its start for ever
        "adam_beta2": (0, 0.999999),
        "max_grad_norm": (0, BIG),
        "ema_decay": (0, 0.999999),
        "seed": (0, 2**32 - 1),  # what numpy takes
        "dataloader_num_workers": (0, 1024),
        "dataloader_timeout": (0, BIG),
        "process_timeout": (1, BIG),
        "logging_steps": (1, BIG),
        "eval_steps": (1, BIG),
        "eval_samples": (0, BIG),
        "save_steps": (1, BIG),
        "save_total_limit": (1, BIG),
    }

    def problems(self) -> list[str]:
        found = super().problems()
        if "" in self.dataset:  # an empty path would be the working directory
            found.append(
                "--dataset holds an empty name. Give a hub id, folder or file; is a variable of the shell unset?"
            )
        for dataset in self.dataset:
            pattern = any(character in dataset for character in "*?{") or ".json," in dataset or "://" in dataset
            if looks_like_path(dataset) and not pattern and not Path(dataset).exists():
                found.append(
                    f"--dataset is {dataset}: there is no such file or folder. Check the path, or give a hub id."
                )
        if self.dataset_config and len(self.dataset_config) != len(self.dataset):
            found.append(
                f"--dataset_config names {len(self.dataset_config)} configurations for {len(self.dataset)} data sets. Give one "
                "each, `default` where there is none."
            )
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset):
            found.append(
                f"--dataset_weights has {len(self.dataset_weights)} weights for {len(self.dataset)} data sets. Give one each."
            )
        if any(weight <= 0 for weight in self.dataset_weights or ()):
            found.append(f"--dataset_weights is {self.dataset_weights}, but all must be above 0. Leave a data set out.")
        if self.feature_cache and len(self.dataset) > 1:
            found.append("--feature_cache is of one data set, but --dataset names several. Drop one.")
        if self.bf16 and self.fp16:
            found.append("--bf16 and --fp16 are both true. Choose one.")
        if self.feature_cache and self.augment:
            found.append(
                "--augment is true, but --feature_cache holds features of images already encoded. Pass --augment false, and "
                "for augmented views write the cache with cache_features.py --views."
            )
        if self.lora:
            try:
                check_expression(self.lora)
            except ValueError as error:
                found.append(f"--lora {error}")
        if self.merge_lora and not self.lora:
            found.append("--merge_lora is true, but there is no --lora. Name a part, or leave it out.")
        if self.merge_lora and self.load_in_4bit:
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
