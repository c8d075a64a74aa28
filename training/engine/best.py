"""Which validation was the best, and its checkpoint."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..system.atomic_files import write_whole


@dataclass
class Best:
    """The best validation so far. `metric` as in the lines of metrics.jsonl; step 0: none yet."""

    metric: str
    greater_is_better: bool
    step: int = 0
    value: float | None = None

    def update(self, step: int, figures: dict[str, float]) -> bool:
        """True if these figures are the best so far. Raises ValueError if the metric is not among them."""
        if not figures:
            return False
        if self.metric not in figures:
            raise ValueError(
                f"--metric_for_best_model is {self.metric!r}, but the validation gives {', '.join(sorted(figures))}. "
                "Choose one of these."
            )
        value = figures[self.metric]
        if self.value is not None and not (value > self.value if self.greater_is_better else value < self.value):
            return False
        if value != value:  # NaN
            return False
        self.step, self.value = step, value
        return True

    def resume(self, saved: dict | None) -> None:
        """Go on from what a checkpoint recorded, if it judged by the same figure."""
        if saved and (saved["metric"], saved["greater_is_better"]) == (self.metric, self.greater_is_better):
            self.step, self.value = saved["step"], saved["value"]

    def record(self) -> dict | None:
        return asdict(self) if self.step else None


def check_best(saved: object) -> None:
    """Raises ValueError for what `Best.record` cannot have given."""
    if saved is None:
        return
    is_record = isinstance(saved, dict) and {"metric", "greater_is_better", "step", "value"} <= saved.keys()
    if not (is_record and type(saved["step"]) is int and isinstance(saved["value"], (int, float))):
        raise ValueError(f"its best validation is {saved!r}")


def write_best(output_dir: Path, best: Best) -> None:
    """best.json: figure, value, step and folder of the best validation."""
    if best.step:
        described = {**best.record(), "checkpoint": f"checkpoints/step_{best.step}"}
        write_whole(output_dir / "best.json", json.dumps(described) + "\n")
