"""How long to train on how many photos, and what to expect of it."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.caption_dataset import read_captions
from ..data.formats import load_rows
from ..system.atomic_files import write_whole
from ..system.json_lines import read_json_object

# Passes over the captions, and the most steps: those of the recipe on Flickr8k's 30 000 (docs/photos.md). Fewest steps: with
# fewer, ITC has not left chance, whatever the data.
STAGE1_PASSES, STAGE1_STEPS = 5, (300, 2400)
STAGE2_PASSES, STAGE2_STEPS = 2, (200, 1900)
STAGE1_BATCH, STAGE2_BATCH = 64, 32  # images of a step; ITC contrasts each with the others
VIEWS, MOST_VIEWED = 4, 20_000  # augmented views of each photo in the cache, up to as many photos
HELD_OUT = 10  # percent of the photos, where the data has no validation split
FEW = 1000  # photos below which the figures say little


@dataclass(frozen=True)
class Stage:
    """Optimiser steps of a stage, and images of each."""

    steps: int
    batch: int


@dataclass(frozen=True)
class Plan:
    """What photos.py does with a data set."""

    train_split: str
    eval_split: str
    images: int
    texts: int
    eval_images: int
    views: int
    stage1: Stage
    stage2: Stage

    @classmethod
    def read(cls, kept: dict) -> "Plan":
        """From its fields, as `dataclasses.asdict` gives them."""
        return cls(**{**kept, "stage1": Stage(**kept["stage1"]), "stage2": Stage(**kept["stage2"])})

    def __str__(self) -> str:
        return (
            f"{self.images} photos with {self.texts} texts to train on ({self.train_split}), validated on {self.eval_images} ({self.eval_split}): "
            f"stage 1 takes {self.stage1.steps} steps of {self.stage1.batch}, stage 2 {self.stage2.steps} of "
            f"{self.stage2.batch}."
        )

    @property
    def expectation(self) -> str:
        """What such a number of photos teaches."""
        if self.images >= FEW:
            return "What 6000 photos reach, and in what time, stands in docs/photos.md."
        return (
            f"{self.images} photos show that everything works, and little more: expect captions that repeat those of the "
            "training photos, and figures that change with every seed. Some thousands make a model that captions new photos "
            "(docs/photos.md has the figures of 6000); for few, finetune.py on a checkpoint that was trained on many is better."
        )


def kept_plan(args) -> Plan:
    """The plan of an output folder, made at its first run and kept in plan.json; args: PhotosArguments.

    Raises ValueError for a folder that was made with other arguments.
    """
    kept = Path(args.output_dir) / "plan.json"
    asked = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    if kept.exists():
        known = read_json_object(kept, "Choose another --output_dir.")
        other = [name for name, value in asked.items() if known["arguments"].get(name) != value]
        if other:
            was = known["arguments"].get(other[0])
            raise ValueError(
                f"{args.output_dir} was made with --{other[0]} {was}, not {asked[other[0]]}. Pass that to continue it, or "
                "another --output_dir."
            )
        return Plan.read(known["plan"])
    splits = choose_splits(args.dataset, args.image_folder, args.train_split, args.eval_split)
    trained, validated = (load_rows(args.dataset, split, args.image_folder) for split in splits)
    texts = read_captions(trained, args.text_column, True)
    plan = make_plan(splits, len(trained), len(texts), len(validated), (args.stage1_steps, args.stage2_steps))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps({"arguments": asked, "plan": asdict(plan)}, indent=1).encode())
    return plan


def choose_splits(dataset: str, image_folder: str | None, train: str, validation: str | None) -> tuple[str, str]:
    """The splits to train and validate on: as given, else `validation` where there is one, else the last tenth of `train`.

    Raises ValueError where `train` cannot be read.
    """
    if validation:
        return train, validation
    load_rows(dataset, train, image_folder)  # a data set that cannot be read is told of by itself
    with contextlib.suppress(ValueError):
        load_rows(dataset, "validation", image_folder)
        return train, "validation"
    if "[" in train:
        raise ValueError(f"--train_split is {train!r}, and there is no validation split. Name one: --eval_split.")
    return f"{train}[:{100 - HELD_OUT}%]", f"{train}[{100 - HELD_OUT}%:]"


def make_plan(
    splits: tuple[str, str], images: int, texts: int, eval_images: int, steps: tuple[int | None, int | None]
) -> Plan:
    """Plan for `images` training photos with `texts` captions; `steps` of stages 1 and 2 where they are given."""
    return Plan(
        *splits,
        images=images,
        texts=texts,
        eval_images=eval_images,
        views=VIEWS if images <= MOST_VIEWED else 1,
        stage1=plan_stage(images, texts, STAGE1_PASSES, STAGE1_STEPS, STAGE1_BATCH, steps[0]),
        stage2=plan_stage(images, texts, STAGE2_PASSES, STAGE2_STEPS, STAGE2_BATCH, steps[1]),
    )


def plan_stage(images: int, texts: int, passes: int, limits: tuple[int, int], batch: int, steps: int | None) -> Stage:
    """Batches of at most half of the photos: one that held all of them would be the same at every step."""
    batch = max(2, min(batch, images // 2))
    fewest, most = limits
    return Stage(steps or min(most, max(fewest, round(passes * texts / batch))), batch)
