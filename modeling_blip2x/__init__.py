"""BLIP-2 for the Hugging Face ecosystem: both training stages, any frozen vision tower, any frozen language model.

Importing the package registers its classes with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_blip2x import Blip2xConfig, Blip2xQFormerConfig
from .generation_blip2x import Blip2xForConditionalGeneration
from .modeling_blip2x import Blip2xModel, Blip2xPreTrainedModel
from .pretraining_blip2x import Blip2xForPreTraining
from .processing_blip2x import Blip2xProcessor
from .retrieval_blip2x import Blip2xForImageTextRetrieval

__version__ = "0.1.0"

AutoConfig.register("blip2x", Blip2xConfig)
AutoConfig.register("blip2x_qformer", Blip2xQFormerConfig)
AutoModel.register(Blip2xConfig, Blip2xModel)
AutoModelForPreTraining.register(Blip2xConfig, Blip2xForPreTraining)
AutoModelForImageTextToText.register(Blip2xConfig, Blip2xForConditionalGeneration)
AutoModelForMultimodalLM.register(Blip2xConfig, Blip2xForConditionalGeneration)  # `transformers serve`, any-to-any
AutoModelForZeroShotImageClassification.register(Blip2xConfig, Blip2xForImageTextRetrieval)
AutoProcessor.register(Blip2xConfig, Blip2xProcessor)

__all__ = [
    "Blip2xConfig",
    "Blip2xForConditionalGeneration",
    "Blip2xForImageTextRetrieval",
    "Blip2xForPreTraining",
    "Blip2xModel",
    "Blip2xPreTrainedModel",
    "Blip2xProcessor",
    "Blip2xQFormerConfig",
]
