"""Where the queries look, for the report: the model's maps of one image."""

import numpy as np

from modeling_blip2x.attention_maps_blip2x import NoGridError

from ...data.collators import collate_images, collate_prompts
from ..evaluated_model import Checkpoint


def query_maps(checkpoint: Checkpoint, item: dict) -> np.ndarray | None:
    """(Q, rows, columns), mean over layers and heads, each query's sum 1; None where the tower's positions are no grid."""
    model, processor = checkpoint.model, checkpoint.processor
    inputs = collate_images([item], processor.image_processor, False)
    if checkpoint.stage == 2:
        longest = checkpoint.language_collator().max_text_length
        inputs |= collate_prompts([item], processor.qformer_tokenizer, longest)
    try:
        maps = model.query_attention(**{name: value.to(model.device) for name, value in inputs.items()})
    except NoGridError:
        return None
    return maps[0].cpu().numpy()
