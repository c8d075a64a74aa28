"""CapFilt (section 3.4): several captions of each image by a trained model, ranked with the web's own; the best are kept.

    python training/bootstrap_captions.py --dataset DIR --split train --captioner STAGE1_OR_2 --scorer STAGE1 --output_dir OUT
    python training/pretrain_stage1.py --dataset OUT --text_column captions ...

Training draws one caption of the list each step. OUT/SPLIT.jsonl has a line an image, or, where the source embeds its images,
OUT/SPLIT.parquet a row: `image`, `captions` (best first), `scores` and `sources` (web or synthetic). Images that cannot be
read are left out and named in OUT/skipped.jsonl.

The same command continues a run that was stopped, and ends with what it would have ended with: an image's captions come from
(seed, row) alone. Only --batch_size may change on the way, and that may round a logit differently (see candidates.py).
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from tqdm import tqdm

from blip2x_training.arguments.base import Arguments, doc
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.capfilt.candidates import (
    RANKINGS,
    best,
    candidates_of,
    encode_images,
    numbers_of,
    sample_captions,
    score,
)
from blip2x_training.capfilt.progress import Progress, json_lines, read_progress, write_dataset
from blip2x_training.data.caption_dataset import ImageDataset
from blip2x_training.data.feature_cache import images_fingerprint
from blip2x_training.data.formats import image_start, load_rows
from blip2x_training.data.rows import Rows, require_column
from blip2x_training.data.texts import plain_texts
from blip2x_training.models.loading import is_stage1, load_model
from blip2x_training.system.atomic_files import write_whole
from blip2x_training.system.commands import run_command
from blip2x_training.system.fingerprints import weights_fingerprint
from blip2x_training.system.run_lock import locked_folder
from blip2x_training.system.utf8 import not_utf8
from modeling_blip2x import Blip2xProcessor

CAPTION_COLUMNS = ("text", "caption", "captions")
# Fields that do not decide what comes out; of the paths, what lies there does.
FREE = (
    "output_dir", "dataset", "image_folder", "captioner", "scorer", "batch_size", "max_skip_fraction", "overwrite_output_dir"
)  # fmt: skip


@dataclass
class BootstrapArguments(Arguments):
    """CapFilt: synthetic captions, ranked together with those of the data set."""

    dataset: str | None = doc(None, "As in training. Required.")
    dataset_config: str | None = doc(None, "Its configuration, where the data set has several.")
    split: str = doc("train", "Split to caption; slices such as 'train[:1000]' work.")
    output_dir: str | None = doc(None, "Folder of the new data set. Required.")
    captioner: str | None = doc(None, "Stage-2 folder, or a stage-1 folder, which captions by its ITG head. Required.")
    scorer: str | None = doc(None, "Stage-1 folder that ranks; null takes the captioner, if that is one.")
    num_captions: int = doc(10, "Captions drawn for an image.")
    keep: int = doc(2, "Captions kept of an image, its own included; fewer where it has fewer different ones.")
    rank_by: str = doc("itc", "itc (cosine), itm (match logit) or itc+itm (their sum).")
    top_p: float = doc(0.9, "Probability of the nucleus that tokens are drawn from.")
    temperature: float = doc(1.0, "Divides the logits before.")
    max_new_tokens: int = doc(20, "Longest caption in tokens.")
    min_new_tokens: int = doc(5, "Shortest caption in tokens.")
    prompt: str | None = doc(None, "Prompt of a stage-2 captioner; null takes the one it was trained with.")
    max_text_length: int = doc(32, "Longest text that the scorer reads, in tokens.")
    image_column: str = doc("image", "As in training.")
    image_folder: str | None = doc(None, "As in training.")
    text_column: str | None = doc(
        None,
        f"Column with the web's captions; null takes the first of {', '.join(CAPTION_COLUMNS)} that there is, if any.",
    )
    seed: int = doc(42, "Draws the captions.")
    batch_size: int = doc(16, "Images captioned and ranked at once.")
    max_skip_fraction: float = doc(0.01, "Images that cannot be read are left out; a larger share stops the run.")
    bf16: bool = doc(False, "bfloat16 autocast.")
    overwrite_output_dir: bool = doc(False, "Start over where output_dir holds this split made otherwise.")

    REQUIRED = ("dataset", "output_dir", "captioner")
    PATHS = ("image_folder", "captioner", "scorer")
    CHOICES = {"rank_by": tuple(RANKINGS)}
    RANGES = {
        "num_captions": (1, 1000),
        "keep": (1, 1000),
        "top_p": (1e-6, 1.0),
        "temperature": (1e-3, 100.0),
        "max_new_tokens": (1, 500),
        "min_new_tokens": (0, 500),
        "max_text_length": (3, 512),
        "batch_size": (1, 100_000),
        "max_skip_fraction": (0, 1),
    }

    def problems(self) -> list[str]:
        found = super().problems()
        if self.min_new_tokens > self.max_new_tokens:
            found.append(f"--min_new_tokens is {self.min_new_tokens}, above --max_new_tokens {self.max_new_tokens}.")
        return found


@dataclass
class Models:
    """Captioner and scorer with their processors, the same objects where one is both; what a stage-2 captioner is told."""

    captioner: torch.nn.Module
    words: Blip2xProcessor
    scorer: torch.nn.Module
    reader: Blip2xProcessor
    prompt: str


def web_captions(rows: datasets.Dataset | Rows, column: str | None) -> list[list[str]]:
    """The captions of each row; an empty list where it has none. Raises ValueError for what is no text."""
    column = column or next((name for name in CAPTION_COLUMNS if name in rows.column_names), None)
    if column is None:
        return [[] for _ in range(len(rows))]
    require_column(rows, column, "text_column")
    captions = []
    for row, value in enumerate(rows[column][:]):
        try:
            captions.append([text for text in plain_texts(value) if not not_utf8(text)])
        except ValueError as error:
            raise ValueError(
                f"Column {column!r}, row {row}: {error}. Name the column of the texts: --text_column."
            ) from error
    return captions


def caption(
    args: BootstrapArguments, images: ImageDataset, web: list[list[str]], models: Models, rows: Iterable[int]
) -> list[dict]:
    """A record for each of the rows: captions, scores and sources, or why it is left out."""
    pictures, faults = {}, {}
    for row in rows:
        try:
            pictures[row] = images.image(row)
        except ValueError as error:
            faults[row] = str(error.__cause__ or error)
    kept = {}
    if pictures:
        draws = [numbers_of(args.seed, row, args.num_captions, args.max_new_tokens) for row in pictures]
        shown = list(pictures.values())
        with torch.no_grad(), torch.autocast(models.captioner.device.type, torch.bfloat16, enabled=args.bf16):
            seen = encode_images(models.captioner, models.words, shown)
            drawn = sample_captions(
                models.captioner,
                models.words,
                shown,
                seen,
                torch.stack(draws),
                prompt=models.prompt,
                top_p=args.top_p,
                temperature=args.temperature,
                min_new_tokens=args.min_new_tokens,
            )
            found = [candidates_of(web[row], texts) for row, texts in zip(pictures, drawn)]
            if models.scorer is not models.captioner:
                seen = encode_images(models.scorer, models.reader, shown)
            score(models.scorer, models.reader, seen, found, args.rank_by, args.max_text_length)
        kept = {row: best(candidates, args.keep) for row, candidates in zip(pictures, found)}
    records = []
    for row in rows:
        if kept.get(row):
            records.append(
                {
                    "row": row,
                    "captions": [candidate.text for candidate in kept[row]],
                    "scores": [round(candidate.score, 6) for candidate in kept[row]],
                    "sources": [candidate.source for candidate in kept[row]],
                }
            )
        else:
            reason = faults.get(row, "it has no caption, and none that was drawn has a word")
            report = {"dataset": args.dataset, "split": args.split, "row": row, "name": images.name(row)}
            records.append({"row": row, "skipped": report | {"reason": reason}})
    return records


def load_models(args: BootstrapArguments, device: str) -> Models:
    captioner, words = load_model(args.captioner, device)
    if args.scorer is None or Path(args.scorer).absolute() == Path(args.captioner).absolute():
        scorer, reader = captioner, words
    else:
        scorer, reader = load_model(args.scorer, device)
    if not is_stage1(scorer):
        raise ValueError(
            f"--scorer is {args.scorer}, and {args.scorer or args.captioner} holds a stage-2 model, which does not score "
            "pairs. Pass a stage-1 folder as --scorer."
        )
    prompt = args.prompt if args.prompt is not None else (captioner.config.prompt_template or "")
    if "{}" in prompt:
        raise ValueError(f"The captioner was trained with the prompt {prompt!r}, a question. Pass --prompt.")
    return Models(captioner, words, scorer, reader, prompt)


def write_skipped(output_dir: Path) -> None:
    """skipped.jsonl from the progress of all splits captioned so far."""
    skipped = []
    for path in sorted((output_dir / ".progress").glob("*.jsonl")):
        skipped += [record["skipped"] for record in read_progress(path)[1:] if "skipped" in record]
    write_whole(output_dir / "skipped.jsonl", json_lines(skipped))


def stop_if_too_many_skipped(progress: Progress, output_dir: Path, num_rows: int, max_fraction: float) -> None:
    """Raise ValueError where more than this share of all rows has been left out already."""
    left_out = sum("skipped" in record for record in progress.records)
    if left_out > max_fraction * num_rows:
        write_skipped(output_dir)
        raise ValueError(
            f"{left_out} of {num_rows} rows are left out after {len(progress.records)}, above --max_skip_fraction "
            f"{max_fraction}. {output_dir / 'skipped.jsonl'} lists them with the reasons. Repair or remove them and pass "
            "--overwrite_output_dir, or raise --max_skip_fraction."
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(BootstrapArguments, sys.argv[1:] if argv is None else argv)
    with locked_folder(args.output_dir):
        run(args)


def run(args: BootstrapArguments) -> None:
    """Caption what no earlier run has captioned, and write the data set."""
    output_dir, split = Path(args.output_dir), args.split.partition("[")[0]
    rows = load_rows(args.dataset, args.split, args.image_folder, args.dataset_config)
    images = ImageDataset(rows, args.image_column, image_start(args.dataset, args.image_folder))
    web = web_captions(rows, args.text_column)
    models = load_models(args, "cuda" if torch.cuda.is_available() else "cpu")
    identity = {name: value for name, value in asdict(args).items() if name not in FREE}
    identity |= {
        "prompt": models.prompt,
        "captioner": weights_fingerprint(models.captioner),
        "scorer": weights_fingerprint(models.scorer),
        "images": images_fingerprint(images),
        "texts": hashlib.sha256(json.dumps(web).encode()).hexdigest()[:16],
    }
    progress = Progress(
        output_dir / ".progress" / f"{split}.jsonl", identity, len(images), args.batch_size, args.overwrite_output_dir
    )
    for start in tqdm(range(len(progress.records), len(images), args.batch_size), "captions", unit="batch"):
        progress.add(caption(args, images, web, models, range(start, min(start + args.batch_size, len(images)))))
        stop_if_too_many_skipped(progress, output_dir, len(images), args.max_skip_fraction)
    stop_if_too_many_skipped(progress, output_dir, len(images), args.max_skip_fraction)

    # Everything below is derived from the progress file, so a run that is stopped here gives the same when repeated.
    if not any("captions" in record for record in progress.records):
        raise ValueError(f"No row of {args.dataset}, split {args.split!r}, has an image and a caption.")
    target = write_dataset(images, progress.records, output_dir, split)
    write_skipped(output_dir)
    sources = [source for record in progress.records for source in record.get("sources", [])]
    left_out = sum("skipped" in record for record in progress.records)
    print(
        f"{target}: {len(progress.records) - left_out} images, {len(sources)} captions kept, {sources.count('web')} of them "
        f"the web's and {sources.count('synthetic')} synthetic; images left out: {left_out}"
    )


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    run_command(main)


if __name__ == "__main__":
    command()
