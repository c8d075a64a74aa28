"""Stage 2: query outputs, projected, are a soft prompt of a frozen language model (paper, section 3.3).

Decoder-only (OPT, Llama, GPT-2, Qwen): input_ids hold one `<image>` placeholder for each query and the text; projected
queries replace the placeholders. Encoder-decoder (T5): the same on the encoder's side, labels on the decoder's.

`generate` is transformers' own, on this model: the image is encoded once, before the first token and whatever the number
of beams. Output of a decoder-only model begins with the prompt's ids; `Blip2xProcessor.batch_decode_new` takes it off.
"""

import copy
import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin
from transformers.utils import ModelOutput, logging

from .building_blip2x import build_generative, hand_over
from .configuration_blip2x import Blip2xConfig, Blip2xQFormerConfig
from .distributed_blip2x import global_mean
from .modeling_blip2x import Blip2xModel, Blip2xPreTrainedModel
from .outputs_blip2x import Blip2xForConditionalGenerationOutput, Blip2xImageFeatures
from .pretraining_blip2x import Blip2xForPreTraining
from .prompting_blip2x import ImagePrompting, positions_of
from .qformer_blip2x import in_own_dtype
from .vision_blip2x import attention_weights_of

logger = logging.get_logger(__name__)


class Blip2xForConditionalGeneration(ImagePrompting, Blip2xPreTrainedModel, GenerationMixin):
    """Vision tower, Q-Former, projection and language model."""

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
        width = self.language_model.get_input_embeddings().embedding_dim
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, width)
        accepted = inspect.signature(self.language_model.forward).parameters
        self.takes_position_ids = "position_ids" in accepted
        self.takes_logits_to_keep = "logits_to_keep" in accepted
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

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
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
        output = Blip2xImageFeatures(
            last_hidden_state=queries.vision_embeds,
            pooler_output=in_own_dtype(self.language_projection, queries.last_hidden_state),
            hidden_states=queries.vision_outputs.hidden_states,
            attentions=queries.vision_outputs.attentions,
            qformer_outputs=queries,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

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
        return_dict: bool | None = None,
        **decoder_arguments: object,
    ) -> Blip2xForConditionalGenerationOutput | tuple:
        """Language-modelling logits and loss, given images and text.

        Args:
            pixel_values: (images, 3, height, width), or vision_embeds (images, N, D) in their place.
            input_ids, attention_mask: (B, L); with Q placeholders (`config.image_token_index`) for each image. Without
                input_ids the prompt is the image alone.
            labels: decoder-only: (B, L) like input_ids, -100 where nothing is supervised (image, prompt, padding).
                Encoder-decoder: (B, T) targets of the decoder. They are shifted here.
            qformer_input_ids, qformer_attention_mask: (images, L') text that the queries read.
            mm_encoder_outputs: {"image": get_image_features(...)} computed earlier, in place of the images.
            output_attentions, output_hidden_states: return those of tower, Q-Former and language model; hidden states
                of chosen layers where this is a list.
            decoder_arguments: of decoder-only models alone. position_ids (B, L); logits_to_keep, how many last
                positions get logits (0 is all); shift_labels (B, L), targets already aligned with the logits, which
                then replace labels (sequence-parallel training shifts before it splits).

        While training, logits are those of positions whose next token has a label in any row: (B, positions, vocabulary).

        Raises:
            ValueError: image tokens and image features differ in number, naming both.
            TypeError: an argument that this language model does not take.
        """
        self._check_decoder_arguments(decoder_arguments)
        if self.config.text_config.model_type == "t5" and self.language_model.dtype == torch.float16:
            self._warn_of_float16()
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or vision_embeds is not None:
            if image is not None:
                raise ValueError("Pass images (pixel_values or vision_embeds) or mm_encoder_outputs, not both.")
            image = self.get_image_features(
                pixel_values,
                vision_embeds,
                qformer_input_ids,
                qformer_attention_mask,
                interpolate_pos_encoding,
                output_attentions,
                output_hidden_states,
                return_dict=True,
            )
        options = {
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if encoder_outputs is None:
            if input_ids is None and inputs_embeds is None:
                if image is None:
                    raise ValueError("Nothing to read: pass input_ids, images, or both.")
                input_ids = self.image_prompt(len(image.pooler_output))
            inputs_embeds = self.merge_image(input_ids, inputs_embeds, image, past_key_values)
            if attention_mask is None and past_key_values is None:
                attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        if self.config.is_encoder_decoder:
            out = self._encode_and_decode(
                inputs_embeds,
                attention_mask,
                encoder_outputs,
                decoder_input_ids,
                decoder_attention_mask,
                labels,
                options,
            )
            loss = None if labels is None else language_modelling_loss(out.logits, labels)
        else:
            position_ids = decoder_arguments.get("position_ids")
            if position_ids is None and past_key_values is None and attention_mask.ndim == 2:
                position_ids = positions_of(attention_mask)
            if position_ids is not None and self.takes_position_ids:
                options["position_ids"] = position_ids
            shift_labels, targets = decoder_arguments.get("shift_labels"), None
            if labels is None and shift_labels is None:
                options["logits_to_keep"] = decoder_arguments.get("logits_to_keep", 0)
            elif labels is not None and shift_labels is None:
                targets = labels[:, 1:]
                if self.training and self.takes_logits_to_keep:
                    # The head is the widest layer, and most positions are of the image: no logits that no label needs.
                    supervised = (targets != -100).any(dim=0).nonzero()[:, 0]
                    options["logits_to_keep"], targets = supervised, targets[:, supervised]
            if self.training:
                options.setdefault("use_cache", False)  # nothing goes on from a training step
            with attention_weights_of(self.language_model, output_attentions):
                out = self.callable_language_model(
                    inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, **options
                )
            loss = None
            if shift_labels is not None:
                loss = language_modelling_loss(out.logits, shift_labels)
            elif labels is not None:
                loss = language_modelling_loss(out.logits[:, : targets.shape[1]], targets)
        queries = None if image is None else image.qformer_outputs
        output = Blip2xForConditionalGenerationOutput(
            loss=loss,
            logits=out.logits,
            **{name: out.get(name) for name in _LANGUAGE_OUTPUTS},
            vision_outputs=None if queries is None else queries.vision_outputs,
            qformer_outputs=queries,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _check_decoder_arguments(self, arguments: dict) -> None:
        taken = () if self.config.is_encoder_decoder else ("position_ids", "logits_to_keep", "shift_labels")
        unknown = [name for name in arguments if name not in taken]
        if unknown:
            raise TypeError(
                f"forward of {type(self).__name__} with a {self.config.text_config.model_type} language model takes no "
                f"argument {', '.join(map(repr, unknown))}."
            )

    @torch.compiler.disable
    def _warn_of_float16(self) -> None:
        logger.warning_once(
            "T5 was trained in bfloat16 and overflows in float16: answers may be gibberish. Load the model with "
            "dtype=torch.bfloat16 or torch.float32."
        )

    def _encode_and_decode(
        self,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        encoder_outputs: ModelOutput | None,
        decoder_input_ids: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        options: dict,
    ) -> ModelOutput:
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError(
                    "An encoder-decoder language model needs labels or decoder_input_ids in forward. To answer, call "
                    "generate."
                )
            decoder_input_ids = self.language_model.prepare_decoder_input_ids_from_labels(labels=labels)
        with attention_weights_of(self.language_model, options.get("output_attentions")):
            return self.callable_language_model(
                inputs_embeds=None if encoder_outputs is not None else inputs_embeds,
                attention_mask=attention_mask,
                encoder_outputs=encoder_outputs,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                return_dict=True,
                **options,
            )


_LANGUAGE_OUTPUTS = (
    "past_key_values",
    "hidden_states",
    "attentions",
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
)


def language_modelling_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B, T, vocabulary) against labels (B, T), in fp32, a mean over the supervised tokens.

    While training on several processes it is the mean over the global batch; in evaluation over this process's rows,
    since processes need not evaluate in step.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    count = (labels != -100).sum()
    return global_mean(total, count) if torch.is_grad_enabled() else total / count.clamp(min=1)


def generation_config_of(model: Blip2xForConditionalGeneration) -> object:
    """The language model's own generation config; it never writes the image placeholder."""
    generation_config = copy.deepcopy(model.language_model.generation_config)
    generation_config.suppress_tokens = [model.config.image_token_index]
    return generation_config


__all__ = ["Blip2xForConditionalGeneration"]
