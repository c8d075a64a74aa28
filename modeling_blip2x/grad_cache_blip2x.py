"""Stage 1 on a large batch with the activation memory of a small one: gradient caching (Gao et al. 2021, GradCache).

    outputs = chunked_backward(model, chunk_size=32, vision_embeds=..., input_ids=..., attention_mask=...)
    average_gradients(model.parameters())  # with several processes
    optimizer.step()

ITC needs the features of the whole batch, but its gradient passes through them alone. So features come first, chunk by
chunk, each chunk's graph dropped; ITC over all of them gives the gradient of every feature; then each chunk is encoded
again and gets one backward of what it adds to the loss:

    sum(feature * its gradient by ITC) + its share of ITM + its share of ITG

ITM draws its negatives over the whole batch from the ITC logits, and belongs to the chunk of the pair that drew them.
The price is the encoding of images and texts once more, and of negative images once a chunk.

Dropout: both encodings of a chunk see the same random state, hence the same masks; both build a graph, for kernels may
differ without one (they do in bfloat16 on a CPU). The two passes then agree bit for bit, and the gradient is exact.

Memory that remains proportional to the B pairs of this process, N pairs in the global batch: the tower's features
(B, positions, width), as many again at most for negatives of other processes, the ITC features (N, Q + 1, P) and their
gradients, some (B, N) matrices of logits, and the inputs. No activation is among them.

Several processes: nothing here goes through DDP's forward, so its hooks stay quiet and gradients remain those of this
process, scaled like all losses here so that their mean over processes is the gradient of the global mean (see
`global_mean`). `average_gradients` takes that mean, once before the optimiser's step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from .distributed_blip2x import batch_sizes, fetch_rows, global_share, global_sum, rank
from .losses_blip2x import image_text_similarity, itg_sum, itm_pairs, itm_sums
from .matching_blip2x import EncodedPairs
from .outputs_blip2x import Blip2xForPreTrainingOutput, Blip2xTextFeatures
from .pretraining_blip2x import Blip2xForPreTraining


def chunked_backward(
    model: Blip2xForPreTraining,
    *,
    chunk_size: int,
    pixel_values: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_ids: torch.Tensor | None = None,
    vision_embeds: torch.Tensor | None = None,
    negative_seed: int | None = None,
    negative_hardness: float = 1.0,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Blip2xForPreTrainingOutput:
    """Forward and backward of `model` with the memory of `chunk_size` pairs; returns losses and logits, detached.

    Adds to the gradients what `model(...).loss.backward()` would. The other arguments are those of the model's forward.

    Args:
        chunk_size: pairs encoded at a time; the last chunk may be smaller.
        backward: called several times with a scalar; may scale it (accelerate's `backward`, a loss scaler).
        autocast: makes the context of every forward, such as accelerate's `autocast`. Backwards run outside it.

    Raises:
        ValueError: no text, numbers of images and texts that differ, a chunk size below 1, or features with a graph,
            which would have to be kept for the whole batch: the tower must be frozen.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but must be at least 1 pair.")
    if input_ids is None:
        raise ValueError("Stage 1 needs texts: input_ids is None. Pass the output of processor(images, text).")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    vision = _tower_features(model, pixel_values, vision_embeds, chunk_size, autocast)
    model.check_rows(vision, input_ids)
    sizes = batch_sizes(len(vision), vision.device)
    first_row = sum(sizes[: rank()])
    if sum(sizes) == 1:
        model.warn_of_single_pair()
    chunks = [slice(start, start + chunk_size) for start in range(0, len(vision), chunk_size)]
    objectives = model.config.objectives

    def encode(rows: slice) -> tuple[EncodedPairs, tuple[torch.Tensor, torch.Tensor]]:
        """A chunk, and its ITC features in float32."""
        image = BaseModelOutput(last_hidden_state=vision[rows])
        texts = input_ids[rows], attention_mask[rows]
        pairs = model.encode_rows(image, *texts, sizes, first_row + rows.start, model.decoder_ids(texts[0]))
        images, text = model.features_of(pairs)
        return pairs, (images.float(), text.pooler_output.float())

    # Features of the whole batch
    states, features = [], []
    for rows in chunks:
        states.append(_random_state(vision.device))
        with autocast():
            features.append([feature.detach() for feature in encode(rows)[1]])
    images, texts = (torch.cat(parts).requires_grad_() for parts in zip(*features))

    # ITC, and the gradient of its features
    means, feature_gradients = {}, ()
    with _own_parameters(model):
        contrast = model.compare(
            images,
            Blip2xTextFeatures(pooler_output=texts),
            image_ids,
            sizes,
            first_row,
            similarity=lambda images, texts: _similarity_in_chunks(images, texts, chunk_size),
        )
        if "itc" in objectives:
            loss_itc = model.itc_loss(contrast)
            scales = [one for one in (model.temperature, model.itc_bias) if one is not None and one.requires_grad]
            feature_gradients = torch.autograd.grad(loss_itc, [images, texts, *scales])
            for scale, gradient in zip(scales, feature_gradients[2:]):
                backward((scale * gradient).sum())
            means["loss_itc"] = loss_itc.detach()
        temperature = model.temperature.detach()[0]

    # Negatives of ITM, and the number of terms of each global mean
    counts = {}
    if "itm" in objectives:
        negatives = model.draw_negatives(contrast, first_row, negative_seed, negative_hardness)
        all_texts = model.gather_texts(input_ids, attention_mask, sizes)
        fetch = _fetch_of(vision, negatives[0], first_row, sizes)
        counts["loss_itm"] = global_sum(len(vision) + sum((drawn >= 0).sum() for drawn in negatives))
        counts["itm_accuracy"] = counts["loss_itm"]
    if "itg" in objectives:
        counts["loss_itg"] = global_sum(attention_mask[:, 1:].sum())

    def share_of(rows: slice, state: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What a chunk adds to the loss, with gradient, and its terms of the means."""
        with _replayed(state, vision.device):
            pairs, features = encode(rows)
        share = sum((feature * gradient[rows]).sum() for feature, gradient in zip(features, feature_gradients))
        terms = {}
        if "itm" in objectives:
            own = pairs.first_row + torch.arange(len(pairs.input_ids), device=vision.device)
            chosen = itm_pairs(own, *(drawn[rows] for drawn in negatives))
            logits = model.match_logits(pairs, chosen, all_texts, fetch)
            terms["loss_itm"], terms["itm_accuracy"] = itm_sums(logits, chosen.labels)
            share = share + global_share(terms["loss_itm"], counts["loss_itm"])
        if "itg" in objectives:
            terms["loss_itg"] = itg_sum(*model.text_logits(pairs))
            share = share + global_share(terms["loss_itg"], counts["loss_itg"])
        return share, {name: term.detach() for name, term in terms.items()}

    # Each chunk again, with a graph
    totals = dict.fromkeys(counts, 0.0)
    for rows, state in zip(chunks, states):
        with autocast():
            share, terms = share_of(rows, state)
        backward(share)
        totals = {name: totals[name] + term for name, term in terms.items()}

    means |= {name: global_sum(total) / counts[name].clamp(min=1) for name, total in totals.items()}
    return Blip2xForPreTrainingOutput(
        loss=sum(mean for name, mean in means.items() if name.startswith("loss")),
        **means,
        temperature=temperature,
        logits_per_image=contrast.logits_per_image.detach(),
        logits_per_text=contrast.logits_per_text.detach(),
    )


@contextmanager
def _own_parameters(model: Blip2xForPreTraining):
    """The model's own parameters at hand: while offloaded, accelerate loads them for its forward, which is not called."""
    hook = model._hf_hook if model.temperature.is_meta else None
    if hook is not None:
        hook.pre_forward(model)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(model, None)


@torch.no_grad()
def _tower_features(
    model: Blip2xForPreTraining,
    pixel_values: torch.Tensor | None,
    vision_embeds: torch.Tensor | None,
    chunk_size: int,
    autocast: Callable[[], AbstractContextManager],
) -> torch.Tensor:
    """Features (B, N, D) of the frozen tower, which sees one chunk at a time, or those given."""
    trains = pixel_values is not None and any(p.requires_grad for p in model.model.vision_model.parameters())
    if trains or (vision_embeds is not None and vision_embeds.requires_grad):
        raise ValueError(
            "Chunks need features of images without a graph, but the vision tower has trainable parameters. Call "
            "model.freeze_unimodal(), or train without chunks (itc_chunk_size null)."
        )
    if pixel_values is None or vision_embeds is not None:
        return model.model.get_vision_outputs(pixel_values, vision_embeds).last_hidden_state
    parts = []
    for pixels in pixel_values.split(chunk_size):
        with autocast():
            parts.append(model.model.get_vision_embeds(pixels))
    return torch.cat(parts)


def _similarity_in_chunks(images: torch.Tensor, texts: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """`image_text_similarity`, whose cosines of each query (images, texts, Q) are there for one chunk at a time."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(image_text_similarity, rows, texts, **options) for rows in images.split(chunk_size)])


def _fetch_of(
    vision: torch.Tensor, negatives: torch.Tensor, first_row: int, sizes: list[int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from global numbers among `negatives` to tower features.

    Features of other processes are exchanged here, once: processes may have different numbers of chunks.
    """
    index = negatives - first_row
    remote = negatives[(negatives >= 0) & ((index < 0) | (index >= len(vision)))].unique()
    received = fetch_rows(vision, remote, sizes)

    def fetch(numbers: torch.Tensor) -> torch.Tensor:
        index = numbers - first_row
        is_here = (index >= 0) & (index < len(vision))
        rows = vision.new_empty(len(numbers), *vision.shape[1:])
        rows[is_here] = vision[index[is_here]]
        rows[~is_here] = received[torch.searchsorted(remote, numbers[~is_here])]
        return rows

    return fetch


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """What dropout on `device` will draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _replayed(state: list[torch.Tensor], device: torch.device):
    """Random numbers as they came after `state`; afterwards those of before go on."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield


__all__ = ["chunked_backward"]
