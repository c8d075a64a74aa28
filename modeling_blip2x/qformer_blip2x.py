"""The Querying Transformer: one module, three objectives that differ in who may attend to whom (paper, figure 2).

Queries and text share the self-attention; each has its own feed-forward; only queries cross-attend to the image. Three
methods name the three masks:

    encode_queries, encode_text   unimodal (ITC): queries see queries, text sees text
    encode_pairs                  bidirectional (ITM, instruction-aware queries): everything sees everything
    decode_text                   multimodal causal (ITG): text sees all queries and earlier text; queries see queries

Two things are computed once and reused. Keys and values of the cross-attention depend on the image alone
(`image_key_values`). And since queries see no text under the first and the third mask, those of ITC are those of ITG:
in training `encode_together` runs both objectives as one sequence; to generate, `decode_text` runs over the text alone,
with the self-attention keys and values that `encode_queries` returned.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .checks_blip2x import check_text
from .configuration_blip2x import Blip2xQFormerConfig

KeyValues = tuple[torch.Tensor, torch.Tensor]  # keys and values, (B, heads, length, head width) each
# Not float8, which is for storage only: nothing computes in it.
COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def in_own_dtype(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`module` of states, cast to the dtype of its weight where parts of a model differ.

    A packed weight (bytes of bitsandbytes, float8) does not tell what its module reads; its states are left as they are.
    """
    dtype = getattr(getattr(module, "weight", None), "dtype", None)
    return module(states.to(dtype) if dtype in COMPUTED else states)


def dtype_of_inputs(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Dtype of the first of the module's parameters that are not packed."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.dtype in COMPUTED), default)


@dataclass
class QFormerOutput:
    """hidden (B, L, H); key_values of each layer's self-attention; the rest only where asked for, else empty."""

    hidden: torch.Tensor
    key_values: tuple[KeyValues, ...] = ()
    hidden_states: tuple[torch.Tensor, ...] = ()
    attentions: tuple[torch.Tensor, ...] = ()
    cross_attentions: tuple[torch.Tensor, ...] = ()

    def split(self, lengths: list[int]) -> list["QFormerOutput"]:
        """Outputs of parts of the sequence that do not see one another; cross-attentions go with the first, the queries."""
        ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
        spans = [slice(end - length, end) for end, length in zip(ends, lengths)]
        return [
            QFormerOutput(
                hidden=hidden,
                hidden_states=tuple(states[:, span] for states in self.hidden_states),
                attentions=tuple(weights[:, :, span, span] for weights in self.attentions),
                cross_attentions=self.cross_attentions if span.start == 0 else (),
            )
            for span, hidden in zip(spans, self.hidden.split(lengths, dim=1))
        ]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that also returns its weights. attention_mask: boolean, True where attention is allowed."""
    scores = (query * scaling) @ key.transpose(-1, -2)  # there are fewer queries than scores
    if attention_mask is not None:
        # Not -inf: softmax of a row in which nothing is allowed would be NaN.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.softmax(scores, dim=-1).to(query.dtype)  # sums in float32 whatever the dtype
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class QFormerAttention(nn.Module):
    """Multi-head attention with the residual and post-LayerNorm of BERT."""

    def __init__(self, config: Blip2xQFormerConfig, key_value_size: int):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False  # read by transformers' sdpa: masks are always explicit here
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_value_size, config.hidden_size)
        self.value = nn.Linear(key_value_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, H) -> (B, heads, L, head width)."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def key_values(self, states: torch.Tensor) -> KeyValues:
        """Keys and values of states (B, L, key_value_size)."""
        return self.split_heads(self.key(states)), self.split_heads(self.value(states))

    def forward(
        self, hidden: torch.Tensor, key_values: KeyValues, mask: torch.Tensor | None, return_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden (B, L, H) attends to key_values (B, heads, S, d); mask boolean, broadcastable to (B, 1, L, S)."""
        queries = self.split_heads(self.query(hidden))
        attend = eager_attention_forward if return_weights else self.attention_function(queries)
        context, weights = attend(
            self,
            queries,
            *key_values,
            attention_mask=mask,
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
        )
        context = context.flatten(-2)  # (B, L, heads, d) -> (B, L, H)
        return self.layernorm(hidden + self.dropout(self.dense(context))), weights if return_weights else None

    def attention_function(self, queries: torch.Tensor) -> Callable:
        # On a CPU torch's sdpa has no kernel with dropout (what it does instead takes 1.1 times as long as the plain
        # formula in float32, 1.5 times in bfloat16), and its backward of bfloat16 is 1.3 to 20 times slower.
        drops = self.training and self.config.attention_probs_dropout_prob > 0
        if queries.device.type == "cpu" and queries.requires_grad and (drops or queries.dtype == torch.bfloat16):
            return eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)


class QFormerFeedForward(nn.Module):
    """Feed-forward block with the residual and post-LayerNorm of BERT."""

    def __init__(self, config: Blip2xQFormerConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layernorm(hidden + self.dropout(self.down(self.activation(self.up(hidden)))))


class QFormerLayer(GradientCheckpointingLayer):
    """Shared self-attention, cross-attention for queries (every n-th layer), one feed-forward each for queries and text."""

    def __init__(self, config: Blip2xQFormerConfig, layer_idx: int):
        super().__init__()
        self.attention = QFormerAttention(config, config.hidden_size)
        has_cross_attention = layer_idx % config.cross_attention_frequency == 0
        self.crossattention = QFormerAttention(config, config.encoder_hidden_size) if has_cross_attention else None
        self.query_feed_forward = QFormerFeedForward(config)
        self.text_feed_forward = QFormerFeedForward(config) if config.use_qformer_text_input else None

    def forward(
        self,
        hidden: torch.Tensor,
        num_queries: int,
        mask: torch.Tensor | None,
        image_keys: torch.Tensor | None,
        image_values: torch.Tensor | None,
        prefix_keys: torch.Tensor | None,
        prefix_values: torch.Tensor | None,
        return_weights: bool,
        num_outputs: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """hidden (B, L, H): the first num_queries positions are queries, the rest is text.

        num_outputs: how many first positions are computed; the others are only attended to. A mask with a single row
            applies to each of them.

        Returns hidden, own keys and values, and the weights of self- and cross-attention. Keys and values come and go as
        plain tensors, not as pairs: reentrant checkpointing loses the gradient of tensors inside a tuple.
        """
        keys, values = self.attention.key_values(hidden)
        seen = keys, values
        if prefix_keys is not None:
            seen = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)
        if num_outputs is not None:
            hidden, mask = hidden[:, :num_outputs], mask[:, :, :num_outputs]
        hidden, weights = self.attention(hidden, seen, mask, return_weights)

        # split, not slices: the backward of a slice fills the rest with zeros, and both are added
        queries, text = hidden.split([num_queries, hidden.shape[1] - num_queries], dim=1)
        cross_weights, parts = None, []
        if num_queries:
            if self.crossattention is not None:
                queries, cross_weights = self.crossattention(queries, (image_keys, image_values), None, return_weights)
            parts.append(self.query_feed_forward(queries))
        if text.shape[1]:
            parts.append(self.text_feed_forward(text))
        hidden = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return hidden, keys, values, weights, cross_weights


class QFormerTextEmbeddings(nn.Module):
    """Word and absolute position embeddings. Their LayerNorm is the Q-Former's, which queries pass too."""

    def __init__(self, config: Blip2xQFormerConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, L) -> (B, L, H)."""
        check_text("The text for the Q-Former", input_ids)
        longest = self.config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"The text for the Q-Former has {input_ids.shape[1]} tokens but max_position_embeddings is {longest}. "
                "Truncate it (processor(..., truncation=True, max_length=...))."
            )
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(self.as_trained(input_ids)) + self.position_embeddings(positions)

    def as_trained(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, L) with a random share, `word_dropout`, of the words as [MASK] while training; never [CLS], [DEC], [SEP]."""
        if not (self.training and self.config.word_dropout):
            return input_ids
        hidden = torch.rand(input_ids.shape, device=input_ids.device) < self.config.word_dropout
        hidden[:, 0] = False
        for special in {self.config.eos_token_id, self.config.pad_token_id} - {None}:
            hidden &= input_ids != special
        return input_ids.masked_fill(hidden, self.config.mask_token_id)

    def vocabulary(self, device: torch.device) -> torch.Tensor:
        """The embedding of every word (vocabulary, H): output matrix of the ITG head, which runs on `device`."""
        table = self.word_embeddings
        if type(table) is nn.Embedding and not table.weight.is_meta:
            return table.weight
        # Offloaded or wrapped by an adapter: its own forward alone has the weights, so every word is looked up.
        return table(torch.arange(self.config.vocab_size, device=device))


class QueryTokens(nn.Module):
    """The learned queries (Q, H). A module of its own, so that adapters can name it (PEFT's modules_to_save)."""

    def __init__(self, num_query_tokens: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_query_tokens, hidden_size))

    def forward(self, batch_size: int) -> torch.Tensor:
        """-> (batch_size, Q, H)."""
        return self.weight.expand(batch_size, -1, -1)


class QFormer(PreTrainedModel):
    """Querying Transformer (paper, section 3.1). Shapes: B batch, Q queries, L text length, N image positions, H width."""

    config: Blip2xQFormerConfig
    base_model_prefix = "qformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["QFormerLayer"]

    def __init__(self, config: Blip2xQFormerConfig):
        super().__init__(config)
        if config.use_qformer_text_input and config.bos_token_id >= config.vocab_size:
            raise ValueError(
                f"bos_token_id ([DEC]) is {config.bos_token_id}, outside the vocabulary of {config.vocab_size}. Set "
                "vocab_size to the length of the Q-Former's tokenizer, [DEC] included."
            )
        self.embeddings = QFormerTextEmbeddings(config) if config.use_qformer_text_input else None
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(QFormerLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embeddings.word_embeddings if self.embeddings is not None else None

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def image_key_values(self, image_embeds: torch.Tensor) -> tuple[KeyValues | None, ...]:
        """image_embeds (B, N, D) -> keys and values of each layer's cross-attention, None where a layer has none."""
        device = image_embeds.device.type
        if torch.is_autocast_enabled(device):  # cast once: autocast would cast and cache per layer
            image_embeds = image_embeds.to(torch.get_autocast_dtype(device))
        return tuple(
            layer.crossattention.key_values(image_embeds) if layer.crossattention is not None else None
            for layer in self.layers
        )

    def encode_queries(
        self, query_embeds: torch.Tensor, image_key_values: tuple[KeyValues | None, ...], return_weights: bool = False
    ) -> QFormerOutput:
        """Unimodal, image side: queries (B, Q, H) see each other and the image. Keeps key_values for `decode_text`."""
        hidden = self._start(query_embeds)
        # No mask: every query sees every query, and images have no padding.
        return self._run(hidden, query_embeds.shape[1], None, image_key_values, None, return_weights)

    def encode_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, return_weights: bool = False
    ) -> QFormerOutput:
        """Unimodal, text side: text (B, L) sees text. attention_mask (B, L), 1 for tokens and 0 for padding."""
        mask = attention_mask[:, None, None, :].bool()
        return self._run(self._embed(input_ids), 0, mask, None, None, return_weights)

    def encode_together(
        self,
        query_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_key_values: tuple[KeyValues | None, ...],
        decoder_ids: torch.Tensor | None = None,
        return_weights: bool = False,
        whole_text: bool = False,
    ) -> tuple[QFormerOutput, QFormerOutput | None, QFormerOutput]:
        """Queries, causal text and text as `encode_queries`, `decode_text` and `encode_text` give them, without key_values.

        One sequence (B, Q + L + L, H) whose mask keeps them apart: larger matrix products, and half as many gradients to
        add up for each weight.

        Args:
            decoder_ids: (B, L), input_ids with [DEC] for [CLS]; None leaves the causal text out.
            whole_text: all hidden states of the text (B, L, H); by default (B, 1, H), its first token, all that ITC reads.
        """
        rows, length = input_ids.shape
        num_queries = query_embeds.shape[1]
        ids = [input_ids] if decoder_ids is None else [decoder_ids, input_ids]
        # Looked up at once: the gradient of a look-up has the size of the vocabulary.
        texts = self._embed(torch.cat(ids)).split(rows)
        hidden = torch.cat([self._start(query_embeds), *texts], dim=1)
        mask = self._apart(num_queries, attention_mask.bool(), decoder_ids is not None)
        lengths = [num_queries, length * (len(ids) - 1), length if whole_text else 1]
        out = self._run(hidden, num_queries, mask, image_key_values, None, return_weights, sum(lengths))
        queries, decoded, text = out.split(lengths)
        return queries, None if decoder_ids is None else decoded, text

    @staticmethod
    def _apart(num_queries: int, is_token: torch.Tensor, has_decoder: bool) -> torch.Tensor:
        """Boolean mask (B, 1, S, S) of [queries, causal text, text]; is_token (B, L)."""
        rows, length = is_token.shape
        text = num_queries + length * has_decoder  # where it starts
        mask = is_token.new_zeros(rows, text + length, text + length)
        # Queries, which go on to ITC, see queries alone; causal text sees them too.
        mask[:, :text, :num_queries] = True
        if has_decoder:
            # Of the text it sees what comes before, so that it cannot read the token that it must predict.
            mask[:, num_queries:text, num_queries:text] = is_token[:, None].expand(-1, length, -1).tril()
        # The text of ITC sees itself, in both directions: with a look at the queries its feature would know the image.
        mask[:, text:, text:] = is_token[:, None]
        return mask[:, None]

    def encode_pairs(
        self,
        query_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_key_values: tuple[KeyValues | None, ...],
        return_weights: bool = False,
        num_outputs: int | None = None,
    ) -> QFormerOutput:
        """Bidirectional: queries and text see each other. Output (B, Q + L, H), queries first.

        num_outputs: how many first positions are read; the last layer computes no others. All by default.
        """
        num_queries = query_embeds.shape[1]
        hidden = torch.cat([self._start(query_embeds), self._embed(input_ids)], dim=1)
        queries_seen = attention_mask.new_ones(attention_mask.shape[0], num_queries)
        mask = torch.cat([queries_seen, attention_mask], dim=1)[:, None, None, :].bool()
        return self._run(hidden, num_queries, mask, image_key_values, None, return_weights, num_outputs)

    def decode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        query_key_values: tuple[KeyValues, ...],
        return_weights: bool = False,
    ) -> QFormerOutput:
        """Multimodal causal: text (B, L) sees all queries, through their cached keys and values, and earlier text."""
        length = input_ids.shape[1]
        num_queries = query_key_values[0][0].shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        text_mask = causal[None, None] & attention_mask[:, None, None, :].bool()  # (B, 1, L, L)
        mask = torch.cat([text_mask.new_ones(input_ids.shape[0], 1, length, num_queries), text_mask], dim=-1)
        return self._run(self._embed(input_ids), 0, mask, None, query_key_values, return_weights)

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.embeddings is None:
            raise ValueError(
                "This Q-Former has no text branch (use_qformer_text_input=False), so it cannot read text. Load a "
                "checkpoint that has one, or leave the text for the Q-Former out."
            )
        return self._start(self.embeddings(input_ids))

    def _start(self, embeds: torch.Tensor) -> torch.Tensor:
        # Cast to one dtype: T5 keeps modules named "wo*" in float32, which catches our word embeddings in a float16 model.
        return self.dropout(in_own_dtype(self.layernorm, embeds))

    def _run(
        self,
        hidden: torch.Tensor,
        num_queries: int,
        mask: torch.Tensor | None,
        image_key_values: tuple[KeyValues | None, ...] | None,
        prefix: tuple[KeyValues, ...] | None,
        return_weights: bool,
        num_outputs: int | None = None,
    ) -> QFormerOutput:
        none = (None,) * len(self.layers)
        key_values, hidden_states, attentions, cross_attentions = [], [hidden], [], []
        for layer, image, before in zip(self.layers, image_key_values or none, prefix or none):
            image_keys, image_values = image or (None, None)
            prefix_keys, prefix_values = before or (None, None)
            hidden, keys, values, weights, cross_weights = layer(
                hidden,
                num_queries,
                mask,
                image_keys,
                image_values,
                prefix_keys,
                prefix_values,
                return_weights,
                num_outputs if layer is self.layers[-1] else None,
            )
            key_values.append((keys, values))
            hidden_states.append(hidden)
            attentions.append(weights)
            if cross_weights is not None:
                cross_attentions.append(cross_weights)
        return QFormerOutput(
            hidden=hidden,
            key_values=tuple(key_values),
            hidden_states=tuple(hidden_states),
            attentions=tuple(attentions) if return_weights else (),
            cross_attentions=tuple(cross_attentions),
        )


def select_images(image_key_values: tuple[KeyValues | None, ...], index: torch.Tensor) -> tuple[KeyValues | None, ...]:
    """Rows `index` (pairs,) of every layer's image keys and values: images are indexed, never encoded again."""
    # index_select: its backward is deterministic; that of [] is not.
    return tuple(kv and (kv[0].index_select(0, index), kv[1].index_select(0, index)) for kv in image_key_values)
