"""The fields of run_evaluation.py and what they stand for on a task and a checkpoint.

    python training/run_evaluation.py --config training/configs/evaluation/vqav2.yaml --model DIR \
        --data questions.json,annotations.json --image_folder val2014 --output_dir OUT

The YAML files are the presets: protocols of the paper and of LAVIS.
"""

from dataclasses import dataclass

from ..arguments.base import Arguments, doc
from .published import PUBLISHED
from .retrieval import MODES

BEAMS = 5  # of every generation in the paper
CAPTION_PROMPT = "a photo of"
CLASS_PROMPT = "a photo of a"
QUESTION_PROMPT, SHORT_QUESTION_PROMPT = "Question: {} Answer:", "Question: {} Short answer:"  # OPT, FlanT5
# A penalty of -1 prefers short answers, as people give them (the paper, section 4.2).
GENERATION = {  # task: length penalty, fewest and most new tokens
    "caption": (1.0, 1, 30),
    "vqa": (-1.0, 1, 10),
}
TASKS = ("caption", "vqa", "retrieval", "classification")
VQA_METRICS = ("vqa_accuracy", "exact_match", "wups")
# Fields that do not decide what is predicted: a run goes on whatever they are. Of the paths, what lies there decides.
FREE = (
    "data", "image_folder", "classes", "candidates",
    "output_dir", "model", "scorer", "batch_size", "lemmatize", "metric", "benchmark", "model_card", "license", "training_data",
    "report", "java_metrics", "max_skip_fraction", "overwrite_output_dir", "wordnet",
)  # fmt: skip


@dataclass
class EvaluationArguments(Arguments):
    """Evaluation of a checkpoint on a task, with the paper's protocol unless told otherwise."""

    model: str | None = doc(
        None, "Folder or id of a checkpoint of stage 1 or 2, or of transformers' own BLIP-2 or InstructBLIP. Required."
    )
    task: str | None = doc(None, f"One of {', '.join(TASKS)}. Required.")
    data: str | None = doc(
        None,
        "As --dataset in training, and official files: NoCaps, VQAv2, OK-VQA (QUESTIONS,ANNOTATIONS or questions alone), "
        "GQA, DAQUAR's qa.*.txt, Flickr8k.token.txt. Required.",
    )
    dataset_config: str | None = doc(None, "Configuration of the data, where it has several.")
    split: str = doc("test", "Split; slices such as 'test[:100]' work; `all` of a file that has none.")
    output_dir: str | None = doc(None, "Folder of metrics.json, predictions.json, results and report. Required.")
    benchmark: str | None = doc(
        None, f"Whose published figures are shown beside, one of {', '.join(PUBLISHED)}; null for none."
    )
    image_folder: str | None = doc(None, "Where relative paths of images start; null: at the data file.")
    image_column: str = doc("image", "Column with the image.")
    text_column: str | None = doc(None, "Column with captions, answers or class; null finds it.")
    prompt_column: str | None = doc(None, "Column with the questions; null finds it.")

    prompt: str | None = doc(
        None,
        "Text before what is written; {} stands for the question. null takes what the checkpoint was trained with, else the task's: "
        f"{CAPTION_PROMPT!r}; {QUESTION_PROMPT!r}, with FlanT5 {SHORT_QUESTION_PROMPT!r}.",
    )
    num_beams: int = doc(BEAMS, "Beams; 1 is greedy.")
    length_penalty: float | None = doc(None, "Exponent on the length of a beam's score; null: captions 1, answers -1.")
    min_new_tokens: int | None = doc(None, "Fewest tokens written; null: 1.")
    max_new_tokens: int | None = doc(None, "Most tokens written; null: captions 30, answers 10.")
    repetition_penalty: float = doc(1.0, "Above 1 keeps words from coming again.")
    image_size: int | None = doc(None, "Side of the square image in pixels; null takes the checkpoint's own.")
    clean_questions: bool = doc(False, 'Lower-case questions and take out . ! " ( ) * # : ; ~ as LAVIS does.')

    score_mode: str = doc(
        "itm+itc",
        "Retrieval: itc (cosine), itm (match logit, the paper), itm+itc (match logit + cosine, LAVIS), itm+logits (ITC "
        "logit + half of the match log-odds, our own).",
    )
    rerank_k: int = doc(128, "Retrieval: best by ITC that ITM ranks again, both ways.")
    clean_captions: bool = doc(True, "Retrieval and classification: texts are cleaned as in training.")
    max_text_length: int = doc(32, "Longest text that a stage-1 model reads, in tokens.")

    classes: str | None = doc(
        None, "Classification: file with the class names, JSON or a line each; null takes those of the data set."
    )
    templates: list[str] = doc(
        ["a photo of a {}."], "Classification by stage 1: sentences about a class, whose features are averaged."
    )
    candidates: str | None = doc(
        None, "Visual question answering by choice: file with all answers there are, JSON or a line each."
    )

    other_images: bool = doc(
        False,
        "Captions and answers: each sample is shown the image of another, which tells what is known without looking.",
    )
    metric: str | None = doc(
        None, f"Of answers: {', '.join(VQA_METRICS)}; null: vqa_accuracy where each question has ten, else exact_match."
    )
    lemmatize: bool = doc(False, "Nouns and verbs of answers go to their base form; needs spaCy or NLTK.")
    wordnet: str | None = doc(None, "Folder of WordNet 3.0's database files, for wups; null looks for them.")
    scorer: str | None = doc(None, "Stage-1 checkpoint whose ITC scores the captions.")
    java_metrics: bool = doc(True, "METEOR and SPICE, where Java and pycocoevalcap are there.")

    report: bool = doc(True, "Write report.html and report.png.")
    model_card: bool = doc(False, "Fill the checkpoint's model card with these results.")
    license: str | None = doc(None, "Model card: licence of the weights; null keeps what the card says.")
    training_data: str | None = doc(None, "Model card: what it was trained on; null takes it from config.yaml.")

    batch_size: int = doc(16, "Images, questions or texts a process handles at once.")
    bf16: bool = doc(False, "bfloat16 autocast.")
    max_skip_fraction: float = doc(
        0.01, "Images that cannot be read are counted and left out; a larger share is an error."
    )
    overwrite_output_dir: bool = doc(False, "Start over where output_dir holds another evaluation.")

    def __post_init__(self):
        penalty, fewest, most = GENERATION.get(self.task, (None, None, None))
        self.length_penalty = penalty if self.length_penalty is None else self.length_penalty
        self.min_new_tokens = fewest if self.min_new_tokens is None else self.min_new_tokens
        self.max_new_tokens = most if self.max_new_tokens is None else self.max_new_tokens

    @property
    def generation(self) -> dict[str, object]:
        """Arguments of generate."""
        names = ("num_beams", "min_new_tokens", "max_new_tokens", "repetition_penalty")
        arguments = {name: getattr(self, name) for name in names}
        return arguments | ({"length_penalty": self.length_penalty} if self.num_beams > 1 else {})

    REQUIRED = ("model", "task", "data", "output_dir")
    PATHS = ("model", "image_folder", "classes", "candidates", "scorer", "wordnet")
    CHOICES = {"task": TASKS, "score_mode": tuple(MODES), "benchmark": tuple(PUBLISHED), "metric": VQA_METRICS}
    RANGES = {
        "num_beams": (1, 1000),
        "length_penalty": (-100, 100),
        "min_new_tokens": (0, 10_000),
        "max_new_tokens": (1, 10_000),
        "repetition_penalty": (1e-3, 100),
        "image_size": (1, 10_000),
        "rerank_k": (1, 10**9),
        "max_text_length": (2, 10_000),
        "batch_size": (1, 100_000),
        "max_skip_fraction": (0, 1),
    }

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.min_new_tokens or 0) > (self.max_new_tokens or float("inf")):
            found.append(f"--min_new_tokens is {self.min_new_tokens}, above --max_new_tokens {self.max_new_tokens}.")
        if self.task == "vqa" and self.prompt is not None and "{}" not in self.prompt:
            found.append(f"--prompt is {self.prompt!r}, but needs {{}} where the question goes.")
        if self.task == "caption" and "{}" in (self.prompt or ""):
            found.append(f"--prompt is {self.prompt!r}, but a caption has no question for its {{}}.")
        if any("{}" not in template for template in self.templates):
            found.append(f"--templates are {self.templates}, but each needs {{}} where the class goes.")
        if self.other_images and self.task not in ("caption", "vqa"):
            found.append(f"--other_images is for captions and answers, not for --task {self.task}. Leave it out.")
        if self.scorer and self.task != "caption":
            found.append("--scorer scores captions. Drop it, or choose --task caption.")
        return found


def choose_prompt(args: EvaluationArguments, config) -> tuple[str, str]:
    """The prompt of a stage-2 model, and where it comes from.

    As asked, else the one that the checkpoint was trained with where that fits the task, else the paper's.
    """
    own, asks = config.prompt_template, args.task == "vqa"
    if args.prompt is not None:
        return args.prompt, "--prompt"
    if own is not None and ("{}" in own) == asks and args.task != "classification":
        return own, "the checkpoint was trained with it"
    if asks:
        return SHORT_QUESTION_PROMPT if config.is_encoder_decoder else QUESTION_PROMPT, "the paper's"
    return CLASS_PROMPT if args.task == "classification" else CAPTION_PROMPT, "the paper's"
