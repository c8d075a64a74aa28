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
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from .distributed_blip2x import batch_sizes, fetch_rows, global_share, global_sum, rank, share_of_items
from .losses_blip2x import image_text_similarity, itg_sum, itm_pairs, itm_sums, query_spread_sum
from .matching_blip2x import Contrast, EncodedPairs
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
    num_items_in_batch: torch.Tensor | float | None = None,
    accelerator: object | None = None,
) -> Blip2xForPreTrainingOutput:
    """Forward and backward of `model` with the memory of `chunk_size` pairs; returns losses and logits, detached.

    Adds to the gradients what `model(...).loss.backward()` would. The other arguments are those of the model's forward.

    Args:
        chunk_size: pairs encoded at a time; the last chunk may be smaller.
        accelerator: accelerate's, or what has its `autocast()`, the context of every forward, and its `backward(loss)`,
            which is called several times and may scale. Backwards run outside the context. None: neither is needed.

    Raises:
        ValueError: no text, numbers of images and texts that differ, a chunk size below 1, or features with a graph,
            which would have to be kept for the whole batch: the tower must be frozen.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but must be at least 1 pair.")
    if input_ids is None:
        raise ValueError("Stage 1 needs texts: input_ids is None. Pass the output of processor(images, text).")
    autocast = nullcontext if accelerator is None else accelerator.autocast
    backward = torch.Tensor.backward if accelerator is None else accelerator.backward
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    vision = _tower_features(model, pixel_values, vision_embeds, chunk_size, autocast)
    model.check_rows(vision, input_ids)
    sizes = batch_sizes(len(vision), vision.device)
    batch = _Batch(model, chunk_size, vision, input_ids, attention_mask, sizes, sum(sizes[: rank()]))
    if sum(sizes) == 1:
        model.warn_of_single_pair()

    images, texts, states = _features(batch, autocast)
    with _own_parameters(model):
        contrast = _contrast(batch, images, texts, image_ids)
        means, gradients = _contrast_backward(model, contrast, images, texts, backward)
        temperature = model.temperature.detach()[0]
    whole = _whole(batch, contrast, gradients, negative_seed, negative_hardness)
    whole.num_items_in_batch = num_items_in_batch
    means |= _chunks_backward(batch, whole, states, autocast, backward)
    return Blip2xForPreTrainingOutput(
        loss=sum(mean for name, mean in means.items() if name.startswith("loss")),
        **means,
        temperature=temperature,
        logits_per_image=contrast.logits_per_image.detach(),
        logits_per_text=contrast.logits_per_text.detach(),
    )


@dataclass
class _Batch:
    """The pairs of this process, their images as tower features (B, N, D), encoded a chunk at a time.

    sizes: pairs on each process; first_row: number of this one's first pair in the global batch.
    """

    model: Blip2xForPreTraining
    chunk_size: int
    vision: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    sizes: list[int]
    first_row: int

    @property
    def chunks(self) -> list[slice]:
        return [slice(start, start + self.chunk_size) for start in range(0, len(self.vision), self.chunk_size)]

    def encode(self, rows: slice) -> tuple[EncodedPairs, tuple[torch.Tensor, torch.Tensor]]:
        """A chunk, and its ITC features: of images (rows, Q, P), of texts (rows, P), in float32."""
        image = BaseModelOutput(last_hidden_state=self.vision[rows])
        texts = self.input_ids[rows], self.attention_mask[rows]
        first_row, decoder_ids = self.first_row + rows.start, self.model.decoder_ids(texts[0])
        pairs = self.model.encode_rows(image, *texts, self.sizes, first_row, decoder_ids)
        images, text = self.model.features_of(pairs)
        return pairs, (images.float(), text.pooler_output.float())


@dataclass
class _Whole:
    """What a chunk must know of the whole batch to compute its share of the loss.

    gradients: of ITC by the features of images (B, Q, P) and of texts (B, P); empty where ITC is no objective.
    negatives: global numbers of an image for each text and of a text for each image, (B,) each. texts: token ids and mask
    of the global batch. fetch: tower features of images by global number. All three None where ITM is no objective.
    counts: how many terms each global mean has, by the name of the mean. num_items_in_batch: tokens of ITG as a trainer has
    counted them over an optimiser step, which then stand in for the count of this batch.
    """

    gradients: tuple[torch.Tensor, ...]
    counts: dict[str, torch.Tensor]
    negatives: tuple[torch.Tensor, torch.Tensor] | None = None
    texts: tuple[torch.Tensor, torch.Tensor] | None = None
    fetch: Callable[[torch.Tensor], torch.Tensor] | None = None
    num_items_in_batch: torch.Tensor | float | None = None

    def share(self, name: str, total: torch.Tensor) -> torch.Tensor:
        """What a sum over terms of this process, or of a chunk, adds to the mean of that name."""
        if name == "loss_itg" and self.num_items_in_batch is not None:
            return share_of_items(total, self.num_items_in_batch)
        return global_share(total, self.counts[name])

    def mean(self, name: str, total: torch.Tensor) -> torch.Tensor:
        """The mean over the global batch, of a process's sum; with num_items_in_batch what this process adds to it."""
        if name == "loss_itg" and self.num_items_in_batch is not None:
            return share_of_items(total, self.num_items_in_batch)
        return global_sum(total) / self.counts[name].clamp(min=1)


def _features(
    batch: _Batch, autocast: Callable[[], AbstractContextManager]
) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
    """ITC features of all images and of all texts, as leaves of a new graph, and the random state before each chunk."""
    states, features = [], []
    for rows in batch.chunks:
        states.append(_random_state(batch.vision.device))
        # With a graph, dropped at once: without one kernels may differ, and the second pass would not be the first again.
        with autocast():
            features.append([feature.detach() for feature in batch.encode(rows)[1]])
    images, texts = (torch.cat(parts).requires_grad_() for parts in zip(*features))
    return images, texts, states


def _contrast(batch: _Batch, images: torch.Tensor, texts: torch.Tensor, image_ids: torch.Tensor | None) -> Contrast:
    def similarity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return _similarity_in_chunks(images, texts, batch.chunk_size)

    text = Blip2xTextFeatures(pooler_output=texts)
    return batch.model.compare(images, text, image_ids, batch.sizes, batch.first_row, similarity)


def _contrast_backward(
    model: Blip2xForPreTraining,
    contrast: Contrast,
    images: torch.Tensor,
    texts: torch.Tensor,
    backward: Callable[[torch.Tensor], None],
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """The mean of ITC and its gradients by the features; temperature and bias, which no chunk sees, get theirs here."""
    if "itc" not in model.config.objectives:
        return {}, ()
    loss_itc = model.itc_loss(contrast)
    scales = [one for one in (model.temperature, model.itc_bias) if one is not None and one.requires_grad]
    of_images, of_texts, *of_scales = torch.autograd.grad(loss_itc, [images, texts, *scales])
    for scale, gradient in zip(scales, of_scales):
        backward((scale * gradient).sum())  # by backward, not into .grad: it may scale the loss
    return {"loss_itc": loss_itc.detach()}, (of_images, of_texts)


def _whole(
    batch: _Batch, contrast: Contrast, gradients: tuple[torch.Tensor, ...], seed: int | None, hardness: float
) -> _Whole:
    """Draw the negatives of ITM over the global batch, and count the terms of the means of ITM and ITG."""
    model, whole = batch.model, _Whole(gradients, {})
    if "itm" in model.config.objectives:
        whole.negatives = model.draw_negatives(contrast, batch.first_row, seed, hardness)
        whole.texts = model.gather_texts(batch.input_ids, batch.attention_mask, batch.sizes)
        whole.fetch = _fetch_of(batch.vision, whole.negatives[0], batch.first_row, batch.sizes)
        pairs = global_sum(len(batch.vision) + sum((drawn >= 0).sum() for drawn in whole.negatives))
        whole.counts |= {"loss_itm": pairs, "itm_accuracy": pairs}
    if model.spreads_queries:
        whole.counts["loss_spread"] = torch.tensor(sum(batch.sizes), device=batch.vision.device)
    if "itg" in model.config.objectives:
        whole.counts["loss_itg"] = global_sum(batch.attention_mask[:, 1:].sum())
    return whole


def _chunks_backward(
    batch: _Batch,
    whole: _Whole,
    states: list[list[torch.Tensor]],
    autocast: Callable[[], AbstractContextManager],
    backward: Callable[[torch.Tensor], None],
) -> dict[str, torch.Tensor]:
    """Encode each chunk again, with a graph, and take its backward; returns the global means of ITM and ITG."""
    totals = dict.fromkeys(whole.counts, 0.0)
    for rows, state in zip(batch.chunks, states):
        with autocast():
            share, terms = _share_of(batch, whole, rows, state)
        backward(share)
        totals = {name: totals[name] + term for name, term in terms.items()}
    return {name: whole.mean(name, total) for name, total in totals.items()}


def _share_of(
    batch: _Batch, whole: _Whole, rows: slice, state: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a chunk adds to the loss, with gradient, and its terms of the means."""
    model = batch.model
    with _replayed(state, batch.vision.device):  # the same dropout as in the first pass
        pairs, features = batch.encode(rows)
    # The gradient of this sum by a weight is that of ITC, by the chain rule.
    share = sum((feature * gradient[rows]).sum() for feature, gradient in zip(features, whole.gradients))
    terms = {}
    if "itm" in model.config.objectives:
        own = pairs.first_row + torch.arange(len(pairs.input_ids), device=batch.vision.device)
        chosen = itm_pairs(own, *(drawn[rows] for drawn in whole.negatives))
        logits = model.match_logits(pairs, chosen, whole.texts, whole.fetch)
        terms["loss_itm"], terms["itm_accuracy"] = itm_sums(logits, chosen.labels)
        share = share + whole.share("loss_itm", terms["loss_itm"])
    if model.spreads_queries:
        terms["loss_spread"] = model.config.query_spread * query_spread_sum(pairs.queries.hidden)
        share = share + whole.share("loss_spread", terms["loss_spread"])
    if "itg" in model.config.objectives:
        terms["loss_itg"] = itg_sum(*model.text_logits(pairs))
        share = share + whole.share("loss_itg", terms["loss_itg"])
    return share, {name: term.detach() for name, term in terms.items()}


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
