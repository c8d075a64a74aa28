"""A gradient that is not finite while the loss is: the run stops before the step, on every process, and names it."""

import functools
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from blip2x_training import caption_language, pretrain_stage1
from blip2x_training.engine.checkpoint import steps_saved
from blip2x_training.toy import language_model
from modeling_blip2x import Blip2xForPreTraining
from tests.helpers.processes import Script, flags, make_parts, steps_logged

SPOILT = "model.qformer.layers.0.attention.query.weight"
FORWARDS = 2  # for a step


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    parts = make_parts(tmp_path_factory.mktemp("gradients"))
    return {**parts, "max_steps": 3, "save_steps": 1, "dataloader_num_workers": 0}


def spoil(step: int, value: float, rank: str | None = None, name: str = SPOILT) -> None:
    """From a step on, one number of one gradient is another, on one process or on all."""
    forward, calls = Blip2xForPreTraining.forward, []

    def change(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    def spoilt(self, *args, **kwargs):
        if self.training and rank in (None, os.environ.get("RANK")):
            calls.append(1)
            if len(calls) == (step - 1) * FORWARDS + 1:
                self.get_parameter(name).register_hook(change)
        return forward(self, *args, **kwargs)

    Blip2xForPreTraining.forward = spoilt


def assert_intact(out: Path, steps: list[int]) -> None:
    assert steps_saved(out) == steps and not (out / "config.json").exists()
    tensors = load_file(out / f"checkpoints/step_{steps[-1]}/trained.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("value, clip", [(float("nan"), 1), (float("inf"), 0), (1e30, 1)])  # 1e30 has no square
def test_the_last_step_is_not_taken(fields, tmp_path, monkeypatch, value, clip):
    run = {**fields, "output_dir": tmp_path / "out", "max_grad_norm": clip}
    with monkeypatch.context() as patch:
        patch.setattr(Blip2xForPreTraining, "forward", Blip2xForPreTraining.forward)
        spoil(3, value)
        with pytest.raises(FloatingPointError, match=f"Step 3: the gradient of {re.escape(SPOILT)} is not finite"):
            pretrain_stage1.main(flags(run))
    assert_intact(tmp_path / "out", [1, 2])
    pretrain_stage1.main(flags(run))
    assert steps_saved(tmp_path / "out") == [2, 3] and (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("chunks", [{}, {"itc_chunk_size": 1}])
def test_of_two_processes_both_stop(fields, tmp_path, chunks):
    out = tmp_path / "out"
    run = {**fields, "output_dir": out, "per_device_train_batch_size": 2, **chunks}
    patch = functools.partial(spoil, 2, float("nan"), rank="1") if not chunks else spoil_chunks
    script = Script(run, tmp_path / "log", processes=2, patch=patch)
    assert script.wait() == [1, 1], script.text()
    assert script.text().count(f"error: Step 2: the gradient of {SPOILT} is not finite") == 2, script.text()
    assert_intact(out, [1])


def spoil_chunks() -> None:
    """Rank 1 gets a gradient that is NaN in its third step in chunks, the first of the second optimiser step."""
    from blip2x_training.engine import chunked_step

    whole, calls = chunked_step.chunked_backward, []

    def spoilt(model, **arguments):
        outputs = whole(model, **arguments)
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            model.get_parameter(SPOILT).grad.view(-1)[0] = float("nan")
        return outputs

    chunked_step.chunked_backward = spoilt


def test_float16_skips_what_overflows_but_not_for_ever(fields, tmp_path):
    """From 2^16 the scale is halved 30 times before it is below 1e-4: what is NaN then is no overflow."""
    out = tmp_path / "out"
    run = {**fields, "output_dir": out, "fp16": True, "max_steps": 40, "save_steps": 1000}
    script = Script(run, tmp_path / "log", patch=functools.partial(spoil, 1, float("nan")))
    assert script.wait() == [1], script.text()
    assert f"error: Step 31: the gradient of {SPOILT} is not finite" in script.text(), script.text()
    assert steps_logged(out) == 30 and not steps_saved(out)


def spoil_a_shard() -> None:
    """Before the second step one number of the shard of rank 1 is NaN."""
    from blip2x_training.engine import train_loop

    norm, calls = train_loop.gradient_norm, []

    def spoilt(accelerator, model):
        calls.append(1)
        gradient = accelerator.unwrap_model(model).get_parameter(SPOILT).grad.to_local()
        if len(calls) == 2 and os.environ["RANK"] == "1":
            gradient.view(-1)[0] = float("nan")
        return norm(accelerator, model)

    train_loop.gradient_norm = spoilt


@pytest.mark.slow
def test_a_sharded_gradient_is_judged_and_named_whole(fields, tmp_path):
    out = tmp_path / "out"
    run = {**fields, "output_dir": out, "per_device_train_batch_size": 2}
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    sharded |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    script = Script(run, tmp_path / "log", processes=2, patch=spoil_a_shard, environment=sharded)
    assert script.wait() == [1, 1], script.text()
    assert script.text().count(f"error: Step 2: the gradient of {SPOILT} is not finite") == 2, script.text()
    assert_intact(out, [1])


def test_language_models_of_captions_and_toys_are_not_saved_with_nan(fields, tmp_path, monkeypatch):
    """Their loops are others: the one of transformers' Trainer, and a few lines."""
    monkeypatch.setattr(Trainer, "train", lambda trainer: trainer.model.lm_head.weight.data.fill_(float("nan")))
    flags_of = {"dataset": fields["dataset"], "text_column": "captions", "output_dir": tmp_path / "llm"}
    with pytest.raises(FloatingPointError, match="not finite after training with --learning_rate"):
        caption_language.main(flags({**flags_of, "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 1}))
    assert not (tmp_path / "llm" / "config.json").exists()
    make = language_model.make_model

    def spoilt(vocabulary: int):
        model = make(vocabulary)
        next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        return model

    monkeypatch.setattr(language_model, "make_model", spoilt)
    with pytest.raises(RuntimeError, match="non-finite"):
        language_model.pretrain_language(tmp_path / "toy", seed=0, steps=1, scenes=40)
    assert not (tmp_path / "toy").exists()
