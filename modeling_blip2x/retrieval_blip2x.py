"""Retrieval: a stage-1 checkpoint with a forward that scores images and texts.

The scores themselves are in imagetext_blip2x.py, the losses over the global batch in matching_blip2x.py.
"""

import torch
from torch import nn
from transformers.utils import can_return_tuple

from .configuration_blip2x import Blip2xConfig
from .imagetext_blip2x import SMALLEST_TEMPERATURE
from .losses_blip2x import image_text_similarity
from .matching_blip2x import Blip2xMatchingModel
from .outputs_blip2x import Blip2xRetrievalOutput


class Blip2xForImageTextRetrieval(Blip2xMatchingModel):
    """Retrieval: contrastive logits of images and texts; ITC + ITM loss for fine-tuning."""

    def __init__(self, config: Blip2xConfig, vision_model: nn.Module | None = None):
        super().__init__(config, vision_model)
        self.itg_head.requires_grad_(False)  # kept so that checkpoints stay whole; no loss here trains it

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        negative_seed: int | None = None,
        return_loss: bool = False,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> Blip2xRetrievalOutput | tuple:
        """Logits (N, M) of N images and M texts; with return_loss the two must be pairs.

        Args:
            pixel_values (N, 3, height, width) or vision_embeds (N, positions, D); input_ids, attention_mask (M, L).
            image_ids: (N,); equal ids are positives of one another and never negatives.
            negative_seed: fixes the draw of hard negatives; None draws from torch's own generator in training, and as 0
                does in evaluation.
            output_attentions, output_hidden_states: also return those of tower and Q-Former.
        """
        options = self.model.resolve_outputs(output_attentions, output_hidden_states)
        if return_loss:
            pairs = self.encode_pairs(
                pixel_values, input_ids, attention_mask, vision_embeds, interpolate_pos_encoding, *options
            )
            contrast = self.contrast(pairs, image_ids, *options)
            loss_itc = self.itc_loss(contrast)
            loss_itm, accuracy = self.match(pairs, contrast, negative_seed)
            output = Blip2xRetrievalOutput(
                loss=loss_itc + loss_itm,
                loss_itc=loss_itc,
                loss_itm=loss_itm,
                itm_accuracy=accuracy,
                temperature=self.temperature.detach()[0],
                logits_per_image=contrast.logits_per_image,
                logits_per_text=contrast.logits_per_text,
                **self.outputs_of(pairs, contrast, *options),
            )
        else:
            images = self.get_image_features(
                pixel_values, vision_embeds, interpolate_pos_encoding, *options, return_dict=True
            )
            texts = self.get_text_features(input_ids, attention_mask, *options, return_dict=True)
            cosines = image_text_similarity(images.pooler_output, texts.pooler_output)
            logits = cosines / self.temperature.float().clamp(min=SMALLEST_TEMPERATURE)
            output = Blip2xRetrievalOutput(
                temperature=self.temperature.detach()[0], logits_per_image=logits, logits_per_text=logits.T
            )
            if any(options):
                output.vision_outputs = images.qformer_outputs.vision_outputs
                output.qformer_outputs, output.text_outputs = images.qformer_outputs, texts
        return output


__all__ = ["Blip2xForImageTextRetrieval"]
