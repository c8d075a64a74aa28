"""CapFilt with tiny random models: drawing, ranking, resuming, and training on what comes out."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch

from blip2x_training import bootstrap_captions
from blip2x_training.capfilt import candidates as capfilt
from blip2x_training.capfilt import progress
from blip2x_training.capfilt.candidates import Candidate, SeededNucleus, best, candidates_of, score
from blip2x_training.data.formats import load_rows
from blip2x_training.models.loading import load_model
from tests.helpers.tiny import stage2, stage2_processor
from tests.helpers.training_parts import make_image_folder, make_vision_model, run_stage1


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Folder with data/, tower/, and stage1/, trained for long enough to tell one image from another."""
    root = tmp_path_factory.mktemp("capfilt")
    make_image_folder(root / "data", {"train": 10, "validation": 6})
    make_vision_model(root / "tower")
    run_stage1(root / "data", root / "tower", root / "stage1", "--max_steps", "8", "--save_steps", "8")
    return root


def bootstrap(parts: Path, out: Path, *flags: str) -> list[dict]:
    """Runs the script; returns the lines of train.jsonl."""
    fields = {
        "dataset": parts / "data",
        "text_column": "captions",
        "captioner": parts / "stage1",
        "output_dir": out,
        "num_captions": 4,
        "max_new_tokens": 6,
        "min_new_tokens": 2,
        "batch_size": 3,
    }
    bootstrap_captions.main([f"--{name}={value}" for name, value in fields.items()] + list(flags))
    target = out / "train.jsonl"
    return [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []


def web_of(parts: Path) -> dict[str, list[str]]:
    lines = (parts / "data" / "train" / "metadata.jsonl").read_text().splitlines()
    return {row["file_name"]: row["captions"] for row in map(json.loads, lines)}


def test_training_reads_what_comes_out(parts, tmp_path, capsys):
    rows = bootstrap(parts, tmp_path / "out", "--keep", "3")
    assert "10 images, 30 captions kept" in capsys.readouterr().out
    assert len({row["image"] for row in rows}) == 10
    for row in rows:
        assert Path(row["image"]).exists() and len(set(row["captions"])) == 3
        assert row["scores"] == sorted(row["scores"], reverse=True) and set(row["sources"]) <= {"web", "synthetic"}
        web = web_of(parts)[Path(row["image"]).name]
        assert all((text in web) == (source == "web") for text, source in zip(row["captions"], row["sources"]))
    assert {source for row in rows for source in row["sources"]} == {"web", "synthetic"}
    for number, dataset in enumerate((tmp_path / "out", tmp_path / "out" / "train.jsonl")):
        assert list(load_rows(str(dataset), "train")["captions"]) == [row["captions"] for row in rows]
        lines = run_stage1(dataset, parts / "tower", tmp_path / f"run{number}", "--max_steps", "1")
        assert lines[0]["loss"] > 0


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_a_stage2_captioner_with_a_stage1_scorer(parts, tmp_path, llm):
    processor = stage2_processor(bos=llm == "opt")
    processor.save_pretrained(tmp_path / "stage2")
    model = stage2(llm, std=0.3, image_token_index=processor.image_token_id, prompt_template="a photo of")
    model.save_pretrained(tmp_path / "stage2")
    flags = ("--captioner", str(tmp_path / "stage2"), "--keep", "6")
    rows = bootstrap(parts, tmp_path / "out", *flags, "--scorer", str(parts / "stage1"))
    drawn = {text for row in rows for text, source in zip(row["captions"], row["sources"]) if source == "synthetic"}
    assert len(drawn) > 10 and not any("photo of" in text or "<" in text for text in drawn)
    with pytest.raises(ValueError, match="holds a stage-2 model, which does not score pairs. Pass a stage-1 folder"):
        bootstrap(parts, tmp_path / "other", *flags)
    with pytest.raises(ValueError, match="'Question: {} Answer:', a question. Pass --prompt"):
        model.config.prompt_template = "Question: {} Answer:"
        model.save_pretrained(tmp_path / "stage2")
        bootstrap(parts, tmp_path / "other", *flags, "--scorer", str(parts / "stage1"))
    assert not (tmp_path / "other").exists()


def test_a_rigged_scorer_proves_that_the_best_are_kept(parts, tmp_path, monkeypatch):
    seen = {}

    def longest_is_best(model, processor, vision_embeds, candidates, rank_by, max_text_length):
        for row in candidates:
            for candidate in row:
                candidate.score = float(len(candidate.text))
            seen[len(seen)] = [(candidate.text, candidate.source) for candidate in row]

    monkeypatch.setattr(bootstrap_captions, "score", longest_is_best)
    rows = bootstrap(parts, tmp_path / "out")
    assert len(seen) == len(rows) == 10
    for number, row in enumerate(rows):
        ranked = sorted(seen[number], key=lambda pair: -len(pair[0]))
        assert list(zip(row["captions"], row["sources"])) == ranked[:2] and len(ranked) > 2
        assert row["scores"] == [len(text) for text in row["captions"]]


def test_scores_are_those_of_the_model(parts):
    model, processor = load_model(str(parts / "stage1"), "cpu")
    texts = [["A red square.", "a blue square"], ["a green square on the left", "a blue square", "square"]]
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    embeds = model.shared_model.get_vision_embeds(pixels)
    expected = {"itc": [], "itm": []}
    for number, row in enumerate(texts):
        for text in row:
            encoded = processor(text=[text.lower().replace(".", "")], return_tensors="pt")
            ids = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
            with torch.no_grad():
                image = model.get_image_features(pixels[number, None]).pooler_output
                expected["itc"].append(model.itc_scores(image, model.get_text_features(**ids).pooler_output).item())
                expected["itm"].append(model.itm_logits(pixels[number, None], **ids)[0, 1].item())
    expected["itc+itm"] = [a + b for a, b in zip(expected["itc"], expected["itm"])]
    for rank_by, wanted in expected.items():
        candidates = [[Candidate(text, "web") for text in row] for row in texts]
        score(model, processor, embeds, candidates, rank_by, 32)
        assert [one.score for row in candidates for one in row] == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 5) for value in expected["itc"]}) == 5  # the images and texts do differ in score


def test_equal_texts_count_once_and_ties_go_to_the_earlier():
    found = candidates_of(["A dog.", "two dogs", ""], ["a dog", "a cat", "a cat", " . ", "Two dogs!"])
    assert [(one.text, one.source) for one in found] == [("A dog.", "web"), ("two dogs", "web"), ("a cat", "synthetic")]
    tied = [Candidate("b", "web", 0.5), Candidate("c", "synthetic", 0.9), Candidate("a", "synthetic", 0.5)]
    assert [one.text for one in best(tied, 2)] == ["c", "b"] and len(best(tied, 9)) == 3


def test_nucleus_sampling_follows_the_probabilities():
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5)[:, None] / 1000
    scores = probabilities.log().expand(1000, -1)

    def shares(top_p: float, temperature: float = 1.0) -> list[float]:
        left = SeededNucleus(numbers, top_p, temperature)(torch.zeros(1000, 1), scores)
        assert ((left == 0).sum(1) == 1).all() and left.isinf().sum(1).eq(3).all()
        return (left == 0).float().mean(0).tolist()

    assert shares(1.0) == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=1e-3)
    assert shares(0.9) == pytest.approx([0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], abs=1e-3)
    assert shares(0.5) == pytest.approx([0, 1, 0, 0])
    squared = (probabilities**2 / (probabilities**2).sum()).tolist()
    assert shares(1.0, temperature=0.5) == pytest.approx(squared, abs=2e-3)
    last = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    assert SeededNucleus(last, 1.0, 1.0)(torch.zeros(1, 1), torch.randn(1, 50_000)).isfinite().sum() == 1


def test_captions_depend_on_seed_and_row_and_not_on_the_batch(parts, tmp_path):
    alone = bootstrap(parts, tmp_path / "alone", "--batch_size", "1", "--keep", "6")
    together = bootstrap(parts, tmp_path / "together", "--batch_size", "10", "--keep", "6")
    for one, other in zip(alone, together, strict=True):
        assert one["captions"] == other["captions"] and one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    other_seed = bootstrap(parts, tmp_path / "seed", "--seed", "1", "--keep", "6")
    assert [row["captions"] for row in other_seed] != [row["captions"] for row in alone]


def test_a_run_that_was_killed_goes_on_and_ends_the_same(parts, tmp_path, monkeypatch, capsys):
    whole = bootstrap(parts, tmp_path / "whole")
    out, drawn, lines = tmp_path / "out", [], progress.json_lines

    def cut_off(records):
        if records[0]["row"] == 6:  # killed while the third batch is being written
            path = out / ".progress" / "train.jsonl"
            path.write_bytes(path.read_bytes() + lines(records)[:-40])
            raise KeyboardInterrupt
        return lines(records)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress, "json_lines", cut_off)
        bootstrap(parts, out)
    assert not (out / "train.jsonl").exists()
    with pytest.raises(ValueError, match=r"made otherwise \(top_p was 0.9, is now 0.8\)"):
        bootstrap(parts, out, "--top_p", "0.8")
    numbers = capfilt.numbers_of
    monkeypatch.setattr(bootstrap_captions, "numbers_of", lambda *given: drawn.append(given[1]) or numbers(*given))
    assert bootstrap(parts, out) == whole and drawn == [6, 7, 8, 9]
    assert (out / "train.jsonl").read_bytes() == (tmp_path / "whole" / "train.jsonl").read_bytes()
    assert bootstrap(parts, out) == whole and drawn == [6, 7, 8, 9]  # finished: nothing is drawn again
    assert bootstrap(parts, out, "--top_p", "0.1", "--overwrite_output_dir") != whole and len(drawn) == 14


def test_images_that_cannot_be_read_are_left_out_and_named(parts, tmp_path, capsys):
    shutil.copytree(parts / "data", tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes(b"no image")
    flags = ("--dataset", str(tmp_path / "data"))
    with pytest.raises(ValueError, match="1 of 10 rows are left out after .*, above --max_skip_fraction 0.01"):
        bootstrap(parts, tmp_path / "out", *flags)
    assert "3.png" in (tmp_path / "out" / "skipped.jsonl").read_text()
    rows = bootstrap(parts, tmp_path / "out", *flags, "--max_skip_fraction", "0.1")
    assert len(rows) == 9 and not any(row["image"].endswith("/3.png") for row in rows)
    assert "images left out: 1" in capsys.readouterr().out
    (report,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert (
        report["name"].endswith("3.png")
        and report["split"] == "train"
        and report["reason"].startswith("no known image format (")
    )
    others = bootstrap(parts, tmp_path / "whole")  # the other images' captions are what they would have been
    assert [row["captions"] for row in rows] == [r["captions"] for r in others if not r["image"].endswith("/3.png")]
    assert load_rows(str(tmp_path / "out"), "train")[0]["captions"] == rows[0]["captions"]


def test_embedded_images_and_no_captions_of_their_own(parts, tmp_path):
    rows = load_rows(str(parts / "data"), "train[:5]").cast_column("image", datasets.Image(decode=False))
    embedded = [{"picture": {"bytes": Path(r["image"]["path"]).read_bytes(), "path": None}} for r in rows]
    features = datasets.Features({"picture": datasets.Image()})
    datasets.Dataset.from_list(embedded, features=features).to_parquet(tmp_path / "train.parquet")
    flags = ("--image_column", "picture", "--text_column", "null", "--keep", "2")
    bootstrap(parts, tmp_path / "out", "--dataset", str(tmp_path / "train.parquet"), *flags)
    written = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert set(written.column_names) == {"image", "captions", "scores", "sources"} and len(written) == 5
    assert all(row["image"].size == (48, 40) and set(row["sources"]) == {"synthetic"} for row in written)
    assert run_stage1(tmp_path / "out", parts / "tower", tmp_path / "run", "--max_steps", "1")[0]["loss"] > 0


def test_wrong_fields_are_reported_together(parts, tmp_path):
    with pytest.raises(ValueError, match="(?s)--captioner is missing.*--rank_by is 'clip'.*--top_p is 2.0"):
        bootstrap_captions.main(["--dataset=x", "--output_dir=y", "--top_p=2", "--rank_by=clip"])
    with pytest.raises(ValueError, match="tower holds a clip_vision_model model"):
        bootstrap(parts, tmp_path / "out", "--captioner", str(parts / "tower"))
