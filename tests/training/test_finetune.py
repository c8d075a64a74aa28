"""Fine-tuning through the real script: each task, what trains, what is kept in the checkpoint, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor

from blip2x_training import finetune
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.arguments.pretraining import Stage2Arguments
from blip2x_training.data.transforms import clean_caption
from blip2x_training.engine.tasks import prompt_template
from blip2x_training.metrics.retrieval_recall.scores import recall_at_k
from tests.helpers.tiny import image
from tests.helpers.training_parts import disable_adapters, make_image_folder, make_language_model, make_vision_model
from tests.helpers.training_runs import COMMON, metrics, stage1, stage2

QUESTIONS = ["What colour is the square?", "Where is the square?"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """data/ (captions), vqa/ (question, answers), tower/, stage1/, stage2_opt/ and, with a reading Q-Former, stage2_t5/.

    Language models: opt/, t5/, llama/, and opt64/, which is wide enough for blocks of 4 bits. Tests write elsewhere.
    """
    root = tmp_path_factory.mktemp("finetune")
    for llm in ("opt", "t5", "llama"):
        make_language_model(root / llm, llm)
    make_language_model(root / "opt64", "opt", hidden_size=64, word_embed_proj_dim=64)
    make_image_folder(root / "data", {"train": 8, "validation": 4})
    make_image_folder(root / "vqa", {"train": 8, "validation": 4})
    for split in ("train", "validation"):
        path = root / "vqa" / split / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, row in enumerate(rows):
            colour = row.pop("captions")[0].split()[1]
            row |= {"question": QUESTIONS[number % 2], "answers": [colour] * 7 + ["white"] * 3, "image_id": number // 2}
        path.write_text("\n".join(map(json.dumps, rows)))
    make_vision_model(root / "tower")
    stage1(root, root / "stage1", "--max_steps", "1")
    stage2(root, root / "stage2_opt", "opt", "--max_steps", "1")
    stage2(root, root / "stage2_t5", "t5", "--max_steps", "1", "--qformer_text_input", "true", "--prompt", "a photo of")
    return root


def tune(parts: Path, out: Path, task: str, start: str, *flags: str) -> list[dict]:
    data = parts / ("vqa" if task in ("vqa", "instruct") else "data")
    columns = ["--text_column", "answers", "--prompt_column", "question"] if data.name == "vqa" else COMMON[:2]
    given = ["--task", task, "--dataset", str(data), "--init_from", str(parts / start), "--output_dir", str(out)]
    finetune.main([*COMMON[2:], *columns, *given, "--max_steps", "2", *flags])
    return metrics(out)


def test_evaluation_asks_as_training_did():
    flags = ["--output_dir", "out", "--dataset", "data", "--vision_model", "tower", "--language_model", "llm"]

    def templates(*more: str) -> tuple:
        args = parse_arguments(Stage2Arguments, [*flags, *more])
        return tuple(prompt_template(args, is_encoder_decoder) for is_encoder_decoder in (False, True))

    assert templates() == ("", None)
    assert templates("--prompt_column", "question") == ("{}", "{}")
    assert templates("--prompt", "a photo of") == ("a photo of", "a photo of")


def changed(before: Path, after: Path) -> set[str]:
    """First parts of the names of tensors that training changed."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {".".join(name.split(".")[:2]) for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("start", ["stage2_opt", "stage2_t5"])
def test_vqa(parts, tmp_path, start):
    reads = start == "stage2_t5"
    flags = ["--eval_split", "validation", "--qformer_text_input", str(reads)]
    lines = tune(parts, tmp_path / "out", "vqa", start, *flags)
    assert {"eval_token_accuracy", "eval_vqa_accuracy"} <= lines[-1].keys()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.config.prompt_template == "Question: {} Answer:"
    trained = {"model.qformer", "model.query_tokens", "model.ln_vision"}
    assert (
        trained
        <= changed(parts / start, tmp_path / "out")
        <= {
            *trained,
            "language_projection.weight",
            "language_projection.bias",
        }
    )
    prompts = [model.config.prompt_template.format(question) for question in QUESTIONS]
    inputs = processor(images=[image()] * 2, text=prompts, padding=True, return_tensors="pt")
    assert ("qformer_input_ids" in inputs) == reads
    assert len(processor.batch_decode_new(model.generate(**inputs, max_new_tokens=3), inputs["input_ids"])) == 2


def test_vqa_does_not_flip_or_crop_unless_told(parts, tmp_path):
    import yaml

    tune(parts, tmp_path / "out", "vqa", "stage2_opt")
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["augment"] is False
    tune(parts, tmp_path / "told", "vqa", "stage2_opt", "--augment", "true")
    assert yaml.safe_load((tmp_path / "told" / "config.yaml").read_text())["augment"] is True


def test_caption_trains_the_tower_too_and_at_another_size(parts, tmp_path):
    flags = ["--train_vision", "true", "--layer_decay", "0.5", "--image_size", "42"]
    lines = tune(parts, tmp_path / "out", "caption", "stage2_opt", *flags)
    assert "model.vision_model" in changed(parts / "stage2_opt", tmp_path / "out") and len(lines) == 2
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.config.interpolate_pos_encoding and model.config.prompt_template == "a photo of"
    inputs = processor(images=image(), text="a photo of", return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (42, 42)
    assert torch.isfinite(model(**inputs).logits).all()


def test_retrieval(parts, tmp_path):
    """All three losses train, the tower and a language model stay out, and recalls are those of the weights saved."""
    flags = ["--eval_split", "train", "--rerank_k", "2", "--per_device_eval_batch_size", "3"]
    lines = tune(parts, tmp_path / "out", "retrieval", "stage1", *flags)
    parts_of_loss = [lines[0][f"loss_{name}"] for name in ("itc", "itm", "itg")]
    assert lines[0]["loss"] == pytest.approx(sum(parts_of_loss), rel=1e-5) and min(parts_of_loss) > 0.1
    trained = {"model.qformer", "model.query_tokens", "model.ln_vision", "temperature", "vision_projection.weight"}
    trained |= {"text_projection.weight", "itm_head.weight"}
    assert trained <= changed(parts / "stage1", tmp_path / "out")
    assert "model.vision_model" not in changed(parts / "stage1", tmp_path / "out")

    model = AutoModelForPreTraining.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.config.text_config is None
    rows = [json.loads(line) for line in (parts / "data/train/metadata.jsonl").read_text().splitlines()]
    texts = [clean_caption(text) for row in rows for text in row["captions"]]
    images = [Image.open(parts / "data/train" / row["file_name"]).convert("RGB") for row in rows]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    words = processor(text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        image_features = model.get_image_features(pixels).pooler_output
        cosines = model.itc_scores(image_features, model.get_text_features(**words).pooler_output)
        pairs = [
            model.itm_logits(one[None], **{name: ids[text : text + 1] for name, ids in words.items()})[0, 1]
            for one in pixels
            for text in range(len(texts))
        ]
    owner = torch.arange(len(texts)) // 2
    found = recall_at_k(cosines, owner)
    assert {name: lines[-1][name] for name in found} == pytest.approx(found)
    best = torch.zeros_like(cosines, dtype=torch.bool).scatter(1, cosines.topk(2, dim=1).indices, True)
    match = torch.stack(pairs).view_as(cosines)
    reranked = recall_at_k(match.masked_fill(~best, match.min() - 1) + 1e-6 * cosines, owner)
    assert lines[-1]["i2t_r1_itm"] == pytest.approx(reranked["i2t_r1"])


def test_instruct_from_stage1_with_lora(parts, tmp_path):
    """merged/ answers as root and adapter do together, and the adapter says something."""
    flags = ["--language_model", str(parts / "llama"), "--qformer_text_input", "true"]
    tune(parts, tmp_path / "out", "instruct", "stage1", *flags, "--lora", "lm", "--merge_lora", "true")
    adapted, merged = (
        AutoModelForImageTextToText.from_pretrained(folder).eval()
        for folder in (tmp_path / "out", tmp_path / "out" / "merged")
    )
    assert adapted.config.prompt_template == merged.config.prompt_template == "{}"
    has_adapter = [any("lora" in name for name in model.state_dict()) for model in (adapted, merged)]
    assert has_adapter == [True, False]
    for folder in (tmp_path / "out", tmp_path / "out" / "merged"):
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(images=[image()] * 2, text=QUESTIONS, padding=True, return_tensors="pt")
        assert "qformer_input_ids" in inputs
        with torch.no_grad():
            expected = adapted(**inputs).logits
            assert torch.allclose(merged(**inputs).logits, expected, atol=1e-5)
    disable_adapters(adapted)
    with torch.no_grad():
        assert (adapted(**inputs).logits - expected).abs().max() > 1e-4


def test_qlora(parts, tmp_path):
    """The checkpoint of a language model in 4 bits loads by itself and answers as the run's last weights do."""
    flags = ["--language_model", str(parts / "opt64"), "--lora", "lm", "--load_in_4bit", "true"]
    tune(parts, tmp_path / "out", "vqa", "stage1", *flags)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    layer = model.language_model.model.decoder.layers[0].fc1
    assert type(layer.base_layer).__name__ == "Linear4bit"
    saved = load_file(tmp_path / "out" / "checkpoints" / "step_2" / "trained.safetensors")
    loaded = dict(model.named_parameters())
    assert any("lora_B" in name and tensor.any() for name, tensor in saved.items())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    inputs = AutoProcessor.from_pretrained(tmp_path / "out")(images=image(), text="a", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize(
    "task, start, flags, message",
    [
        ("retrieval", "stage2_opt", [], "holds a stage-2 model"),
        ("vqa", "stage1", [], "Pass --language_model"),
        ("vqa", "stage2_opt", ["--qformer_text_input", "true"], "reads no text"),
        ("vqa", "stage2_t5", [], "Pass --qformer_text_input true"),
        ("vqa", "stage2_opt", ["--prompt", "Answer"], "needs {} where the question goes"),
        ("caption", "stage2_opt", ["--layer_decay", "0.9"], "the tower is frozen"),
        ("chat", "stage2_opt", [], "choose from caption, vqa, instruct, retrieval"),
    ],
)
def test_refusals(parts, tmp_path, task, start, flags, message):
    with pytest.raises(ValueError, match=message):
        tune(parts, tmp_path / "out", task, start, *flags)
    assert not (tmp_path / "out").exists()
