"""Two gloo processes predict what one does, with an uneven split, and go on with what other numbers of processes left."""

import json
from pathlib import Path

from tests.helpers.evaluation_parts import coco_file, make_photos, make_stage1, make_stage2, put
from tests.helpers.ranks import run


def test_two_processes_predict_as_one(tmp_path):
    photos = make_photos(tmp_path / "photos", count=7)  # batches of 2: four, of which the last has one
    captions = {number: [f"a {'red' if number % 2 else 'green'} dog {number}", "a dog"] for number in range(1, 8)}
    coco = coco_file(tmp_path / "captions.json", captions)
    rows = [{"image": f"{n:012d}.jpg", "question": f"is it {n} ?", "answer": "yes"} for n in captions]
    questions = put(tmp_path / "rows.json", rows)
    stage1, opt = make_stage1(tmp_path / "stage1"), make_stage2(tmp_path / "opt")
    common = [f"--image_folder={photos}", "--split=all", "--batch_size=2", "--java_metrics=false", "--max_new_tokens=4"]
    jobs = {
        "caption": ["--task=caption", f"--model={opt}", f"--data={coco}", f"--scorer={stage1}"],
        "vqa": ["--task=vqa", f"--model={opt}", f"--data={questions}"],
        "retrieval": ["--task=retrieval", f"--model={stage1}", f"--data={coco}", "--rerank_k=3"],
    }

    def evaluate(processes: int, out: Path) -> None:
        scripts = [("run_evaluation", [*flags, *common, f"--output_dir={out / name}"]) for name, flags in jobs.items()]
        run(processes, scripts)

    for processes in (1, 2):
        evaluate(processes, tmp_path / str(processes))
    one, two = tmp_path / "1", tmp_path / "2"
    for name in jobs:
        first, second = (json.loads((out / name / "metrics.json").read_text()) for out in (one, two))
        assert first["metrics"] == second["metrics"] and first["counts"] == second["counts"]
        assert second["counts"]["samples"] == 7
        predictions = [(out / name / "predictions.json").read_text() for out in (one, two)]
        assert predictions[0] == predictions[1]
        lines = [path.read_text().splitlines() for path in sorted((two / name / ".progress").glob("*.jsonl"))]
        assert len(lines) == 2 and all(lines), "both processes had a share"
        assert sorted(json.loads(line)[0] for part in lines for line in part) == list(range(7))
    # One process goes on with half of what two have left.
    left = two / "caption" / ".progress" / "results.1.jsonl"
    kept = left.read_text().splitlines(keepends=True)
    left.write_text("".join(kept[:2]))
    evaluate(1, two)
    assert (two / "caption" / "predictions.json").read_text() == (one / "caption" / "predictions.json").read_text()
