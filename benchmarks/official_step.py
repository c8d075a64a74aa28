"""The plain algorithm of the official stage-1 code (LAVIS, blip2_qformer.py), on the weights of our model.

A reference to measure against, not a part of the package. As there:
- text is padded to 32 tokens, whatever its length;
- every pass that sees the image projects its keys and values again: queries alone (ITC), then the three sets of pairs of
  ITM, whose image features are copied into one batch;
- negatives are drawn row by row, each fetched from the device as a number;
- attention is written out, with additive masks; the last layer computes every position; ITG has logits at all 32.
ITG goes on from the self-attention keys and values that the query pass kept, as LAVIS does (`past_key_values`), so the
queries are not run again. One departure, so that losses can be compared: negatives come from the very draw of our model
(uniform numbers of the same seed, probabilities softmax(logits)), not from torch.multinomial.
"""

import math

import torch
import torch.nn.functional as F

from modeling_blip2x import Blip2xForPreTraining
from modeling_blip2x.losses_blip2x import LABEL_SMOOTHING, uniform_numbers

TEXT_LENGTH = 32


def official_losses(
    model: Blip2xForPreTraining,
    vision_embeds: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    negative_seed: int | None,
) -> dict[str, torch.Tensor]:
    """loss_itc, loss_itm and loss_itg of vision_embeds (B, N, D) and texts (B, L); all images differ."""
    ids, text_mask = to_full_length(input_ids), to_full_length(attention_mask)
    rows, queries = len(ids), model.config.num_query_tokens
    query_mask = text_mask.new_ones(rows, queries)
    image = model.model.ln_vision(vision_embeds)

    # ITC
    query_hidden, past = bert(model, queries_of(model, rows), queries, query_mask, image)
    image_features = F.normalize(model.vision_projection(query_hidden), dim=-1)
    text_hidden, _ = bert(model, words_of(model, ids), 0, text_mask)
    text_features = F.normalize(model.text_projection(text_hidden[:, 0]), dim=-1)
    with torch.autocast(ids.device.type, enabled=False):
        similarity = torch.einsum("iqp,tp->itq", image_features.float(), text_features.float()).amax(dim=-1)
        to_text = similarity / model.temperature
        to_image = similarity.T / model.temperature
    targets = torch.arange(rows, device=ids.device)
    both = [F.cross_entropy(scores, targets, label_smoothing=LABEL_SMOOTHING) for scores in (to_text, to_image)]

    # ITM
    uniform = uniform_numbers(0, rows, negative_seed, ids.device)
    negative_images = [draw(to_image[row], row, uniform[row, 0]) for row in range(rows)]
    negative_texts = [draw(to_text[row], row, uniform[row, 1]) for row in range(rows)]
    images_of_pairs = torch.cat([image, torch.stack([image[row] for row in negative_images]), image])
    ids_of_pairs = torch.cat([ids, ids, torch.stack([ids[row] for row in negative_texts])])
    masks_of_pairs = torch.cat([text_mask, text_mask, torch.stack([text_mask[row] for row in negative_texts])])
    hidden = torch.cat([queries_of(model, 3 * rows), words_of(model, ids_of_pairs)], dim=1)
    mask = torch.cat([query_mask.repeat(3, 1), masks_of_pairs], dim=1)
    hidden, _ = bert(model, hidden, queries, mask, images_of_pairs)
    match = model.itm_head(hidden[:, :queries]).mean(dim=1)
    is_match = torch.cat([targets.new_ones(rows), targets.new_zeros(2 * rows)])

    # ITG
    decoder_ids = ids.clone()
    decoder_ids[:, 0] = model.config.qformer_config.bos_token_id
    labels = ids.masked_fill(text_mask == 0, -100)
    mask = torch.cat([query_mask, text_mask], dim=1)
    hidden, _ = bert(model, words_of(model, decoder_ids), 0, mask, past=past)
    logits = model.itg_head(hidden, model.get_input_embeddings().weight)
    logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()

    return {
        "loss_itc": sum(both) / 2,
        "loss_itm": F.cross_entropy(match.float(), is_match),
        "loss_itg": F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING),
    }


def to_full_length(tokens: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, 32), zeros after the text: [PAD] in ids and in masks."""
    return F.pad(tokens, (0, TEXT_LENGTH - tokens.shape[1]))


def draw(scores: torch.Tensor, own: int, uniform: torch.Tensor) -> int:
    """Number of a negative of one row: scores (B,) of its candidates, of which `own` is the match."""
    weights = scores.detach().double().softmax(dim=0)
    weights[own] = 0
    return torch.searchsorted(weights.cumsum(0), uniform.double() * weights.sum(), right=True).item()


def queries_of(model: Blip2xForPreTraining, rows: int) -> torch.Tensor:
    qformer = model.model.qformer
    return qformer.dropout(qformer.layernorm(model.model.query_tokens(rows)))


def words_of(model: Blip2xForPreTraining, ids: torch.Tensor) -> torch.Tensor:
    qformer = model.model.qformer
    return qformer.dropout(qformer.layernorm(qformer.embeddings(ids)))


def bert(
    model: Blip2xForPreTraining,
    hidden: torch.Tensor,
    queries: int,
    mask: torch.Tensor,
    image: torch.Tensor | None = None,
    past: list | None = None,
) -> tuple[torch.Tensor, list]:
    """hidden (B, L, H), of which the first `queries` positions are queries, through all layers.

    mask (B, L), or (B, past + L) with `past`, the keys and values that a pass over queries returned; then text is causal.
    """
    seen = mask[:, None, None, :].to(hidden.dtype)
    if past is not None:
        length, before = hidden.shape[1], mask.shape[1] - hidden.shape[1]
        causal = torch.ones(length, mask.shape[1], device=mask.device).tril(diagonal=before)
        seen = seen * causal
    additive = (1 - seen) * -10000.0
    key_values = []
    for number, layer in enumerate(model.model.qformer.layers):
        own = (None, None) if past is None else past[number]
        hidden, keys, values = attention(layer.attention, hidden, hidden, additive, *own)
        key_values.append((keys, values))
        parts = []
        if queries:
            part = hidden[:, :queries]
            if layer.crossattention is not None:
                part, _, _ = attention(layer.crossattention, part, image, None)
            parts.append(feed_forward(layer.query_feed_forward, part))
        if hidden.shape[1] > queries:
            parts.append(feed_forward(layer.text_feed_forward, hidden[:, queries:]))
        hidden = torch.cat(parts, dim=1)
    return hidden, key_values


def attention(part, hidden, states, additive, past_keys=None, past_values=None) -> tuple[torch.Tensor, ...]:
    """hidden (B, L, H) attends to states (B, S, width), and to keys and values (B, heads, P, d) of the past before them."""
    heads = part.config.num_attention_heads

    def split(projected):
        return projected.view(*projected.shape[:2], heads, -1).permute(0, 2, 1, 3)

    queries, keys, values = split(part.query(hidden)), split(part.key(states)), split(part.value(states))
    if past_keys is not None:
        keys, values = torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    if additive is not None:
        scores = scores + additive
    probabilities = F.dropout(scores.softmax(dim=-1), part.config.attention_probs_dropout_prob, training=part.training)
    context = (probabilities.to(values.dtype) @ values).permute(0, 2, 1, 3).flatten(-2)
    return part.layernorm(part.dropout(part.dense(context)) + hidden), keys, values


def feed_forward(part, hidden: torch.Tensor) -> torch.Tensor:
    return part.layernorm(part.dropout(part.down(part.activation(part.up(hidden)))) + hidden)
