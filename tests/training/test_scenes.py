"""The toy world: what is drawn, said and asked agrees, and held-out pairs stay out of training."""

import numpy as np
import pytest

from blip2x_training.toy.scenes import (
    ALL_PAIRS,
    COLORS,
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    NUMBERS,
    QUESTION_TYPES,
    SHAPES,
    Scene,
    Thing,
    ask,
    draw_split,
    make_rows,
    render,
    write_scenes,
)


def pairs_of(scene: Scene) -> set:
    return {(thing.color, thing.shape) for thing in scene.things}


def truth(scene: Scene, kind: str, question: str) -> str:
    """The answer, worked out anew from the words of the question."""
    words = question.rstrip("?").split()
    if kind == "relation":  # where is the COLOR SHAPE from the COLOR SHAPE
        first = (words[3], words[4]) == (scene.things[0].color, scene.things[0].shape)
        return {"across": ("left", "right"), "down": ("above", "below")}[scene.layout][0 if first else 1]
    if kind == "exists":  # is there a COLOR SHAPE
        return "yes" if (words[3], words[4]) in pairs_of(scene) else "no"
    if kind == "count":  # how many [COLOR] THINGS are there
        color = words[2] if words[2] in COLORS else None
        shape = next((name for name, plural in SHAPES.items() if plural in words), None)
        return NUMBERS[sum(color in (None, t.color) and shape in (None, t.shape) for t in scene.things)]
    named = [word for word in words[4:] if word != "thing"]  # what ATTRIBUTE is the WORD WORD [thing]
    fitting = [t for t in scene.things if set(named) <= {t.size, t.color, t.shape}]
    assert len(fitting) == 1, question
    return getattr(fitting[0], kind)


@pytest.mark.parametrize("split", ["dev", "test_held_out"])
def test_answers_follow_from_the_scene(split):
    scenes, rng = draw_split(split, 0)
    kinds = set()
    for scene in scenes:
        for kind, question, answer in ask(scene, rng, ALL_PAIRS):
            kinds.add(kind)
            assert answer == truth(scene, kind, question), (scene, question)
    assert kinds == set(QUESTION_TYPES)


def test_held_out_pairs_stay_out_of_training():
    for split in ("train", "dev", "test_new"):
        rows = make_rows(split, 0, 400)
        for text in [*rows["caption"], *[question for asked in rows["question"] for question in asked]]:
            assert not any(f"{color} {shape}" in text for color, shape in HELD_OUT_PAIRS), text
    scenes, _ = draw_split("test_held_out", 0, 400)
    assert all(pairs_of(scene) & set(HELD_OUT_PAIRS) for scene in scenes)
    assert all(any(pair in pairs_of(scene) for scene in scenes) for pair in HELD_OUT_PAIRS)


def test_captions_name_left_before_right_and_upper_before_lower():
    for scene in draw_split("test_new", 1, 300)[0]:
        first, last = scene.things[0], scene.things[-1]
        if scene.layout == "across":
            assert last.x - first.x > abs(last.y - first.y) and "left of" in scene.caption
        elif scene.layout == "down":
            assert last.y - first.y > abs(last.x - first.x) and "above" in scene.caption
        else:
            assert scene.caption == f"a {first.name} at the {scene.layout}"
            assert ("left" in scene.layout) == (first.x < IMAGE_SIZE / 2)
            assert ("top" in scene.layout) == (first.y < IMAGE_SIZE / 2)


def test_things_lie_inside_and_apart():
    for scene in draw_split("train", 2, 300)[0]:
        for thing in scene.things:
            assert thing.radius < min(thing.x, thing.y) and max(thing.x, thing.y) < IMAGE_SIZE - thing.radius
        if len(scene.things) == 2:
            a, b = scene.things
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_painted_in_its_color(shape):
    scene = Scene((Thing("big", "red", shape, 24.0, 24.0, 10.0),), "top left")
    picture = render([scene], np.random.default_rng(0))[0].astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 2] < 120)
    assert 80 < red.sum() < 400 and red[14:34, 14:34].sum() == red.sum()
    assert red[24, 24] == (shape != "ring")


def test_guessing_without_the_picture_pays_little():
    rows = make_rows("dev", 0, 300)
    for kind in QUESTION_TYPES:
        answers = [t for ks, ts in zip(rows["type"], rows["text"]) for k, t in zip(ks, ts) if k == kind]
        commonest = max(answers.count(answer) for answer in set(answers)) / len(answers)
        assert commonest < 0.6, (kind, commonest)


def test_same_seed_same_rows_and_splits_differ():
    assert make_rows("dev", 3, 20) == make_rows("dev", 3, 20)
    assert make_rows("dev", 3, 20)["image"] != make_rows("test_new", 3, 20)["image"]
    assert make_rows("dev", 3, 20)["image"] != make_rows("dev", 4, 20)["image"]


def test_datasets_reads_the_folder(tmp_path):
    from datasets import load_dataset

    write_scenes(tmp_path / "scenes", 0, {"train": 12, "test_new": 4, "test_held_out": 5})
    splits = load_dataset(str(tmp_path / "scenes"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 12, "test_new": 4, "test_held_out": 5}
    row = splits["test_held_out"][0]
    assert row["image"].size == (IMAGE_SIZE, IMAGE_SIZE) and row["text"][0] == row["caption"]
    assert len(row["text"]) == len(row["prompt"]) == len(row["type"]) == len(row["question"])


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'; choose one of train, dev"):
        draw_split("validation", 0)
