"""Stage 1 over the global batch: pairs encoded once, ITC against all ranks, ITM with hard negatives.

imagetext_blip2x.py has the layers, and the scores of images and texts that are given; retrieval_blip2x.py is the class that
users load for retrieval. This file adds what the losses of both training classes share. B rows on this rank, N on all;
features of images are (B, Q, P), of texts (B, P).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutput

from .distributed_blip2x import batch_sizes, fetch_rows, gather_rows, gather_text, rank
from .imagetext_blip2x import SMALLEST_TEMPERATURE, Blip2xImageTextModel
from .losses_blip2x import (
    ItmPairs,
    draw_hard_negatives,
    image_text_similarity,
    itc_loss,
    itm_loss,
    itm_pairs,
    positive_pairs,
    sigmoid_itc_loss,
    uniform_numbers,
)
from .outputs_blip2x import Blip2xModelOutput, Blip2xTextFeatures, chosen_hidden_states
from .qformer_blip2x import KeyValues, QFormerOutput, select_images


@dataclass
class EncodedPairs:
    """What one batch is encoded to, once, for all objectives.

    image_key_values: of each image, which all pairs of ITM index. queries, text: those of ITC; decoded: the causal text
    of ITG, where it was asked for. sizes: rows on each rank; first_row: of this rank.
    """

    vision: BaseModelOutput
    image_key_values: tuple[KeyValues | None, ...]
    queries: QFormerOutput
    decoded: QFormerOutput | None
    text: QFormerOutput
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    sizes: list[int]
    first_row: int


@dataclass
class Contrast:
    """ITC of a batch: logits (B, N) of this rank's rows against the global batch, and which of them are positives."""

    logits_per_image: torch.Tensor
    logits_per_text: torch.Tensor
    positives: torch.Tensor
    text: Blip2xTextFeatures


class Blip2xMatchingModel(Blip2xImageTextModel):
    """Stage 1 in training: what a batch of pairs is encoded to, contrasted and matched with."""

    def encode_pairs(
        self,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        vision_embeds: torch.Tensor | None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool | list[int] = False,
        decoder_ids: torch.Tensor | None = None,
    ) -> EncodedPairs:
        """Encode a batch once, for every objective; decoder_ids (B, L): the text of ITG, [DEC] first, or None."""
        vision = self.model.get_vision_outputs(
            pixel_values, vision_embeds, interpolate_pos_encoding, output_attentions, output_hidden_states
        )
        local, device = vision.last_hidden_state.shape[0], vision.last_hidden_state.device
        self.check_rows(vision.last_hidden_state, input_ids)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sizes = batch_sizes(local, device)
        # ITC reads [CLS] alone: the last layer computes the other tokens only for a caller who asks to see them.
        whole_text = output_attentions or bool(output_hidden_states)
        return self.encode_rows(
            vision,
            input_ids,
            attention_mask,
            sizes,
            sum(sizes[: rank()]),
            decoder_ids,
            output_attentions,
            whole_text,
        )

    def encode_rows(
        self,
        vision: BaseModelOutput,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        sizes: list[int],
        first_row: int,
        decoder_ids: torch.Tensor | None = None,
        output_attentions: bool = False,
        whole_text: bool = False,
    ) -> EncodedPairs:
        """Encode images that have passed the tower; first_row: their offset in the global batch."""
        image = self.model.image_key_values(vision.last_hidden_state)
        queries = self.model.query_tokens(vision.last_hidden_state.shape[0])
        encoded = self.model.qformer.encode_together(
            queries, input_ids, attention_mask, image, decoder_ids, output_attentions, whole_text
        )
        return EncodedPairs(vision, image, *encoded, input_ids, attention_mask, sizes, first_row)

    def contrast(
        self,
        pairs: EncodedPairs,
        image_ids: torch.Tensor | None,
        output_attentions: bool = False,
        output_hidden_states: bool | list[int] = False,
    ) -> Contrast:
        """ITC logits of this rank's images (texts) with the texts (images) of all ranks."""
        images, texts = self.features_of(pairs)
        contrast = self.compare(images, texts, image_ids, pairs.sizes, pairs.first_row)
        if output_attentions or output_hidden_states:
            contrast.text.last_hidden_state = pairs.text.hidden
            contrast.text.hidden_states = chosen_hidden_states(pairs.text.hidden_states, output_hidden_states)
            contrast.text.attentions = pairs.text.attentions if output_attentions else None
        return contrast

    def features_of(self, pairs: EncodedPairs) -> tuple[torch.Tensor, Blip2xTextFeatures]:
        """Unit-norm features of encoded images (B, Q, P), and of their texts (B, P) in `pooler_output`."""
        images = self._unit(self.vision_projection, pairs.queries.hidden)
        texts = self._unit(self.text_projection, pairs.text.hidden[:, 0])
        return images, Blip2xTextFeatures(pooler_output=texts)

    def compare(
        self,
        images: torch.Tensor,
        text: Blip2xTextFeatures,
        image_ids: torch.Tensor | None,
        sizes: list[int],
        first_row: int,
        similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = image_text_similarity,
    ) -> Contrast:
        """ITC logits from this rank's features; similarity: `image_text_similarity`, or what computes the same."""
        texts = text.pooler_output
        all_images, all_texts = gather_rows(images, sizes), gather_rows(texts, sizes)
        if image_ids is None:  # each row is an image of its own
            local_ids = first_row + torch.arange(len(images), device=images.device)
            all_ids = torch.arange(sum(sizes), device=images.device)
        else:
            local_ids, all_ids = image_ids, gather_rows(image_ids, sizes)
        temperature = self.temperature.float().clamp(min=SMALLEST_TEMPERATURE)
        return Contrast(
            logits_per_image=similarity(images, all_texts) / temperature,
            logits_per_text=similarity(all_images, texts).T / temperature,
            positives=positive_pairs(local_ids, all_ids),
            text=text,
        )

    def itc_loss(self, contrast: Contrast) -> torch.Tensor:
        """ITC over the global batch, by the softmax of the paper or by SigLIP's sigmoid."""
        if self.itc_bias is not None:
            return sigmoid_itc_loss(contrast.logits_per_image, contrast.positives, self.itc_bias)
        return itc_loss(contrast.logits_per_image, contrast.logits_per_text, contrast.positives)

    @staticmethod
    def outputs_of(
        pairs: EncodedPairs, contrast: Contrast, output_attentions: bool, output_hidden_states: bool | list[int]
    ) -> dict[str, object]:
        """Outputs of tower and Q-Former that a forward returns where hidden states or attentions are asked for."""
        if not output_attentions and not output_hidden_states:
            return {}
        queries = Blip2xModelOutput(
            last_hidden_state=pairs.queries.hidden,
            hidden_states=chosen_hidden_states(pairs.queries.hidden_states, output_hidden_states),
            attentions=pairs.queries.attentions if output_attentions else None,
            cross_attentions=pairs.queries.cross_attentions if output_attentions else None,
        )
        return {"vision_outputs": pairs.vision, "qformer_outputs": queries, "text_outputs": contrast.text}

    def match(
        self, pairs: EncodedPairs, contrast: Contrast, seed: int | None, hardness: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ITM loss and accuracy over the matching pairs and a hard negative for each image and each text.

        hardness: negatives are drawn by softmax(hardness * ITC logits); 0 draws evenly, 1 is the paper.
        """
        own = pairs.first_row + torch.arange(len(pairs.input_ids), device=pairs.input_ids.device)
        chosen = itm_pairs(own, *self.draw_negatives(contrast, pairs.first_row, seed, hardness))
        texts = self.gather_texts(pairs.input_ids, pairs.attention_mask, pairs.sizes)
        vision_embeds = pairs.vision.last_hidden_state
        # With several processes all take part in a fetch, also one whose negatives are all its own.
        fetch = None if len(pairs.sizes) == 1 else lambda index: fetch_rows(vision_embeds, index, pairs.sizes)
        return itm_loss(self.match_logits(pairs, chosen, texts, fetch), chosen.labels)

    def draw_negatives(
        self, contrast: Contrast, first_row: int, seed: int | None, hardness: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Global number of a hard negative image for each text and of a text for each image, (B,) each; -1: none.

        Drawn by the logits of ITC (section 3.2): a mismatch that ITC takes for a match is what ITM has to learn, and the
        logits are there already, for the global batch.
        """
        if seed is None and not self.training:
            seed = 0  # the same evaluation gives the same loss
        uniform = uniform_numbers(first_row, len(contrast.positives), seed, contrast.positives.device)
        return (
            draw_hard_negatives(hardness * contrast.logits_per_text, contrast.positives, uniform[:, 0]),
            draw_hard_negatives(hardness * contrast.logits_per_image, contrast.positives, uniform[:, 1]),
        )

    def gather_texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, sizes: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (N, L) of the global batch."""
        return gather_text(input_ids, attention_mask, sizes, self.config.qformer_config.pad_token_id or 0)

    def match_logits(
        self,
        pairs: EncodedPairs,
        chosen: ItmPairs,
        texts: tuple[torch.Tensor, torch.Tensor],
        fetch: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """ITM logits (pairs, 2) of chosen images with chosen texts.

        texts: ids and mask of the global batch. fetch: gives the tower's features of images that are not among
        `pairs`, by global number; None if there are no others.
        """
        ids, mask = texts
        image = self._images_of(pairs, chosen.image_index, fetch)
        return self._itm_logits_of(ids[chosen.text_index], mask[chosen.text_index], image)

    def _images_of(
        self, pairs: EncodedPairs, global_index: torch.Tensor, fetch: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> tuple[KeyValues | None, ...]:
        """Image keys and values by global number: those of `pairs` are indexed, only others are fetched and projected."""
        local = len(pairs.vision.last_hidden_state)
        index = global_index - pairs.first_row
        if fetch is None:
            return select_images(pairs.image_key_values, index)
        is_remote = (index < 0) | (index >= local)
        remote = global_index[is_remote].unique()  # once each, however many texts have drawn it
        fetched = self.model.image_key_values(fetch(remote))
        index = torch.where(is_remote, local + torch.searchsorted(remote, global_index), index)
        both = tuple(
            here and (torch.cat([here[0], there[0]]), torch.cat([here[1], there[1]]))
            for here, there in zip(pairs.image_key_values, fetched)
        )
        return select_images(both, index)
