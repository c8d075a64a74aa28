"""How images get into the prompt of a language model: in forward by `merge_image`, in generate by the hooks below.

The image is encoded once, before beams are laid out; decoder-only models take the soft prompt in their first step,
encoder-decoder models in the input of the encoder.
"""

import torch

from .outputs_blip2x import Blip2xImageFeatures
from .vision_blip2x import attention_weights_of

IMAGE_ARGUMENTS = (
    "pixel_values",
    "vision_embeds",
    "qformer_input_ids",
    "qformer_attention_mask",
    "interpolate_pos_encoding",
)


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
        continues: bool = False,
    ) -> torch.Tensor:
        """Text embeddings (B, L, width) with the soft prompt at the placeholders.

        continues: these tokens go on from a cache that holds the prompt and its images.

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
        if not continues and not torch.compiler.is_compiling():
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

    # What transformers' generate asks of a multimodal model.

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
        return model_kwargs

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs: dict, model_input_name: str | None, generation_config
    ) -> dict:
        """Encoder-decoder: merge the soft prompt into the encoder's input, then encode once."""
        model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        image = model_kwargs.pop("mm_encoder_outputs", {}).get("image")
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
