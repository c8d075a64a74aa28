"""The parts of photos.py: scripts with their flags, and how long each takes."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..arguments.parsing import CONFIGS
from .plan import Plan, Stage

SMALL_QFORMER = {  # for a Q-Former that starts from nothing: BERT's shape would take days on two cores
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "max_position_embeddings": 64,
    "initializer_range": 0.033,  # .65 / sqrt(hidden_size)
    "hidden_dropout_prob": 0.0,  # as BERT's below: the noise of dropout would pass for a distance between queries
    "attention_probs_dropout_prob": 0.0,
}
FROM_BERT = ["--initializer_range", "0.033", "--dropout", "0"]
BERT_SCALE = "0.33"  # of the learning rate, for what came from BERT
BEAMS, RERANKED = "3", "16"  # beams of captions; candidates of each photo and caption that ITM ranks again
# Seconds of Flickr8k's run on two cores (docs/photos.md): to begin, an image through MobileNetV2, a pair of each stage's
# step with SmolLM2-135M, an image that is ranked, captioned by the ITG head, by the language model.
START, FEATURE, PAIR1, PAIR2, RANKED, ITG, CAPTION = 20.0, 0.025, 0.018, 0.04, 0.3, 0.1, 0.22


@dataclass(frozen=True)
class Part:
    """A script by its name, and its flags.

    seconds: that it takes where they were measured. makes: a file that is there when it is done, for a script that would do
    it again.
    """

    script: str
    flags: list[str]
    seconds: float
    makes: Path | None = None

    @property
    def command(self) -> str:
        words = [f"'{word}'" if set(word) & set(" {}[]*") else word for word in self.flags]
        return " ".join(["python", f"training/{self.script}.py", *words])


def parts_of(args, plan: Plan) -> dict[str, Part]:
    """The parts by their names, in their order; args: PhotosArguments."""
    output = Path(args.output_dir)
    bert, features, first, second = (output / name for name in ("bert", "features", "stage1", "stage2"))
    data = ["--dataset", args.dataset, *optional(image_folder=args.image_folder)]
    texts, bf16 = optional(text_column=args.text_column), ["--bf16", str(args.bf16)]
    training = [*data, *texts, "--train_split", plan.train_split, "--eval_split", plan.eval_split]
    training += ["--feature_cache", str(features), "--augment", "false", "--seed", str(args.seed), *bf16]

    def evaluation(name: str, model: Path, seconds: float, *flags: str) -> Part:
        asked = ["--data", args.dataset, *data[2:], "--split", plan.eval_split, *texts]
        out = ["--output_dir", str(output / "evaluation" / name), "--java_metrics", "false"]
        return Part(
            "run_evaluation", ["--model", str(model), *asked, *flags, *out, *bf16], START + seconds * plan.eval_images
        )

    if args.qformer_init:
        cut = ["--bert", args.qformer_init, *data[:2], *texts, "--train_split", plan.train_split, *FROM_BERT]
        parts = {
            "BERT, cut to the words of the captions": Part(
                "trim_bert",
                [*cut, "--output_dir", str(bert)],
                START,
                bert / "tokenizer.json",  # the last file it writes
            )
        }
        begun = ["--qformer_init", str(bert), "--pretrained_lr_scale", BERT_SCALE]
    else:
        parts, begun = {}, ["--qformer_config", json.dumps(SMALL_QFORMER)]
    return parts | {
        "features of the frozen tower": Part(
            "cache_features",
            [*data, "--vision_model", args.vision_model, "--views", str(plan.views), "--seed", str(args.seed)]
            + ["--splits", plan.train_split, plan.eval_split, "--output_dir", str(features)],
            START + FEATURE * (plan.views * plan.images + plan.eval_images),
        ),
        "stage 1": Part(
            "pretrain_stage1",
            ["--config", str(CONFIGS / "photos_stage1.yaml"), *training, "--vision_model", args.vision_model, *begun]
            + [*schedule(plan.stage1), "--hard_negative_steps", str(plan.stage1.steps), "--output_dir", str(first)],
            START + PAIR1 * plan.stage1.steps * plan.stage1.batch,
        ),
        "retrieval by stage 1": evaluation(
            "retrieval", first, RANKED, "--task", "retrieval", "--score_mode", "itm+itc", "--rerank_k", RERANKED
        ),
        "captions by stage 1's ITG head": evaluation(
            "stage1_captions", first, ITG, "--task", "caption", "--num_beams", BEAMS
        ),
        "stage 2": Part(
            "pretrain_stage2",
            ["--config", str(CONFIGS / "photos_stage2.yaml"), *training, "--init_from", str(first)]
            + ["--language_model", args.language_model, "--prompt", args.prompt, *optional(lora=args.lora)]
            + [*schedule(plan.stage2), "--output_dir", str(second)],
            START + PAIR2 * plan.stage2.steps * plan.stage2.batch,
        ),
        "captions by stage 2": evaluation(
            "stage2_captions", second, CAPTION, "--task", "caption", "--num_beams", BEAMS
        ),
    }


def optional(**fields: str | None) -> list[str]:
    """Flags of those that are given."""
    return [word for name, value in fields.items() if value is not None for word in (f"--{name}", value)]


def schedule(stage: Stage) -> list[str]:
    """Flags of a stage's length: five validations, and a checkpoint every few minutes."""
    every = max(1, stage.steps // 5)
    return [
        *("--max_steps", str(stage.steps), "--per_device_train_batch_size", str(stage.batch)),
        *("--eval_steps", str(every), "--save_steps", str(min(every, 250))),
    ]
