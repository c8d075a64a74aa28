"""Masks, shared computation and attention outputs of the Q-Former."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_blip2x import Blip2xModel
from tests.helpers.tiny import QUERIES, batch, config, stage1


@pytest.fixture
def model():
    return stage1().eval()


@torch.no_grad()
def encode(model, ids, mask, pixel_values):
    bare = model.model
    image = bare.image_key_values(bare.get_vision_embeds(pixel_values))
    queries = bare.query_tokens(len(ids))
    alone = bare.qformer.encode_queries(queries, image)
    return {
        "queries": alone.hidden,
        "text": bare.qformer.encode_text(ids, mask).hidden,
        "pairs": bare.qformer.encode_pairs(queries, ids, mask, image).hidden,
        "decoded": bare.qformer.decode_text(ids, mask, alone.key_values).hidden,
    }


def test_masks_let_through_what_the_paper_says(model):
    """Change the last word, or the image, and see which positions notice (figure 2 of the paper)."""
    data = batch(rows=1)
    ids, mask, image = data["input_ids"], data["attention_mask"], data["pixel_values"]
    before = encode(model, ids, mask, image)
    other_word = ids.clone()
    other_word[0, -1] = ids[0, -1] % 50 + 6
    word = encode(model, other_word, mask, image)
    picture = encode(model, ids, mask, image + 1)

    def changed(after, key):
        return ((after[key] - before[key]).abs().amax(dim=-1)[0] > 1e-6).tolist()

    length = ids.shape[1]
    assert changed(word, "queries") == [False] * QUERIES, "queries alone do not see text"
    assert changed(word, "text") == [True] * length, "text alone sees text, both ways"
    assert changed(word, "pairs") == [True] * (QUERIES + length), "in pairs everything sees everything"
    assert changed(word, "decoded") == [False] * (length - 1) + [True], "causal: earlier words do not see later ones"
    assert changed(picture, "queries") == [True] * QUERIES
    assert changed(picture, "text") == [False] * length, "text alone does not see the image"
    assert changed(picture, "pairs") == [True] * (QUERIES + length)
    assert changed(picture, "decoded") == [True] * length, "every word sees all queries"


@pytest.mark.parametrize("with_decoder", [True, False])
@torch.no_grad()
def test_together_gives_what_each_gives_alone(model, with_decoder):
    data = batch()
    ids, mask, bare = data["input_ids"], data["attention_mask"], model.model
    assert not mask.all(), "with padding"
    image = bare.image_key_values(bare.get_vision_embeds(data["pixel_values"]))
    queries, decoder_ids = bare.query_tokens(len(ids)), ids + 1
    expected = bare.qformer.encode_queries(queries, image, return_weights=True)
    causal = bare.qformer.decode_text(decoder_ids, mask, expected.key_values)
    expected_text = bare.qformer.encode_text(ids, mask, return_weights=True)
    given = queries, ids, mask, image, decoder_ids if with_decoder else None
    seen, decoded, text = bare.qformer.encode_together(*given, return_weights=True, whole_text=True)
    is_token = mask.bool()
    assert torch.allclose(seen.hidden, expected.hidden, atol=1e-6)
    assert torch.allclose(text.hidden[is_token], expected_text.hidden[is_token], atol=1e-6)
    if with_decoder:
        assert torch.allclose(decoded.hidden[is_token], causal.hidden[is_token], atol=1e-6)
    else:
        assert decoded is None
    for one, other in ((seen, expected), (text, expected_text)):
        for name in ("hidden_states", "attentions", "cross_attentions"):
            pairs = list(zip(getattr(one, name), getattr(other, name), strict=True))
            assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in pairs), name
    _, _, first = bare.qformer.encode_together(*given)
    assert torch.allclose(first.hidden, text.hidden[:, :1], atol=1e-6)


def test_padding_changes_nothing(model):
    data = batch(rows=1)
    ids, mask = data["input_ids"], data["attention_mask"]
    short = encode(model, ids, mask, data["pixel_values"])
    padded_ids = torch.nn.functional.pad(ids, (0, 5), value=7)
    long = encode(model, padded_ids, torch.nn.functional.pad(mask, (0, 5)), data["pixel_values"])
    for key in short:
        assert torch.allclose(short[key], long[key][:, : short[key].shape[1]], atol=1e-5), key


def test_cached_queries_equal_running_them_with_the_text(model):
    """ITG through the query cache equals one pass over queries and text with the multimodal causal mask."""
    data = batch(rows=2)
    ids, mask = data["input_ids"], data["attention_mask"]
    cached = encode(model, ids, mask, data["pixel_values"])["decoded"]
    bare = model.model
    with torch.no_grad():
        image = bare.image_key_values(bare.get_vision_embeds(data["pixel_values"]))
        queries = bare.query_tokens(2)
        hidden = torch.cat([bare.qformer.layernorm(queries), bare.qformer._embed(ids)], dim=1)
        total = hidden.shape[1]
        allowed = torch.ones(total, total, dtype=torch.bool).tril()
        allowed[:, :QUERIES] = True
        allowed[:QUERIES, QUERIES:] = False
        keys = torch.cat([torch.ones(2, QUERIES), mask], dim=1).bool()
        full = bare.qformer._run(hidden, QUERIES, allowed[None, None] & keys[:, None, None], image, None, False).hidden
    assert torch.allclose(cached[0], full[0, QUERIES:], atol=1e-5)


def test_image_keys_and_values_are_computed_once(model):
    rows = []
    for layer in model.model.qformer.layers:
        if layer.crossattention is not None:
            layer.crossattention.key.register_forward_hook(
                lambda module, inputs, output: rows.append(inputs[0].shape[0])
            )
    model(**batch(rows=4), negative_seed=0)
    assert rows == [4, 4], "one projection a layer for ITC, ITM (12 pairs) and ITG together"


def test_flops_of_a_step_are_the_necessary_ones():
    """Matrix multiplications of one forward, counted and computed by hand: nothing is encoded twice."""
    model = stage1(attn_implementation="eager").eval()
    config = model.config.qformer_config
    rows, length, width, inner = 4, 9, config.hidden_size, config.intermediate_size
    data = batch(rows=rows, length=length)
    data["attention_mask"][:] = 1
    vision_embeds = model.model.get_vision_embeds(data.pop("pixel_values"))
    positions, image_width = vision_embeds.shape[1:]
    with FlopCounterMode(display=False) as counter:
        model(**data, vision_embeds=vision_embeds, negative_seed=0)

    layers, crossing = config.num_hidden_layers, 2
    multiply = 2 * width * width

    def self_attention(batch_rows, queries, keys):
        return batch_rows * (4 * queries * multiply + 2 * 2 * queries * keys * width)

    def feed_forward(batch_rows, tokens):
        return batch_rows * tokens * 2 * 2 * width * inner

    def cross_attention(batch_rows):  # query and output projections, scores and weighted sum
        return batch_rows * (2 * QUERIES * multiply + 2 * 2 * QUERIES * positions * width)

    def unread(batch_rows, tokens, keys):  # query and output projections, scores and weighted sum, feed-forward
        return batch_rows * (2 * tokens * multiply + 2 * 2 * tokens * keys * width) + feed_forward(batch_rows, tokens)

    pairs = 3 * rows
    expected = crossing * rows * positions * 2 * 2 * image_width * width  # image keys and values, once
    # ITC and ITG are one sequence: its products of attention are whole, and a mask drops what is not to be seen.
    together = QUERIES + 2 * length
    expected += layers * (self_attention(rows, together, together) + feed_forward(rows, together))
    expected += crossing * cross_attention(rows)
    expected += layers * (
        self_attention(pairs, QUERIES + length, QUERIES + length) + feed_forward(pairs, QUERIES + length)
    )
    expected += crossing * cross_attention(pairs)
    # The last layer computes only what is read: [CLS] of ITC's text and the queries of ITM's pairs. Others are seen.
    expected -= unread(rows, length - 1, together) + unread(pairs, length, QUERIES + length)
    projected = model.config.image_text_hidden_size
    expected += rows * (QUERIES + 1) * 2 * width * projected  # ITC projections
    expected += 2 * (rows * QUERIES) * rows * 2 * projected  # similarities, both directions
    expected += pairs * QUERIES * 2 * width * 2  # ITM head
    expected += rows * (length - 1) * (multiply + 2 * width * config.vocab_size)  # ITG head
    assert counter.get_total_flops() == expected


@torch.no_grad()
def test_states_that_are_asked_for_are_whole(model):
    """The last layer leaves out only what nobody asked for."""
    data = batch(rows=3, length=9)
    alone = model.get_text_features(data["input_ids"], data["attention_mask"])
    out = model(**data, negative_seed=0, output_hidden_states=True)
    assert torch.allclose(out.text_outputs.last_hidden_state, alone.last_hidden_state, atol=1e-5)
    assert out.text_outputs.hidden_states[-1].shape[1] == 9
    plain = model(**data, negative_seed=0)
    assert torch.allclose(plain.logits_per_text, out.logits_per_text, atol=1e-5)


def test_text_runs_at_its_real_length(model):
    lengths = []
    model.model.qformer.embeddings.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    model(**batch(rows=4, length=9), negative_seed=0)
    assert set(lengths) == {9}


@torch.no_grad()
def test_sdpa_equals_eager():
    outputs = []
    for implementation in ("sdpa", "eager"):
        model = stage1(attn_implementation=implementation).eval()
        assert model.model.qformer.config._attn_implementation == implementation
        outputs.append(model(**batch(), negative_seed=0))
    for name in ("loss_itc", "loss_itm", "loss_itg", "logits_per_image"):
        assert torch.allclose(outputs[0][name], outputs[1][name], atol=1e-5), name


@torch.no_grad()
def test_attentions_are_never_empty():
    """Under sdpa too: the call switches to eager, and the output stays the same."""
    torch.manual_seed(0)
    model = Blip2xModel(config()).eval()
    pixels = batch(rows=2)["pixel_values"]
    plain = model(pixels)
    full = model(pixels, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(plain.last_hidden_state, full.last_hidden_state, atol=1e-5)
    assert [tuple(a.shape) for a in full.attentions] == [(2, 4, QUERIES, QUERIES)] * 4
    assert [tuple(a.shape) for a in full.cross_attentions] == [(2, 4, QUERIES, 5)] * 2
    assert len(full.hidden_states) == 5
    for weights in (*full.attentions, *full.cross_attentions):
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = stage1(qformer={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**batch(), negative_seed=0).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6), name


def test_text_without_a_text_branch_is_an_error():
    model = Blip2xModel(config(qformer={"use_qformer_text_input": False}))
    with pytest.raises(ValueError, match="no text branch"):
        model(batch()["pixel_values"], qformer_input_ids=batch()["input_ids"])


def test_too_long_a_text_is_an_error(model):
    data = batch(rows=2, length=65)
    with pytest.raises(ValueError, match="65 tokens but max_position_embeddings is 64"):
        model(**data)
