"""The fields of pretrain_stage1.py and pretrain_stage2.py, beside those of every training."""

import re
from dataclasses import dataclass, fields

from modeling_blip2x.configuration_blip2x import ITC_LOSSES, OBJECTIVES

from .base import BIG, TINY, doc
from .training import RunArguments

# Names of parameters that begin with trained weights: what text passes in BERT, and what stage 1 hands to stage 2.
FROM_BERT = re.compile(r"(^|\.)qformer\.(embeddings|layernorm|layers\.\d+\.(attention|text_feed_forward))\.")
FROM_STAGE1 = re.compile(r"(^|\.)(qformer|ln_vision|query_tokens)\.")


@dataclass
class NewModelArguments(RunArguments):
    """A run that builds its model, from a vision tower or from an earlier stage."""

    init_from: str | None = doc(None, "Stage-1 folder to go on from; it brings its tower, Q-Former and queries.")
    vision_model: str | None = doc(None, "Id or folder of the frozen vision tower. Required unless init_from is given.")
    vision_feature_layer: int = doc(-1, "Hidden layer of the tower to use; -2 for CLIP ViT-L.")
    num_query_tokens: int = doc(32, "Number of learned queries.")
    qformer_init: str | None = doc(
        None, "Id or folder of a BERT checkpoint that initialises the Q-Former; null for random."
    )
    qformer_config: dict | str | None = doc(
        None, "Q-Former config fields (a mapping; JSON on the command line) for random init."
    )

    pretrained_lr_scale: float = doc(
        1.0,
        "Learning rate of parts that begin with trained weights, as a share of learning_rate, that of the new ones: the text "
        "side from qformer_init in stage 1, Q-Former and queries from init_from in stage 2.",
    )

    PATHS = (*RunArguments.PATHS, "init_from", "vision_model", "qformer_init")
    RANGES = {**RunArguments.RANGES, "num_query_tokens": (1, BIG), "pretrained_lr_scale": (TINY, 1)}
    # Refused beside init_from: they would be read, have no effect, and stand in config.yaml as if they had.
    OF_NEW_MODELS = ("vision_model", "vision_feature_layer", "num_query_tokens", "qformer_init", "qformer_config")

    @property
    def pretrained(self) -> re.Pattern[str] | None:
        """Names of the parameters that `pretrained_lr_scale` is for."""
        return FROM_STAGE1 if self.init_from else FROM_BERT if self.qformer_init else None

    def required(self) -> list[str]:
        return super().required() + ([] if self.init_from else ["vision_model"])

    def problems(self) -> list[str]:
        found = super().problems()
        if self.init_from:
            defaults = {item.name: item.default for item in fields(self)}
            given = [name for name in self.OF_NEW_MODELS if getattr(self, name) != defaults[name]]
            found += [f"--{name} has no effect with --init_from, which brings its own. Leave it out." for name in given]
        if self.pretrained_lr_scale != 1.0 and self.pretrained is None:
            found.append(
                f"--pretrained_lr_scale is {self.pretrained_lr_scale}, but every trained part is new. Give --qformer_init or "
                "--init_from, or leave it out."
            )
        if self.qformer_init and self.qformer_config:
            found.append(
                "--qformer_init and --qformer_config are both given. A BERT checkpoint brings its own shape: drop one."
            )
        return found


@dataclass
class Stage1Arguments(NewModelArguments):
    """Stage 1: representation learning with the frozen vision tower."""

    init_from: str | None = doc(None, "Stage-1 folder to continue from with fresh optimiser and schedule.")
    qformer_tokenizer: str | None = doc(
        None, "Id or folder of the Q-Former's tokenizer; null takes qformer_init's or builds one."
    )
    image_text_hidden_size: int = doc(256, "Width of the space in which ITC compares images and texts.")
    objectives: list[str] = doc(list(OBJECTIVES), "Losses that are computed and trained.")
    itc_loss: str | None = doc(
        None,
        "softmax over the batch (the paper), or sigmoid for each pair (SigLIP); null: as init_from was trained, or softmax.",
    )
    query_spread: float | None = doc(
        None,
        "Weight of a term that keeps the queries of an image apart (1 is enough), for a Q-Former that starts from a sentence "
        "encoder, whose queries become one vector; use it without dropout. null: as init_from was trained, or 0, the paper.",
    )
    word_dropout: float = doc(
        0.0,
        "Share of a text's words that are read as [MASK] in training; ITG still predicts them. For small data, such as 0.15.",
    )
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

    PATHS = (*NewModelArguments.PATHS, "qformer_tokenizer")
    CHOICES = {**RunArguments.CHOICES, "objectives": OBJECTIVES, "itc_loss": ITC_LOSSES}
    RANGES = {
        **NewModelArguments.RANGES,
        "image_text_hidden_size": (1, BIG),
        "query_spread": (0, 1000),
        "word_dropout": (0, 0.9),
        "hard_negative_steps": (0, BIG),
        "itc_chunk_size": (1, BIG),
        "min_word_count": (1, BIG),
        "rerank_k": (0, BIG),
    }
    OF_NEW_MODELS = (
        *NewModelArguments.OF_NEW_MODELS,
        *("qformer_tokenizer", "image_text_hidden_size", "min_word_count", "pretrained_lr_scale"),
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.itc_chunk_size and self.torch_compile:
            found.append(
                "--torch_compile is true, but with --itc_chunk_size the compiled forward is never called. Drop one."
            )
        return found


@dataclass
class Stage2Arguments(NewModelArguments):
    """Stage 2: generative learning with the frozen vision tower and the frozen LLM."""

    init_from: str | None = doc(None, "Stage-1 folder whose vision tower, Q-Former and queries are taken over.")
    language_model: str | None = doc(None, "Id or folder of the frozen LLM, decoder-only or encoder-decoder. Required.")
    end_token: str | None = doc(
        None,
        "Token that ends a text, where the language model's tokenizer names none: null takes its eos or sep token.",
    )
    load_in_4bit: bool = doc(False, "The language model in 4 bits; with --lora lm this is QLoRA. Needs bitsandbytes.")
    prompt: str = doc("", "Text before each supervised text; it is not supervised itself.")
    prompt_column: str | None = doc(
        None, "Column with a prompt for the texts, or with one for each; null finds it where `prompt` has a {} for it."
    )
    qformer_text_input: bool = doc(
        False, "The Q-Former reads the prompt too; needs init_from, whose text branch it keeps."
    )
    min_learning_rate: float = doc(5e-5, "Learning rate at the end of the cosine.")

    REQUIRED = (*RunArguments.REQUIRED, "language_model")
    PATHS = (*NewModelArguments.PATHS, "language_model")

    def required(self) -> list[str]:
        return list(self.REQUIRED)  # problems() asks for init_from or vision_model in one sentence

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.init_from and not self.vision_model:
            found.append(
                "--init_from is missing. Pass the output folder of stage 1, or, to train stage 2 from scratch, "
                "--vision_model with the id or folder of a vision tower."
            )
        if self.qformer_text_input and not self.init_from:
            found.append("--qformer_text_input is true, but there is no --init_from whose Q-Former can read. Give one.")
        if self.prompt_column and self.prompt and "{}" not in self.prompt:
            found.append(f"--prompt is {self.prompt!r}, but needs {{}} where the text of --prompt_column goes.")
        return found
