"""The frozen language model in 4 bits by bitsandbytes: with `--lora lm` this is QLoRA.

Vision tower, Q-Former and projection keep their precision. The checkpoint holds the packed weights and says so in its
config, so `from_pretrained` needs bitsandbytes and no argument.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

# Left as they are: all but the language model, and its output layer, whose weight may be tied to the embeddings.
NOT_QUANTIZED = ["model.vision_model", "model.qformer", "language_projection", "lm_head"]


def four_bits(bf16: bool) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, Dettmers et al. 2023); products in bfloat16 or float32."""
    if not is_bitsandbytes_available():
        raise ValueError("--load_in_4bit is true, but bitsandbytes is not installed. pip install bitsandbytes.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


def load_language_model_in_4bit(name: str, bf16: bool) -> torch.nn.Module:
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(name).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name, quantization_config=four_bits(bf16))


def mark_as_quantized(model: torch.nn.Module) -> None:
    """Tell a model that was built around a quantised language model: what is saved must say how to read it."""
    llm = model.language_model
    model.config.quantization_config = llm.hf_quantizer.quantization_config
    model.hf_quantizer, model.is_loaded_in_4bit = llm.hf_quantizer, True
    del model.config.text_config.quantization_config  # once, for the whole model
