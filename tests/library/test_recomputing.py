"""Activation checkpointing with a frozen language model: the same gradients from fewer activations, dropout off."""

import pytest
import torch
from transformers import BloomConfig, FalconConfig, Gemma2Config, GPTNeoXConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_blip2x import Blip2xForConditionalGeneration
from tests.helpers import tiny

OTHERS = {
    "bloom": BloomConfig(vocab_size=70, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1, attention_dropout=0.1),
    "falcon": FalconConfig(vocab_size=70, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gemma2": Gemma2Config(
        vocab_size=70, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    ),
    "neox": GPTNeoXConfig(
        vocab_size=70, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, hidden_dropout=0.1
    ),
}  # fmt: skip


def frozen(family: str, monkeypatch) -> Blip2xForConditionalGeneration:
    """A model that trains but for tower and language model; those of OPT, T5, GPT-2, Bloom and GPT-NeoX have dropout."""
    if family in OTHERS:
        monkeypatch.setitem(tiny.LANGUAGE_MODELS, family, OTHERS[family])
    model = tiny.stage2(family, std=0.1, qformer={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    model.freeze_unimodal()
    return model.train()


def backward(model: Blip2xForConditionalGeneration) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients, bytes that the forward keeps for the backward, and calls of what is in the language model's layers."""
    inputs = tiny.prompt(model)
    inputs["labels"] = tiny.labels_of(model, inputs)
    kept, calls = {}, []
    layers = [part for part in model.language_model.modules() if isinstance(part, GradientCheckpointingLayer)]
    leaves = [part for layer in layers for part in layer.modules() if list(part.parameters(recurse=False))]
    hooks = [part.register_forward_pre_hook(lambda *_: calls.append(1)) for part in leaves]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, sum(kept.values()), len(calls)


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "qwen", "t5", *OTHERS])
def test_layers_of_a_frozen_language_model_are_recomputed(family, monkeypatch):
    model = frozen(family, monkeypatch)
    plain, kept, calls = backward(model)
    model.activation_checkpointing_enable()
    again, kept_less, calls_twice = backward(model)
    assert calls_twice == 2 * calls > 0
    assert kept_less < kept
    assert plain.keys() == again.keys() and len(plain) > 50
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], atol=1e-6), name

    model.activation_checkpointing_disable()
    assert backward(model)[2] == calls


def test_generation_keeps_its_cache(monkeypatch):
    """Without gradients nothing is recomputed, and the layers write their cache."""
    model = frozen("llama", monkeypatch).eval()
    inputs = tiny.prompt(model)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    model.activation_checkpointing_enable()
    lengths = []
    hook = model.language_model.model.layers[0].register_forward_pre_hook(
        lambda _, given: lengths.append(given[0].shape[1])
    )
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), plain)
    hook.remove()
    assert lengths[1:] == [1] * (len(lengths) - 1) and len(lengths) > 1


def test_every_second_layer(monkeypatch):
    model = frozen("opt", monkeypatch)
    calls = backward(model)[2]
    model.activation_checkpointing_enable(every_n_layers=2)
    assert calls < backward(model)[2] < 2 * calls
