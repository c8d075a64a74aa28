"""Stage 1: the Q-Former learns from image-text pairs by three objectives over one encoding (paper, section 3.2).

    model = Blip2xForPreTraining.from_unimodal("openai/clip-vit-large-patch14", "google-bert/bert-base-uncased")
    model.freeze_unimodal()
    model(pixel_values=..., input_ids=..., attention_mask=...).loss.backward()

Per batch: the image's keys and values once, one sequence of queries (ITC and ITG), causal text (ITG) and text (ITC), and
the pairs of ITM, whose images are indexed, not encoded again.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple, logging

from .assembling_blip2x import build_pretraining
from .configuration_blip2x import Blip2xQFormerConfig
from .imagetext_blip2x import ItgHead
from .losses_blip2x import itg_loss, query_spread_loss
from .matching_blip2x import Blip2xMatchingModel, EncodedPairs
from .outputs_blip2x import Blip2xForPreTrainingOutput
from .qformer_blip2x import QFormer

logger = logging.get_logger(__name__)


class Blip2xForPreTraining(Blip2xMatchingModel):
    """Stage-1 model. `config.objectives` names what is trained; the paper trains all three."""

    @classmethod
    def from_unimodal(
        cls,
        vision_model: str | nn.Module,
        qformer: str | Blip2xQFormerConfig | None = None,
        *,
        tokenizer: object | None = None,
        num_query_tokens: int = 32,
        image_text_hidden_size: int = 256,
        vision_feature_layer: int = -1,
        objectives: list[str] | None = None,
        itc_loss: str = "softmax",
        query_spread: float = 0.0,
    ) -> "Blip2xForPreTraining":
        """Stage-1 model around a vision tower.

        Args:
            vision_model: id or folder of any transformers vision model, or a loaded one.
            qformer: id or folder of a BERT checkpoint whose weights start the Q-Former (cross-attention, queries and
                heads are new; the query feed-forward starts as a copy of BERT's), or a config for random weights;
                None is a random BERT-base shape.
            tokenizer: the Q-Former's, [DEC] included (`processor.tokenizer`): sets and checks vocabulary and special ids.
            vision_feature_layer: hidden state of the tower to use; -1 its output, -2 the layer before.
            objectives: any of itc, itm, itg; all by default.
            itc_loss: softmax (the paper) or sigmoid (SigLIP).
            query_spread: weight of `query_spread_loss` while training, which keeps queries apart; 0 is the paper.
        """
        return build_pretraining(
            cls,
            vision_model,
            qformer,
            tokenizer=tokenizer,
            num_query_tokens=num_query_tokens,
            image_text_hidden_size=image_text_hidden_size,
            vision_feature_layer=vision_feature_layer,
            itc_loss=itc_loss,
            query_spread=query_spread,
            **({} if objectives is None else {"objectives": objectives}),
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        negative_seed: int | None = None,
        negative_hardness: float = 1.0,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> Blip2xForPreTrainingOutput | tuple:
        """The three losses of B image-text pairs, means over the global batch; while training, loss_spread where it has weight.

        Args:
            pixel_values: (B, 3, height, width), or vision_embeds (B, N, D) in their place.
            input_ids, attention_mask: (B, L), [CLS] first; ITG replaces that token by [DEC].
            image_ids: (B,); pairs with equal ids are positives of one another and never hard negatives.
            negative_seed: makes the draw of hard negatives depend on this and the row's global number alone; None draws
                from torch's own generator in training, and as 0 does in evaluation.
            negative_hardness: negatives are drawn by softmax(negative_hardness * ITC logits): 1 is the paper, 0 draws
                evenly. A Q-Former trained from scratch needs easier ones first: to ITC the hardest look like matches, and
                early in training ITM cannot tell more than ITC.
            output_attentions, output_hidden_states: also return those of tower and Q-Former.
            num_items_in_batch: text tokens without [CLS], as a trainer has counted them over an optimiser step. loss_itg is
                then this forward's sum over them, so that every token weighs the same; ITC and ITM stay means of this batch.

        Raises:
            ValueError: no text, or numbers of images and texts that differ.
        """
        if input_ids is None:
            raise ValueError("Stage 1 needs texts: input_ids is None. Pass the output of processor(images, text).")
        options = self.model.resolve_outputs(output_attentions, output_hidden_states)
        pairs = self.encode_pairs(
            pixel_values,
            input_ids,
            attention_mask,
            vision_embeds,
            interpolate_pos_encoding,
            *options,
            self.decoder_ids(input_ids),
        )
        if sum(pairs.sizes) == 1:
            self.warn_of_single_pair()
        contrast = self.contrast(pairs, image_ids, *options)
        losses = {}
        if "itc" in self.config.objectives:
            losses["loss_itc"] = self.itc_loss(contrast)
        itm_accuracy = None
        if "itm" in self.config.objectives:
            losses["loss_itm"], itm_accuracy = self.match(pairs, contrast, negative_seed, negative_hardness)
        if "itg" in self.config.objectives:
            losses["loss_itg"] = itg_loss(*self.text_logits(pairs), num_items_in_batch)
        if self.spreads_queries:
            losses["loss_spread"] = self.config.query_spread * query_spread_loss(pairs.queries.hidden)
        return Blip2xForPreTrainingOutput(
            loss=sum(losses.values()),
            **losses,
            itm_accuracy=itm_accuracy,
            temperature=self.temperature.detach()[0].clone(),  # FSDP frees the gathered parameter after the step
            logits_per_image=contrast.logits_per_image,
            logits_per_text=contrast.logits_per_text,
            **self.outputs_of(pairs, contrast, *options),
        )

    @property
    def spreads_queries(self) -> bool:
        """Whether the loss holds `query_spread_loss`: it is of training alone, so that validations compare."""
        return self.training and self.config.query_spread > 0

    def decoder_ids(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """input_ids (B, L) with [DEC] for [CLS]; None where ITG is not an objective."""
        if "itg" not in self.config.objectives:
            return None
        start = torch.full_like(input_ids[:, :1], self.config.qformer_config.bos_token_id)
        return torch.cat([start, input_ids[:, 1:]], dim=1)

    def text_logits(self, pairs: EncodedPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (tokens, vocabulary) and labels (tokens,) of ITG, for real tokens only, not for padding."""
        # Padding is left out before the head, whose matrix has a row for every word of the vocabulary.
        is_target = pairs.attention_mask[:, 1:].bool()
        hidden = pairs.decoded.hidden[:, :-1][is_target]
        logits = self.itg_head(hidden, self.model.qformer.embeddings.vocabulary(hidden.device))
        return logits, pairs.input_ids[:, 1:][is_target]

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        max_new_tokens: int = 30,
        **generation_arguments,
    ) -> torch.Tensor:
        """Captions by the ITG head, without a language model: ids (B, up to 1 + max_new_tokens), [DEC] first.

        generation_arguments: those of transformers' generate (num_beams, do_sample, top_p, ...), checked by it. With
            return_dict_in_generate and output_attentions, attentions of each step and layer are (B, heads, L, Q + L),
            text to queries and text.
        """
        vision_embeds = self.model.get_vision_outputs(pixel_values, vision_embeds).last_hidden_state
        image = self.model.image_key_values(vision_embeds)
        queries = self.model.qformer.encode_queries(self.model.query_tokens(len(vision_embeds)), image)
        # One tensor (B, layers, 2, heads, Q, d): generate repeats tensors for beams, not tuples of them.
        cached = torch.stack([torch.stack(kv, dim=1) for kv in queries.key_values], dim=1)
        # Made for this call: as an attribute its parameters would be in the model, and in checkpoints, twice.
        decoder = ItgDecoder(self.config.qformer_config, self.model.qformer, self.itg_head)
        start = torch.full(
            (len(vision_embeds), 1), self.config.qformer_config.bos_token_id, device=vision_embeds.device
        )
        return decoder.generate(
            input_ids=start,
            query_key_values=cached,
            max_new_tokens=max_new_tokens,
            use_cache=False,
            **generation_arguments,
        )

    @torch.compiler.disable
    def warn_of_single_pair(self) -> None:
        if self.training:
            logger.warning_once(
                "The global batch is a single pair: ITC has nothing to contrast and ITM no negative, so ITM counts the "
                "positive only. Raise per_device_train_batch_size."
            )


class ItgDecoder(PreTrainedModel, GenerationMixin):
    """The Q-Former's causal text side as a model that transformers can generate with. A view on the same parameters; owns none.

    Texts are short (32 tokens), so earlier text is computed again each step instead of being cached.
    """

    config: Blip2xQFormerConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: Blip2xQFormerConfig, qformer: QFormer, head: ItgHead):
        super().__init__(config)
        self.qformer = qformer
        self.head = head

    def forward(
        self,
        input_ids: torch.Tensor,
        query_key_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        """input_ids (B, L), query_key_values (B, layers, 2, heads, Q, d) -> logits (B, 1, vocabulary) of the next token.

        attentions, if asked for: of each layer (B, heads, L, Q + L), text to queries and text.
        """
        prefix = tuple((kv[:, 0], kv[:, 1]) for kv in query_key_values.unbind(dim=1))
        attention_mask = torch.ones_like(input_ids)  # no padding: every text started with the same single token
        text = self.qformer.decode_text(input_ids, attention_mask, prefix, output_attentions)
        logits = self.head(text.hidden[:, -1:], self.qformer.embeddings.vocabulary(text.hidden.device))
        return CausalLMOutput(logits=logits, attentions=text.attentions if output_attentions else None)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, query_key_values: torch.Tensor, output_attentions: bool = False, **_
    ) -> dict:
        return {
            "input_ids": input_ids,
            "query_key_values": query_key_values,
            "output_attentions": output_attentions,
        }


__all__ = ["Blip2xForPreTraining"]
