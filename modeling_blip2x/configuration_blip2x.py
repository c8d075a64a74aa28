"""Configurations of BLIP-2: a Q-Former between any vision tower and any language model.

`vision_config` and `text_config` are whatever transformers config the frozen parts have. `text_config=None` is a model
without a language model (stage 1). Unknown fields are refused: transformers would store a typo as an attribute.
"""

from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


def vision_hidden_size(config: PreTrainedConfig) -> int:
    """Width D of the features (B, N, D) or of the feature map (B, D, H, W) that a vision tower of this config gives.

    Raises ValueError if the config does not tell.
    """
    if config.model_type in ("mobilenet_v1", "mobilenet_v2"):
        return _mobilenet_width(config)
    if getattr(config, "hidden_size", None) is not None:
        return config.hidden_size
    if getattr(config, "hidden_sizes", None):
        return config.hidden_sizes[-1]
    raise ValueError(
        f"The config of vision tower '{config.model_type}' names neither hidden_size nor hidden_sizes, so the width of "
        "its features is unknown. Add hidden_size to the vision config."
    )


def _mobilenet_width(config: PreTrainedConfig) -> int:
    # MobileNet configs hold no width: the last convolution is 1024 (v1) or 1280 (v2) channels times the multiplier.
    base = 1024 if config.model_type == "mobilenet_v1" else 1280
    if config.model_type == "mobilenet_v2" and config.finegrained_output and config.depth_multiplier < 1.0:
        return base
    divisor, width = getattr(config, "depth_divisible_by", 8), base * config.depth_multiplier
    if config.model_type == "mobilenet_v1":
        return max(config.min_depth, int(width))
    rounded = max(config.min_depth, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


OBJECTIVES = ("itc", "itm", "itg")  # of stage 1 (paper, section 3.2); each is a loss_NAME of the model's output
ITC_LOSSES = ("softmax", "sigmoid")

# Keys that transformers itself writes into config.json or passes to a config, besides its fields.
KEYS_OF_TRANSFORMERS = {"model_type", "architectures", "transformers_version", "auto_map", "name_or_path"} | {
    "torch_dtype", "attn_implementation", "experts_implementation", "num_labels", "is_encoder_decoder", "quantization_config"
}  # fmt: skip


def unknown_fields(config_class: type, keywords: dict) -> list[str]:
    """Those keywords that are neither fields of `config_class` nor known to transformers."""
    known = KEYS_OF_TRANSFORMERS | set(GenerationConfig().to_dict())
    return [k for k in keywords if k not in known and not k.startswith("_") and not hasattr(config_class, k)]


def without_unknown_fields(config_class: type, dictionary: dict) -> dict:
    """A config's dictionary without attributes that were hung on the object: loading would refuse what they write."""
    unknown = unknown_fields(config_class, dictionary)
    return {name: value for name, value in dictionary.items() if name not in unknown}


def refuse_unknown_fields(config_class: type, keywords: dict) -> None:
    """Raise ValueError for `unknown_fields`."""
    unknown = unknown_fields(config_class, keywords)
    if unknown:
        own = [name for name in config_class.__annotations__ if not name.startswith("_")]
        near = [match for name in unknown for match in get_close_matches(name, own, n=1)]
        hint = f"Did you mean {', '.join(near)}?" if near else f"Its fields are {', '.join(sorted(own))}."
        raise ValueError(f"{config_class.__name__} has no field {', '.join(map(repr, unknown))}. {hint}")


def check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}, but must be at least 0 and less than 1, such as 0.3.")


@strict
class Blip2xQFormerConfig(PreTrainedConfig):
    """Querying Transformer; BERT-base shape by default (paper, section 3.1).

    vocab_size: rows of the word embedding, [DEC] included. bos_token_id: [DEC], the start token of ITG; by default the
    last row.
    eos_token_id: [SEP], where captions of the ITG head end; None lets them run to their longest length.
    word_dropout: share of words of a text that are read as `mask_token_id` while training; what ITG is to predict stays.
    cross_attention_frequency: every n-th layer, from layer 0, attends to the image.
    encoder_hidden_size: width of the image features; derived from the vision config by `Blip2xConfig`.
    """

    model_type = "blip2x_qformer"
    base_config_key = "qformer_config"

    vocab_size: int = 30523
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    mask_token_id: int | None = None
    word_dropout: float | int = 0.0
    cross_attention_frequency: int = 2
    encoder_hidden_size: int | None = None
    use_qformer_text_input: bool = True

    def __post_init__(self, **kwargs):
        refuse_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, but {self.hidden_size} is not one of "
                f"{self.num_attention_heads}."
            )
        check_share("word_dropout", self.word_dropout)
        if self.word_dropout and self.mask_token_id is None:
            raise ValueError(
                f"word_dropout is {self.word_dropout}, but mask_token_id is None. Set it to the tokenizer's [MASK]."
            )
        if self.cross_attention_frequency < 1:
            raise ValueError(f"cross_attention_frequency must be at least 1, got {self.cross_attention_frequency}.")
        if self.bos_token_id is None:
            self.bos_token_id = self.vocab_size - 1

    def to_dict(self) -> dict:
        return without_unknown_fields(type(self), super().to_dict())


@strict
class Blip2xConfig(PreTrainedConfig):
    """BLIP-2: vision tower, Q-Former and, for stage 2, a language model.

    num_query_tokens: learned queries Q, the number of image tokens the language model sees.
    image_text_hidden_size: width P of the contrastive space. image_token_index: id of the `<image>` placeholder.
    vision_feature_layer: which hidden state of the tower is used; -1 is its output, -2 the layer before (CLIP ViT-L).
    vision_layer_norm_eps: epsilon of `ln_vision`, the trained LayerNorm on the image features.
    objectives: losses of stage 1 that are trained; the paper's three by default.
    itc_loss: softmax over the batch (the paper), or a sigmoid for each pair (SigLIP), which adds a learned bias.
    query_spread: weight of `query_spread_loss` while training; 0 is the paper.
    position_dropout, feature_dropout: shares of an image's positions that are left out, and of its features that are zero,
        while training: for all queries alike, unlike dropout within the Q-Former, whose noise passes for a distance of queries.
    interpolate_pos_encoding: images are of another size than the tower was trained at, as in fine-tuning at 364 pixels:
        its position embeddings are always interpolated.
    prompt_template: the prompt the model was trained with, for example `Question: {} Answer:`; "" if with none, None if
        that is unknown.
    part_dtypes: dtype of each part in a checkpoint whose parts differ; None where they do not. `from_pretrained` gives each
        part its own again, and with `dtype` that dtype to those parts that are not float32.
    empty_prompt: ids that follow an image without a text, as the processor lays them out; None: BOS of a decoder-only
        language model that has one.
    """

    model_type = "blip2x"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "vision_outputs", "qformer_outputs", "text_outputs"]
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "qformer_config": Blip2xQFormerConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    image_token_index: int | None = None
    vision_feature_layer: int = -1
    vision_layer_norm_eps: float = 1e-5
    interpolate_pos_encoding: bool = False
    prompt_template: str | None = None
    empty_prompt: list[int] | None = None
    objectives: list[str] | tuple[str, ...] = OBJECTIVES
    itc_loss: str = "softmax"
    query_spread: float = 0.0
    position_dropout: float | int = 0.0
    feature_dropout: float | int = 0.0
    part_dtypes: dict[str, str] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        refuse_unknown_fields(type(self), kwargs)
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = bool(self.text_config is not None and self.text_config.is_encoder_decoder)
        self.qformer_config.encoder_hidden_size = vision_hidden_size(self.vision_config)
        if self.is_encoder_decoder and getattr(self.text_config, "decoder_start_token_id", None) is None:
            self.text_config.decoder_start_token_id = self.text_config.pad_token_id  # as T5 starts its decoder
        if self.vision_config.model_type == "blip_2_vision_model" and self.vision_config.initializer_range < 1e-6:
            self.vision_config.initializer_range = 0.02  # transformers' default of 1e-10 makes a random tower constant
        if not self.objectives or not set(self.objectives) <= set(OBJECTIVES):
            raise ValueError(f"objectives must name some of {', '.join(OBJECTIVES)}, got {list(self.objectives)}.")
        if self.itc_loss not in ITC_LOSSES:
            raise ValueError(f"itc_loss is {self.itc_loss!r}; choose from {', '.join(ITC_LOSSES)}.")
        if not 0 <= self.query_spread < float("inf"):
            raise ValueError(f"query_spread is {self.query_spread}, but must be at least 0, such as 1.")
        check_share("position_dropout", self.position_dropout)
        check_share("feature_dropout", self.feature_dropout)
        if self.num_query_tokens < 1:
            raise ValueError(f"num_query_tokens must be at least 1, got {self.num_query_tokens}.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's config; in stage 1 the Q-Former's, which is then what reads the text."""
        if self.text_config is None:
            return self.qformer_config
        return super().get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict:
        fields = without_unknown_fields(type(self), super().to_dict())
        if self.part_dtypes:
            # What from_pretrained begins with: the smaller dtype, in which float32 parts stay float32. Of two smaller ones
            # neither holds the other.
            smaller = set(self.part_dtypes.values()) - {"float32"}
            fields["dtype"] = smaller.pop() if len(smaller) == 1 else "float32"
        return fields
