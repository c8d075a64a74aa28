"""Stage 1 as a whole: what is trained, what stays, and that it learns."""

import pytest
import torch
from transformers.utils import logging as transformers_logging

from modeling_blip2x import Blip2xForImageTextRetrieval, imagetext_blip2x, losses_blip2x, pretraining_blip2x
from modeling_blip2x.losses_blip2x import query_spread_loss
from modeling_blip2x.vision_blip2x import thinned
from tests.helpers.tiny import QUERIES, TOWERS, batch, stage1

LOSSES = ("loss_itc", "loss_itm", "loss_itg")
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_loss_is_the_plain_sum():
    out = stage1().train()(**batch(), negative_seed=1)
    assert torch.allclose(out.loss, out.loss_itc + out.loss_itm + out.loss_itg)


@pytest.mark.parametrize("tower", TOWERS)
def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(tower):
    model = stage1(tower).train()
    size = 64 if tower == "mobilenet" else 28  # its map of a smaller image is one position: nothing to attend to
    model(**batch(size=size), negative_seed=1).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("model.vision_model."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.requires_grad and parameter.grad is not None, name
            if not name.endswith("key.bias"):  # softmax does not see a bias that all keys share
                assert parameter.grad.abs().sum() > 0, name


def test_query_tokens_start_random_and_their_outputs_differ():
    model = stage1(qformer={"hidden_size": 96}).eval()
    weight = model.model.query_tokens.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.2) and abs(weight.mean().item()) < 0.005
    with torch.no_grad():
        hidden = model.model(batch(rows=1)["pixel_values"]).last_hidden_state[0]
    distance = torch.cdist(hidden, hidden) + torch.eye(QUERIES) * 1e9
    assert distance.min() > 1e-2
    model.train()
    model(**batch(), negative_seed=0).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], float("inf"))
    assert norm < 1e3


def test_every_parameter_starts_as_documented():
    model = stage1(qformer={"initializer_range": 0.05})
    for name, parameter in model.named_parameters():
        if name.startswith("model.vision_model."):
            continue
        if name == "temperature":
            assert parameter.item() == pytest.approx(0.07)
        elif "layernorm.weight" in name or name == "model.ln_vision.weight":
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name != "model.query_tokens.weight":
            assert parameter.std().item() == pytest.approx(0.05, rel=0.25), name


def test_random_eva_tower_is_not_constant():
    """transformers' own default initialises it with a spread of 1e-10, so that all features are alike."""
    features = stage1("eva").model.get_vision_embeds(batch()["pixel_values"])
    assert features.std() > 1e-3


def test_frozen_tower_stays_in_eval_mode_and_bit_identical():
    model = stage1().train()
    assert model.training and not any(m.training for m in model.model.vision_model.modules())
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        model.train()(**batch(), negative_seed=step).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == name.startswith("model.vision_model."), f"{name} {'did not move' if same else 'moved'}"


def test_overfits_32_pairs():
    """ITM below 0.3 and every image finds its text among 32."""
    model = stage1(qformer={"initializer_range": 0.09, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    data = batch(rows=32)
    with torch.no_grad():
        vision_embeds = model.model.get_vision_embeds(data.pop("pixel_values"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    matching = []
    for step in range(300):
        out = model(**data, vision_embeds=vision_embeds, negative_seed=step)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        matching.append(out.loss_itm.item())
        if len(matching) > 10 and max(matching[-10:]) < 0.2:
            break
    model.eval()
    with torch.no_grad():
        out = model(**data, vision_embeds=vision_embeds, negative_seed=0)
    assert out.loss_itm < 0.3
    assert (out.logits_per_image.argmax(1) == torch.arange(32)).all()
    assert (out.logits_per_text.argmax(1) == torch.arange(32)).all()


def test_negative_seed_fixes_the_negatives():
    model = stage1().eval()
    with torch.no_grad():
        losses = [model(**batch(rows=8), negative_seed=seed).loss_itm.item() for seed in (1, 1, 2, 3, 4)]
    assert losses[0] == losses[1] and len(set(losses)) > 1


def test_single_pair_is_defined_and_warned_of_once(caplog):
    model = stage1().train()
    transformers_logging.enable_propagation()
    pretraining_blip2x.logger.warning_once.cache_clear()
    out = model(**batch(rows=1))
    model(**batch(rows=1))
    assert caplog.text.count("The global batch is a single pair") == 1
    assert all(torch.isfinite(out[name]) for name in LOSSES)
    assert out.logits_per_image.shape == (1, 1) and out.itm_accuracy in (0.0, 1.0)


def test_batch_of_one_image_many_times_is_safe():
    out = stage1().train()(**batch(), image_ids=torch.zeros(4, dtype=torch.long))
    out.loss.backward()
    assert all(torch.isfinite(out[name]) for name in LOSSES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fifty_finite_steps_under_autocast(dtype):
    model = stage1().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(50):
        with torch.autocast("cpu", dtype=dtype):
            out = model(**batch(seed=step), negative_seed=step)
        assert all(out[name].dtype == torch.float32 and torch.isfinite(out[name]) for name in LOSSES), step
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()


def test_cached_features_equal_the_tower():
    model = stage1().eval()
    data = batch()
    with torch.no_grad():
        direct = model(**data, negative_seed=0)
        embeds = model.model.get_vision_embeds(data.pop("pixel_values"))
        cached = model(**data, vision_embeds=embeds, negative_seed=0)
    assert torch.equal(direct.loss, cached.loss)


@torch.no_grad()
def test_scores_have_their_units():
    model = stage1().eval()
    data = batch(rows=3)
    images = model.get_image_features(data["pixel_values"]).pooler_output
    texts = model.get_text_features(data["input_ids"], data["attention_mask"]).pooler_output
    assert images.shape == (3, QUERIES, 16) and texts.shape == (3, 16)
    assert torch.allclose(images.norm(dim=-1), torch.ones(3, QUERIES), atol=1e-5)
    cosines = model.itc_scores(images, texts)
    out = model(**data, negative_seed=0)
    assert torch.allclose(out.logits_per_image * out.temperature, cosines, atol=1e-5)
    assert torch.allclose(out.logits_per_text, out.logits_per_image.T, atol=1e-5)
    pair = model.itm_scores(**data)
    assert torch.allclose(pair, model.itm_logits(**data).softmax(-1)[:, 1])
    grid = model.itm_scores(**data, grid=True, chunk_size=2)
    assert grid.shape == (3, 3) and torch.allclose(grid.diagonal(), pair, atol=1e-5)


@pytest.mark.parametrize("index", [(2, 0, 1, 1, 0), (0, 1, 1, 0, 0)])
@torch.no_grad()
def test_pairs_that_share_images_are_scored_as_each_alone(monkeypatch, index):
    """They go together by length, or by image, two at a time here; the order of the logits is that of the texts."""
    monkeypatch.setattr(imagetext_blip2x, "PAIRS_TOGETHER", 2)
    model = stage1().eval()
    data = batch(rows=5)
    data["attention_mask"][3, 4:] = 0
    index = torch.tensor(index)
    logits = model.itm_logits(data["pixel_values"][:3], data["input_ids"], data["attention_mask"], image_index=index)
    alone = model.itm_logits(data["pixel_values"][index], data["input_ids"], data["attention_mask"])
    assert torch.allclose(logits, alone, atol=1e-5)


@torch.no_grad()
def test_one_image_and_two_texts():
    model = stage1().eval()
    data = batch(rows=2)
    data["pixel_values"] = data["pixel_values"][:1]
    assert model.itm_scores(**data, grid=True).shape == (1, 2)
    with pytest.raises(ValueError, match="1 images and 2 texts"):
        model.itm_logits(**data)


@torch.no_grad()
def test_retrieval_class_has_the_same_weights_and_scores(tmp_path):
    model = stage1().eval()
    model.save_pretrained(tmp_path)
    retrieval = Blip2xForImageTextRetrieval.from_pretrained(tmp_path).eval()
    data = batch(rows=3)
    expected = model(**data, negative_seed=0)
    scores = retrieval(**data)
    assert scores.loss is None and torch.allclose(scores.logits_per_image, expected.logits_per_image, atol=1e-5)
    trained = retrieval(**data, negative_seed=0, return_loss=True)
    assert torch.allclose(trained.loss, expected.loss_itc + expected.loss_itm, atol=1e-5)
    texts = {name: value[:2] for name, value in data.items() if name != "pixel_values"}
    assert retrieval(data["pixel_values"], **texts).logits_per_image.shape == (3, 2)


def test_captions_without_a_language_model():
    model = stage1().eval()
    pixels = batch(rows=2)["pixel_values"]
    greedy = model.generate(pixels, max_new_tokens=5)
    assert greedy.shape == (2, 6) and (greedy[:, 0] == 60).all()
    data = {"input_ids": greedy, "attention_mask": torch.ones_like(greedy)}
    with torch.no_grad():  # greedy: every token is the best one of the training forward
        pairs = model.encode_pairs(pixels, **data, vision_embeds=None, decoder_ids=greedy)
        hidden = pairs.decoded.hidden
        best = model.itg_head(hidden, model.get_input_embeddings().weight).argmax(-1)
    assert torch.equal(best[:, :-1], greedy[:, 1:])
    assert model.generate(pixels, max_new_tokens=5, num_beams=3, do_sample=False).shape == (2, 6)
    assert model.generate(pixels, max_new_tokens=4, do_sample=True, top_p=0.9, num_return_sequences=2).shape == (4, 5)


def test_objectives_can_be_left_out():
    out = stage1(objectives=["itc", "itm"])(**batch(), negative_seed=0)
    assert out.loss_itg is None and torch.allclose(out.loss, out.loss_itc + out.loss_itm)
    with pytest.raises(ValueError, match="objectives must name some of itc, itm, itg"):
        stage1(objectives=["itx"])


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"pixel_values": torch.zeros(4, 3, 30, 30)}, "size|match"),
        ({"pixel_values": torch.zeros(3, 28, 28)}, r"\(3, 28, 28\)"),
        ({"pixel_values": torch.zeros(3, 3, 28, 28)}, "3 images and 4 texts"),
        ({"pixel_values": None}, "either pixel_values or vision_embeds, got neither"),
        ({"pixel_values": None, "vision_embeds": torch.zeros(4, 5, 47)}, r"positions, 48\), got shape \(4, 5, 47\)"),
        ({"vision_embeds": torch.zeros(4, 5, 48)}, "got both"),
        ({"input_ids": None}, "needs texts"),
    ],
)
def test_bad_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        stage1()(**{**batch(), **inputs})


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_with_two_threads():
    """The order in which threads add gradients of shared image keys must not matter."""

    def train() -> dict[str, torch.Tensor]:
        model, data = stage1(seed=0).train(), batch(rows=96, length=12)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        torch.manual_seed(0)
        for step in range(60):
            optimizer.zero_grad()
            model(**data, negative_seed=step).loss.backward()
            optimizer.step()
        return model.state_dict()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = train(), train()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layer", (-4, 3))
def test_a_layer_that_the_tower_lacks_is_named(layer):
    model = stage1(vision_feature_layer=layer)
    with pytest.raises(ValueError, match=f"vision_feature_layer is {layer}, but .* has 3 hidden states.*-3 to 2"):
        model(**batch())


def test_queries_are_kept_apart_in_training_alone(monkeypatch):
    """By default not at all: the paper's losses. A validation compares runs with and without it."""
    monkeypatch.setattr(losses_blip2x, "QUERY_DISTANCE", 1.5)  # random ones are 1.4 apart
    data = batch()
    model = stage1(qformer=STILL, query_spread=3.0)
    trained, validated = model.train()(**data, negative_seed=0), model.eval()(**data, negative_seed=0)
    paper = stage1(qformer=STILL).train()(**data, negative_seed=0)
    assert trained.loss_spread > 0.01 and torch.allclose(trained.loss, paper.loss + trained.loss_spread)
    assert "loss_spread" not in validated and "loss_spread" not in paper
    assert torch.allclose(validated.loss, paper.loss)
    queries = model.get_image_features(data["pixel_values"]).qformer_outputs.last_hidden_state
    assert trained.loss_spread.item() == pytest.approx(3 * query_spread_loss(queries).item(), rel=1e-4)
    with pytest.raises(ValueError, match="query_spread is -1"):
        stage1(query_spread=-1.0)


def test_thinned_features_by_hand():
    features = torch.arange(1, 1 + 6 * 20 * 50, dtype=torch.float).view(6, 20, 50)
    torch.manual_seed(0)
    fewer = thinned(features, 0.3, 0.0)
    assert fewer.shape == (6, 14, 50)
    places = [[(features[n] == row).all(1).nonzero().item() for row in fewer[n]] for n in range(6)]
    assert all(row == sorted(set(row)) for row in places) and len(set(map(tuple, places))) > 1, (
        "each image loses its own"
    )
    zeroed = thinned(features, 0.0, 0.2)
    gone = zeroed == 0
    assert torch.equal(gone, gone[:, :1].expand_as(gone)), "the same features at all positions"
    assert 0.1 < gone.float().mean() < 0.3 and torch.allclose(zeroed[~gone], features[~gone] / 0.8)
    assert thinned(features, 0.99, 0.0).shape == (6, 1, 50)
    assert torch.equal(thinned(features, 0.0, 0.0), features)


def test_thinning_is_of_training_alone():
    words = {"word_dropout": 0.5, "mask_token_id": 4}
    model, plain = stage1(position_dropout=0.4, feature_dropout=0.3, qformer=STILL | words), stage1(qformer=STILL)
    plain.load_state_dict(model.state_dict())
    data = batch() | {"negative_seed": 0}
    with torch.no_grad():
        assert torch.equal(model.eval()(**data).loss, plain.eval()(**data).loss)
        first, second = (model.train()(**data) for _ in range(2))
    assert first.loss != second.loss
    assert model.model.get_vision_embeds(data["pixel_values"]).shape[1] == 3, "of five positions"


def test_dropped_words_are_read_as_mask_and_predicted_all_the_same(monkeypatch):
    model = stage1(qformer={"word_dropout": 0.5, "mask_token_id": 4, "eos_token_id": 3, **STILL}).train()
    embeddings, read = model.model.qformer.embeddings, []
    embeddings.word_embeddings.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    data = batch() | {"negative_seed": 0}
    data["input_ids"][:, -1] = 3
    expected = {}
    real = losses_blip2x.itg_loss
    monkeypatch.setattr(
        pretraining_blip2x,
        "itg_loss",
        lambda logits, labels, n: expected.update(labels=labels) or real(logits, labels, n),
    )
    model(**data)
    masked = torch.cat([(ids == 4).flatten() for ids in read]).float().mean()
    assert 0.2 < masked < 0.5 and len(read) == 2, "texts of ITC and ITG together, and of ITM"
    for ids in read:
        assert (ids[:, 0] != 4).all() and (ids[:, -1] == 3).all()
    assert torch.equal(expected["labels"], data["input_ids"][:, 1:][data["attention_mask"][:, 1:].bool()])


@pytest.mark.parametrize("name", ["position_dropout", "feature_dropout"])
def test_shares_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 1.0, but must be at least 0 and less than 1"):
        stage1(**{name: 1.0})
    with pytest.raises(ValueError, match="word_dropout is 0.2, but mask_token_id is None"):
        stage1(qformer={"word_dropout": 0.2})
