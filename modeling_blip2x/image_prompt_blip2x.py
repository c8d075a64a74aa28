"""How images get into the prompt of a language model: in forward by `merge_image`, in generate before transformers' own.

The image is encoded once, before beams are laid out; decoder-only models take the soft prompt in their first step, which
is run once for all beams, encoder-decoder models in the input of the encoder.
"""

import copy
from collections.abc import Callable

import torch
from transformers import DynamicCache, GenerationConfig

from .checks_blip2x import check_prompt
from .language_blip2x import CACHE
from .outputs_blip2x import Blip2xImageFeatures
from .vision_blip2x import with_eager_attention


def repeat_rows(value: torch.Tensor | tuple, copies: int) -> torch.Tensor | tuple:
    """Each row of a tensor, or of the tensors in a tuple, `copies` times, one after the other."""
    if isinstance(value, tuple):
        return tuple(repeat_rows(one, copies) for one in value)
    return value.repeat_interleave(copies, dim=0)


class ImagePrompting:
    """Mixin of a generative model with `get_image_features`, `config.image_token_index` and transformers' generate."""

    main_input_name = "input_ids"  # generation goes on from the text, though images come first in forward

    def image_prompt(self, batch_size: int) -> torch.Tensor:
        """input_ids (batch_size, Q or more) of a prompt without text: the image, and what the processor puts after it."""
        ids = [self.config.image_token_index] * self.config.num_query_tokens
        bos = getattr(self.config.text_config, "bos_token_id", None)
        if self.config.empty_prompt is not None:
            ids += self.config.empty_prompt
        elif not self.config.is_encoder_decoder and bos is not None:
            ids.append(bos)
        return torch.tensor([ids], device=self.device).expand(batch_size, -1)

    def merge_image(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        image: Blip2xImageFeatures | None,
        cache: object | None = None,
    ) -> torch.Tensor:
        """Text embeddings (B, L, width) with the soft prompt at the placeholders.

        cache: tokens that go on from one that holds the prompt need no image of their own.

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
        begins = features is not None or cache is None or cache.get_seq_length() == 0
        if begins and not torch.compiler.is_compiling():  # a check that depends on data would break a compiled graph
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

    # Images in transformers' generate.

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        mm_encoder_outputs: dict[str, Blip2xImageFeatures] | None = None,
        assistant_model: object | None = None,
        **generation_arguments: object,
    ) -> object:
        """transformers' own generate, from images and text; images are encoded here, once.

        Args:
            inputs: pixel_values or input_ids, without a name.
            pixel_values, vision_embeds, input_ids, attention_mask, inputs_embeds, qformer_input_ids,
                qformer_attention_mask, interpolate_pos_encoding, mm_encoder_outputs: as in forward.
            assistant_model: a smaller model that drafts; one of this class sees the image through its own Q-Former.
            generation_arguments: those of `transformers.GenerationMixin.generate`, checked by it.

        Returns ids (B, L); of a decoder-only model they begin with the prompt, unless that was inputs_embeds alone.
        """
        if inputs is not None and inputs.is_floating_point():
            pixel_values = _given_once("pixel_values", inputs, pixel_values)
        elif inputs is not None:
            input_ids = _given_once("input_ids", inputs, input_ids)
        if self.config.is_encoder_decoder and input_ids is not None and inputs_embeds is not None:
            raise ValueError("generate got both input_ids and inputs_embeds. An encoder reads one of the two.")
        texts = {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        images = dict(mm_encoder_outputs or {})
        if pixel_values is not None or vision_embeds is not None:
            images["image"] = self.get_image_features(
                pixel_values,
                vision_embeds,
                **texts,
                interpolate_pos_encoding=interpolate_pos_encoding,
                return_dict=True,
            )
        elif id(self) in images:  # this model is the assistant of another, which encoded the image for it
            images = {"image": images[id(self)]}
        image = images.get("image")
        if image is not None:
            if isinstance(assistant_model, ImagePrompting):
                features = assistant_model.get_image_features(vision_embeds=image.last_hidden_state, **texts)
                images[id(assistant_model)] = features
            if input_ids is None and inputs_embeds is None:
                input_ids = self.image_prompt(image.pooler_output.shape[0])
                attention_mask = torch.ones_like(input_ids)
        prompt = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds, "mm_encoder_outputs": images}
        if assistant_model is not None:
            generation_arguments["assistant_model"] = assistant_model
        return super().generate(
            input_ids,
            generation_config,
            **{name: value for name, value in prompt.items() if value is not None},
            **generation_arguments,
        )

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, mm_encoder_outputs=None, **kwargs) -> dict:
        """As in transformers, and with the image in the first step, which has no cache yet.

        transformers drops the image again where it sees no first iteration, and to it an assistant's first step is none.
        It also looks for the parameter names `inputs_embeds` and `kwargs` in this signature.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, mm_encoder_outputs=mm_encoder_outputs, **kwargs
        )
        cache = inputs.get(CACHE)
        if mm_encoder_outputs and not self.config.is_encoder_decoder and (cache is None or cache.get_seq_length() == 0):
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return inputs

    def heal_tokens(self, input_ids: torch.Tensor, tokenizer: object | None = None) -> torch.Tensor:
        """input_ids (B, L) whose last token may be another one that begins alike (token_healing).

        transformers reads the whole text anew, which neither its images nor BOS outlive, so the last token alone is
        taken. An encoder-decoder model's text is in the encoder, and its decoder has nothing to heal.
        """
        if self.config.is_encoder_decoder:
            return input_ids
        healed = super().heal_tokens(input_ids, tokenizer)
        return torch.cat([input_ids[:, :-1], healed[:, -1:]], dim=1) if healed.shape[1] else input_ids

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs: dict, model_input_name: str | None, generation_config
    ) -> dict:
        """Encoder-decoder: merge the soft prompt into the encoder's input, then encode once, for an assistant too."""
        images = model_kwargs.pop("mm_encoder_outputs", None) or {}
        image = images.pop(id(self), None) or images.pop("image", None)
        if images:  # those for an assistant
            model_kwargs["mm_encoder_outputs"] = images
        is_embeds = inputs_tensor.is_floating_point()
        embeds = self.merge_image(None if is_embeds else inputs_tensor, inputs_tensor if is_embeds else None, image)
        check_prompt(self.config.text_config, embeds, model_kwargs.get("attention_mask"))
        encoder = self.get_encoder()
        if generation_config.output_attentions:
            encoder = with_eager_attention(encoder)
        model_kwargs["encoder_outputs"] = encoder(
            inputs_embeds=embeds,
            attention_mask=model_kwargs.get("attention_mask"),
            output_attentions=generation_config.output_attentions,
            output_hidden_states=generation_config.output_hidden_states,
            return_dict=True,
        )
        model_kwargs.pop("inputs_embeds", None)
        return model_kwargs

    def _prefill(self, input_ids, generation_config, model_kwargs: dict, is_first_iteration: bool = True):
        """Prefill one row per prompt; its beams, or return sequences, get copies of the cache."""
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        cache = model_kwargs.get(CACHE)
        # A static cache is laid out for all rows from the start, and one that was begun has them already.
        is_fresh = type(cache) is DynamicCache and cache.get_seq_length() == 0
        # Prefill in chunks is left to transformers. A prompt of embeddings alone has no ids to deal out images by.
        is_whole = generation_config.prefill_chunk_size is None and input_ids.shape[1] > 0
        if copies == 1 or self.config.is_encoder_decoder or not is_fresh or not is_whole:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        rows = input_ids.shape[0]
        firsts = {
            name: value[::copies] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
            for name, value in model_kwargs.items()
        }
        image = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if image is not None:  # transformers has repeated the features too; those of each first copy are taken
            images_of_rows = (input_ids == self.config.image_token_index).sum(dim=1) // self.config.num_query_tokens
            row = torch.arange(rows, device=input_ids.device).repeat_interleave(images_of_rows)
            image = copy.copy(image)
            image.pooler_output = image.pooler_output[row % copies == 0]
            firsts["mm_encoder_outputs"] = {"image": image}
        outputs = super()._prefill(input_ids[::copies], generation_config, firsts, is_first_iteration)
        cache.reorder_cache(torch.arange(rows, device=input_ids.device) // copies)
        for name in ("logits", "hidden_states", "attentions"):
            if outputs.get(name) is not None:
                outputs[name] = repeat_rows(outputs[name], copies)
        return outputs


def _given_once(name: str, unnamed: torch.Tensor, named: torch.Tensor | None) -> torch.Tensor:
    if named is not None:
        raise ValueError(f"generate got {name} twice: as its first argument and by name. Pass it once.")
    return unnamed
