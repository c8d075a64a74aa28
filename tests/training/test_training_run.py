"""The scripts themselves, on twenty generated images: both stages, resuming, faults, LoRA."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
)

from blip2x_training import caption_language, pretrain_stage1
from blip2x_training.data.caption_dataset import CaptionDataset, Sampling
from blip2x_training.data.collators import language_collator
from blip2x_training.data.formats import load_rows
from blip2x_training.engine.checkpoint import read_state
from blip2x_training.evaluation import writing
from tests.helpers.tiny import image
from tests.helpers.training_parts import disable_adapters, make_image_folder, make_language_model, make_vision_model
from tests.helpers.training_runs import interrupted_after, metrics, stage1, stage2, without_speed


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Folder with data/, tower/, opt/, t5/, llama/, and a finished stage 1 in stage1/. Tests read it and write elsewhere."""
    root = tmp_path_factory.mktemp("training")
    make_image_folder(root / "data", {"train": 20, "validation": 6})
    make_vision_model(root / "tower")
    for llm in ("opt", "t5", "llama"):
        make_language_model(root / llm, llm)
    stage1(
        root,
        root / "stage1",
        "--max_steps",
        "6",
        "--eval_split",
        "validation",
        "--eval_steps",
        "3",
        "--save_total_limit",
        "1",
    )
    return root


def test_stage1_run_folder_is_complete(parts, capsys):
    out = parts / "stage1"
    lines = metrics(out)
    training, validation = [line for line in lines if "lr" in line], [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6] and [line["step"] for line in validation] == [3, 6]
    assert training[0].keys() >= {
        "loss",
        "loss_itc",
        "loss_itm",
        "loss_itg",
        "lr",
        "temperature",
        "itm_accuracy",
        "samples_per_second",
        "peak_memory_mb",
    }
    assert (
        validation[0].keys() >= {"i2t_r1", "t2i_r10", "itm_balanced_accuracy_hard", "eval_cider"}
        and "i2t_r1_itm" in validation[1]
    )
    assert training[0]["loss"] == pytest.approx(
        sum(training[0][f"loss_{part}"] for part in ("itc", "itm", "itg")), abs=1e-4
    )
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step_6"]
    model, processor = AutoModelForPreTraining.from_pretrained(out), AutoProcessor.from_pretrained(out)
    batch = processor(images=[image()], text=["a red square"], return_tensors="pt")
    assert torch.isfinite(model(**batch).loss)
    tower = load_file(parts / "tower" / "model.safetensors")
    saved = load_file(out / "model.safetensors")
    frozen = {
        name.removeprefix("model.vision_model."): tensor for name, tensor in saved.items() if ".vision_model." in name
    }
    same = [
        name
        for name in frozen
        if any(name.endswith(other) and torch.equal(frozen[name], tower[other]) for other in tower)
    ]
    assert len(same) == len(frozen) > 10, "the frozen tower has changed"

    stage1(parts, out, "--max_steps", "6")
    assert "is finished: 6 steps" in capsys.readouterr().out and metrics(out) == lines


@pytest.mark.parametrize("llm, prompt", [("opt", "a photo of"), ("t5", "")])
def test_stage2_from_stage1(parts, tmp_path, llm, prompt, capsys, monkeypatch):
    """It starts from stage 1's Q-Former, learns, leaves the language model alone, and validates what it saves."""
    texts, figures = [], writing.caption_figures
    monkeypatch.setattr(writing, "caption_figures", lambda *given: texts.append(given[0]) or figures(*given))
    flags = ["--max_steps", "6", "--eval_split", "validation", "--eval_steps", "3", "--prompt", prompt]
    lines = stage2(parts, tmp_path / "out", llm, *flags)
    assert "Hand-over from stage 1" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")

    halfway, end = (line for line in lines if "eval_loss" in line)
    assert end["eval_loss"] < halfway["eval_loss"]  # over the same rows, with dropout off
    loss, accuracy = figures_row_by_row(model, processor, parts / "data", prompt)
    assert end["eval_loss"] == pytest.approx(loss, rel=1e-5) and end["eval_token_accuracy"] == pytest.approx(accuracy)
    images = [Image.open(parts / f"data/validation/{number}.png").convert("RGB") for number in range(6)]
    inputs = processor(images=images, text=[prompt] * 6, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert texts[-1] == processor.batch_decode_new(ids, inputs["input_ids"]) and (llm == "t5" or all(texts[-1]))

    before, after = load_file(parts / llm / "model.safetensors"), model.language_model.state_dict()
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name][: len(tensor)], tensor) for name, tensor in before.items())
    first, second = (load_file(folder / "model.safetensors") for folder in (parts / "stage1", tmp_path / "out"))
    moved = [(second[k] - first[k]).abs().max() for k in first.keys() & second.keys() if ".qformer.layers." in k]
    assert len(moved) > 20 and 0 < max(moved) < 0.01  # six steps of Adam at 0.001; new weights would be 0.02 apart


def figures_row_by_row(model, processor, data: Path, prompt: str) -> tuple[float, float]:
    """Loss and token accuracy over all supervised tokens of the validation split, from one row at a time."""
    collate = language_collator(model, processor, 32, cropped=False)
    rows = CaptionDataset(
        load_rows(str(data), "validation"),
        text_column="captions",
        prompt=prompt,
        sampling=Sampling(seed=42, draw_text=False),
    )
    loss, right, count = 0.0, 0, 0
    for row in range(len(rows)):
        batch = collate([rows[0, row]])
        with torch.no_grad():
            outputs = model(**batch)
        labels, predicted = batch["labels"][0], outputs.logits[0].argmax(-1)
        if not model.config.is_encoder_decoder:
            labels, predicted = labels[1:], predicted[:-1]
        supervised = labels != -100
        loss += outputs.loss.item() * supervised.sum().item()
        right += (predicted == labels)[supervised].sum().item()
        count += supervised.sum().item()
    return loss / count, right / count


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_run_equals_uninterrupted_one(parts, tmp_path, monkeypatch, stage):
    flags = ["--max_steps", "10", "--gradient_accumulation_steps", "2"]  # dropout, crops and drawn captions are on
    flags += [
        "--position_dropout",
        "0.3",
        "--feature_dropout",
        "0.2",
        *(["--word_dropout", "0.2"] if stage == 1 else []),
    ]

    def run(out):
        return stage1(parts, out, *flags) if stage == 1 else stage2(parts, out, "opt", *flags)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(5, patch)
        run(tmp_path / "halves")
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    resumed = run(tmp_path / "halves")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert without_speed(resumed) == without_speed(whole)


def test_faults_are_clear_and_leave_checkpoints_alone(parts, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(parts / "stage1", out)
    (out / "checkpoints" / "step_6" / "trained.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="trained.safetensors is missing or damaged.*overwrite_output_dir"):
        stage1(parts, out, "--max_steps", "8")
    shutil.rmtree(out)
    shutil.copytree(parts / "stage1", out)
    with pytest.raises(ValueError, match="belongs to another model"):
        stage1(parts, out, "--max_steps", "8", "--num_query_tokens", "5")


def test_a_mistake_leaves_no_folder_and_no_earlier_run_harmed(parts, tmp_path):
    with pytest.raises(ValueError, match="has no split 'test', only train, validation"):
        stage1(parts, tmp_path / "new", "--max_steps", "1", "--eval_split", "test")
    assert not (tmp_path / "new").exists()
    out = tmp_path / "out"
    shutil.copytree(parts / "stage1", out)
    before = metrics(out)
    with pytest.raises(ValueError, match="--init_from .*tower holds a clip_vision_model model"):
        stage2(parts, out, "opt", "--init_from", str(parts / "tower"), "--overwrite_output_dir")
    assert metrics(out) == before and (out / "model.safetensors").exists()
    with pytest.raises(ValueError, match="--language_model is /nowhere: there is no such file or folder"):
        stage2(parts, out, "opt", "--language_model", "/nowhere")


def test_continuing_with_other_fields_says_so_and_a_short_run_warms_up_in_a_tenth(parts, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(parts / "stage1", out)
    lines = stage1(parts, out, "--max_steps", "40", "--warmup_steps", "2000", "--learning_rate", "2e-3")
    said = capsys.readouterr().out
    assert "--max_steps 6 -> 40" in said and "--learning_rate 0.001 -> 0.002" in said and "--seed" not in said
    assert "--warmup_steps is 2000, but the run has 40 steps: warming up for 4 instead" in said
    assert max(line["lr"] for line in lines if line["step"] > 6) > 1.9e-3


def test_started_over_on_request(parts, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(parts / "stage1", out)
    lines = stage1(parts, out, "--max_steps", "2", "--overwrite_output_dir")
    assert [line["step"] for line in lines] == [1, 2]


def test_objectives_choose_the_losses(parts, tmp_path):
    lines = stage1(parts, tmp_path / "out", "--max_steps", "1", "--objectives", "itc", "itm")
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss_itc"] + lines[0]["loss_itm"]) and "loss_itg" not in lines[0]


def test_itc_by_sigmoid_is_trained_kept_and_taken_back(parts, tmp_path):
    out = tmp_path / "sigmoid"
    lines = stage1(parts, out, "--max_steps", "3", "--warmup_steps", "1", "--itc_loss", "sigmoid")
    assert lines[0]["loss_itc"] > 3  # a match costs the bias of -10 at first; the softmax of 4 pairs about log 4 = 1.4
    model = AutoModelForPreTraining.from_pretrained(out)
    assert model.config.itc_loss == "sigmoid" and 1e-5 < abs(model.itc_bias.item() + 10) < 1
    flags = [
        "--output_dir",
        str(tmp_path / "softmax"),
        "--init_from",
        str(out),
        "--itc_loss",
        "softmax",
        "--max_steps",
        "1",
    ]
    pretrain_stage1.main(["--dataset", str(parts / "data"), "--warmup_steps", "0", *flags])
    back = AutoModelForPreTraining.from_pretrained(tmp_path / "softmax")
    assert back.config.itc_loss == "softmax" and back.itc_bias is None


def test_queries_are_kept_apart_by_a_flag_that_the_checkpoint_remembers(parts, tmp_path, capsys):
    out = tmp_path / "apart"
    lines = stage1(parts, out, "--max_steps", "1", "--query_spread", "2")
    line = lines[0]
    assert line["loss"] == pytest.approx(sum(line[f"loss_{name}"] for name in ("itc", "itm", "itg", "spread")))
    assert AutoModelForPreTraining.from_pretrained(out).config.query_spread == 2
    assert "whose noise passes for a distance between queries" in capsys.readouterr().out
    more = ["--output_dir", str(tmp_path / "paper"), "--init_from", str(out), "--query_spread", "0", "--max_steps", "1"]
    pretrain_stage1.main(["--dataset", str(parts / "data"), "--warmup_steps", "0", *more])
    assert "loss_spread" not in metrics(tmp_path / "paper")[0]
    assert read_state(out)["order"] == 2, "of the visits, for a later version to go on with"


def test_chunks_train_as_the_whole_batch(parts, tmp_path, capsys):
    """With a chunk of the batch's size dropout draws the same; accumulation and smaller chunks go with it."""
    same = ["--max_steps", "6", "--eval_split", "validation", "--eval_steps", "3"]
    lines = stage1(parts, tmp_path / "whole", *same, "--itc_chunk_size", "4")
    for line, expected in zip(lines, metrics(parts / "stage1"), strict=True):
        names = [name for name in expected if "loss" in name or name == "grad_norm"]
        assert [line[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-4)
    assert "adds no negatives to ITC" not in capsys.readouterr().out
    flags = ["--max_steps", "2", "--itc_chunk_size", "3", "--gradient_accumulation_steps", "2"]
    plain = stage1(parts, tmp_path / "plain", *flags[:2], *flags[4:])
    assert capsys.readouterr().out.count("adds no negatives to ITC") == 1
    lines = stage1(parts, tmp_path / "chunks", *flags)
    assert [line["loss_itm"] for line in lines] == pytest.approx([line["loss_itm"] for line in plain], rel=0.1)


def test_lora_by_one_argument(parts, tmp_path):
    out = tmp_path / "out"
    stage2(parts, out, "llama", "--max_steps", "6", "--lora", "lm", "--merge_lora", "true")
    trained = load_file(out / "checkpoints" / "step_6" / "trained.safetensors")
    adapted = {name for name in trained if "lora_" in name}
    assert adapted and all(name.startswith("language_model.") for name in adapted) and len(adapted) < len(trained)
    assert any(trained[name].abs().max() > 0 for name in adapted if "lora_B" in name)

    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
    batch = AutoProcessor.from_pretrained(out)(images=[image()], text=["a red square"], return_tensors="pt")
    with_adapter = model(**batch).logits
    merged = AutoModelForImageTextToText.from_pretrained(out / "merged").eval()
    assert not any("lora" in name for name in merged.state_dict())
    assert torch.allclose(with_adapter, merged(**batch).logits, atol=1e-5)
    assert AutoProcessor.from_pretrained(out / "merged").image_token_id == merged.config.image_token_index
    disable_adapters(model)
    assert not torch.allclose(with_adapter, model(**batch).logits)


def test_language_model_of_captions_alone_serves_stage2(parts, tmp_path, capsys):
    flags = ["--vocab_size", "300", "--hidden_size", "48", "--num_hidden_layers", "1", "--num_train_epochs", "4"]
    data = ["--dataset", str(parts / "data"), "--text_column", "captions", "--eval_split", "validation"]
    caption_language.main([*data, *flags, "--output_dir", str(tmp_path / "llm"), "--per_device_train_batch_size", "4"])
    assert "perplexity" in capsys.readouterr().out
    model, tokenizer = (kind.from_pretrained(tmp_path / "llm") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("a red square on the left", return_tensors="pt")
    assert ids["input_ids"][0, 0] == tokenizer.bos_token_id
    assert model(**ids, labels=ids["input_ids"]).loss < 3  # of log(300) = 5.7 at the start
    lines = stage2(parts, tmp_path / "out", "opt", "--language_model", str(tmp_path / "llm"), "--max_steps", "1")
    assert lines[0]["loss"] < 4  # a model that knows the words; a random one starts at log(300) here too
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    known = model.state_dict()
    assert all(
        torch.equal(tensor[: len(known[k])], known[k]) for k, tensor in whole.language_model.state_dict().items()
    )


def test_json_file_as_dataset(parts, tmp_path):
    """The images and texts that the file names are those that are trained on, in its order."""
    numbers = [7, 2, 11, 4]
    rows = [{"image": f"{parts}/data/train/{number}.png", "caption": f"square {number}"} for number in numbers]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert load_rows(str(file), "train[:3]")["caption"][:] == ["square 7", "square 2", "square 11"]
    data = CaptionDataset(load_rows(str(file), "train"), text_column="caption")
    assert data.texts == [[f"square {number}"] for number in numbers]
    for row, number in enumerate(numbers):
        assert data.image(row).tobytes() == Image.open(f"{parts}/data/train/{number}.png").convert("RGB").tobytes()

    stage1(parts, tmp_path / "out", "--max_steps", "1", "--dataset", str(file), "--text_column", "caption")
    words = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.get_vocab()  # built from the texts of the run
    assert {"square", "7", "11"} <= words.keys() and not {"red", "green", "left"} & words.keys()
