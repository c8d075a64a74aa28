"""The fields of finetune.py beside those of every training, and what each of its tasks sets them to."""

from dataclasses import dataclass

from modeling_blip2x.configuration_blip2x import OBJECTIVES

from .base import BIG, TINY, doc
from .training import RunArguments

TASKS = {  # task: its prompt, whether crops and flips are harmless, whether captions are cleaned, its longest text in tokens
    "caption": ("a photo of", True, True, 32),
    "vqa": ("Question: {} Answer:", False, False, 64),  # a flip turns left into right, a crop changes counts
    "instruct": ("{}", False, False, 256),  # answers of several sentences
    "retrieval": ("", True, True, 32),
}


@dataclass
class FinetuneArguments(RunArguments):
    """Fine-tuning of a stage-2 model on caption, vqa or instruct, or of a stage-1 model on retrieval."""

    task: str | None = doc(None, f"One of {', '.join(TASKS)}. Required.")
    init_from: str | None = doc(None, "Checkpoint folder or id to tune: stage 2, or stage 1 for retrieval. Required.")
    language_model: str | None = doc(None, "Id or folder of the frozen LLM, where init_from is a stage-1 folder.")
    end_token: str | None = doc(
        None,
        "Token that ends a text, where the language model's tokenizer names none: null takes its eos or sep token.",
    )
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
    max_text_length: int | None = doc(
        None,
        "Longest prompt and text in tokens; null is what suits the task: 32, 64 for vqa, 256 for instruct. Texts that are "
        "cut are not taught to end.",
    )
    num_train_epochs: float = doc(5.0, "Passes over the images, used when max_steps is null.")
    learning_rate: float = doc(1e-5, "Peak learning rate.")
    min_learning_rate: float = doc(0.0, "Learning rate at the end of the cosine.")
    warmup_steps: int = doc(1000, "Steps of linear warm-up from 1e-6.")
    adam_beta2: float = doc(0.999, "AdamW beta 2.")
    objectives: list[str] = doc(list(OBJECTIVES), "Retrieval: losses that are computed and trained.")
    hard_negative_steps: int = doc(0, "Retrieval: as in stage 1.")
    itc_chunk_size: int | None = doc(None, "Retrieval with a frozen tower: as in stage 1.")
    rerank_k: int = doc(16, "Retrieval: candidates that ITM re-ranks in the validation at the end; 0 for none.")

    def __post_init__(self):
        if self.task in TASKS:
            prompt, augment, clean, longest = TASKS[self.task]
            self.max_text_length = longest if self.max_text_length is None else self.max_text_length
            self.prompt = prompt if self.prompt is None else self.prompt
            self.augment = (augment and not self.feature_cache) if self.augment is None else self.augment
            self.clean_captions = clean if self.clean_captions is None else self.clean_captions

    REQUIRED = (*RunArguments.REQUIRED, "task", "init_from")
    PATHS = (*RunArguments.PATHS, "init_from", "language_model")
    CHOICES = {**RunArguments.CHOICES, "task": tuple(TASKS), "objectives": OBJECTIVES}
    RANGES = {
        **RunArguments.RANGES,
        "layer_decay": (TINY, 1),
        "hard_negative_steps": (0, BIG),
        "itc_chunk_size": (1, BIG),
        "rerank_k": (0, BIG),
    }

    def problems(self) -> list[str]:
        found = super().problems()
        if self.task in ("vqa", "instruct") and "{}" not in self.prompt:
            found.append(f"--prompt is {self.prompt!r}, but needs {{}} where the question goes.")
        if self.end_token and not self.language_model:
            found.append(
                "--end_token has no effect without --language_model: a stage-2 folder has its own. Leave it out."
            )
        if self.train_vision and self.feature_cache:
            found.append("--train_vision is true, but --feature_cache skips the tower. Drop one.")
        if self.layer_decay != 1.0 and not self.train_vision:
            found.append(f"--layer_decay is {self.layer_decay}, but the tower is frozen. Pass --train_vision true.")
        return found
