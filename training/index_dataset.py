"""Write the index of a data set, so that training on it starts at once and holds none of its rows in memory.

    python training/index_dataset.py 'DIR/{00000..12899}.tar' --output runs/laion_index
    accelerate launch training/pretrain_stage1.py --dataset runs/laion_index ...

An index says where the image of each row lies, and holds its texts. It takes any format that --dataset does; tars and
parquet files are indexed in parallel, and where they lie. The same command again continues where the last one stopped. The
data themselves stay where they are, and an index whose files have changed is refused.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from blip2x_training.arguments.base import Arguments, doc
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.system.commands import run_command


@dataclass
class IndexArguments(Arguments):
    """The index of one split of a data set."""

    dataset: str | None = doc(None, "As in training; it may also stand before all flags. Required.")
    output: str | None = doc(None, "Folder of the index, which --dataset of training takes. Required.")
    split: str = doc("train", "Split to index; its name is what --train_split then names.")
    dataset_config: str | None = doc(None, "Its configuration, where the data set has several.")
    image_folder: str | None = doc(None, "Where relative paths of images start; null: at the JSON file.")
    image_column: str = doc("image", "Column with the image.")
    num_workers: int | None = doc(None, "Processes; null: one for each core.")
    overwrite: bool = doc(False, "Write an index anew that is there already.")

    REQUIRED = ("dataset", "output")
    PATHS = ("image_folder",)
    RANGES = {"num_workers": (1, 1024)}

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.split.isidentifier():
            found.append(
                f"--split is {self.split!r}, but must be the name of one, such as train. Training takes slices."
            )
        return found


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    if given and not given[0].startswith("-"):
        given = ["--dataset", *given]
    args = parse_arguments(IndexArguments, given)
    from blip2x_training.system.run_lock import locked_folder

    with locked_folder(args.output):
        run(args)


def run(args: IndexArguments) -> None:
    """The index of a split, unless it is there."""
    from blip2x_training.data.formats import image_start, load_rows
    from blip2x_training.data.images import keep_encoded
    from blip2x_training.data.index_files import open_index
    from blip2x_training.data.indexing import index_pieces, pieces_of_files, pieces_of_rows
    from blip2x_training.data.rows import require_column
    from blip2x_training.data.shard_files import shard_files
    from blip2x_training.system.atomic_files import discard

    folder = Path(args.output) / args.split
    if (folder / "index.json").exists():
        if not args.overwrite:
            print(
                f"{folder} is there: {len(open_index(args.output, args.split))} rows. --overwrite true writes it anew."
            )
            return
        discard(folder)
    sharded, rows, image_folder = shard_files(args.dataset, args.split), None, None
    if sharded:
        kind, files = sharded
        pieces = pieces_of_files(files, kind, args.image_column)
    else:
        rows = load_rows(args.dataset, args.split, args.image_folder, args.dataset_config)
        require_column(rows, args.image_column, "image_column")
        rows = keep_encoded(rows, args.image_column)
        image_folder = image_start(args.dataset, args.image_folder)
        source = os.path.abspath(args.dataset) if os.path.isfile(args.dataset) else args.dataset
        pieces = pieces_of_rows(rows, source, args.image_column)
    described = {"source": args.dataset, "split": args.split}
    index_pieces(pieces, folder, described, rows, image_folder, args.num_workers or os.cpu_count() or 1, say)
    index = open_index(args.output, args.split)
    for shard in index.shards:
        if shard.fault:
            print(f"Left out: {shard.fault}")
    size = sum((folder / name).stat().st_size for name in ("rows.bin", "texts.bin"))
    print(f"{folder}: {len(index)} rows in {len(index.shards)} shards, {size / 1e6:.1f} MB.")
    if not len(index):
        raise ValueError(f"{args.dataset}, split {args.split!r} has no rows that can be read.")


def say(text: str) -> None:
    print(text, flush=True)


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    run_command(main)


if __name__ == "__main__":
    command()
