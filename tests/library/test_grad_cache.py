"""A step in chunks is the step of the whole batch: losses, gradients, random numbers, and the memory of a chunk."""

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers.modeling_outputs import BaseModelOutput

from blip2x_training.engine.chunked_step import chunked_step
from modeling_blip2x import Blip2xForPreTraining, grad_cache_blip2x, losses_blip2x
from modeling_blip2x.grad_cache_blip2x import _fetch_of, chunked_backward
from modeling_blip2x.losses_blip2x import itc_loss, itg_loss, itm_loss, itm_pairs
from modeling_blip2x.outputs_blip2x import Blip2xForPreTrainingOutput
from tests.helpers.saved_bytes import SavedBytes
from tests.helpers.tiny import QUERIES, batch, stage1

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LOSSES = ("loss", "loss_itc", "loss_itm", "loss_itg", "itm_accuracy")
ROWS = 8
bfloat16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def make(dropout: bool = False, **changes) -> Blip2xForPreTraining:
    """A spread of 0.08 makes pairs differ, so that gradients are no mere noise."""
    return stage1(qformer={"initializer_range": 0.08, **({} if dropout else NO_DROPOUT)}, **changes).train()


def inputs(rows: int = ROWS, cached: Blip2xForPreTraining | None = None) -> dict[str, torch.Tensor]:
    """A batch in which rows 1 and 6 have one image; of `cached`, features in place of pixels."""
    data = batch(rows=rows)
    data["image_ids"] = torch.tensor([0, 1, 2, 3, 4, 5, 1, *range(7, rows)])[:rows]
    if cached is not None:
        data["vision_embeds"] = cached.model.get_vision_embeds(data.pop("pixel_values"))
    return data


def gradients(model: Blip2xForPreTraining) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_size", (3, ROWS))
def test_sigmoid_itc_in_chunks(chunk_size):
    """With a bias that is learned too."""
    data = inputs()
    expected = plain(make(itc_loss="sigmoid"), data)
    assert_same(expected, chunked(make(itc_loss="sigmoid"), data, chunk_size))
    assert expected[1]["itc_bias"].abs() > 1e-3


@pytest.mark.parametrize("chunk_size", (3, ROWS))
def test_queries_are_kept_apart_in_chunks(chunk_size, monkeypatch):
    monkeypatch.setattr(losses_blip2x, "QUERY_DISTANCE", 1.5)  # random ones are 1.4 apart
    data = inputs()
    expected = plain(make(query_spread=2.0), data)
    found = chunked(make(query_spread=2.0), data, chunk_size)
    assert_same(expected, found)
    assert found[0].loss_spread.item() == pytest.approx(expected[0].loss_spread.item(), rel=1e-5)
    assert expected[0].loss_spread > 0.01


def plain(model: Blip2xForPreTraining, data: dict, autocast: Callable | None = None):
    with autocast() if autocast else torch.autocast("cpu", enabled=False):
        output = model(**data, negative_seed=5)
    output.loss.backward()
    return output, gradients(model)


def chunked(
    model: Blip2xForPreTraining,
    data: dict,
    chunk_size: int,
    backward: Callable = torch.Tensor.backward,
    autocast: Callable = contextlib.nullcontext,
):
    accelerator = SimpleNamespace(backward=backward, autocast=autocast)
    output = chunked_backward(model, chunk_size=chunk_size, negative_seed=5, accelerator=accelerator, **data)
    return output, gradients(model)


def assert_same(one, other, tolerance: float = 1e-5) -> None:
    (expected, wanted), (output, found) = one, other
    assert not output.loss.requires_grad
    for name in (*LOSSES, "temperature", "logits_per_image", "logits_per_text"):
        if expected.get(name) is None:
            assert output.get(name) is None, name
        else:
            assert torch.allclose(output[name], expected[name], atol=tolerance), name
    assert found.keys() == wanted.keys()
    assert sum(gradient.abs().max() > 1e-3 for gradient in wanted.values()) > len(wanted) / 2
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 8, 100])
@pytest.mark.parametrize("cached", [False, True])
def test_chunks_equal_the_whole_batch(chunk_size, cached):
    one, other = make(), make()
    data = inputs(cached=one if cached else None)
    assert_same(plain(one, data), chunked(other, data, chunk_size))


@pytest.mark.parametrize("objectives", [["itc"], ["itm", "itg"], ["itc", "itm"]])
def test_any_objectives(objectives):
    one, other = make(objectives=objectives), make(objectives=objectives)
    assert_same(plain(one, inputs()), chunked(other, inputs(), 3))


def test_one_image_in_all_rows_and_no_mask():
    data = inputs() | {"image_ids": torch.zeros(ROWS, dtype=torch.long), "attention_mask": None}
    assert_same(plain(make(), data), chunked(make(), data, 3))


def test_a_frozen_temperature_stays():
    one, other = make(), make()
    one.temperature.requires_grad_(False)
    other.temperature.requires_grad_(False)
    assert_same(plain(one, inputs()), chunked(other, inputs(), 3))
    assert other.temperature.grad is None


def test_gradient_checkpointing_goes_with_it():
    model = make(dropout=True)
    torch.manual_seed(0)
    expected = chunked(model, inputs(), 3)
    model = make(dropout=True)
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    assert_same(expected, chunked(model, inputs(), 3))


def test_backwards_add_up_and_may_be_scaled():
    model = make()
    _, once = chunked(make(), inputs(), 3)
    for _ in range(2):
        _, twice = chunked(model, inputs(), 3, backward=lambda loss: (4 * loss).backward())
    for name, gradient in once.items():
        assert torch.allclose(twice[name], 8 * gradient, atol=1e-4, rtol=1e-5), name


def test_one_chunk_draws_the_dropout_of_the_plain_step():
    """Random numbers come in the order of the plain forward, negatives without a seed among them."""
    data = inputs() | {"negative_seed": None}
    torch.manual_seed(0)
    model = make(dropout=True)
    torch.manual_seed(1)
    expected = model(**data)
    expected.loss.backward()
    wanted = gradients(model)
    state = torch.get_rng_state()
    model = make(dropout=True)
    torch.manual_seed(1)
    output = chunked_backward(model, chunk_size=ROWS, **data)
    assert_same((expected, wanted), (output, gradients(model)))
    assert torch.equal(torch.get_rng_state(), state)


def one_graph(model: Blip2xForPreTraining, data: dict, chunk_size: int):
    """The same loss in chunks, written with one graph: every chunk is encoded once, then come its ITM and its ITG."""
    vision = model.model.get_vision_embeds(data["pixel_values"])
    ids, mask, chunks = data["input_ids"], data["attention_mask"], []
    for start in range(0, ROWS, chunk_size):
        rows = slice(start, start + chunk_size)
        image = BaseModelOutput(last_hidden_state=vision[rows])
        pairs = model.encode_rows(image, ids[rows], mask[rows], [ROWS], start, model.decoder_ids(ids[rows]))
        chunks.append((rows, pairs, *model.features_of(pairs)))
    images, text = torch.cat([chunk[2] for chunk in chunks]), chunks[0][3]
    text.pooler_output = torch.cat([chunk[3].pooler_output for chunk in chunks])
    contrast = model.compare(images, text, data["image_ids"], [ROWS], 0)
    negatives = model.draw_negatives(contrast, 0, 5, 1.0)
    logits, labels, words = [], [], []
    for rows, pairs, *_ in chunks:
        chosen = itm_pairs(torch.arange(ROWS)[rows], negatives[0][rows], negatives[1][rows])
        fetch = _fetch_of(vision, negatives[0], 0, [ROWS])
        logits.append(model.match_logits(pairs, chosen, (ids, mask), fetch))
        labels.append(chosen.labels)
        words.append(model.text_logits(pairs))
    matching, accuracy = itm_loss(torch.cat(logits), torch.cat(labels))
    output = Blip2xForPreTrainingOutput(
        loss_itc=itc_loss(contrast.logits_per_image, contrast.logits_per_text, contrast.positives),
        loss_itm=matching,
        loss_itg=itg_loss(*(torch.cat(parts) for parts in zip(*words))),
        itm_accuracy=accuracy,
        temperature=model.temperature[0],
        logits_per_image=contrast.logits_per_image,
        logits_per_text=contrast.logits_per_text,
    )
    output.loss = output.loss_itc + output.loss_itm + output.loss_itg
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_with_dropout_the_gradient_is_that_of_one_graph(chunk_size):
    results, states = [], []
    for step in (one_graph, chunked):
        model = make(dropout=True)
        torch.manual_seed(1)
        results.append(step(model, inputs(), chunk_size))
        states.append(torch.get_rng_state())
    assert_same(*results)
    assert torch.equal(*states), "what comes after draws other numbers than the replay"


def encodings(chunk_size: int, autocast: Callable) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features of all chunks as the first pass saw them, and as the second did."""
    model, seen = make(dropout=True), []
    for projection in (model.vision_projection, model.text_projection):
        projection.register_forward_hook(lambda module, given, output: seen.append(output.detach().clone()))
    chunked(model, inputs(), chunk_size, autocast=autocast)
    assert len(seen) == 4 * -(-ROWS // chunk_size)
    return seen[: len(seen) // 2], seen[len(seen) // 2 :]


@pytest.mark.parametrize("autocast", [contextlib.nullcontext, bfloat16])
@pytest.mark.parametrize("chunk_size", [3, 8])
def test_both_encodings_of_a_chunk_agree_bit_for_bit(chunk_size, autocast, monkeypatch):
    assert all(torch.equal(first, second) for first, second in zip(*encodings(chunk_size, autocast)))
    monkeypatch.setattr(grad_cache_blip2x, "_replayed", lambda state, device: contextlib.nullcontext())
    assert not any(torch.equal(first, second) for first, second in zip(*encodings(chunk_size, autocast)))


def test_bfloat16_autocast_is_that_of_the_plain_step():
    one, other = make(), make()
    expected, wanted = plain(one, inputs(), bfloat16)
    output, found = chunked(other, inputs(), 3, autocast=bfloat16)
    for name in LOSSES[:4]:
        assert output[name].dtype == torch.float32 and output[name].item() == pytest.approx(expected[name].item(), 1e-2)
    exact = plain(make(), inputs())[1]
    for name, gradient in wanted.items():  # no further from float32 than the plain step is, up to a factor
        if not name.endswith("key.bias"):  # zero but for rounding
            assert (found[name] - exact[name]).norm() < 0.1 * exact[name].norm() + 1e-4, name
            assert (gradient - exact[name]).norm() < 0.1 * exact[name].norm() + 1e-4, name


def test_float16_with_a_loss_scaler():
    model = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    half = functools.partial(torch.autocast, "cpu", dtype=torch.float16)
    _, found = chunked(model, inputs(), 3, autocast=half, backward=lambda loss: scaler.scale(loss).backward())
    scaler.unscale_(optimizer)
    exact = plain(make(), inputs())[1]
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() < 0.02 * gradient.norm() + 1e-4, name


def test_accelerate_brings_autocast_and_accumulation():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    try:
        model = accelerator.prepare(make())
        dtypes = set()
        model.vision_projection.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))
        for _ in range(2):
            with accelerator.accumulate(model):
                chunked_step(3)(accelerator, model, inputs() | {"negative_seed": 5})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    _, expected = chunked(make(), inputs(), 3, autocast=bfloat16)
    assert dtypes == {torch.bfloat16}
    assert all(torch.allclose(gradient, expected[name]) for name, gradient in gradients(model).items())


def peak_of(rows: int, chunk_size: int | None) -> int:
    """Bytes that autograd holds at most, beside parameters and inputs, in a step of so many rows."""
    model = make(dropout=True)
    data = inputs(rows, cached=model)
    with SavedBytes([*model.parameters(), *data.values()]) as saved:
        chunked(model, data, chunk_size) if chunk_size else plain(model, data)
    assert saved.now == 0
    return saved.peak


def test_activations_do_not_grow_with_the_batch():
    chunk_size, rows, width = 4, 32, 16
    features = 4 * rows * (QUERIES + 1) * width
    logits = 4 * rows * rows
    small, large = peak_of(8, chunk_size), peak_of(rows, chunk_size)
    assert large <= small + features + 2 * logits
    assert large < 1.2 * peak_of(chunk_size, None)
    assert peak_of(rows, None) > 6 * large


def test_the_tower_sees_a_chunk_at_a_time_and_keeps_no_graph():
    model, rows = make(), []
    model.model.vision_model.register_forward_hook(
        lambda module, given, output: rows.append((len(output.last_hidden_state), torch.is_grad_enabled()))
    )
    chunked(model, inputs(), 3)
    assert rows == [(3, False), (3, False), (2, False)]


def test_each_image_is_projected_twice_and_negatives_of_other_chunks_once_more():
    model, rows = make(), []
    model.model.ln_vision.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    chunked(model, inputs(), 4)
    encoded, negatives = rows[:2] + rows[2::2], rows[3::2]
    assert encoded == [4, 4, 4, 4] and len(negatives) == 2 and 0 < sum(negatives) <= ROWS


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        chunked(make(), inputs(), 0)
    with pytest.raises(ValueError, match="needs texts"):
        chunked(make(), inputs() | {"input_ids": None}, 2)
    with pytest.raises(ValueError, match="7 images and 8 texts"):
        chunked(make(), inputs() | {"pixel_values": torch.zeros(7, 3, 28, 28)}, 2)
    with pytest.raises(ValueError, match="got neither"):
        chunked(make(), inputs() | {"pixel_values": None}, 2)
    trained = make()
    trained.model.vision_model.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze_unimodal"):
        chunked(trained, inputs(), 2)
