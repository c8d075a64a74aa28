"""Stage 2: query outputs, projected, are a soft prompt of a frozen language model (paper, section 3.3).

Decoder-only (OPT, Llama, GPT-2, Qwen): input_ids hold one `<image>` placeholder for each query and the text; projected
queries replace the placeholders. Encoder-decoder (T5): the same on the encoder's side, labels on the decoder's.

`generate` is transformers' own, on this model: the image is encoded once, before the first token and whatever the number
of beams. Output of a decoder-only model begins with the prompt's ids; `Blip2xProcessor.batch_decode_new` takes it off.
"""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin
from transformers.utils import ModelOutput, can_return_tuple

from .assembling_blip2x import build_generative, generation_config_of, hand_over
from .checks_blip2x import check_prompt
from .configuration_blip2x import Blip2xConfig, Blip2xQFormerConfig
from .image_prompt_blip2x import ImagePrompting
from .language_blip2x import (
    IGNORE,
    LanguageBackbone,
    LanguageModelSignature,
    language_modelling_loss,
    longer_cache,
    warn_of_float16,
)
from .modeling_blip2x import Blip2xModel, Blip2xPreTrainedModel
from .outputs_blip2x import Blip2xForConditionalGenerationOutput, Blip2xImageFeatures
from .pretraining_blip2x import Blip2xForPreTraining
from .qformer_blip2x import in_own_dtype
from .vision_blip2x import with_eager_attention


class Blip2xForConditionalGeneration(ImagePrompting, Blip2xPreTrainedModel, GenerationMixin):
    """Vision tower, Q-Former, projection and language model."""

    accepts_loss_kwargs = True  # the loss divides by num_items_in_batch where Trainer counts it

    def __init__(
        self, config: Blip2xConfig, vision_model: nn.Module | None = None, language_model: nn.Module | None = None
    ):
        """vision_model, language_model: loaded ones to take instead of random ones of the config."""
        super().__init__(config)
        if config.text_config is None:
            raise ValueError(
                "The config has no text_config: this is a stage-1 checkpoint without a language model. Use "
                "Blip2xForConditionalGeneration.from_stage1(checkpoint, language_model) to add one."
            )
        self.model = Blip2xModel(config, vision_model)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        self.language_model = auto_class.from_config(config.text_config) if language_model is None else language_model
        width = self.language_model.get_input_embeddings().weight.shape[1]
        # Here and not in the Q-Former: stage 1 trains without it, and each language model gets its own.
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, width)
        self.signature = LanguageModelSignature(self.language_model)
        self.post_init()

    @classmethod
    def from_unimodal(
        cls,
        vision_model: str | nn.Module,
        language_model: str | nn.Module,
        qformer: str | Blip2xQFormerConfig | None = None,
        *,
        image_token_index: int | None = None,
        num_query_tokens: int = 32,
        vision_feature_layer: int = -1,
    ) -> "Blip2xForConditionalGeneration":
        """Generative model around a vision tower and a language model, without stage 1.

        Args:
            vision_model, language_model: ids, folders or loaded modules.
            qformer: id or folder of a BERT checkpoint, or a config for random weights; None is a random BERT-base shape.
            image_token_index: id of `<image>` (`processor.image_token_id`); by default the next free one.
        """
        model = build_generative(
            cls,
            vision_model,
            language_model,
            qformer,
            image_token_index=image_token_index,
            num_query_tokens=num_query_tokens,
            vision_feature_layer=vision_feature_layer,
        )
        model.generation_config = generation_config_of(model)
        return model

    @classmethod
    def from_stage1(
        cls,
        checkpoint: "str | Blip2xForPreTraining",
        language_model: str | nn.Module,
        *,
        image_token_index: int | None = None,
        use_qformer_text_input: bool = False,
    ) -> "Blip2xForConditionalGeneration":
        """Tower and Q-Former of a stage-1 checkpoint in front of a language model; prints what became of each part.

        Args:
            checkpoint: folder or id of a stage-1 model, or one in memory, whose tower is then shared.
            image_token_index: id of `<image>` (`processor.image_token_id`); by default the next free one.
            use_qformer_text_input: keep the text branch, for queries that read the question.
        """
        stage1 = Blip2xForPreTraining.from_pretrained(checkpoint) if isinstance(checkpoint, str) else checkpoint
        model, report = hand_over(
            cls,
            stage1,
            language_model,
            image_token_index=image_token_index,
            use_qformer_text_input=use_qformer_text_input,
        )
        model.generation_config = generation_config_of(model)
        print(report)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.language_model.get_encoder() if modality is None else super().get_encoder(modality)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> Blip2xImageFeatures | tuple:
        """The soft prompt (B, Q, width of the LLM) of images, in `pooler_output`. Arguments as in `Blip2xModel`."""
        queries = self.model(
            pixel_values,
            vision_embeds,
            qformer_input_ids,
            qformer_attention_mask,
            output_attentions,
            output_hidden_states,
            interpolate_pos_encoding,
            return_dict=True,
        )
        return Blip2xImageFeatures(
            last_hidden_state=queries.vision_embeds,
            pooler_output=in_own_dtype(self.language_projection, queries.last_hidden_state),
            hidden_states=queries.vision_outputs.hidden_states,
            attentions=queries.vision_outputs.attentions,
            qformer_outputs=queries,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        mm_encoder_outputs: dict[str, Blip2xImageFeatures] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        interpolate_pos_encoding: bool = False,
        cache: object | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | float | None = None,
        **others: object,
    ) -> Blip2xForConditionalGenerationOutput | tuple:
        """Language-modelling logits and loss, given images and text.

        Args:
            pixel_values: (images, 3, height, width), or vision_embeds (images, N, D) in their place.
            input_ids, attention_mask: (B, L); with Q placeholders (`config.image_token_index`) for each image. Without
                input_ids the prompt is the image alone.
            labels: decoder-only: (B, L) like input_ids, -100 where nothing is supervised (prompt, padding). Encoder-decoder:
                (B, T) targets of the decoder. They are shifted here; image placeholders never count.
            qformer_input_ids, qformer_attention_mask: (images, L') text that the queries read.
            mm_encoder_outputs: {"image": get_image_features(...)} computed earlier, in place of the images.
            output_attentions, output_hidden_states: return those of tower, Q-Former and language model; hidden states
                of chosen layers where this is a list.
            cache: of an earlier forward, to go on from; past_key_values is its name up to transformers 5.23.
            position_ids: (B, L) of a decoder-only model; counted from mask and cache by default.
            logits_to_keep: how many last positions of a decoder-only model get logits where there are no labels; 0 is all.
            num_items_in_batch: labels as a trainer has counted them over an optimiser step (transformers' Trainer does); the
                loss is then this forward's sum over them, so that every token weighs the same. Where they were counted with
                those of placeholders, the count is lessened by their share of this batch.
            others: what else the language model's own forward takes, and shift_labels (B, L): targets already aligned with
                the logits, which then replace labels (sequence-parallel training shifts before it splits).

        While training, logits are those of positions whose next token has a label in any row: (B, positions, vocabulary).

        Raises:
            ValueError: image tokens and image features differ in number; an empty batch or text, NaN, too many tokens.
            TypeError: an argument that this language model does not take.
        """
        if input_ids is None and pixel_values is not None and pixel_values.ndim == 2:
            pixel_values, input_ids = None, pixel_values  # classifier-free guidance calls every model with ids alone
        warn_of_float16(self.language_model)
        image = self._image_features(
            mm_encoder_outputs,
            pixel_values,
            vision_embeds,
            qformer_input_ids,
            qformer_attention_mask,
            interpolate_pos_encoding,
            output_attentions,
            output_hidden_states,
        )
        cache = longer_cache(cache, past_key_values)
        # Not in the signature, where Trainer takes what has label in its name for something that every batch has.
        shift_labels = others.pop("shift_labels", None)
        options = self._language_options(others, cache, use_cache, output_attentions, output_hidden_states)
        if encoder_outputs is None:
            inputs_embeds, attention_mask = self.embed_prompt(input_ids, inputs_embeds, attention_mask, image, cache)
        if labels is not None:
            labels, given = self._without_placeholders(labels, input_ids), labels
            if num_items_in_batch is not None:
                first = 0 if self.config.is_encoder_decoder else 1  # a decoder-only model predicts from the second on
                kept, counted = ((one[:, first:] != IGNORE).sum() for one in (labels, given))
                num_items_in_batch = num_items_in_batch * kept / counted.clamp(min=1)
        if self.config.is_encoder_decoder:
            of_decoders = {"position_ids": position_ids, "shift_labels": shift_labels}
            self.signature.refuse(name for name, value in of_decoders.items() if value is not None)
            prompt = inputs_embeds, attention_mask, encoder_outputs, decoder_input_ids, decoder_attention_mask
            out, loss = self._encode_and_decode(*prompt, labels, num_items_in_batch, options)
        else:
            options |= self.signature.positions(position_ids, attention_mask, inputs_embeds, cache)
            targets = labels, shift_labels, num_items_in_batch
            out, loss = self._decode(inputs_embeds, attention_mask, *targets, logits_to_keep, options)
        return self._output_of(out, loss, image)

    def _language_options(
        self,
        others: dict[str, object],
        cache: object | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | list[int] | None,
    ) -> dict[str, object]:
        """Arguments of the language model's forward besides its inputs; None is left to its own config."""
        options = {
            self.signature.cache: cache,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.signature.others(others) | {name: value for name, value in options.items() if value is not None}

    @staticmethod
    def _output_of(
        out: ModelOutput, loss: torch.Tensor | None, image: Blip2xImageFeatures | None
    ) -> Blip2xForConditionalGenerationOutput:
        queries = None if image is None else image.qformer_outputs
        return Blip2xForConditionalGenerationOutput(
            **{name: out.get(name) for name in _LANGUAGE_OUTPUTS},
            loss=loss,
            vision_outputs=None if queries is None else queries.vision_outputs,
            qformer_outputs=queries,
        )

    def _image_features(
        self,
        mm_encoder_outputs: dict[str, Blip2xImageFeatures] | None,
        pixel_values: torch.Tensor | None,
        vision_embeds: torch.Tensor | None,
        *arguments: object,
    ) -> Blip2xImageFeatures | None:
        """Those computed earlier, or those of the images; None where there is no image."""
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is None and vision_embeds is None:
            return image
        if image is not None:
            raise ValueError("Pass images (pixel_values or vision_embeds) or mm_encoder_outputs, not both.")
        return self.get_image_features(pixel_values, vision_embeds, *arguments, return_dict=True)

    def embed_prompt(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        image: Blip2xImageFeatures | None,
        cache: object | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (B, L, width) of a prompt with its images, and its mask; None: there is no padding."""
        if input_ids is None and inputs_embeds is None:
            if image is None:
                raise ValueError("Nothing to read: pass input_ids, images, or both.")
            input_ids = self.image_prompt(image.pooler_output.shape[0])
        inputs_embeds = self.merge_image(input_ids, inputs_embeds, image, cache)
        check_prompt(self.config.text_config, inputs_embeds, attention_mask)
        if attention_mask is None and cache is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        return inputs_embeds, attention_mask

    def _without_placeholders(self, labels: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """Labels in which no place of an image is supervised: the model reads features there, and never writes them."""
        labels = labels.masked_fill(labels == self.config.image_token_index, IGNORE)
        if input_ids is None or self.config.is_encoder_decoder:
            return labels
        return labels.masked_fill(input_ids == self.config.image_token_index, IGNORE)

    def _decode(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | float | None,
        logits_to_keep: int | torch.Tensor,
        options: dict,
    ) -> tuple[ModelOutput, torch.Tensor | None]:
        """Output and loss of a decoder-only language model."""
        targets = shift_labels
        if targets is None and labels is not None:
            targets = labels[:, 1:]  # a position's logits predict the next token
            if self.training and "logits_to_keep" in self.signature.names:
                # The head is the widest layer, and most positions are of the image: no logits that no label needs.
                logits_to_keep = (targets != IGNORE).any(dim=0).nonzero()[:, 0]
                targets = targets[:, logits_to_keep]
                options["logits_to_keep"] = logits_to_keep
        elif targets is None:
            options |= self.signature.chosen(logits_to_keep=logits_to_keep)
        if self.training:
            options.setdefault("use_cache", False)  # no cache while training
        out = self._language_model_for(options)(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, **options
        )
        if targets is None:
            return out, None
        return out, language_modelling_loss(out.logits[:, : targets.shape[1]], targets, num_items_in_batch)

    def _encode_and_decode(
        self,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        encoder_outputs: ModelOutput | None,
        decoder_input_ids: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | float | None,
        options: dict,
    ) -> tuple[ModelOutput, torch.Tensor | None]:
        """Output and loss of an encoder-decoder language model."""
        if decoder_input_ids is None and "decoder_inputs_embeds" not in options:
            if labels is None:
                raise ValueError(
                    "An encoder-decoder language model needs labels or decoder_input_ids in forward. To answer, call "
                    "generate."
                )
            decoder_input_ids = self.decoder_inputs_of(labels)
        out = self._language_model_for(options)(
            inputs_embeds=None if encoder_outputs is not None else inputs_embeds,
            attention_mask=attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            return_dict=True,
            **options,
        )
        return out, None if labels is None else language_modelling_loss(out.logits, labels, num_items_in_batch)

    def decoder_inputs_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) that an encoder-decoder model's labels (B, T) are predicted from: from where generate starts.

        transformers' own shift starts mBART from the last label, wherever generate starts.
        """
        config = self.config.text_config
        start = getattr(self.generation_config, "decoder_start_token_id", None)
        start = config.decoder_start_token_id if start is None else start
        shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORE, config.pad_token_id or 0)

    def _language_model_for(self, options: dict) -> Callable:
        """The language model; a view of it in eager attention where weights are asked for, which sdpa does not compute."""
        if options.get("output_attentions"):
            return with_eager_attention(self.language_model)
        return self.callable_language_model

    @property
    def base_model(self) -> LanguageBackbone:
        """All but the output layer, as transformers means it: see `LanguageBackbone`."""
        return LanguageBackbone(self)

    def run_backbone(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **others: object,
    ) -> ModelOutput:
        """`last_hidden_state` (B, L, width) of a decoder-only language model, before its output layer.

        Arguments as in forward. Raises ValueError for an encoder-decoder model.
        """
        if self.config.is_encoder_decoder:
            raise ValueError("base_model reads a prompt alone; call an encoder-decoder model's forward with labels.")
        image = self._image_features(None, pixel_values, vision_embeds, qformer_input_ids, qformer_attention_mask)
        embeds, mask = self.embed_prompt(input_ids, inputs_embeds, attention_mask, image)
        options = self.signature.others(others) | self.signature.positions(position_ids, mask, embeds, None)
        return self.language_model.base_model(inputs_embeds=embeds, attention_mask=mask, return_dict=True, **options)

    def _get_name(self) -> str:
        # Trainer shifts labels for label smoothing only where it knows the class's name as that of a causal model.
        return super()._get_name() if self.config.is_encoder_decoder else type(self.language_model).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())


# The language model's own outputs, under the names that this release of transformers gives them.
_LANGUAGE_OUTPUTS = [
    field.name
    for field in fields(Blip2xForConditionalGenerationOutput)
    if field.name not in ("loss", "vision_outputs", "qformer_outputs")
]


__all__ = ["Blip2xForConditionalGeneration"]
