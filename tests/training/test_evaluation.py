"""run_evaluation.py end to end on tiny checkpoints and small files of the official formats."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from blip2x_training import run_evaluation
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.evaluation import journal
from blip2x_training.evaluation.fields import EvaluationArguments
from blip2x_training.evaluation.lemmatizer import load_lemmatizer
from blip2x_training.evaluation.published import PUBLISHED
from blip2x_training.metrics.caption.scores import caption_scores
from blip2x_training.metrics.vqa_accuracy.scores import vqa_accuracy
from blip2x_training.models.lora import LoraCheckpoint, add_lora
from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xProcessor
from modeling_blip2x.convert import convert
from tests.helpers.evaluation_parts import (
    CAPTIONS,
    coco_file,
    evaluate,
    make_photos,
    make_stage1,
    make_stage2,
    put,
    texts_of,
)

PRESETS = sorted((Path(__file__).parents[2] / "training" / "configs" / "evaluation").glob("*.yaml"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    make_photos(root / "photos")
    make_stage1(root / "stage1")
    make_stage2(root / "opt")
    make_stage2(root / "t5", "t5")
    coco_file(root / "captions.json")
    return root


def captions(parts: Path, out: Path, **fields) -> tuple[dict, list[dict]]:
    fields = {"model": parts / "opt", "data": parts / "captions.json", "max_new_tokens": 6, **fields}
    return evaluate(out, task="caption", image_folder=parts / "photos", **fields)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_read_and_pins_its_protocol(path):
    args = parse_arguments(
        EvaluationArguments, ["--config", str(path), "--model", "m", "--data", "d", "--output_dir", "o"]
    )
    assert args.benchmark in PUBLISHED and args.split
    text = path.read_text()
    if args.task in ("caption", "vqa"):
        assert args.num_beams == 5 and args.length_penalty == (1.0 if args.task == "caption" else -1.0)
        assert args.max_new_tokens == (30 if args.task == "caption" else 10)
        for name in ("prompt", "num_beams", "length_penalty", "min_new_tokens", "max_new_tokens", "image_size"):
            assert f"\n{name}:" in text, name
    if args.task == "retrieval":
        assert args.rerank_k == 128 and args.score_mode == "itm+itc"
    if path.stem == "coco_caption_opt":
        assert (args.min_new_tokens, args.repetition_penalty) == (8, 1.15)


def test_captions_are_scored_and_written_as_the_official_server_takes_them(parts, tmp_path, capsys):
    metrics, records = captions(parts, tmp_path / "out", benchmark="coco_caption", report=True, num_beams=2)
    expected = caption_scores(texts_of(records), list(CAPTIONS.values()))
    assert {name: metrics["metrics"][name] for name in expected} == pytest.approx(
        {name: 100 * value for name, value in expected.items()}
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == [{"image_id": n, "caption": t} for n, t in zip(CAPTIONS, texts_of(records))]
    printed = capsys.readouterr().out
    for name, value in metrics["protocol"].items():
        assert name in printed and str(value) in printed
    assert metrics["protocol"]["prompt"] == "'a photo of'" and metrics["published"] and "ViT-g OPT-2.7B" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 4 and 'src="/' not in page and "http" not in page
    assert "ViT-g OPT-2.7B" in page and "Where the queries look: 00000000000" in page and CAPTIONS[2][0] in page
    assert 'class="score good"' not in page and 'class="score bad"' not in page  # CIDEr is no matter of right and wrong
    assert Image.open(tmp_path / "out" / "report.png").width > 800


def test_texts_are_those_of_the_model_alone(parts, tmp_path):
    _, records = captions(parts, tmp_path / "out", batch_size=3)
    model = Blip2xForConditionalGeneration.from_pretrained(parts / "opt").eval()
    processor = Blip2xProcessor.from_pretrained(parts / "opt")
    for number, text in zip(CAPTIONS, texts_of(records)):
        image = Image.open(parts / "photos" / f"{number:012d}.jpg")
        inputs = processor(images=image, text="a photo of", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=1, do_sample=False)
        assert text == processor.batch_decode_new(ids, inputs["input_ids"])[0]
    assert len(set(texts_of(records))) > 1


def test_nocaps_by_domain_and_its_test_images(parts, tmp_path):
    domains = ["in-domain", "near-domain", "in-domain"]
    data = coco_file(tmp_path / "nocaps_val.json", domain=domains)
    metrics, records = captions(parts, tmp_path / "out", data=data, benchmark="nocaps", report=True)
    inside = [0, 2]
    expected = caption_scores([texts_of(records)[n] for n in inside], [list(CAPTIONS.values())[n] for n in inside])
    assert metrics["metrics"]["CIDEr_in"] == pytest.approx(100 * expected["CIDEr"])
    assert {"CIDEr", "Bleu_4_near"} <= metrics["metrics"].keys() and "Bleu_4_out" not in metrics["metrics"]
    assert "CIDEr_near" not in metrics["metrics"] and "single image" in " ".join(metrics["notes"])
    content = json.loads(Path(data).read_text())
    del content["annotations"]
    metrics, blind = captions(parts, tmp_path / "test", data=put(tmp_path / "nocaps_test_image_info.json", content))
    assert texts_of(blind) == texts_of(records) and not metrics["metrics"]
    assert metrics["counts"]["without_reference"] == 3 and "evaluation server" in metrics["notes"][0]


def test_transformers_checkpoint_by_folder_gives_what_the_converted_one_gives(parts, tmp_path):
    model = make_stage2(tmp_path / "eva", tower="eva", qformer={"use_qformer_text_input": False})
    convert(model, str(tmp_path / "theirs"), to="transformers")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "blip-2"
    _, ours = captions(parts, tmp_path / "1", model=model)
    _, theirs = captions(parts, tmp_path / "2", model=tmp_path / "theirs")
    assert texts_of(ours) == texts_of(theirs) and any(texts_of(ours))


def test_lora_folder_gives_what_the_merged_model_gives(parts, tmp_path):
    model = Blip2xForConditionalGeneration.from_pretrained(parts / "opt")
    processor = Blip2xProcessor.from_pretrained(parts / "opt")
    add_lora(model, "lm")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    LoraCheckpoint(model, merged_processor=processor).save_pretrained(tmp_path / "lora")
    processor.save_pretrained(tmp_path / "lora")
    _, plain = captions(parts, tmp_path / "1")
    _, adapted = captions(parts, tmp_path / "2", model=tmp_path / "lora")
    _, merged = captions(parts, tmp_path / "3", model=tmp_path / "lora" / "merged")
    assert texts_of(adapted) == texts_of(merged) != texts_of(plain)


def test_checkpoint_by_hub_id(parts, tmp_path):
    """The id is looked up as the hub's client does; what it had downloaded before is found offline."""
    repository = tmp_path / "home" / "hub" / "models--someone--tiny"
    shutil.copytree(parts / "opt", repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    flags = ["--task=caption", f"--data={parts / 'captions.json'}", "--split=all", f"--image_folder={parts / 'photos'}"]
    flags += ["--max_new_tokens=6", "--num_beams=1", "--java_metrics=false", "--report=false"]
    script = Path(run_evaluation.__file__)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for model in ("someone/tiny", str(parts / "opt")):
        out = tmp_path / Path(model).name
        command = [sys.executable, str(script), f"--model={model}", *flags, f"--output_dir={out}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    by_id, by_folder = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("tiny", "opt"))
    assert by_id == by_folder and any(texts_of(by_id))


def test_prompts_by_language_model_and_checkpoint(parts, tmp_path):
    rows = [{"image": f"{n:012d}.jpg", "question": "what colour is it ?", "answer": "red"} for n in CAPTIONS]
    data = put(tmp_path / "rows.json", rows)
    fields = {"task": "vqa", "data": data, "image_folder": parts / "photos", "max_new_tokens": 3}
    for model, prompt in (("opt", "Question: {} Answer:"), ("t5", "Question: {} Short answer:")):
        metrics, _ = evaluate(tmp_path / model, model=parts / model, **fields)
        assert metrics["protocol"]["prompt"] == repr(prompt)
    own = make_stage2(tmp_path / "own", prompt_template="{} ?")
    assert evaluate(tmp_path / "out1", model=own, **fields)[0]["protocol"]["prompt"] == "'{} ?'"
    protocol = captions(parts, tmp_path / "out2", model=own)[0]["protocol"]
    # A template with {} is of questions and fits no caption.
    assert (protocol["prompt"], protocol["prompt_from"]) == ("'a photo of'", "the paper's")


def test_a_model_trained_without_a_prompt_is_asked_without_one(parts, tmp_path, capsys):
    trained = make_stage2(tmp_path / "trained", prompt_template="")
    protocol = captions(parts, tmp_path / "out", model=trained)[0]["protocol"]
    assert (protocol["prompt"], protocol["prompt_from"]) == ("''", "the checkpoint was trained with it")
    assert "the checkpoint was trained with it" in capsys.readouterr().out
    protocol = captions(parts, tmp_path / "told", model=trained, prompt="a")[0]["protocol"]
    assert (protocol["prompt"], protocol["prompt_from"]) == ("'a'", "--prompt")


def test_a_scorer_scores_captions(parts, tmp_path):
    metrics, records = captions(parts, tmp_path / "1", scorer=parts / "stage1")
    assert metrics["metrics"]["itc_score"] == pytest.approx(sum(one["itc_score"] for one in records) / 3)
    single, _ = captions(parts, tmp_path / "2", scorer=parts / "stage1", batch_size=1)
    for name in ("itc_score", "itc_score_references"):
        assert metrics["metrics"][name] == pytest.approx(single["metrics"][name], abs=1e-3)
    assert -100 <= metrics["metrics"]["itc_score"] <= 100


def test_batch_size_does_not_change_predictions(parts, tmp_path):
    questions = ["what colour is the square in this picture ?", "is it a dog ?", "how many ?"]
    rows = [{"image": f"{n:012d}.jpg", "question": q, "answer": "red"} for n in CAPTIONS for q in questions]
    data = put(tmp_path / "rows.json", rows)
    found = []
    for llm in ("opt", "t5"):
        fields = {"task": "vqa", "model": parts / llm, "data": data, "image_folder": parts / "photos", "num_beams": 3}
        runs = [evaluate(tmp_path / f"{llm}{size}", **fields, batch_size=size)[1] for size in (1, 4, 9)]
        assert texts_of(runs[0]) == texts_of(runs[1]) == texts_of(runs[2])
        found.append(len(set(texts_of(runs[0]))))
    assert max(found) > 3


def test_a_killed_evaluation_goes_on(parts, tmp_path, monkeypatch, capsys):
    _, whole = captions(parts, tmp_path / "whole", batch_size=1)
    add, written = journal.Journal.add, []

    def killed_after_two(self, results):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(list(results))
        add(self, results)

    monkeypatch.setattr(journal.Journal, "add", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        captions(parts, tmp_path / "out", batch_size=1)
    monkeypatch.setattr(
        journal.Journal, "add", lambda self, results: (written.append(list(results)), add(self, results))
    )
    path = tmp_path / "out" / ".progress" / "results.0.jsonl"
    path.write_text(path.read_text() + '[2, {"predic')  # cut off in the middle of a line
    _, records = captions(parts, tmp_path / "out", batch_size=1)
    assert written == [[0], [1], [2]] and records == whole
    assert "Going on after 2 of 3" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="another evaluation.*max_new_tokens was 6, is now 5.*--overwrite_output_dir"):
        captions(parts, tmp_path / "out", max_new_tokens=5)
    assert captions(parts, tmp_path / "out", max_new_tokens=5, overwrite_output_dir=True)[0]["counts"]["samples"] == 3


def test_ctrl_c_says_that_the_same_command_goes_on(parts, tmp_path):
    """It is pressed while the script waits for a file that never comes."""
    endless = tmp_path / "candidates.json"
    os.mkfifo(endless)
    flags = ["--task=caption", f"--model={parts / 'opt'}", f"--data={parts / 'captions.json'}", "--split=all"]
    flags += [f"--image_folder={parts / 'photos'}", f"--candidates={endless}", f"--output_dir={tmp_path / 'out'}"]
    command = [sys.executable, str(Path(run_evaluation.__file__)), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        writer = None
        while writer is None and process.poll() is None:
            try:
                writer = os.open(endless, os.O_WRONLY | os.O_NONBLOCK)  # refused until the script has opened it
            except OSError:
                time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=600)[1]
    os.close(writer)
    assert process.returncode == 130 and "The same command goes on" in said and "Traceback" not in said


def test_what_cannot_be_compared_is_said(parts, tmp_path):
    captions_of = {1: ["a red square", "the same text"], 2: ["a green square", "the same text"], 3: ["a blue dog"]}
    data = coco_file(tmp_path / "captions.json", captions_of)
    fields = {"model": parts / "stage1", "data": data, "image_folder": parts / "photos", "score_mode": "itc"}
    metrics, _ = evaluate(tmp_path / "1", task="retrieval", benchmark="coco_retrieval", **fields)
    assert any(note.startswith("Only 3 images: drawing lots reaches i2t_r1 33") for note in metrics["notes"])
    assert "Texts that several images have: 1. Finding that of another image counts as wrong." in metrics["notes"]
    metrics, _ = captions(parts, tmp_path / "2", benchmark="coco_caption")
    assert "3 samples; the published figures are of 5000: not comparable." in metrics["notes"]
    assert not any("comparable" in note for note in captions(parts, tmp_path / "3")[0]["notes"])


def test_one_image_only_has_no_cider(parts, tmp_path):
    metrics, _ = captions(parts, tmp_path, split="all[:1]")
    assert "CIDEr" not in metrics["metrics"] and "single image" in " ".join(metrics["notes"])


def test_what_is_missing_is_counted_or_an_error(parts, tmp_path):
    content = json.loads((parts / "captions.json").read_text())
    content["images"].append({"id": 9, "file_name": "missing.jpg"})
    (tmp_path / "photos").mkdir()
    for path in (parts / "photos").iterdir():
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "photos" / "broken.jpg").write_bytes((parts / "photos" / f"{1:012d}.jpg").read_bytes()[:300])
    content["images"].append({"id": 10, "file_name": "broken.jpg"})
    content["annotations"] += [
        {"image_id": 9, "id": 90, "caption": "a"},
        {"image_id": 10, "id": 91, "caption": "a dog"},
    ]
    data, fields = put(tmp_path / "data.json", content), {"image_folder": tmp_path / "photos", "max_skip_fraction": 0.5}
    whole, records = captions(parts, tmp_path / "whole")
    for task in ("caption", "retrieval"):
        model = parts / ("opt" if task == "caption" else "stage1")
        common = {"task": task, "model": model, "max_new_tokens": 6}
        metrics, part = evaluate(tmp_path / task, data=data, **common, **fields)
        assert metrics["counts"]["skipped"] == 2 and metrics["counts"]["scored"] == 3
        skipped = json.loads((tmp_path / task / "skipped.json").read_text())
        assert {Path(one["name"]).name for one in skipped} == {"missing.jpg", "broken.jpg"}
        if task == "caption":
            assert metrics["metrics"] == whole["metrics"] and texts_of(part) == texts_of(records)
        with pytest.raises(ValueError, match="of 5 rows cannot be used, above --max_skip_fraction 0"):
            evaluate(tmp_path / f"{task}2", data=data, **common, image_folder=tmp_path / "photos")
    content["annotations"].append({"image_id": 77, "id": 92, "caption": "a dog"})
    with pytest.raises(
        ValueError, match="1 captions are of images that `images` does not list, the first of image_id 77"
    ):
        captions(parts, tmp_path / "out", data=put(tmp_path / "data.json", content))


def test_wrong_fields_and_checkpoints_are_named(parts, tmp_path):
    with pytest.raises(ValueError, match="has no split 'holdout', only train, all. Name one of these: --split\\.$"):
        captions(parts, tmp_path, split="holdout")
    with pytest.raises(ValueError, match=r"no checkpoint, but has some below it: \S+/opt, .*/stage1.*Give one"):
        captions(parts, tmp_path, model=parts)
    with pytest.raises(ValueError, match="--task vqa needs a checkpoint of stage 2"):
        evaluate(tmp_path, task="vqa", model=parts / "stage1", data=parts / "captions.json")
    with pytest.raises(ValueError, match="--task retrieval needs a checkpoint of stage 1"):
        evaluate(tmp_path, task="retrieval", model=parts / "opt", data=parts / "captions.json")
    with pytest.raises(
        ValueError, match=r"(?s)4 wrong field.*--task is 'captions'; choose.*--score_mode is 'x'.*--num_beams is 0"
    ):
        parse_arguments(
            EvaluationArguments,
            ["--task=captions", "--num_beams=0", "--score_mode=x", "--data=d", "--output_dir=o"],
        )
    assert not (tmp_path / "metrics.json").exists()


def install(monkeypatch, **modules) -> None:
    """Let these modules, and no other, be what `import` and `find_spec` find of the two that lemmatise."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in modules or None)


def no_data(*_):
    raise OSError("its data is not here")


def test_lemmatizer_of_what_is_installed(monkeypatch):
    token = types.SimpleNamespace
    words = {
        "dogs": token(lemma_="dog", pos_="NOUN", text="dogs"),
        "sitting": token(lemma_="sit", pos_="VERB", text="sitting"),
        "better": token(lemma_="good", pos_="ADJ", text="better"),
    }
    spacy = types.SimpleNamespace(load=lambda name: lambda text: [words[word] for word in text.split()])
    forms = {("dogs", "n"): "dog", ("sitting", "v"): "sit", ("dogs", "v"): "dog after"}

    def nltk(lemmatize: Callable) -> dict:
        stem = types.SimpleNamespace(WordNetLemmatizer=lambda: types.SimpleNamespace(lemmatize=lemmatize))
        return {"nltk": types.SimpleNamespace(stem=stem), "nltk.stem": stem}

    by_wordnet = nltk(lambda word, pos="n": forms.get((word, pos), word))
    install(monkeypatch, spacy=spacy, **nltk(no_data))
    assert load_lemmatizer()("better dogs sitting") == "better dog sit"  # adjectives stay as they are
    install(monkeypatch, spacy=types.SimpleNamespace(load=no_data), **by_wordnet)
    assert load_lemmatizer()("better dogs sitting") == "better dog sit"
    for found in ({}, {"spacy": types.SimpleNamespace(load=no_data)}, nltk(no_data)):
        install(monkeypatch, **found)
        with pytest.raises(ValueError, match="--lemmatize needs spaCy .*Install one, or drop the flag"):
            load_lemmatizer()


def test_lemmatized_answers_are_scored_and_the_written_ones_kept(parts, tmp_path, monkeypatch):
    rows = [{"image": f"{n:012d}.jpg", "question": "what colour ?", "answer": "red"} for n in CAPTIONS]
    fields = {"task": "vqa", "model": parts / "opt", "data": put(tmp_path / "rows.json", rows), "max_new_tokens": 2}
    metrics, plain = evaluate(tmp_path / "plain", image_folder=parts / "photos", **fields)
    assert metrics["metrics"]["exact_match"] == 0 and all(texts_of(plain))
    red = [types.SimpleNamespace(lemma_="red", pos_="NOUN", text="reds")]
    install(monkeypatch, spacy=types.SimpleNamespace(load=lambda name: lambda text: red))
    metrics, records = evaluate(tmp_path / "out", image_folder=parts / "photos", lemmatize=True, **fields)
    assert metrics["metrics"]["exact_match"] == 100 and texts_of(records) == texts_of(plain)
    assert metrics["protocol"]["lemmatize"] is True


def test_model_card_is_filled_and_filled_again(parts, tmp_path):
    model = make_stage1(tmp_path / "model")
    put(tmp_path / "model" / "config.yaml", "dataset: [/some/where/flickr8k]\ntrain_split: train\n")
    fields = {"model": model, "model_card": True, "license": "mit"}
    captions(parts, tmp_path / "1", **fields)
    captions(parts, tmp_path / "1", **fields)
    evaluate(
        tmp_path / "2", task="retrieval", data=parts / "captions.json", image_folder=parts / "photos", model=model,
        model_card=True,
    )  # fmt: skip
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (tmp_path / "model" / "model_card.md").read_text() == (tmp_path / "model" / "README.md").read_text()
    template = Path(__file__).parents[2].joinpath("model_card.md").read_text()
    headings = [line for line in template.splitlines() if line.startswith("## ")]
    assert [line for line in card.text.splitlines() if line.startswith("## ")] == headings
    assert card.text.count("### Captions: model on captions.json, all") == 1 and "### Retrieval: model" in card.text
    assert card.data.license == "mit" and "`flickr8k`, split `train`" in card.text and "/some" not in card.text
    kinds = [result.metric_type for result in card.data.eval_results]
    assert kinds.count("CIDEr") == 1 and "i2t_r1" in kinds
    own = "---\nlicense: apache-2.0\n---\n\n# Mine\n\nMy words.\n\n## Figures\n\nOld ones.\n\n## Limits\n\nMany.\n"
    put(tmp_path / "model" / "README.md", own)
    captions(parts, tmp_path / "1", model=model, model_card=True)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    for words in ("My words.", "Old ones.", "### Captions: model", "## Limits\n\nMany."):
        assert words in card.text
    assert card.data.license == "apache-2.0"


def test_vqa_accuracy_by_type(parts, tmp_path):
    asked = [(1, "what colour ?", 10), (2, "how many ?", 20), (3, "is it a dog ?", 30)]
    questions = {"questions": [{"image_id": i, "question": q, "question_id": n} for i, q, n in asked]}
    questions |= {"data_subtype": "val2014"}
    model = {
        "task": "vqa",
        "model": parts / "opt",
        "image_folder": parts / "photos",
        "max_new_tokens": 2,
        "report": True,
    }
    alone = put(tmp_path / "questions.json", questions)
    metrics, blind = evaluate(tmp_path / "test-dev", data=alone, benchmark="vqav2", **model)
    assert not metrics["metrics"] and metrics["counts"]["without_reference"] == 3
    results = json.loads((tmp_path / "test-dev" / "results.json").read_text())
    assert results == [{"question_id": n, "answer": t} for (_, _, n), t in zip(asked, texts_of(blind))]
    answers = [[text] * 4 + ["other"] * 6 for text in texts_of(blind)]
    answers[1] = ["other"] * 10
    annotations = [
        {
            "image_id": i, "question_id": n, "question_type": q.split()[0], "answer_type": "other",
            "answers": [{"answer_id": k + 1, "answer": a} for k, a in enumerate(given)],
        }
        for (i, q, n), given in zip(asked, answers)
    ]  # fmt: skip
    data = f"{alone},{put(tmp_path / 'annotations.json', {'annotations': annotations})}"
    metrics, records = evaluate(tmp_path / "val", data=data, benchmark="okvqa", **model)
    assert texts_of(records) == texts_of(blind)
    assert metrics["metrics"]["vqa_accuracy"] == pytest.approx(vqa_accuracy(texts_of(records), answers)["overall"])
    assert metrics["metrics"]["question_type/how"] == 0 and metrics["metrics"]["question_type/is"] == 100
    page = (tmp_path / "val" / "report.html").read_text()
    assert "By question type" in page and "other ×10" in page and f"other ×6, {texts_of(records)[0]} ×4" in page
    assert (
        "Right 2, wrong 1 of 3 answers" in page and "Right" not in (tmp_path / "test-dev" / "report.html").read_text()
    )
