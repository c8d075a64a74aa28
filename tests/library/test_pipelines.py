"""transformers' pipelines and Trainer, and the code that users of BLIP-2 have had since 2023."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForImageTextRetrieval, Blip2xProcessor
from tests.helpers.tiny import QUERIES, batch, image, prompt, stage1, stage1_processor, stage2, stage2_processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Stage-2 folders with OPT and T5 and a stage-1 folder, as a training run leaves them."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, bos in (("opt", True), ("t5", False)):
        model, processor = stage2(name, std=0.5), stage2_processor(bos)
        model.config.image_token_index = processor.image_token_id
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    stage1().save_pretrained(root / "stage1")
    stage1_processor().save_pretrained(root / "stage1")
    return root


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_image_text_to_text_pipeline(name, folders):
    ask = pipeline("image-text-to-text", model=str(folders / name))
    options = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}, "return_full_text": False}
    one = ask(images=image(), text="what colour is it ?", **options)
    assert isinstance(one[0]["generated_text"], str)
    several = ask(images=[image(), image("blue")], text=["a dog", "a cat on the left"], **options)
    assert len(several) == 2
    alone = [ask(images=i, text=t, **options) for i, t in ((image(), "a dog"), (image("blue"), "a cat on the left"))]
    assert [s[0] if isinstance(s, list) else s for s in several] == [a[0] for a in alone]


def test_image_text_to_text_pipeline_with_chat_messages(folders):
    ask = pipeline("image-text-to-text", model=str(folders / "opt"))
    content = [{"type": "image", "image": image()}, {"type": "text", "text": "what is it ?"}]
    options = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}, "return_full_text": False}
    answer = ask(text=[{"role": "user", "content": content}], **options)[0]["generated_text"]
    plain = ask(images=image(), text="Question: what is it ? Answer:", **options)[0]["generated_text"]
    assert answer == plain


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_image_text_to_text_pipeline_with_several_images(name, folders):
    """In one prompt or ragged over several, in a list or in a chat: what the model itself writes for each prompt alone."""
    processor = AutoProcessor.from_pretrained(folders / name)
    ask = pipeline("image-text-to-text", model=str(folders / name), processor=processor)
    options = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}, "return_full_text": False}
    images = [[image(), image("blue")], [], [image("green")]]
    texts = ["<image> a dog , <image> a cat", "how many ?", "is it <image> red"]
    expected = []
    for row, text in zip(images, texts):
        inputs = processor([row], [text], return_tensors="pt")
        ids = ask.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        expected += processor.batch_decode_new(ids, inputs.input_ids)
    assert len(set(expected)) == 3

    def answers(outputs):
        return [output["generated_text"].strip() for output in outputs]

    assert answers(ask(images=images, text=texts, **options)) == expected
    assert answers(ask(images=images[0], text=texts[0], **options)) == expected[:1]
    first, second = ({"type": "image", "image": one} for one in images[0])
    parts = [{"type": "text", "text": "a dog"}, {"type": "text", "text": "or a cat ?"}]
    chat = [{"role": "user", "content": [first, parts[0], second, parts[1]]}]
    inputs = processor([images[0]], "Question: <image>a dog<image>or a cat ? Answer:", return_tensors="pt")
    ids = ask.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answers(ask(text=chat, **options)) == processor.batch_decode_new(ids, inputs.input_ids)


def test_zero_shot_image_classification_pipeline(folders):
    classify = pipeline("zero-shot-image-classification", model=str(folders / "stage1"))
    assert type(classify.model) is Blip2xForImageTextRetrieval
    labels = ["red circle", "a green square on the left", "dog"]
    scores = {
        row["label"]: row["score"] for row in classify(image(), candidate_labels=labels, hypothesis_template="{}")
    }
    processor = AutoProcessor.from_pretrained(folders / "stage1")
    inputs = processor(images=image(), text=labels, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = classify.model(**inputs).logits_per_image[0].softmax(0)
    assert scores == pytest.approx(dict(zip(labels, expected.tolist())), abs=1e-5)


def short_of_greedy(model, inputs, ids):
    """By how many standard deviations of the logits a chosen token falls short of the best, by the same model in float32."""
    exact = copy.deepcopy(model).float()
    given = {"pixel_values": inputs["pixel_values"].float()}
    if model.config.is_encoder_decoder:
        given |= {"input_ids": inputs["input_ids"], "decoder_input_ids": ids[:, :-1]}
        chosen = ids[:, 1:]
    else:
        given |= {"input_ids": ids[:, :-1]}
        chosen = ids[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = exact(**given).logits[:, -chosen.shape[1] :]
    spread = logits.std()
    logits[..., model.config.image_token_index] = -torch.inf  # never written
    return ((logits.max(dim=-1).values - logits.gather(2, chosen[..., None])[..., 0]).max() / spread).item()


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_the_code_of_2023(name, keyword, folders):
    """Salesforce's model card, but for the class and bfloat16, which a CPU has."""
    processor = Blip2xProcessor.from_pretrained(folders / name)
    model = Blip2xForConditionalGeneration.from_pretrained(folders / name, **{keyword: torch.bfloat16})
    device = "cpu"
    model.to(device)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = processor(images=image(), return_tensors="pt").to(device, torch.bfloat16)
    assert inputs.input_ids.tolist() == [[processor.image_token_id] * QUERIES + ([1] if name == "opt" else [2])]
    caption_ids = model.generate(**inputs, max_new_tokens=20)
    caption = processor.batch_decode(caption_ids, skip_special_tokens=True)[0].strip()
    assert [caption] == processor.batch_decode_new(caption_ids, inputs.input_ids) and "<image>" not in caption
    assert short_of_greedy(model, inputs, caption_ids) < 0.8  # such wide weights enlarge what bfloat16 rounds
    caption_ids[0, -1] = processor.tokenizer.unk_token_id  # as another token than the best would
    assert short_of_greedy(model, inputs, caption_ids) > 1
    turns = "question : what is it ? answer : a dog . question : what colour ? answer :"
    for text in ("this is a picture of", turns):
        inputs = processor(image(), text=text, return_tensors="pt").to(device, torch.bfloat16)
        assert inputs.pixel_values.dtype == torch.bfloat16 and inputs.input_ids.dtype == torch.int64
        ids = model.generate(**inputs, max_new_tokens=20)
        assert short_of_greedy(model, inputs, ids) < 0.8
        written = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        (answer,) = processor.batch_decode_new(ids, inputs.input_ids)
        assert written == (f"{text} {answer}".strip() if name == "opt" else answer)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.rows.items()}


def train_with_trainer(model, rows, folder):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", remove_unused_columns=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Pairs(rows))
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_runs_stage_1(tmp_path):
    model = stage1()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train_with_trainer(model, batch(8), tmp_path)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_trainer_runs_stage_2(language_model, tmp_path):
    model = stage2(language_model, qformer={"use_qformer_text_input": False})
    model.freeze_unimodal()
    rows = prompt(model, rows=8)
    if language_model == "opt":
        rows["labels"] = rows["input_ids"].clone()
        rows["labels"][:, :QUERIES] = -100
    else:
        rows["labels"] = rows["input_ids"][:, QUERIES:].clone()
    losses = train_with_trainer(model, rows, tmp_path)
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_accumulation_gives_the_loss_of_its_parts(tmp_path):
    """Trainer must not divide by the number of tokens once more (accepts_loss_kwargs)."""
    model = stage2("opt", qformer={"use_qformer_text_input": False})
    model.freeze_unimodal()
    rows = prompt(model, rows=8)
    rows["labels"] = rows["input_ids"].clone()
    rows["labels"][:, :QUERIES] = -100
    with torch.no_grad():
        expected = model(**rows).loss.item()
    assert train_with_trainer(model, rows, tmp_path)[0] == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_needs_no_word_about_its_class(folders):
    assert type(AutoModelForImageTextToText.from_pretrained(folders / "t5")) is Blip2xForConditionalGeneration
