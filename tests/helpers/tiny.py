"""Tiny random models, tokenizers and batches for the tests. Nothing is loaded from anywhere."""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2VisionConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    GPT2Config,
    LlamaConfig,
    MobileNetV2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    T5Config,
    ViTConfig,
)

from modeling_blip2x import Blip2xConfig, Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor

SIZE, PATCH, QUERIES, VOCABULARY = 28, 14, 6, 70
WORDS = (
    "a an the photo of red green blue circle square dog cat left right above below and question : answer ? . is what "
    "colour how many one two three yes no there in on it this picture , !"
).split()

_vit = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TOWERS = {
    "clip": CLIPVisionConfig(**_vit),
    "siglip": SiglipVisionConfig(**_vit),
    "dinov2": Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE, patch_size=PATCH
    ),
    "vit": ViTConfig(**_vit),
    "eva": Blip2VisionConfig(**_vit),
    "mobilenet": MobileNetV2Config(depth_multiplier=0.1, image_size=SIZE),
}
LANGUAGE_MODELS = {
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "qwen": Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "t5": T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2
    ),
}


def qformer_config(**changes) -> dict:
    return {
        "vocab_size": 61,
        "bos_token_id": 60,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        **changes,
    }


def config(tower: str = "clip", language_model: str | None = None, **changes) -> Blip2xConfig:
    qformer_changes = changes.pop("qformer", {})
    text = LANGUAGE_MODELS[language_model].to_dict() if language_model else None
    if text is not None:
        changes.setdefault("image_token_index", VOCABULARY - 1)
    return Blip2xConfig(
        vision_config=TOWERS[tower].to_dict(),
        qformer_config=qformer_config(**qformer_changes),
        text_config=text,
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        **changes,
    )


def stage1(tower: str = "clip", seed: int = 0, **changes) -> Blip2xForPreTraining:
    torch.manual_seed(seed)
    model = Blip2xForPreTraining(config(tower, **changes))
    liven(model.model.vision_model)
    model.freeze_unimodal()
    return model


def stage2(
    language_model: str = "opt", tower: str = "clip", seed: int = 0, std: float | None = None, **changes
) -> Blip2xForConditionalGeneration:
    """std: spread of all matrices. The usual 0.02 lets tiny models ignore the image, and equalities hold for nothing."""
    torch.manual_seed(seed)
    model = Blip2xForConditionalGeneration(config(tower, language_model, **changes)).eval()
    liven(model.model.vision_model)
    if std is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, std)
    return model


def liven(tower: torch.nn.Module) -> None:
    """Convolutions at transformers' spread of 0.02 fade to nothing over 50 layers: no position differs from another."""
    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)


def batch(rows: int = 4, length: int = 9, seed: int = 0, size: int = SIZE) -> dict[str, torch.Tensor]:
    """Stage-1 batch: pixel_values (rows, 3, size, size), input_ids and attention_mask (rows, length), row 1 padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[1, length - 3 :], mask[1, length - 3 :] = 0, 0
    return {
        "pixel_values": torch.randn(rows, 3, size, size, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
    }


def prompt(
    model: Blip2xForConditionalGeneration, rows: int = 2, text: int = 5, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Stage-2 inputs: an image and placeholders + text for each row."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((rows, QUERIES), model.config.image_token_index)
    ids = torch.cat([image, torch.randint(5, 60, (rows, text), generator=generator)], dim=1)
    return {
        "pixel_values": torch.randn(rows, 3, SIZE, SIZE, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def labels_of(model: Blip2xForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels of `prompt`: its text, or three words for a decoder."""
    if not model.config.is_encoder_decoder:
        return inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_index, -100)
    return torch.full((len(inputs["input_ids"]), 3), 7)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer that adds [CLS] ... [SEP], like BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _word_level(special, "[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def llm_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Word-level tokenizer that puts <s> first (bos) or </s> last (like T5's)."""
    tokenizer = _word_level(["<pad>", "<s>", "</s>", "<unk>"], "<unk>")
    template = "<s> $A" if bos else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _word_level(special: list[str], unknown: str) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False)


def stage1_processor() -> Blip2xProcessor:
    return Blip2xProcessor(image_processor(), bert_tokenizer())


def stage2_processor(bos: bool = True, **arguments) -> Blip2xProcessor:
    return Blip2xProcessor(image_processor(), llm_tokenizer(bos), num_query_tokens=QUERIES, **arguments)


def image(colour: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)
