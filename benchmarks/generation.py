"""Captions by ours and by transformers' `Blip2ForConditionalGeneration.generate`, the same random weights in both.

Sizes: an EVA tower as large as ViT-B/16 (a ViT-g of random weights would cost a CPU minutes, and the same in both), a
Q-Former of 12 x 768 with 32 queries, a language model of OPT-125m's size, 20 new tokens each, prompt `a photo of`.
"""

from functools import partial

import torch
from transformers import Blip2VisionConfig, Blip2VisionModel, OPTConfig, OPTForCausalLM

from benchmarks.measure import Row, alternating_seconds, faster
from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xQFormerConfig
from modeling_blip2x.convert_to_blip2x import export_transformers
from modeling_blip2x.weight_files_blip2x import Weight

NEW_TOKENS = 20
PROMPT = [2, 102, 1345, 9]  # BOS and `a photo of`
AIM = 1.2


def models(device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and transformers', of equal weights."""
    torch.manual_seed(0)
    tower = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
        )
    )
    # Weights larger than OPT's start: of small ones the tied head repeats the last token whatever the image.
    language_model = OPTForCausalLM(OPTConfig(init_std=0.06))
    qformer = Blip2xQFormerConfig(use_qformer_text_input=False, encoder_hidden_size=768)
    ours = Blip2xForConditionalGeneration.from_unimodal(tower, language_model, qformer).eval()
    weights = {name: Weight.of(tensor) for name, tensor in ours.state_dict().items()}
    model_class, config, weights, _ = export_transformers(ours.config, weights)
    theirs = model_class(config).eval()
    theirs.load_state_dict({name: weight.read() for name, weight in weights.items()}, strict=False)
    theirs.tie_weights()
    return ours.to(device, dtype), theirs.to(device, dtype)


@torch.inference_mode()
def run(device: str) -> list[Row]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ours, theirs = models(device, dtype)
    rows = []
    for batch in (1, 8):
        pixels = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
        prompt = [ours.config.image_token_index] * ours.config.num_query_tokens + PROMPT
        input_ids = torch.tensor([prompt] * batch, device=device)
        for beams in (1, 5):
            options = {
                "pixel_values": pixels,
                "input_ids": input_ids,
                "attention_mask": torch.ones_like(input_ids),
                "num_beams": beams,
                "min_new_tokens": NEW_TOKENS,
                "max_new_tokens": NEW_TOKENS,
                "do_sample": False,
                "suppress_tokens": [ours.config.image_token_index],
            }
            calls = {"ours": partial(ours.generate, **options), "theirs": partial(theirs.generate, **options)}
            equal = torch.equal(calls["ours"](), calls["theirs"]())
            # No warm-up: both have just run to be compared.
            seconds = alternating_seconds(calls, device, repeats=5 if batch == 1 else 3, warmup=0)
            case = (
                f"batch {batch}, {'greedy' if beams == 1 else f'{beams} beams'}, ids {'equal' if equal else 'DIFFER'}"
            )
            rows.append(
                faster("generation", case, device, str(dtype)[6:], seconds["ours"], seconds["theirs"], "s", AIM)
            )
    return rows
