"""What differs between language models, and between releases of transformers, for a model that feeds them embeddings.

One language model counts positions itself and another does not, one takes `logits_to_keep`, one calls its cache `cache`
and another `past_key_values`. All of that is asked of the model here, so that a forward reads the same for all of them.

What a family needs that is no matter of its forward stands where the thing itself is made:

- the token that an encoder-decoder starts from: `Blip2xConfig.__post_init__` in configuration_blip2x.py;
- a padding token for families that have none (Llama, GPT-2): `Blip2xProcessor.__init__` in processing_blip2x.py;
- whether BOS stands behind the image in a prompt without text: `image_prompt` in image_prompt_blip2x.py;
- which class of transformers loads it: `load_language_model` in assembling_blip2x.py.
"""

import inspect
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import logging

from .distributed_blip2x import global_mean, share_of_items

logger = logging.get_logger(__name__)
IGNORE = -100  # label of a token that no loss counts, as in torch and transformers

# Name of the cache in outputs and in generate: past_key_values, and from transformers 5.24 on cache.
CACHE = next(field.name for field in fields(Seq2SeqLMOutput) if field.name in ("cache", "past_key_values"))

# What transformers' generate, Trainer and PEFT pass to every model, and models of this release make no use of.
NOT_FOR_MODELS = (
    "tokenizer",
    "assistant_tokenizer",
    "cache_position",
    "task_ids",
    "token_type_ids",
    "mm_token_type_ids",
)

# Arguments that only some language models have; as None they say nothing, and PEFT passes them to all.
OF_SOME_MODELS = (
    "head_mask",
    "decoder_head_mask",
    "cross_attn_head_mask",
    "decoder_inputs_embeds",
    "decoder_position_ids",
    "output_router_logits",
)


def longer_cache(cache: object | None, past_key_values: object | None) -> object | None:
    """The cache to go on from. PEFT's prefix comes under the old name at every step, beside the cache that it began."""
    if cache is None or past_key_values is None:
        return past_key_values if cache is None else cache
    return max(cache, past_key_values, key=lambda one: one.get_seq_length())


def positions_of(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, cache: object | None
) -> torch.Tensor:
    """Positions (B, L) of inputs_embeds (B, L, width) that go on from a cache.

    attention_mask: (B, past + L), 0 for padding, which may be on the left; None: there is no padding.
    """
    length = inputs_embeds.shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape[1] >= past + length:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return (past + torch.arange(length, device=inputs_embeds.device))[None]


class LanguageModelSignature:
    """The names by which the forward of a language model takes its arguments."""

    def __init__(self, language_model: nn.Module):
        self.names = set(inspect.signature(language_model.forward).parameters)
        self.cache = next((name for name in ("cache", "past_key_values") if name in self.names), CACHE)
        self.model_type = language_model.config.model_type

    def chosen(self, **arguments: object) -> dict:
        """Those arguments that are set and that the model has a name for."""
        return {name: value for name, value in arguments.items() if value is not None and name in self.names}

    def positions(
        self,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        cache: object | None,
    ) -> dict[str, torch.Tensor]:
        """position_ids if the model takes them: as given, else counted from mask and cache."""
        # A mask of four dimensions is a layout of the caller's own, from which nothing can be counted.
        if position_ids is None and (attention_mask is None or attention_mask.ndim == 2):
            position_ids = positions_of(attention_mask, inputs_embeds, cache)
        return self.chosen(position_ids=position_ids)

    def others(self, arguments: dict) -> dict:
        """Of keywords that a caller passed besides those of `Blip2xForConditionalGeneration.forward`, those to hand on.

        Raises TypeError for one that neither the language model nor transformers knows, with the nearest name.
        """
        arguments = {name: value for name, value in arguments.items() if name not in NOT_FOR_MODELS}
        silent = [name for name, value in arguments.items() if value is None and name in OF_SOME_MODELS]
        self.refuse(name for name in arguments if name not in silent)
        return {name: value for name, value in arguments.items() if value is not None}

    def refuse(self, names: Iterable[str]) -> None:
        """Raise TypeError for names of arguments that the language model does not have, with the nearest that it has."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            near = get_close_matches(unknown[0], self.names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"forward with a {self.model_type} language model takes no argument "
                f"{', '.join(map(repr, unknown))}.{hint}"
            )


class LanguageBackbone:
    """A generative model without the output layer of its language model: embeddings in, `last_hidden_state` out.

    What `model.base_model` is. Trainers that multiply by the output layer themselves, a few tokens at a time (TRL's
    SFTTrainer), call it with the arguments of a forward. Not a module: it holds no weights of its own.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *arguments, **keywords):
        return self.model.run_backbone(*arguments, **keywords)

    def __getattr__(self, name: str) -> object:
        return getattr(self.model.model, name)  # what else transformers asks of the part that all models share


def warn_of_float16(language_model: nn.Module) -> None:
    """Say once that a T5 in float16 gives gibberish; transformers computes it without a word."""
    if language_model.config.model_type == "t5" and language_model.dtype == torch.float16:
        _warn_of_float16()


@torch.compiler.disable
def _warn_of_float16() -> None:
    logger.warning_once(
        "T5 was trained in bfloat16 and overflows in float16: answers may be gibberish. Load the model with "
        "dtype=torch.bfloat16 or torch.float32."
    )


def language_modelling_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Cross-entropy (B, T, vocabulary) against labels (B, T), in fp32, a mean over the supervised tokens.

    While training on several processes it is the mean over the global batch; in evaluation over this process's rows,
    since processes need not evaluate in step. With num_items_in_batch, the tokens as a trainer has counted them, it is what
    these rows add to the mean over all.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    if num_items_in_batch is not None:
        return share_of_items(total, num_items_in_batch)
    count = (labels != IGNORE).sum()
    return global_mean(total, count) if torch.is_grad_enabled() else total / count.clamp(min=1)
