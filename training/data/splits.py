"""The splits a run trains and validates on, and the steps they take."""

import functools
import math
import re

from accelerate import Accelerator

from ..arguments.training import RunArguments
from .caption_dataset import CaptionDataset, JointDataset, Sampling
from .first_index import first_index
from .formats import NO_CONFIG, image_start, load_rows
from .image_identity import ImageNumbers
from .image_processor import output_size
from .index_files import is_index
from .index_images import open_split
from .indexed_dataset import IndexedCaptionDataset
from .remote import is_remote
from .shard_cache import ShardCache, shard_home
from .shard_files import shard_files


def load_dataset_split(
    args: RunArguments,
    accelerator: Accelerator,
    split: str,
    crop_size: tuple[int, int] | None,
    draw_text: bool,
    prompt: str = "",
    prompt_column: str | None = None,
) -> CaptionDataset | JointDataset:
    """One split of each data set, as one; the main process reads first, so that others find datasets' cache.

    For training, rows of an index (of tars and of what is remote there always is one) are read when they are visited, unless
    their features come from a cache.
    """
    parts, known_images = [], ImageNumbers()
    configs = args.dataset_config or [None] * len(args.dataset)
    given = list(zip(args.dataset, configs, strict=True))
    reads_index = draw_text and not args.feature_cache
    # Tars beside data sets of other kinds are loaded like these: so an image that both hold is known as one.
    all_shards = reads_index and all(may_be_indexed(args, dataset, config, split) for dataset, config in given)
    for number, (dataset, config) in enumerate(given):
        reading = {
            "text_column": args.text_column,
            "prompt_column": prompt_column,
            "prompt": prompt,
            "clean_captions": args.clean_captions,
            "sampling": Sampling(f"{args.seed}/{number}" if number else args.seed, crop_size, draw_text),
            "source": (f"{dataset}, {config}" if config else dataset, split),
        }
        index = None
        if reads_index and (all_shards or is_index(dataset) or is_remote(dataset)):
            index = dataset if is_index(dataset) else first_index(dataset, split, args.image_column)
        if index:
            cache = ShardCache(args.shard_cache or shard_home(), int(args.shard_cache_gb * 1e9))
            parts.append(IndexedCaptionDataset(*open_split(index, split), **reading, cache=cache))
            continue
        with accelerator.main_process_first():
            rows = load_rows(dataset, split, args.image_folder, config)
        part = CaptionDataset(
            rows,
            image_column=args.image_column,
            folder=image_start(dataset, args.image_folder),
            known_images=known_images,
            **reading,
        )
        parts.append(part)
    return JointDataset(parts) if len(parts) > 1 else parts[0]


def may_be_indexed(args: RunArguments, dataset: str, config: str | None, split: str) -> bool:
    """Whether training on a data set reads an index: one that is given, or that of tars and of what is remote."""
    if is_index(dataset) or is_remote(dataset):
        return True
    plain = config in NO_CONFIG and args.image_column == "image"
    shards = shard_files(dataset, re.match(r"\w*", split)[0]) if plain else None
    return shards is not None and shards[0] == "tar"


def count_steps(args: RunArguments, num_rows: int, num_processes: int) -> int:
    """Optimiser steps of the run: max_steps, or as many as num_train_epochs passes over the rows take."""
    samples = args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps
    return args.max_steps or max(1, math.ceil(args.num_train_epochs * num_rows / samples))


def load_splits(
    args: RunArguments, accelerator: Accelerator, image_processor, prompt: str = ""
) -> tuple[CaptionDataset | JointDataset, CaptionDataset | JointDataset | None]:
    """The training split, augmented where asked for, and the validation split or None."""
    asked = "auto" if "{}" in prompt else None  # a prompt with a place for a question needs one
    prompt_column = args.prompt_column or asked
    read = functools.partial(load_dataset_split, args, accelerator, prompt=prompt, prompt_column=prompt_column)
    crop_size = output_size(image_processor) if args.augment else None
    train_set = read(args.train_split, crop_size=crop_size, draw_text=True)
    return train_set, read(args.eval_split, crop_size=None, draw_text=False) if args.eval_split else None


def steps_of(args: RunArguments, accelerator: Accelerator, train_set: CaptionDataset | JointDataset) -> int:
    return count_steps(args, len(train_set), accelerator.num_processes)
