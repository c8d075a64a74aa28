"""The embedded default: BLIP-2 through both stages on built-in toy scenes, on two CPU cores, without downloads.

    python training/quickstart.py --output_dir runs/quickstart [--seed 0] [--ablations]

It makes what a user would download (a data set, a frozen vision tower, a frozen language model; all toys), runs
pretrain_stage1.py and pretrain_stage2.py with configs/quickstart_stage*.yaml on them, prints one table of figures for new
scenes and for scenes with colour-shape pairs that neither stage saw, and loads the result in a fresh process. The same
command again continues where the last one stopped; everything random follows --seed.
"""

import argparse
import atexit
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"


@dataclass
class Budget:
    """Sizes and steps of each part; None takes the default, which for a stage is max_steps of its config."""

    split_sizes: dict[str, int] | None = None
    vision_steps: int | None = None
    language_steps: int | None = None
    stage1_steps: int | None = None
    stage2_steps: int | None = None
    pictures: int | None = None  # for the vision tower
    text_scenes: int | None = None  # for the language model


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder unless it exists. It gets its name when it is finished, so one that exists is whole."""
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def claim(output_dir: Path, seed: int) -> None:
    """Remembers the seed of an output folder; raises ValueError if it was made with another."""
    from blip2x_training.system.atomic_files import write_whole

    marker = output_dir / "seed.json"
    text = marker.read_text(errors="replace") if marker.exists() else str(seed)
    if text != str(seed):
        raise ValueError(
            f"{output_dir} was made with --seed {text[:20]}, not {seed}. Pass that seed to continue it, or another "
            "--output_dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        write_whole(marker, json.dumps(seed))


class Background:
    """A module of toy/ that makes a folder in its own process, with one thread; nothing to do if the folder is there."""

    def __init__(self, script: str, folder: Path, seed: int, options: dict[str, int | None]):
        self.script, self.folder, self.process = script, folder, None
        self.unfinished = folder.with_name(f".{folder.name}.unfinished")
        if not folder.exists():
            shutil.rmtree(self.unfinished, ignore_errors=True)
            command = [
                sys.executable,
                "-m",
                f"blip2x_training.toy.{script}",
                "--output_dir",
                str(self.unfinished),
                "--seed",
                str(seed),
            ]
            command += [word for flag, value in options.items() if value for word in (flag, str(value))]
            # Tower and language model are made side by side: with more threads each they would share two cores.
            self.process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
            atexit.register(self.process.terminate)  # a quickstart that is stopped takes it along

    def wait(self) -> Path:
        if self.process is not None:
            if self.process.wait() != 0:
                code = self.process.returncode
                raise ValueError(
                    f"{self.script} ended with exit code {code}; its message stands above. Mend it and run again."
                )
            self.unfinished.rename(self.folder)
            self.process = None
        return self.folder


def run_quickstart(output_dir: Path, seed: int, ablations: bool = False, budget: Budget | None = None) -> dict:
    """Makes all parts, trains, scores and reports below `output_dir`; returns {"full" or ablation: {split: scores}}."""
    import transformers
    from datasets import disable_progress_bars

    from blip2x_training import cache_features, pretrain_stage1, pretrain_stage2
    from blip2x_training.toy.scenes import write_scenes
    from blip2x_training.toy.scores import score_generation, score_retrieval
    from blip2x_training.toy.summary import SPLITS, table, write_picture

    disable_progress_bars()
    transformers.logging.disable_progress_bar()
    budget = budget or Budget()
    claim(output_dir, seed)
    clock = Clock()

    tower_options = {"--steps": budget.vision_steps, "--pictures": budget.pictures}
    making_tower = Background("vision_tower", output_dir / "vision_tower", seed, tower_options)
    language_options = {"--steps": budget.language_steps, "--scenes": budget.text_scenes}
    making_language = Background("language_model", output_dir / "language_model", seed, language_options)
    dataset = write_scenes(output_dir / "scenes", seed, budget.split_sizes)
    clock.lap("scenes")
    tower = making_tower.wait()
    clock.lap("vision tower, pre-trained on pictures alone")
    language_model = making_language.wait()
    clock.lap("language model, pre-trained on text alone beside the above")
    given = ["--dataset", str(dataset), "--seed", str(seed)]
    cache = once(
        output_dir / "features",
        lambda folder: cache_features.main(
            ["--dataset", str(dataset), "--vision_model", str(tower), "--output_dir", str(folder), "--splits", "train"]
            + ["--batch_size", "250"]
        ),
    )
    given += ["--feature_cache", str(cache)]
    clock.lap("features of the frozen tower")

    def stage1(name: str, *more: str) -> Path:
        steps = ["--max_steps", str(budget.stage1_steps)] if budget.stage1_steps else []
        pretrain_stage1.main(
            ["--config", str(CONFIGS / "quickstart_stage1.yaml"), "--output_dir", str(output_dir / name)]
            + ["--vision_model", str(tower), *given, *steps, *more]
        )
        clock.lap(name)
        return output_dir / name

    def stage2(name: str, *more: str) -> Path:
        steps = ["--max_steps", str(budget.stage2_steps)] if budget.stage2_steps else []
        pretrain_stage2.main(
            ["--config", str(CONFIGS / "quickstart_stage2.yaml"), "--output_dir", str(output_dir / name)]
            + ["--language_model", str(language_model), *given, *steps, *more]
        )
        clock.lap(name)
        return output_dir / name

    def score(first: Path | None, second: Path) -> dict[str, dict[str, float]]:
        scores = {split: score_generation(second, dataset, split, seed) for split in SPLITS}
        for split in SPLITS if first else ():
            scores[split] |= score_retrieval(first, dataset, split)
        clock.lap(f"scores of {second.name}")
        return scores

    first = stage1("stage1")
    second = stage2("stage2", "--init_from", str(first))
    results = {"full": score(first, second)}
    if ablations:
        import yaml

        shape = yaml.safe_load((CONFIGS / "quickstart_stage1.yaml").read_text())
        fresh = ["--vision_model", str(tower), "--qformer_config", json.dumps(shape["qformer_config"])]
        fresh += ["--num_query_tokens", str(shape["num_query_tokens"])]
        results["no stage 1"] = score(None, stage2("stage2_without_stage1", *fresh))
        no_itg = stage1("stage1_without_itg", "--objectives", "itc", "itm")
        results["no ITG"] = score(no_itg, stage2("stage2_without_itg", "--init_from", str(no_itg)))

    (output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_card([first, second], table(results))
    print("\n" + table(results) + "\n")
    print("A fresh process loads the result through AutoModelForImageTextToText and AutoProcessor:", flush=True)
    show = [sys.executable, "-m", "blip2x_training.toy.show", "--model", str(second)]
    show += ["--dataset", str(dataset), "--output_dir", str(output_dir / "shown")]
    # A process of its own has nothing left in memory that loading could lean on.
    subprocess.run(show, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    parts = {"vision tower": tower, "language model": language_model, "stage 1": first, "stage 2": second}
    curves = {title: folder / "metrics.jsonl" for title, folder in parts.items()}
    shown = json.loads((output_dir / "shown" / "shown.json").read_text(encoding="utf-8"))
    report = write_picture(output_dir, shown, curves)
    clock.lap("fresh process and report")
    print(f"\n{clock}\nReport: {report}\nModels to load: {second} (writes), {first} (scores images against texts)")
    print(f"To see it in a browser: {python_of_the_space()} space_app/app.py --model {output_dir}")
    return results


def write_card(folders: list[Path], figures: str) -> None:
    """model_card.md as README.md of each folder, with the figures of this run in the place of its own."""
    before, _, after = (HERE.parent / "model_card.md").read_text(encoding="utf-8").split("```\n")
    for folder in folders:
        (folder / "README.md").write_text(f"{before}```\n{figures}\n```\n{after}", encoding="utf-8")


def python_of_the_space() -> str:
    """This Python as a command: relative to the working directory if it lies below it, as .venv does."""
    python = Path(sys.executable)
    return str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else str(python)


class Clock:
    """Wall seconds of each part."""

    def __init__(self):
        self.begin = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def __str__(self) -> str:
        lines = [f"{seconds:7.1f} s  {name}" for name, seconds in self.laps.items()]
        return "\n".join([*lines, f"{self.last - self.begin:7.1f} s  in all"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train BLIP-2 through both stages on built-in toy scenes; no downloads, minutes on two CPU cores."
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablations", action="store_true", help="Two more rows: no stage 1, and stage 1 without ITG.")
    arguments = parser.parse_args(argv)
    # Both count only if set before torch and transformers are imported, which is why the imports wait until now.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    # Threads that sleep at once halve the speed of small models; threads that spin long stop a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from blip2x_training.system.run_lock import locked_folder

    with locked_folder(arguments.output_dir):
        run_quickstart(Path(arguments.output_dir), arguments.seed, arguments.ablations)


if __name__ == "__main__":
    from blip2x_training.system.commands import run_command

    run_command(main)
