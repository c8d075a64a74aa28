"""Data: clear errors for wrong arguments, drawn captions, the training transform, collators, caption clean-up, schedule."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import BertConfig, BertModel

from blip2x_training import trim_bert
from blip2x_training.data.caption_dataset import CaptionDataset, Sampling
from blip2x_training.data.collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator
from blip2x_training.data.formats import load_rows
from blip2x_training.data.image_processor import output_size
from blip2x_training.data.images import opened
from blip2x_training.data.pixels import finished
from blip2x_training.data.transforms import augment_image, clean_caption, draw_crop
from blip2x_training.data.vocabulary import build_tokenizer, load_qformer_tokenizer
from blip2x_training.engine import start
from blip2x_training.engine.optimizer import Schedule, build_optimizer
from blip2x_training.engine.tasks import hardness_at
from modeling_blip2x.losses_blip2x import draw_hard_negatives
from tests.helpers.tiny import (
    QUERIES,
    batch,
    bert_tokenizer,
    image,
    image_processor,
    llm_tokenizer,
    stage1,
    stage2_processor,
)
from tests.helpers.training_parts import make_image_folder

COLUMNS = {"image_column": "image", "text_column": "captions"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("data"), {"train": 6})


def test_missing_dataset_split_and_column_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match="nowhere: there is no such file"):
        load_rows(str(tmp_path / "nowhere"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty folder"):
        load_rows(str(tmp_path / "empty"), "train")
    with pytest.raises(ValueError, match="has no split 'test', only train. Name one"):
        load_rows(str(folder), "test")
    with pytest.raises(ValueError, match=r"--text_column is 'caption'.*Did you mean 'captions'"):
        CaptionDataset(load_rows(str(folder), "train"), image_column="image", text_column="caption")


def test_one_caption_is_drawn_each_visit_reproducibly(folder):
    rows = load_rows(str(folder), "train")
    first, second = (CaptionDataset(rows, sampling=Sampling(3, (28, 28)), **COLUMNS) for _ in range(2))
    drawn = [first[epoch, 0] for epoch in range(12)]
    assert {item["text"] for item in drawn} == set(first.texts[0])
    again = second[5, 0]
    assert again["text"] == drawn[5]["text"] and np.array_equal(again["image"], drawn[5]["image"])
    assert not np.array_equal(drawn[0]["image"], drawn[1]["image"])


def test_training_images_are_normalised_by_the_towers_own_mean_and_std(folder):
    rows = load_rows(str(folder), "train")
    processor = image_processor()
    processor.image_mean, processor.image_std = [0.1, 0.5, 0.9], [0.2, 0.4, 0.8]
    height, width = output_size(processor)
    tokenizer = build_tokenizer(["a"], 1)
    for crop_size in ((height, width), None):
        data = CaptionDataset(rows, sampling=Sampling(crop_size=crop_size), **COLUMNS)
        drawn = [data[epoch, 0] for epoch in range(3)]
        pixels = Stage1Collator(processor, tokenizer, 8, cropped=crop_size is not None)(drawn)["pixel_values"]
        for item, tensor in zip(drawn, pixels):
            if crop_size is None:  # as in inference
                expected = processor(images=item["image"], return_tensors="pt")["pixel_values"][0]
                assert np.array_equal(item["image"], data.image(0))
            else:
                as_it_is = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
                expected = processor(images=item["image"].numpy(), **as_it_is)["pixel_values"][0]
                assert torch.equal(tensor, expected)
                mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
                expected = (item["image"] / 255 - mean) / std
            assert tensor.shape == (3, height, width) and torch.allclose(tensor, expected, atol=1e-5)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_levels_become_the_same_pixels(folder, device):
    """What workers send is a quarter of the bytes, and to the last bit the same once it has arrived."""
    processor, tokenizer = image_processor(), build_tokenizer(["a"], 1)
    data = CaptionDataset(
        load_rows(str(folder), "train"), sampling=Sampling(crop_size=output_size(processor)), **COLUMNS
    )
    items = [data[epoch, 0] for epoch in range(4)]
    whole = Stage1Collator(processor, tokenizer, 8, cropped=True)(items)
    sent = Stage1Collator(processor, tokenizer, 8, cropped=True, levels=True)(items)
    assert sent["pixel_levels"].dtype == torch.uint8 and "pixel_values" not in sent
    arrived = finished(sent, device)
    assert arrived.keys() == whole.keys() and arrived["pixel_values"].dtype == torch.float32
    assert torch.equal(arrived["pixel_values"].cpu(), whole["pixel_values"])


@pytest.mark.parametrize(("cores", "processes", "workers"), [(2, 1, 0), (8, 1, 7), (64, 8, 7), (128, 8, 8), (16, 8, 0)])
def test_workers_by_the_cores_of_the_machine(cores, processes, workers, monkeypatch):
    monkeypatch.setattr(start.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert start.workers_of_machine() == workers


def test_crops_cover_half_of_the_area_or_more_and_are_flipped_half_of_the_time():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))  # brightness is the column
    crops = [augment_image(Image.fromarray(ramp), (20, 20), random.Random(n))[0].int().numpy() for n in range(400)]
    spans = [abs(crop[:, -1].mean() - crop[:, 0].mean()) * 20 / 19 for crop in crops]
    flipped = sum(crop[:, -1].mean() < crop[:, 0].mean() for crop in crops)
    assert 160 < flipped < 240
    assert min(spans) > 200 * (0.5 * 3 / 4) ** 0.5 - 4 and max(spans) > 190  # width of the narrowest allowed crop


def test_clean_caption_follows_the_paper():
    assert clean_caption('A "Dog", isn\'t it?  (Yes!) #1: a*b; c~d.') == "a dog , isn't it? yes 1 a b c d"
    assert len(clean_caption("word " * 60).split()) == 50


def test_augmentation_gives_the_size_for_any_shape():
    for shape in ((500, 20), (20, 500), (30, 40), (1, 1)):
        assert augment_image(Image.new("RGB", shape), (28, 32), random.Random(0)).shape == (3, 28, 32)


def test_large_photos_are_decoded_smaller_and_turned_upright(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    photo = noise.resize((640, 480), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo.save(tmp_path / "upright.jpg", quality=95)
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.jpg", quality=95, exif=exif)
    for name in ("upright.jpg", "lying.jpg"):
        for seed in range(8):
            image = Image.open(tmp_path / name)
            crop = augment_image(image, (56, 64), random.Random(seed)).int()
            assert max(image.size) <= 320  # a crop of half the area has more than twice as many pixels even then
            rng = random.Random(seed)
            expected = photo.resize((64, 56), Image.Resampling.BICUBIC, box=draw_crop(640, 480, rng))
            expected = ImageOps.mirror(expected) if rng.random() < 0.5 else expected
            difference = (crop - torch.tensor(np.array(expected)).permute(2, 0, 1)).abs().float()
            assert difference.mean() < 6  # levels of 255: the box is cut to whole pixels of the smaller image
    with opened(str(tmp_path / "upright.jpg"), None) as image:
        assert augment_image(image, (224, 224), random.Random(0)).shape == (3, 224, 224) and image.size == (640, 480)


def test_built_vocabulary_spells_rare_words():
    tokenizer = build_tokenizer(["a dog runs", "a dog sits", "a zebra"], min_count=2)
    assert tokenizer.bos_token == "[DEC]" and tokenizer.unk_token_id not in tokenizer("a zebra runs").input_ids
    assert tokenizer.decode(tokenizer("a zebra").input_ids, skip_special_tokens=True) == "a zebra"
    assert tokenizer.convert_ids_to_tokens(tokenizer("dog").input_ids) == ["[CLS]", "dog", "[SEP]"]


def items(*texts, prompt="", draw=0.5):
    return [
        {"text": text, "prompt": prompt, "image_id": i, "draw": draw, "vision_embeds": torch.zeros(3, 4)}
        for i, text in enumerate(texts)
    ]


def test_stage1_batch():
    batch = Stage1Collator(None, build_tokenizer(["a dog runs"], 1), 4, cropped=False)(items("a", "a dog runs"))
    assert batch["input_ids"].shape == (2, 4) and batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["image_ids"].tolist() == [0, 1] and batch["vision_embeds"].shape == (2, 3, 4)


def test_causal_labels_cover_text_and_end_only():
    tokenizer = llm_tokenizer()
    collate = CausalLMCollator(None, tokenizer, num_query_tokens=2, image_token_id=99, max_text_length=8, cropped=False)
    batch = collate(items("a dog", "a dog runs", prompt="a photo of"))
    ids, labels = batch["input_ids"], batch["labels"]
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt, text = (
        tokenizer("a photo of", add_special_tokens=False).input_ids,
        tokenizer("a dog", add_special_tokens=False).input_ids,
    )
    assert ids[0].tolist() == [99, 99, bos, *prompt, *text, end, tokenizer.pad_token_id]
    assert labels[0].tolist() == [-100] * 6 + [*text, end, -100]
    assert batch["attention_mask"][0].tolist() == [1] * 9 + [0]
    collate.max_text_length = 4  # a long prompt keeps its end and leaves half of the room, at least, for the text
    short = collate(items("a dog", prompt="a photo of"))
    assert short["input_ids"][0].tolist() == [99, 99, bos, prompt[-1], *text]
    assert short["labels"][0].tolist() == [-100] * 4 + text


@pytest.mark.parametrize("kind", [CausalLMCollator, Seq2SeqLMCollator])
def test_prompts_to_generate_from_are_those_of_the_processor(kind):
    processor = stage2_processor(bos=kind is CausalLMCollator)
    collate = kind(
        processor.image_processor,
        processor.tokenizer,
        QUERIES,
        processor.image_token_id,
        max_text_length=8,
        cropped=False,
    )
    texts = ["a photo of", "what colour is it ?"]
    rows = [{"image": image(), "prompt": text} for text in texts]
    expected = processor(images=[image()] * 2, text=texts, padding=True, return_tensors="pt")
    given = collate.prompts(rows)
    assert given.keys() == expected.keys() and all(torch.equal(given[name], expected[name]) for name in expected)


def test_a_cut_text_has_no_end():
    tokenizer = llm_tokenizer()
    collate = CausalLMCollator(None, tokenizer, 1, 99, max_text_length=3, cropped=False)
    assert tokenizer.eos_token_id not in collate(items("a dog runs"))["labels"]
    assert tokenizer.eos_token_id in collate(items("a"))["labels"]


def test_prefix_language_modelling_splits_before_the_midpoint():
    tokenizer = llm_tokenizer(bos=False)
    collate = Seq2SeqLMCollator(
        None, tokenizer, num_query_tokens=1, image_token_id=99, max_text_length=32, cropped=False
    )
    text = tokenizer("a dog runs a photo of", add_special_tokens=False).input_ids
    end, seen = tokenizer.eos_token_id, set()
    for draw in np.linspace(0, 0.999, 20):
        batch = collate(items("a dog runs a photo of", draw=float(draw)))
        prefix, target = batch["input_ids"][0].tolist()[1:-1], batch["labels"][0].tolist()
        assert prefix + target == [*text, end] and batch["input_ids"][0, -1] == end
        seen.add(len(prefix))
    assert seen == {1, 2, 3}
    batch = collate(items("a dog", prompt="a photo of"))
    assert batch["labels"][0].tolist() == [*tokenizer("a dog", add_special_tokens=False).input_ids, end]


def test_learning_rate_warms_up_then_follows_a_cosine():
    schedule = Schedule(max_steps=100, warmup_steps=10, peak=1e-4, floor=1e-5)
    rate = [schedule.rate_at(step) for step in range(101)]
    assert rate[0] == pytest.approx(1e-6) and rate[5] == pytest.approx(5.05e-5) and rate[10] == pytest.approx(1e-4)
    assert rate[55] == pytest.approx(5.5e-5) and rate[100] == pytest.approx(1e-5)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))


def test_weights_decay_and_vectors_do_not():
    """By what a step does where there is no gradient: matrices shrink by learning rate times decay, the rest stays."""
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4)
    )
    model[3].requires_grad_(False)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.98))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {"0.weight", "2.weight"}
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] * (0.95 if name in decayed else 1.0), rtol=1e-6), name
    assert all(before[name].abs().min() > 1e-3 for name in decayed)


def test_negatives_become_hard_over_the_given_steps():
    assert [hardness_at(step, 4) for step in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0] and hardness_at(0, 0) == 1.0
    logits = torch.tensor([[9.0, 0.0, 1.0, 2.0]]).expand(20_000, 4)  # column 0 is the match
    positives = torch.tensor([[True, False, False, False]]).expand(20_000, 4)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for hardness in (0.0, 0.5, 1.0):
        drawn = draw_hard_negatives(hardness * logits, positives, uniform).bincount(minlength=4) / 20_000
        expected = (hardness * torch.tensor([0.0, 1.0, 2.0])).softmax(0)
        assert drawn[0] == 0 and drawn[1:].tolist() == pytest.approx(expected.tolist(), abs=0.015)


def test_harder_negatives_are_more_alike(monkeypatch):
    """What the model draws in a step: ITC scores of the drawn pairs rise with the hardness that it is given."""
    model, data, drawn = stage1().eval(), batch(rows=8), []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "vision_model" not in name:
                parameter.normal_(0, 0.3)  # a new model's scores hardly differ from one another

    def told(logits, positives, uniform):
        drawn.append(draw_hard_negatives(logits, positives, uniform))
        return drawn[-1]

    monkeypatch.setattr("modeling_blip2x.matching_blip2x.draw_hard_negatives", told)
    means = {}
    for hardness in (0.0, 1.0, 1000.0):
        drawn.clear()
        with torch.no_grad():
            outputs = [model(**data, negative_seed=seed, negative_hardness=hardness) for seed in range(20)]
        scores = [scores for one in outputs for scores in (one.logits_per_text, one.logits_per_image)]
        of_drawn = [rows.gather(1, columns[:, None]) for rows, columns in zip(scores, drawn, strict=True)]
        means[hardness] = torch.cat(of_drawn).mean().item()
    others = torch.cat(scores[:2]).masked_select(~torch.eye(8, dtype=torch.bool).repeat(2, 1)).view(16, 7)
    assert others.std() > 0.5
    assert means[0.0] == pytest.approx(others.mean().item(), abs=0.2 * others.std().item())  # drawn evenly
    assert means[0.0] + 0.2 < means[1.0] < means[1000.0]
    assert means[1000.0] == pytest.approx(others.amax(1).mean().item(), abs=1e-3)  # the most alike


def test_trimmed_bert_reads_the_captions_as_before(tmp_path, folder):
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes)).eval()
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    flags = [
        "--bert",
        tmp_path / "bert",
        "--dataset",
        folder,
        "--text_column",
        "captions",
        "--output_dir",
        tmp_path / "small",
    ]
    trim_bert.main([str(flag) for flag in flags])
    smaller, words = (
        BertModel.from_pretrained(tmp_path / "small").eval(),
        load_qformer_tokenizer(str(tmp_path / "small")),
    )
    assert smaller.config.vocab_size < bert.config.vocab_size and words.bos_token == "[DEC]"
    with torch.no_grad():
        before, after = (
            model(**tok("a red square on the left", return_tensors="pt")).last_hidden_state
            for model, tok in ((bert, tokenizer), (smaller, words))
        )
    assert torch.equal(before, after)
    trim_bert.main([*map(str, flags), "--num_layers", "1", "--dropout", "0"])
    config = BertConfig.from_pretrained(tmp_path / "small")
    assert config.num_hidden_layers == 1 and config.hidden_dropout_prob == 0
