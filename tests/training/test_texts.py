"""Texts that are no UTF-8, names that are none, texts that are cut, and texts that spell special tokens, in runs."""

import io
import json
import os
import tarfile

import pytest
from accelerate import Accelerator
from PIL import Image
from transformers import AutoConfig, AutoProcessor, GPT2Config, GPT2LMHeadModel

from blip2x_training import bootstrap_captions, cache_features, finetune, pretrain_stage2, run_evaluation
from blip2x_training.arguments.finetuning import FinetuneArguments
from blip2x_training.data.bad_rows import SkipLog
from blip2x_training.data.caption_dataset import CaptionDataset
from blip2x_training.data.collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator, language_collator
from blip2x_training.data.formats import load_rows
from blip2x_training.data.rows import Rows
from blip2x_training.data.text_lengths import tell_what_is_cut
from blip2x_training.evaluation.samples import EvaluationSet
from blip2x_training.system.utf8 import not_utf8
from modeling_blip2x.printable_blip2x import printable
from tests.helpers.family_tokenizers import bert
from tests.helpers.tiny import QUERIES, llm_tokenizer, stage2, stage2_processor
from tests.helpers.training_parts import make_vision_model, run_stage1

HALF = "a \ud83d dog"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eight pictures with captions in a JSONL file; one caption spells `<image>`, one is no UTF-8."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(8):
        Image.new("RGB", (30, 30), (number * 30, 0, 0)).save(folder / f"{number}.png")
        text = {2: "a sign that says <image> in red", 3: HALF, 5: "the letters [SEP] on </s>"}.get(
            number, "a red square"
        )
        row = {"image": f"{number}.png", "captions": text, "question": "what is <image> it?", "answer": "red"}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def runs(rows, tmp_path_factory):
    """Stage 1, and a stage 2 whose language model has BERT's tokenizer, on these rows."""
    folder = tmp_path_factory.mktemp("runs")
    tower = make_vision_model(folder / "tower")
    tokenizer = bert()
    tokenizer.save_pretrained(folder / "lm")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        folder / "lm"
    )
    allowed = ["--max_skip_fraction=0.2", "--report_to=none", "--augment=false"]
    run_stage1(rows, tower, folder / "stage1", *allowed, "--max_steps=2")
    fields = {
        "dataset": rows,
        "text_column": "captions",
        "init_from": folder / "stage1",
        "language_model": folder / "lm",
        "output_dir": folder / "stage2",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
    }
    pretrain_stage2.main([f"--{name}={value}" for name, value in fields.items()] + allowed)
    return folder


def skipped(folder) -> list[tuple[int, str]]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return [(row["row"], row["reason"]) for row in map(json.loads, lines)]


def test_runs_leave_out_what_is_no_utf8_and_read_what_spells_a_special_token(runs):
    for stage in ("stage1", "stage2"):
        assert skipped(runs / stage) == [(3, r"the text is not UTF-8: 'a \ud83d dog'")]
    processor, config = AutoProcessor.from_pretrained(runs / "stage2"), AutoConfig.from_pretrained(runs / "stage2")
    generation = json.loads((runs / "stage2" / "generation_config.json").read_text())
    assert (
        generation["eos_token_id"] == [processor.tokenizer.sep_token_id] == [3]
    )  # GPT2Config's 50256 is no token here
    assert processor.is_encoder_decoder is False and config.empty_prompt == [2]


def test_questions_that_spell_an_image_token_are_tuned_on_and_evaluated(runs, rows, tmp_path):
    asked = ["--text_column=answer", "--prompt_column=question"]
    tuned = {"init_from": runs / "stage2", "dataset": rows, "output_dir": tmp_path / "vqa", "max_steps": 1}
    tuned |= {"per_device_train_batch_size": 4, "report_to": "none", "task": "vqa"}
    finetune.main([f"--{name}={value}" for name, value in tuned.items()] + asked)
    evaluated = {"model": tmp_path / "vqa", "data": rows, "split": "train", "output_dir": tmp_path / "eval"}
    evaluated |= {"task": "vqa", "num_beams": 1, "report": "false"}
    run_evaluation.main([f"--{name}={value}" for name, value in evaluated.items()] + asked)
    assert len(json.loads((tmp_path / "eval" / "predictions.json").read_text())) == 8


def test_a_text_that_is_no_utf8_leaves_with_its_row():
    assert not_utf8("é 😀", ["a", None, 3]) is None
    assert not_utf8("a", [{"raw": HALF}]) == r"the text is not UTF-8: 'a \ud83d dog'"
    images = [{"path": f"{number}.png", "bytes": b"x"} for number in range(4)]
    columns = {"image": images, "question": ["a", HALF, "b", "c"], "answers": [["x"], ["x"], ["x", HALF], ["é"]]}
    options = {"text_column": "answers", "prompt_column": "question"}
    dataset = CaptionDataset(Rows(columns), **options)
    reason = r"the text is not UTF-8: 'a \ud83d dog'"
    assert dataset.kept.tolist() == [0, 3] and [report["reason"] for report in dataset.left_out] == [reason] * 2
    evaluated = EvaluationSet(Rows(columns), task="vqa", **options)
    assert [sample.row for sample in evaluated.samples] == [0, 3]
    assert [(report["row"], report["reason"]) for report in evaluated.skipped] == [(1, reason), (2, reason)]
    with pytest.raises(
        ValueError, match="None of the 2 rows of d can be used, the first: row 0, 1.png: the text is not UTF-8"
    ):
        EvaluationSet(Rows(columns).select([1, 2]), task="vqa", name="d", **options)


def test_a_file_with_a_line_in_another_encoding_loses_that_row_alone(tmp_path):
    lines = [json.dumps({"image": f"{number}.png", "text": "a dog"}).encode() for number in range(2)]
    (tmp_path / "rows.jsonl").write_bytes(
        b"\n".join([*lines, '{"image": "2.png", "text": "un café"}'.encode("latin-1")])
    )
    for number in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    dataset = CaptionDataset(load_rows(str(tmp_path / "rows.jsonl"), "train"), folder=tmp_path)
    assert dataset.kept.tolist() == [0, 1] and dataset.left_out[0]["reason"] == r"the text is not UTF-8: 'un caf\udce9'"


@pytest.fixture
def latin1_tar(tmp_path):
    """Samples whose names are Latin-1; the second's text is too, the third's picture is broken."""
    picture = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(picture, "PNG")
    texts, pictures = [b"a dog", "un café".encode("latin-1"), b"a cat", b"a bird"], [picture.getvalue()] * 4
    pictures[2] = b"broken"
    with tarfile.open(tmp_path / "train.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for number, (text, content) in enumerate(zip(texts, pictures)):
            for ending, data in (("png", content), ("txt", text)):
                member = tarfile.TarInfo(f"café{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return tmp_path / "train.tar"


def test_names_that_are_no_utf8_are_escaped(latin1_tar, tmp_path, capsys):
    dataset = CaptionDataset(load_rows(str(latin1_tar), "train"), source=("d", "train"))
    assert [(row["row"], os.path.basename(row["name"]), row["reason"]) for row in dataset.left_out] == [
        (1, r"caf\udce91.png", r"the text is not UTF-8: 'un caf\udce9'")
    ]
    log = SkipLog(tmp_path / "skipped.jsonl", dataset.left_out, dataset.sources, 4, 1.0)
    log.start(write=True)
    log.add(dataset[0, 1]["skipped"], 1)
    read = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [os.path.basename(row["name"]) for row in read] == [r"caf\udce91.png", r"caf\udce92.png"]
    assert printable("a\x1b[31mb\ud83d é.png") == r"a\x1b[31mb\ud83d é.png"


def test_cache_bootstrap_and_evaluation_take_names_that_are_no_utf8(latin1_tar, runs, tmp_path):
    cached = {
        "vision_model": runs / "tower",
        "dataset": latin1_tar,
        "splits": "train",
        "output_dir": tmp_path / "cache",
        "max_skip_fraction": 0.5,  # one of the four is no image
    }
    cache_features.main([f"--{name}={value}" for name, value in cached.items()])
    assert (tmp_path / "cache" / "train.json").exists()
    drawn = {
        "dataset": latin1_tar,
        "captioner": runs / "stage1",
        "output_dir": tmp_path / "captions",
        "num_captions": 1,
    }
    bootstrap_captions.main([f"--{name}={value}" for name, value in drawn.items()] + ["--max_skip_fraction=1"])
    assert (tmp_path / "captions" / "train.parquet").exists()
    given = {"model": runs / "stage1", "data": latin1_tar, "split": "train", "output_dir": tmp_path / "eval"}
    given |= {"task": "caption", "num_beams": 1, "report": "false", "max_skip_fraction": 1}
    run_evaluation.main([f"--{name}={value}" for name, value in given.items()])
    left_out = json.loads((tmp_path / "eval" / "skipped.json").read_text())
    assert [os.path.basename(row["name"]) for row in left_out] == [r"caf\udce91.png", r"caf\udce92.png"]


def captions(*texts: str) -> CaptionDataset:
    images = [{"path": f"{number}.png", "bytes": b"x"} for number in range(len(texts))]
    return CaptionDataset(Rows({"image": images, "text": list(texts)}), clean_captions=False)


def told(capsys, dataset, collator, asked: int = 32) -> str:
    tell_what_is_cut(Accelerator(cpu=True), dataset, collator, asked)
    return capsys.readouterr().out


def test_texts_that_are_cut_are_counted_and_the_flag_that_helps_is_named(capsys):
    long, short = "a red dog " * 20, "a dog"
    for kind, bos in ((CausalLMCollator, True), (Seq2SeqLMCollator, False)):
        collator = kind(None, llm_tokenizer(bos), 2, 99, 32, cropped=False)
        line = told(capsys, captions(*[long] * 3, short), collator)
        whole = 60 + bos + 1  # words, what begins and what ends them
        assert line == (
            "3 of 4 texts looked at are longer than --max_text_length 32 tokens and are cut there: they are not taught to "
            f"end. The longest has {whole}: pass --max_text_length {whole}, or shorten the texts.\n"
        )
        collator.max_text_length = whole
        assert told(capsys, captions(*[long] * 3, short), collator, whole) == ""
    model = stage2("opt")  # of 64 positions
    collator = language_collator(model, stage2_processor(), 256, cropped=False)
    assert told(capsys, captions(long, short), collator, 256) == (
        f"1 of 2 texts looked at are longer than the {64 - QUERIES} tokens that the language model reads and are cut there: "
        "they are not taught to end. The longest has 62: shorten the texts.\n"
    )
    few = told(capsys, captions(long, *[short] * 199), CausalLMCollator(None, llm_tokenizer(), 2, 99, 32, False))
    assert few.startswith("1 of 200 texts") and "--max_text_length 62" not in few
    many = captions(*[short] * 1500, *[long] * 500)
    assert told(capsys, many, CausalLMCollator(None, llm_tokenizer(), 2, 99, 32, False)).startswith("250 of 1000 texts")
    stage1 = told(capsys, captions(long, short), Stage1Collator(None, bert(), 32, cropped=False))
    assert stage1.startswith("1 of 2 texts") and "taught to end" not in stage1


def test_the_longest_text_suits_the_task():
    longest = {task: FinetuneArguments(task=task).max_text_length for task in ("caption", "vqa", "instruct")}
    assert longest == {"caption": 32, "vqa": 64, "instruct": 256}
    assert FinetuneArguments(task="instruct", max_text_length=40).max_text_length == 40
