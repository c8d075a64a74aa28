"""What the models return. Shapes: B batch, N image positions, D width of the tower, Q queries, L text, H width of the
Q-Former, P contrastive width. Hidden states and attentions are there when asked for.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import ModelOutput

Tensors = tuple[torch.FloatTensor, ...]


def chosen_hidden_states(states: Tensors, wanted: bool | list[int]) -> Tensors | None:
    """Hidden states where asked for: all of them, or of a list of layers, with None in the places of the others."""
    if isinstance(wanted, bool):
        return states if wanted else None
    kept = {index % len(states) for index in wanted}
    return tuple(state if index in kept else None for index, state in enumerate(states))


@dataclass
class Blip2xModelOutput(ModelOutput):
    """last_hidden_state (B, Q, H): query output. vision_embeds (B, N, D): features of the tower before `ln_vision`.

    Of the Q-Former: hidden_states (layers + 1) of (B, Q, H), followed by the text where it reads one; attentions (layers)
    of (B, heads, Q, Q); cross_attentions (one for each layer that has them) of (B, heads, Q, N). Of the vision tower:
    vision_outputs, with its hidden_states and attentions.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    vision_embeds: torch.FloatTensor | None = None
    vision_outputs: BaseModelOutput | None = None


@dataclass
class Blip2xImageFeatures(ModelOutput):
    """pooler_output: the features asked for; (B, Q, width of the LLM) for a soft prompt, (B, Q, P) unit norm in stage 1.

    last_hidden_state (B, N, D), hidden_states and attentions are the vision tower's, as in other transformers models;
    those of the Q-Former are in qformer_outputs.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    qformer_outputs: Blip2xModelOutput | None = None


@dataclass
class Blip2xTextFeatures(ModelOutput):
    """pooler_output (B, P), unit norm; last_hidden_state (B, L, H), hidden_states and attentions of the Q-Former."""

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class Blip2xMultimodalFeatures(ModelOutput):
    """last_hidden_state (B, Q, H): query outputs that have seen image and text."""

    last_hidden_state: torch.FloatTensor | None = None


@dataclass
class Blip2xRetrievalOutput(ModelOutput):
    """logits_per_image (N, M) = cosine / temperature, logits_per_text its counterpart; loss = ITC + ITM if asked.

    vision_outputs, qformer_outputs (queries alone, as in ITC) and text_outputs where hidden states or attentions are
    asked for.
    """

    loss: torch.FloatTensor | None = None
    loss_itc: torch.FloatTensor | None = None
    loss_itm: torch.FloatTensor | None = None
    itm_accuracy: torch.FloatTensor | None = None
    temperature: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    vision_outputs: BaseModelOutput | None = None
    qformer_outputs: Blip2xModelOutput | None = None
    text_outputs: Blip2xTextFeatures | None = None


@dataclass
class Blip2xForPreTrainingOutput(ModelOutput):
    """loss = loss_itc + loss_itm + loss_itg + loss_spread, those that there are; logits (B, N) against the global batch, cosine / temperature.

    The rest as in `Blip2xRetrievalOutput`.
    """

    loss: torch.FloatTensor | None = None
    loss_itc: torch.FloatTensor | None = None
    loss_itm: torch.FloatTensor | None = None
    loss_itg: torch.FloatTensor | None = None
    loss_spread: torch.FloatTensor | None = None
    itm_accuracy: torch.FloatTensor | None = None
    temperature: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    vision_outputs: BaseModelOutput | None = None
    qformer_outputs: Blip2xModelOutput | None = None
    text_outputs: Blip2xTextFeatures | None = None


@dataclass
class Blip2xForConditionalGenerationOutput(Seq2SeqLMOutput):
    """loss, logits (B, L, vocabulary), cache, hidden states and attentions are the language model's.

    Those of the vision tower are in vision_outputs, those of the Q-Former in qformer_outputs. The cache has the name that
    transformers gives it: past_key_values, from release 5.24 on cache.
    """

    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    vision_outputs: BaseModelOutput | None = None
    qformer_outputs: Blip2xModelOutput | None = None
