"""Layers and scores of stage 1: unit-norm features, ITC cosines, ITM match probabilities of the images and texts given.

matching_blip2x.py adds what training needs of other processes (negatives, the global batch); retrieval_blip2x.py is the
class with a forward in the units of retrieval, pretraining_blip2x.py that with the three losses. All have the same weights.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import can_return_tuple

from .configuration_blip2x import Blip2xConfig, Blip2xQFormerConfig
from .losses_blip2x import image_text_similarity
from .modeling_blip2x import Blip2xModel, Blip2xPreTrainedModel
from .outputs_blip2x import (
    Blip2xImageFeatures,
    Blip2xMultimodalFeatures,
    Blip2xTextFeatures,
    chosen_hidden_states,
)
from .qformer_blip2x import KeyValues, in_own_dtype, select_images

TEMPERATURE = 0.07  # start of the learned ITC temperature (section 3.2)
SIGMOID_BIAS = -10.0  # start of the learned bias of sigmoid ITC (SigLIP)
PAIRS_TOGETHER = 64  # of ITM where images are shared: few enough to be of about one length, enough to fill a GPU
SMALLEST_TEMPERATURE = 1e-3  # a learned divisor must not reach zero


class ItgHead(nn.Module):
    """BERT's masked-LM head. Its output matrix is the word embedding itself, handed in: there is nothing to tie."""

    def __init__(self, config: Blip2xQFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def resize(self, vocab_size: int) -> None:
        """Cut the bias to vocab_size entries, or add zeros."""
        bias = F.pad(self.bias.detach(), (0, vocab_size - len(self.bias)))
        self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)

    def forward(self, hidden: torch.Tensor, word_embeddings: torch.Tensor) -> torch.Tensor:
        """hidden (..., H), word_embeddings (vocabulary, H) -> logits (..., vocabulary)."""
        hidden = self.layernorm(self.activation(in_own_dtype(self.dense, hidden)))
        return F.linear(hidden, word_embeddings.to(hidden.dtype), self.bias.to(hidden.dtype))


class Blip2xImageTextModel(Blip2xPreTrainedModel):
    """Layers of stage 1, and the scores they give."""

    def __init__(self, config: Blip2xConfig, vision_model: nn.Module | None = None):
        """vision_model: a loaded tower to take instead of a random one of the config."""
        super().__init__(config)
        if config.text_config is not None:
            raise ValueError(
                f"{type(self).__name__} has no language model, but the config has a text_config "
                f"({config.text_config.model_type}). Load a stage-1 checkpoint, or set text_config to None."
            )
        width = config.qformer_config.hidden_size
        self.model = Blip2xModel(config, vision_model)
        self.vision_projection = nn.Linear(width, config.image_text_hidden_size)
        self.text_projection = nn.Linear(width, config.image_text_hidden_size)
        self.itm_head = nn.Linear(width, 2)
        self.itg_head = ItgHead(config.qformer_config)
        self.temperature = nn.Parameter(torch.empty(1))  # one element, not a scalar: FSDP2 cannot shard scalars
        self.itc_bias = nn.Parameter(torch.empty(1)) if config.itc_loss == "sigmoid" else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ItgHead):
            init.zeros_(module.bias)
        if isinstance(module, Blip2xImageTextModel):
            init.constant_(module.temperature, TEMPERATURE)
            if module.itc_bias is not None:
                init.constant_(module.itc_bias, SIGMOID_BIAS)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; the vocabulary is the Q-Former's, and the bias of the ITG head follows it."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.itg_head.resize(embeddings.num_embeddings)
        return embeddings

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> Blip2xImageFeatures | tuple:
        """Unit-norm query features (B, Q, P) of images, in `pooler_output`."""
        queries = self.model(
            pixel_values,
            vision_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        return Blip2xImageFeatures(
            last_hidden_state=queries.vision_embeds,
            pooler_output=self._unit(self.vision_projection, queries.last_hidden_state),
            hidden_states=queries.vision_outputs.hidden_states,
            attentions=queries.vision_outputs.attentions,
            qformer_outputs=queries,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> Blip2xTextFeatures | tuple:
        """Unit-norm features (B, P) of texts, from their first token ([CLS]), in `pooler_output`."""
        output_attentions, output_hidden_states = self.model.resolve_outputs(output_attentions, output_hidden_states)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        out = self.model.qformer.encode_text(input_ids, attention_mask, output_attentions)
        return Blip2xTextFeatures(
            last_hidden_state=out.hidden,
            pooler_output=self._unit(self.text_projection, out.hidden[:, 0]),
            hidden_states=chosen_hidden_states(out.hidden_states, output_hidden_states),
            attentions=out.attentions if output_attentions else None,
        )

    def get_multimodal_features(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> Blip2xMultimodalFeatures:
        """Query outputs (B, Q, H) that have seen image and text of each pair, in `last_hidden_state`.

        image_index (B,): the image of each text, where one image goes with several; it is then encoded once.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vision_embeds = self.model.get_vision_outputs(pixel_values, vision_embeds).last_hidden_state
        self.check_rows(vision_embeds if image_index is None else image_index, input_ids)
        image = self.model.image_key_values(vision_embeds)
        if image_index is not None:
            image = select_images(image, image_index)
        return Blip2xMultimodalFeatures(last_hidden_state=self._multimodal_queries(input_ids, attention_mask, image))

    @staticmethod
    def itc_scores(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Cosines (N, M) of `get_image_features` (N, Q, P) and `get_text_features` (M, P): the best query counts."""
        return image_text_similarity(images, texts)

    def itm_logits(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Match logits (pairs, 2), order (no match, match), averaged over the queries (section 3.2).

        Text i goes with image i, or with image image_index[i]. With image_index, `PAIRS_TOGETHER` pairs are read at a
        time: of one image where images have many texts each, so that its keys and values need no copy; otherwise of
        about one length, so that little padding is read.
        """
        if image_index is None:
            hidden = self.get_multimodal_features(
                pixel_values, input_ids, attention_mask, vision_embeds
            ).last_hidden_state
            return in_own_dtype(self.itm_head, hidden).mean(dim=1)
        self.check_rows(image_index, input_ids)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        image = self.model.image_key_values(
            self.model.get_vision_outputs(pixel_values, vision_embeds).last_hidden_state
        )
        lengths = attention_mask.sum(dim=1)
        has_many_texts_an_image = len(image_index) >= PAIRS_TOGETHER * image_index.unique().numel()
        by_image = image_index * (1 + attention_mask.shape[1]) if has_many_texts_an_image else 0
        order = (by_image + lengths).argsort(stable=True)
        logits = []
        for pairs in order.split(PAIRS_TOGETHER):
            mask = attention_mask[pairs]
            # As long as these texts are, not the longest of all.
            length = int(mask.any(dim=0).nonzero().max()) + 1
            index = image_index[pairs]
            if (index == index[0]).all():
                of_pairs = self._repeated(select_images(image, index[:1]), len(pairs))
            else:
                of_pairs = select_images(image, index)
            logits.append(self._itm_logits_of(input_ids[pairs, :length], mask[:, :length], of_pairs))
        return torch.cat(logits)[order.argsort()]

    def itm_scores(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        grid: bool = False,
        chunk_size: int = 256,
    ) -> torch.Tensor:
        """Match probabilities: (pairs,) of image i with text i, or with `grid` (N, M) of every image with every text.

        In the grid an image's keys and values are computed once for all texts, `chunk_size` texts at a time.
        """
        if not grid:
            return self.itm_logits(pixel_values, input_ids, attention_mask, vision_embeds).softmax(dim=-1)[:, 1]
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vision_embeds = self.model.get_vision_outputs(pixel_values, vision_embeds).last_hidden_state
        rows = []
        for image in range(len(vision_embeds)):  # one at a time: keys and values of a whole gallery are large
            key_values = self.model.image_key_values(vision_embeds[image : image + 1])
            chunks = zip(input_ids.split(chunk_size), attention_mask.split(chunk_size))
            logits = [self._itm_logits_of(ids, mask, self._repeated(key_values, len(ids))) for ids, mask in chunks]
            rows.append(torch.cat(logits).softmax(dim=-1)[:, 1])
        return torch.stack(rows)

    @staticmethod
    def _repeated(key_values: tuple[KeyValues | None, ...], times: int) -> tuple[KeyValues | None, ...]:
        # A view: one image's keys and values for many texts take no memory of their own.
        return tuple(kv and (kv[0].expand(times, -1, -1, -1), kv[1].expand(times, -1, -1, -1)) for kv in key_values)

    @staticmethod
    def check_rows(images: torch.Tensor, texts: torch.Tensor) -> None:
        # shape[0], here and in other forwards: torch.export would freeze len() to the batch size it was traced with.
        if images.shape[0] != texts.shape[0]:
            raise ValueError(
                f"Pairs need as many images as texts, got {images.shape[0]} images and {texts.shape[0]} texts. For every "
                "image with every text call itm_scores(..., grid=True)."
            )

    @staticmethod
    def _unit(projection: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return F.normalize(in_own_dtype(projection, states), dim=-1)

    def _multimodal_queries(self, input_ids: torch.Tensor, mask: torch.Tensor, image: tuple) -> torch.Tensor:
        queries = self.model.query_tokens(input_ids.shape[0])
        return self.model.qformer.encode_pairs(queries, input_ids, mask, image, num_outputs=queries.shape[1]).hidden

    def _itm_logits_of(self, input_ids: torch.Tensor, mask: torch.Tensor, image: tuple) -> torch.Tensor:
        return in_own_dtype(self.itm_head, self._multimodal_queries(input_ids, mask, image)).mean(dim=1)
