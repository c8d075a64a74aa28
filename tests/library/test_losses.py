"""The three losses against definitions written out by hand, and the draw of hard negatives."""

import math

import pytest
import torch

from modeling_blip2x.losses_blip2x import (
    draw_hard_negatives,
    image_text_similarity,
    itc_loss,
    itg_loss,
    itm_loss,
    itm_pairs,
    positive_pairs,
    query_spread_loss,
    sigmoid_itc_loss,
    uniform_numbers,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_similarity_takes_the_best_query():
    images, texts = random(3, 5, 8), random(4, 8, seed=1)
    by_hand = [[max(float(q @ t) for q in image) for t in texts] for image in images]
    assert torch.allclose(image_text_similarity(images, texts), torch.tensor(by_hand), atol=1e-5)


def test_similarity_is_exact_under_autocast():
    images, texts = random(3, 5, 8), random(4, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = image_text_similarity(images, texts)
    assert torch.equal(similarity, image_text_similarity(images, texts))


def test_itc_equals_cross_entropy_with_label_smoothing():
    logits, rows = random(4, 4), torch.arange(4)
    ours = itc_loss(logits, logits.T, positive_pairs(rows, rows))
    reference = torch.nn.functional.cross_entropy
    expected = (reference(logits, rows, label_smoothing=0.1) + reference(logits.T, rows, label_smoothing=0.1)) / 2
    assert torch.allclose(ours, expected, atol=1e-6)


def test_itc_spreads_the_target_over_equal_images():
    ids = torch.tensor([7, 7, 9])
    logits = random(3, 3)
    target = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]) * 0.9 + 0.1 / 3
    expected = -sum((target * side.log_softmax(1)).sum(1).mean() for side in (logits, logits.T)) / 2
    assert torch.allclose(itc_loss(logits, logits.T, positive_pairs(ids, ids)), expected, atol=1e-6)


def test_sigmoid_itc_asks_of_each_pair():
    """SigLIP, equation 1, pair by pair; two images of one id are positives both ways."""
    logits, ids = torch.randn(4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    bias = torch.tensor([-2.0], requires_grad=True)
    expected = 0.0
    for image in range(4):
        for text in range(4):
            sign = 1 if ids[image] == ids[text] else -1
            expected -= math.log(1 / (1 + math.exp(-sign * (logits[image, text].item() - 2.0)))) / 4
    loss = sigmoid_itc_loss(logits, positive_pairs(ids, ids), bias)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert bias.grad.abs() > 0.1


def test_hard_negatives_follow_the_similarity_and_are_never_positives():
    ids = torch.tensor([1, 1, 2, 3])
    logits = torch.tensor([[9.0, 9.0, 2.0, 1.0]]).repeat(4, 1)
    positives = positive_pairs(ids, ids)
    draws = torch.stack([draw_hard_negatives(logits, positives, torch.rand(4)) for _ in range(4000)])
    assert not positives.gather(1, draws.T).any()
    share = (draws[:, 0] == 2).float().mean().item()
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.03)


def test_rows_without_negatives_are_left_out():
    ids = torch.tensor([5, 5])
    positives = positive_pairs(ids, ids)
    none = draw_hard_negatives(random(2, 2), positives, torch.rand(2))
    assert none.tolist() == [-1, -1]
    pairs = itm_pairs(torch.arange(2), none, none)
    assert pairs.labels.tolist() == [1, 1]
    loss, accuracy = itm_loss(random(2, 2), pairs.labels)
    assert torch.isfinite(loss) and 0 <= accuracy <= 1


def test_seeded_numbers_depend_on_seed_and_row_alone():
    whole = uniform_numbers(0, 8, seed=3, device="cpu")
    assert torch.equal(whole[5:], uniform_numbers(5, 3, seed=3, device="cpu"))
    assert torch.equal(whole[:2], uniform_numbers(0, 2, seed=3, device="cpu"))
    assert not torch.equal(whole, uniform_numbers(0, 8, seed=4, device="cpu"))
    torch.manual_seed(0)
    first = uniform_numbers(0, 8, seed=None, device="cpu")
    torch.manual_seed(0)
    assert torch.equal(first, uniform_numbers(0, 8, seed=None, device="cpu"))


def test_pairs_are_positives_then_negative_images_then_negative_texts():
    pairs = itm_pairs(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([1, -1]))
    assert pairs.image_index.tolist() == [0, 1, 1, 0, 0]
    assert pairs.text_index.tolist() == [0, 1, 0, 1, 1]
    assert pairs.labels.tolist() == [1, 1, 0, 0, 0]


def test_constant_itm_predictor_is_the_known_plateau():
    """At one positive to two negatives, always answering with the base rate costs 0.6365."""
    logits = torch.tensor([[2 / 3, 1 / 3]]).log().repeat(3, 1)
    loss, accuracy = itm_loss(logits, torch.tensor([1, 0, 0]))
    assert loss.item() == pytest.approx(0.6365, abs=1e-4) and accuracy.item() == pytest.approx(2 / 3)


def test_itg_is_smoothed_cross_entropy_over_tokens():
    logits, labels = random(5, 11), torch.tensor([0, 3, 10, 4, 4])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(itg_loss(logits, labels), expected, atol=1e-6)


def test_queries_pay_for_being_closer_than_their_distance():
    queries = random(2, 4, 6) * torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None]  # lengths do not count
    queries[0, 1] = 7 * queries[0, 0] + 1e-3 * queries[0, 2]
    by_hand = []
    for image in queries:
        unit = [query / query.norm() for query in image]
        by_hand += [max(0.0, 0.9 - float((unit[i] - unit[j]).norm())) for i in range(4) for j in range(i)]
    assert query_spread_loss(queries).item() == pytest.approx(sum(by_hand) / 12, abs=1e-5)
    assert query_spread_loss(torch.eye(4)[None]) == 0, "a right angle is far enough"
    assert query_spread_loss(queries[:, :1]) == 0, "one query has no other"


def test_queries_that_are_nearly_one_are_taken_apart():
    together = (random(1, 1, 64) + 1e-3 * random(8, 4, 64, seed=1)).requires_grad_()
    optimizer = torch.optim.AdamW([together], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        query_spread_loss(together).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(together.detach(), dim=-1)
    assert (unit @ unit.transpose(1, 2) - torch.eye(4)).max() < 0.62
