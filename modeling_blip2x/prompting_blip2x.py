"""How images get into the prompt of a language model: in forward by `merge_image`, in generate by the hooks below.

The image is encoded once, before beams are laid out; decoder-only models take the soft prompt in their first step, which
is run once for all beams, encoder-decoder models in the input of the encoder.
"""

from collections.abc import Callable

import torch
from transformers import DynamicCache

from .outputs_blip2x import Blip2xImageFeatures
from .vision_blip2x import attention_weights_of

QFORMER_ARGUMENTS = ("qformer_input_ids", "qformer_attention_mask")
IMAGE_ARGUMENTS = ("pixel_values", "vision_embeds", *QFORMER_ARGUMENTS, "interpolate_pos_encoding")


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, L) of tokens, given attention_mask (B, L): padding may be on the left."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def repeat_rows(value: torch.Tensor | tuple, copies: int) -> torch.Tensor | tuple:
    """Each row of a tensor, or of the tensors in a tuple, `copies` times, one after the other."""
    if isinstance(value, tuple):
        return tuple(repeat_rows(one, copies) for one in value)
    return value.repeat_interleave(copies, dim=0)


class ImagePrompting:
    """Mixin of a generative model with `get_image_features`, `config.image_token_index` and transformers' generate."""

    def image_prompt(self, batch_size: int) -> torch.Tensor:
        """input_ids (batch_size, Q or Q + 1) of a prompt without text: the image, then BOS if the decoder has one."""
        ids = [self.config.image_token_index] * self.config.num_query_tokens
        bos = getattr(self.config.text_config, "bos_token_id", None)
        if not self.config.is_encoder_decoder and bos is not None:
            ids.append(bos)
        return torch.tensor([ids], device=self.device).expand(batch_size, -1)

    def merge_image(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        image: Blip2xImageFeatures | None,
        past_key_values: object | None = None,
    ) -> torch.Tensor:
        """Text embeddings (B, L, width) with the soft prompt at the placeholders.

        past_key_values: a cache; tokens that go on from one that holds the prompt need no image of their own.

        Raises:
            ValueError: the number of placeholders is not the number of image features; both are named.
        """
        table = self.get_input_embeddings()
        if inputs_embeds is None:
            is_image = input_ids == self.config.image_token_index
            # The placeholder's id may lie outside the table, and what it would look up is replaced anyway.
            inputs_embeds = table(input_ids.masked_fill(is_image, 0))
        else:
            placeholder = torch.tensor(self.config.image_token_index, device=inputs_embeds.device)
            is_image = (inputs_embeds == table(placeholder)).all(dim=-1)
        features = None if image is None else image.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
        # Data-dependent checks would break a compiled graph.
        if not torch.compiler.is_compiling() and (past_key_values is None or past_key_values.get_seq_length() == 0):
            self._check_placeholders(is_image, features)
        if features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(is_image[..., None], features)

    def _check_placeholders(self, is_image: torch.Tensor, features: torch.Tensor | None) -> None:
        placeholders = int(is_image.sum())
        expected = 0 if features is None else features.numel() // features.shape[-1]
        if placeholders != expected:
            rows = is_image.sum(dim=1).tolist()
            raise ValueError(
                f"The text has {placeholders} image tokens (id {self.config.image_token_index}; {rows} by row) but the "
                f"images give {expected} features ({self.config.num_query_tokens} for each image). Build input_ids with "
                "processor(images, text), and do not truncate the image tokens."
            )

    @property
    def generation_config(self) -> object:
        """The language model's own: there is one set of defaults, whoever is asked to generate."""
        return self.language_model.generation_config

    @generation_config.setter
    def generation_config(self, value: object) -> None:
        if hasattr(self, "language_model"):  # transformers sets one before any part is built; the LLM makes its own
            self.language_model.generation_config = value

    @property
    def callable_language_model(self) -> Callable:
        """The language model, compiled while generate asks for it."""
        return self.language_model if self._compiled_language_model is None else self._compiled_language_model

    _compiled_language_model = None

    def get_compiled_call(self, compile_config) -> Callable:
        """This model with its language model compiled. The rest of a decoding step is a look-up of one embedding."""
        compiled = self.language_model.get_compiled_call(compile_config)

        def call(*arguments, **keywords):
            self._compiled_language_model = compiled
            try:
                return self(*arguments, **keywords)
            finally:
                self._compiled_language_model = None

        return call

    # What transformers' generate asks of a multimodal model.

    def _supports_logits_to_keep(self) -> bool:
        return not self.config.is_encoder_decoder

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs) -> dict:
        """Adds the positions of this step's tokens, for decoder-only models. (transformers reads the name `kwargs`.)"""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if self.config.is_encoder_decoder:
            return inputs
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if past == 0 and kwargs.get("mm_encoder_outputs") is not None:
            # An assistant's first step is not a first iteration to transformers, which drops what it prefills with.
            inputs["mm_encoder_outputs"] = kwargs["mm_encoder_outputs"]
        if "position_ids" in inputs:
            return inputs
        tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        length = tokens.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            inputs["position_ids"] = positions_of(attention_mask)[:, -length:]
        else:  # generate drops a mask without padding
            inputs["position_ids"] = (past + torch.arange(length, device=tokens.device))[None]
        return inputs

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs: dict):
        """Generation goes on from the text, though images are this model's main input. `inputs` may be either."""
        if inputs is not None:
            name = "pixel_values" if inputs.is_floating_point() else "input_ids"
            if model_kwargs.get(name) is not None:
                raise ValueError(f"generate got {name} twice: as its first argument and by name. Pass it once.")
            model_kwargs[name] = inputs
        input_ids = model_kwargs.pop("input_ids", None)
        inputs_embeds = model_kwargs.get("inputs_embeds")
        if inputs_embeds is None:
            model_kwargs.pop("inputs_embeds", None)
            input_ids = self._maybe_initialize_input_ids_for_generation(input_ids, bos_token_id, model_kwargs)
            return input_ids, "input_ids", model_kwargs
        if not self.config.is_encoder_decoder:
            # Kept beside the embeddings of the prompt: new tokens are appended to it.
            model_kwargs["input_ids"] = self._maybe_initialize_input_ids_for_generation(
                input_ids, bos_token_id, model_kwargs
            )
        elif input_ids is not None:
            raise ValueError("generate got both input_ids and inputs_embeds. An encoder reads one of the two.")
        return inputs_embeds, "inputs_embeds", model_kwargs

    def _maybe_initialize_input_ids_for_generation(self, inputs, bos_token_id, model_kwargs):
        """A prompt of images alone is the placeholders and BOS."""
        images = (
            model_kwargs.get("pixel_values")
            if model_kwargs.get("vision_embeds") is None
            else model_kwargs["vision_embeds"]
        )
        if inputs is None and images is not None and model_kwargs.get("inputs_embeds") is None:
            inputs = self.image_prompt(len(images))
            model_kwargs["attention_mask"] = torch.ones_like(inputs)
            return inputs
        return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        """Decoder-only: encode the images once, before beams are laid out."""
        arguments = {name: model_kwargs.pop(name) for name in IMAGE_ARGUMENTS if model_kwargs.get(name) is not None}
        if "pixel_values" in arguments or "vision_embeds" in arguments:
            model_kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(**arguments, return_dict=True)}
            # Kept for an assistant, whose queries read the same text; forward makes no use of it beside the features.
            model_kwargs |= {name: value for name, value in arguments.items() if name in QFORMER_ARGUMENTS}
        return model_kwargs

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs: dict, model_input_name: str | None, generation_config
    ) -> dict:
        """Encoder-decoder: merge the soft prompt into the encoder's input, then encode once."""
        model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        image = model_kwargs.get("mm_encoder_outputs", {}).get("image")
        is_embeds = inputs_tensor.is_floating_point()
        embeds = self.merge_image(None if is_embeds else inputs_tensor, inputs_tensor if is_embeds else None, image)
        with attention_weights_of(self.language_model, generation_config.output_attentions):
            model_kwargs["encoder_outputs"] = self.get_encoder()(
                inputs_embeds=embeds,
                attention_mask=model_kwargs.get("attention_mask"),
                output_attentions=generation_config.output_attentions,
                output_hidden_states=generation_config.output_hidden_states,
                return_dict=True,
            )
        model_kwargs.pop("inputs_embeds", None)
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, **kwargs
    ):
        """Features of images are not repeated for beams: the encoder has read them, or `_prefill` reads them once."""
        features = kwargs.pop("mm_encoder_outputs", None) if expand_size > 1 else None
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if features is not None and not is_encoder_decoder:
            kwargs["mm_encoder_outputs"] = features
        return input_ids, kwargs

    def _prefill(self, input_ids, generation_config, model_kwargs: dict, is_first_iteration: bool = True):
        """Decoder-only: reads a prompt once. Its beams, or return sequences, begin alike and get copies of its cache."""
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if copies == 1 or self.config.is_encoder_decoder:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        cache = model_kwargs.get("past_key_values")
        rows = len(input_ids)
        firsts = {
            name: value[::copies] if isinstance(value, torch.Tensor) and len(value) == rows else value
            for name, value in model_kwargs.items()
        }
        chunked = generation_config.prefill_chunk_size is not None
        if type(cache) is not DynamicCache or cache.get_seq_length() > 0 or chunked:  # made for all rows, or has them
            if model_kwargs.get("mm_encoder_outputs") is not None:
                model_kwargs["mm_encoder_outputs"] = self._expand_multimodal_outputs(
                    input_ids[::copies], model_kwargs["mm_encoder_outputs"], copies, firsts.get("inputs_embeds")
                )
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        outputs = super()._prefill(input_ids[::copies], generation_config, firsts, is_first_iteration)
        cache.reorder_cache(torch.arange(rows, device=input_ids.device) // copies)
        for name in ("logits", "hidden_states", "attentions"):
            if outputs.get(name) is not None:
                outputs[name] = repeat_rows(outputs[name], copies)
        return outputs

    def _get_candidate_generator(self, *, assistant_model, model_kwargs: dict, **others):
        """A drafting assistant with a Q-Former makes its own features, once, of what this model's tower saw."""
        image = model_kwargs.get("mm_encoder_outputs", {}).get("image")
        if isinstance(assistant_model, ImagePrompting) and image is not None:
            texts = {name: model_kwargs[name] for name in QFORMER_ARGUMENTS if name in model_kwargs}
            features = assistant_model.get_image_features(vision_embeds=image.last_hidden_state, **texts)
            model_kwargs = model_kwargs | {"mm_encoder_outputs": {"image": features}}
            # The assistant's own generate decides which logits it needs.
            model_kwargs.pop("logits_to_keep", None)
        return super()._get_candidate_generator(assistant_model=assistant_model, model_kwargs=model_kwargs, **others)
