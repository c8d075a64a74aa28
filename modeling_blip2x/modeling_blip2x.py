"""BLIP-2's shared parts: the base class of all models, and `Blip2xModel`, vision tower + Q-Former.

    image (B, 3, h, w) -> tower -> (B, N, D) -> ln_vision -> cross-attention of the Q-Former -> queries (B, Q, H)

Initialisation (`_init_weights`): matrices trained here start from N(0, initializer_range of the Q-Former's config), query
tokens from N(0, 0.02): at zero they would stay identical for ever, each getting the same gradient. Biases start from 0,
norms from 1. Tower and LLM initialise themselves.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from .attention_maps_blip2x import grid_of, maps_of
from .checks_blip2x import check_images
from .configuration_blip2x import Blip2xConfig
from .outputs_blip2x import Blip2xModelOutput, chosen_hidden_states
from .qformer_blip2x import KeyValues, QFormer, QueryTokens, dtype_of_inputs, in_own_dtype
from .recomputing_blip2x import as_transformers_does, recompute_in_eval_mode
from .vision_blip2x import build_vision_tower, freeze_unused_parts, parameters_of_features, thinned, vision_features

QUERY_STD = 0.02  # of the official implementation


class Blip2xPreTrainedModel(PreTrainedModel):
    """Initialisation, freezing, and what transformers needs to know of every BLIP-2 model."""

    config: Blip2xConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means over the global batch; Trainer must not divide them again
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = ["QFormerLayer", "QFormerTextEmbeddings", "QueryTokens"]
    _skip_keys_device_placement = ["past_key_values", "cache"]  # one cache by its two names
    # Narrow layers through which all of an image or text passes: float32 in a float16 model, and never quantised.
    _keep_in_fp32_modules = ["language_projection", "vision_projection", "text_projection", "itm_head"]

    def __init__(self, config: Blip2xConfig):
        super().__init__(config)
        if config.part_dtypes:
            kept = [part for part, dtype in config.part_dtypes.items() if dtype == "float32"]
            self._keep_in_fp32_modules_strict = kept

    def save_pretrained(self, *args, **kwargs) -> None:
        """As in transformers; where parts are held in different dtypes, the config says which."""
        self.config.part_dtypes = part_dtypes(self)
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.qformer_config.initializer_range
        if isinstance(module, QueryTokens):
            init.normal_(module.weight, mean=0.0, std=QUERY_STD)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        else:
            super()._init_weights(module)

    def freeze_unimodal(self) -> None:
        """Freeze vision tower and language model: no gradients, and eval mode whatever `train()` is told later."""
        for part in self.frozen_candidates():
            part.requires_grad_(False)
            part.eval()

    def unfreeze_vision(self) -> None:
        """Let the vision tower train, but for parameters that its features do not depend on (fine-tuning)."""
        tower = self.shared_model.vision_model
        used = parameters_of_features(tower, self.config.vision_feature_layer)
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(name in used)

    def frozen_candidates(self) -> list[nn.Module]:
        """The unimodal models that BLIP-2 keeps frozen."""
        parts = [getattr(self, "language_model", None), self.shared_model.vision_model]
        return [part for part in parts if part is not None]

    @property
    def shared_model(self) -> "Blip2xModel":
        return self if isinstance(self, Blip2xModel) else self.model

    def train(self, mode: bool = True) -> "Blip2xPreTrainedModel":
        """As in torch, but a vision tower or language model without trainable parameters stays in eval mode, and so do
        the batch norms of a tower: their statistics come from far more images than fine-tuning shows."""
        super().train(mode)
        for module in self.shared_model.vision_model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
                module.eval()
        for part in self.frozen_candidates():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """As in transformers, and the layers of a frozen language model or tower are recomputed too."""
        super().activation_checkpointing_enable(*args, **kwargs)
        for part in self.frozen_candidates():
            recompute_in_eval_mode(part)

    def activation_checkpointing_disable(self) -> None:
        """As in transformers."""
        super().activation_checkpointing_disable()
        for part in self.frozen_candidates():
            as_transformers_does(part)

    def check_processor(self, processor: object) -> None:
        """Raise ValueError, naming both numbers, where a `Blip2xProcessor` does not fit this model."""
        config, tokenizer, reader = self.config, processor.tokenizer, processor.qformer_tokenizer
        rows = self.get_input_embeddings().weight.shape[0]
        pairs = [("num_query_tokens", processor.num_query_tokens, config.num_query_tokens)]
        if config.text_config is None:
            pairs = [("num_query_tokens", processor.num_query_tokens, None)]
            pairs.append(("bos_token_id ([DEC])", tokenizer.bos_token_id, config.qformer_config.bos_token_id))
            padding = config.qformer_config.pad_token_id
        else:
            pairs.append(("image_token_id", processor.image_token_id, config.image_token_index))
            padding = self.generation_config.pad_token_id
        wrong = [
            f"{name} is {theirs} in the processor, {ours} in the model"
            for name, theirs, ours in pairs
            if theirs != ours
        ]
        if len(tokenizer) > rows:
            wrong.append(f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows")
        if padding is not None and padding not in tokenizer.all_special_ids:
            wrong.append(
                f"pad_token_id is {tokenizer.pad_token_id} in the processor, {padding} in the model, where it is no special "
                "token and would be read as a word"
            )
        if reader is not None and not config.qformer_config.use_qformer_text_input:
            wrong.append("the processor has a Q-Former tokenizer, the Q-Former reads no text (use_qformer_text_input)")
        elif reader is not None:
            rows = self.shared_model.get_input_embeddings().weight.shape[0]
            if len(reader) > rows:
                wrong.append(f"the Q-Former's tokenizer has {len(reader)} tokens, the Q-Former's embedding {rows} rows")
        if wrong:
            raise ValueError(f"Processor and model do not fit: {'; '.join(wrong)}. Load both from the same folder.")

    @property
    def cross_attention_layers(self) -> list[int]:
        """Numbers of the Q-Former's layers whose queries look at the image."""
        layers = self.shared_model.qformer.layers
        return [number for number, layer in enumerate(layers) if layer.crossattention is not None]

    @torch.no_grad()
    def query_attention(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        layer: int | None = None,
        head: int | None = None,
        image_size: tuple[int, int] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """Where each query looks: its cross-attention over the image, (B, Q, rows, columns) in float32.

        Rows and columns are those of the tower's grid over the image. Positions without a place (class token, registers)
        are left out, and each map then sums to 1.

        Args:
            pixel_values: (B, 3, height, width), or vision_embeds (B, N, D) in their place.
            qformer_input_ids, qformer_attention_mask: (B, L) text that instruction-aware queries read.
            layer: number of a Q-Former layer, one of `cross_attention_layers`; None is their mean.
            head: number of an attention head; None is their mean.
            image_size: height and width of the pixels behind vision_embeds; by default the size in the tower's config.
            interpolate_pos_encoding: for images of another size than the tower was trained on.

        Raises:
            ValueError: a layer that has no cross-attention, a head that there is not, or positions that are no grid.
        """
        layers, heads = self.cross_attention_layers, self.config.qformer_config.num_attention_heads
        if layer is not None and layer not in layers:
            raise ValueError(
                f"layer is {layer}, but the layers that look at the image are {layers}. Choose one of them."
            )
        if head is not None and head not in range(heads):
            raise ValueError(f"head is {head}, but there are {heads} heads. Choose from 0 to {heads - 1}.")
        model, tower = self.shared_model, self.config.vision_config
        if pixel_values is not None:
            image_size = pixel_values.shape[-2:]
        elif image_size is None:
            side = getattr(tower, "image_size", None)
            if side is None:
                raise ValueError(
                    f"image_size is None, and a {tower.model_type} config names none. Pass it with vision_embeds."
                )
            image_size = (side, side) if isinstance(side, int) else side
        # The tower runs before, without weights of its own: nobody reads them, and eager attention would be slow.
        vision = model.get_vision_outputs(pixel_values, vision_embeds, interpolate_pos_encoding).last_hidden_state
        grid = grid_of(vision.shape[1], *image_size, getattr(tower, "patch_size", None))
        out = model(
            vision_embeds=vision,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            output_attentions=True,
            return_dict=True,
        )
        # On one device first: layers of a model that is spread over several give theirs where they are.
        chosen = [w.float().to(vision.device) for w in out.cross_attentions]
        weights = torch.stack(chosen).mean(0) if layer is None else chosen[layers.index(layer)]  # (B, heads, Q, N)
        return maps_of(weights.mean(1) if head is None else weights[:, head], grid)

    def trainable_parameters_summary(self) -> str:
        """A table of the parts with their trainable and frozen parameter counts."""
        parts: dict[str, list[int]] = {}
        for name, parameter in self.named_parameters():
            part = name.removeprefix("model.").split(".")[0]
            counts = parts.setdefault(part, [0, 0])
            counts[0 if parameter.requires_grad else 1] += parameter.numel()
        rows = [f"{'part':<22}{'trainable':>14}{'frozen':>16}"]
        rows += [f"{part:<22}{trained:>14,}{frozen:>16,}" for part, (trained, frozen) in parts.items()]
        trained, frozen = (sum(counts[i] for counts in parts.values()) for i in (0, 1))
        rows.append(f"{'total':<22}{trained:>14,}{frozen:>16,}   ({trained / max(trained + frozen, 1):.1%} trained)")
        return "\n".join(rows)


def part_dtypes(model: Blip2xPreTrainedModel) -> dict[str, str] | None:
    """dtype of each part by its name; None where all have one, or a quantised language model tells its own."""
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    shared = model.shared_model
    parts = dict(shared.named_children()) | {name: part for name, part in model.named_children() if part is not shared}
    tensors = {name: list(part.parameters()) for name, part in parts.items()}
    tensors |= {name: [parameter] for name, parameter in model.named_parameters(recurse=False)}
    # Of a part of several dtypes the smallest: T5 keeps a few layers of a float16 model in float32, also when loaded.
    found = {
        name: min((tensor.dtype for tensor in of if tensor.is_floating_point()), key=lambda dtype: dtype.itemsize)
        for name, of in tensors.items()
        if of
    }
    if len(set(found.values())) == 1:
        return None
    return {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}


class Blip2xModel(Blip2xPreTrainedModel):
    """Vision tower and Q-Former: images in, query outputs (B, Q, H) out."""

    def __init__(self, config: Blip2xConfig, vision_model: nn.Module | None = None):
        """vision_model: a loaded tower to take, of the config's vision_config, instead of a random one."""
        super().__init__(config)
        qformer_config = config.qformer_config
        tower = build_vision_tower(config.vision_config) if vision_model is None else vision_model
        self.vision_model = freeze_unused_parts(tower)
        # Ours, not the tower's: it is trained while the tower stays frozen.
        self.ln_vision = nn.LayerNorm(qformer_config.encoder_hidden_size, eps=config.vision_layer_norm_eps)
        self.query_tokens = QueryTokens(config.num_query_tokens, qformer_config.hidden_size)
        self.qformer = QFormer(qformer_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.qformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.qformer.set_input_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; the vocabulary is the Q-Former's."""
        embeddings = self.qformer.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.vocab_size = embeddings.num_embeddings
        return embeddings

    def get_vision_embeds(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Features (B, N, D) of the tower, before `ln_vision`: what a feature cache holds and `vision_embeds` takes."""
        return self.get_vision_outputs(pixel_values, None, interpolate_pos_encoding).last_hidden_state

    def get_vision_outputs(
        self,
        pixel_values: torch.Tensor | None,
        vision_embeds: torch.Tensor | None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool | list[int] = False,
    ) -> BaseModelOutput:
        """Features (B, N, D) in `last_hidden_state`: of the given pixels, or the given ones; exactly one of the two."""
        if (pixel_values is None) == (vision_embeds is None):
            given = "neither" if pixel_values is None else "both"
            raise ValueError(f"Pass either pixel_values or vision_embeds, got {given}.")
        if vision_embeds is not None:
            check_images("vision_embeds", vision_embeds, self.training)
            return self.as_trained(BaseModelOutput(last_hidden_state=vision_embeds))
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must be (batch, channels, height, width), got shape {tuple(pixel_values.shape)}. Add the "
                "batch dimension, or let the processor make it."
            )
        check_images("pixel_values", pixel_values, self.training)
        # A frozen tower builds no graph: it would keep its activations for gradients that nobody takes.
        frozen = not any(parameter.requires_grad for parameter in self.vision_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            vision = vision_features(
                self.vision_model,
                pixel_values.to(dtype_of_inputs(self.vision_model, pixel_values.dtype)),
                self.config.vision_feature_layer,
                interpolate_pos_encoding or self.config.interpolate_pos_encoding,
                output_attentions,
                output_hidden_states,
            )
        return self.as_trained(vision)

    def as_trained(self, vision: BaseModelOutput) -> BaseModelOutput:
        """Features with what `position_dropout` and `feature_dropout` leave of them while training; else as they are."""
        dropouts = self.config.position_dropout, self.config.feature_dropout
        if self.training and any(dropouts) and vision.last_hidden_state.ndim == 3:
            vision.last_hidden_state = thinned(vision.last_hidden_state, *dropouts)
        return vision

    def image_key_values(self, vision_embeds: torch.Tensor) -> tuple[KeyValues | None, ...]:
        """vision_embeds (B, N, D) -> normalised, then keys and values for every cross-attention of the Q-Former."""
        width = self.config.qformer_config.encoder_hidden_size
        if vision_embeds.ndim != 3 or vision_embeds.shape[-1] != width:
            raise ValueError(
                f"vision_embeds must be (batch, positions, {width}), got shape {tuple(vision_embeds.shape)}. They must "
                "come from this model's own vision tower."
            )
        return self.qformer.image_key_values(in_own_dtype(self.ln_vision, vision_embeds))

    def resolve_outputs(
        self, attentions: bool | None, hidden_states: bool | list[int] | None
    ) -> tuple[bool, bool | list[int]]:
        """Whether to return attentions and hidden states: as asked, else as the config says."""
        attentions = self.config.output_attentions if attentions is None else attentions
        hidden_states = self.config.output_hidden_states if hidden_states is None else hidden_states
        return bool(attentions), hidden_states or False

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Blip2xModelOutput | tuple:
        """Query outputs of images.

        Args:
            pixel_values: (B, 3, height, width). vision_embeds: (B, N, D) in their place, skips the tower.
            qformer_input_ids: (B, L) text that the queries attend to, for instruction-aware queries; with
                qformer_attention_mask (B, L), all ones by default.
            output_attentions: return weights of tower and Q-Former; this call then uses eager attention, as sdpa has no
                weights to return. output_hidden_states: of both.
            interpolate_pos_encoding: for images of another size than the tower was trained on.

        Raises:
            ValueError: both or none of pixel_values and vision_embeds, or shapes that do not fit the tower.
        """
        output_attentions, output_hidden_states = self.resolve_outputs(output_attentions, output_hidden_states)
        vision = self.get_vision_outputs(
            pixel_values, vision_embeds, interpolate_pos_encoding, output_attentions, output_hidden_states
        )
        image = self.image_key_values(vision.last_hidden_state)
        queries = self.query_tokens(vision.last_hidden_state.shape[0])
        if qformer_input_ids is None:
            out = self.qformer.encode_queries(queries, image, output_attentions)
        else:
            if qformer_attention_mask is None:
                qformer_attention_mask = torch.ones_like(qformer_input_ids)
            out = self.qformer.encode_pairs(
                queries, qformer_input_ids, qformer_attention_mask, image, output_attentions
            )
        return Blip2xModelOutput(
            last_hidden_state=out.hidden[:, : queries.shape[1]],
            hidden_states=chosen_hidden_states(out.hidden_states, output_hidden_states),
            attentions=out.attentions if output_attentions else None,
            cross_attentions=out.cross_attentions if output_attentions else None,
            vision_embeds=vision.last_hidden_state,
            vision_outputs=vision,
        )


__all__ = ["Blip2xModel", "Blip2xPreTrainedModel"]
