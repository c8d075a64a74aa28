"""What an evaluation has predicted so far, so that the same command goes on where a killed one stopped.

OUTPUT/.progress/identity.json says what is evaluated and how; each process appends its results to a JSONL of its own.
"""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

from ..system.atomic_files import write_whole
from ..system.fingerprints import differences
from ..system.json_lines import read_json_object, read_whole_lines

REMEDY = "Delete the folder .progress to start over."


class Journal:
    """Results by number, of all processes of all runs so far.

    `name` tells apart what one evaluation counts: samples, or images that are re-ranked. A line cut off by a crash is
    dropped. Raises ValueError where the folder holds another evaluation.
    """

    def __init__(
        self, output_dir: Path, identity: dict, accelerator: Accelerator, overwrite: bool, name: str = "results"
    ):
        folder = output_dir / ".progress"
        self.path = folder / f"{name}.{accelerator.process_index}.jsonl"
        differs = open_folder(folder, identity, overwrite, accelerator)
        if differs:
            raise ValueError(
                f"{output_dir} holds another evaluation ({differs}). Choose another --output_dir, or pass "
                "--overwrite_output_dir to start over."
            )
        self.results: dict[int, object] = {}
        for path in sorted(folder.glob(f"{name}.*.jsonl")):
            self.results |= whole_lines(path, repair=path == self.path)
        accelerator.wait_for_everyone()  # nobody adds before all have read

    def add(self, results: dict[int, object]) -> None:
        lines = "".join(json.dumps([number, result], ensure_ascii=False) + "\n" for number, result in results.items())
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(lines)


def open_folder(folder: Path, identity: dict, overwrite: bool, accelerator: Accelerator) -> str:
    """Make the folder, or clear it where another evaluation may be overwritten; what differs where it may not."""
    described, differs = folder / "identity.json", ""
    identity = json.loads(json.dumps(identity))  # as it reads back
    accelerator.wait_for_everyone()
    if described.exists():
        differs = differences(read_json_object(described, REMEDY), identity)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and (overwrite and differs or not described.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_whole(described, json.dumps(identity, indent=1).encode())
    accelerator.wait_for_everyone()
    return "" if overwrite else differs


def whole_lines(path: Path, repair: bool) -> dict[int, object]:
    """Results of a file by number, without a last line that a crash cut off; `repair` also takes it off the file.

    Raises ValueError for a line that is damaged.
    """
    results = read_whole_lines(path, REMEDY)
    content = path.read_bytes()
    if repair and content and not content.endswith(b"\n"):
        write_whole(path, content[: content.rfind(b"\n") + 1])
    if not all(isinstance(result, list) and len(result) == 2 and isinstance(result[0], int) for result in results):
        raise ValueError(f"{path} is damaged: a line is no [number, result]. {REMEDY}")
    return dict(results)
