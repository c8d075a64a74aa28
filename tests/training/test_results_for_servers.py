"""The files for evaluation servers answer everything that was asked, in its order: with nothing where an image is bad."""

import json
from pathlib import Path

import pytest

from tests.helpers.evaluation_parts import evaluate, make_photos, make_stage2, put

MISSING, BROKEN = 2, 4
GOOD = (1, 3, 5)
COUNT = 5


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> str:
    return make_stage2(tmp_path_factory.mktemp("models") / "opt")


def photos_with_gaps(folder: Path, pattern: str) -> Path:
    make_photos(folder, pattern, COUNT)
    (folder / pattern.format(MISSING)).unlink()
    broken = folder / pattern.format(BROKEN)
    broken.write_bytes(broken.read_bytes()[:200])
    return folder


def results_of(out: Path, **fields) -> tuple[dict, str]:
    """metrics.json, and the file for the server: its prediction of a good image is that of predictions.json."""
    metrics, records = evaluate(out, max_skip_fraction=0.6, max_new_tokens=3, min_new_tokens=3, **fields)
    assert len(records) < COUNT and all(record["prediction"] for record in records)
    assert any("answers for the server are empty" in note for note in metrics["notes"])
    name = "results.txt" if fields.get("benchmark") == "daquar" else "results.json"
    return records, (out / name).read_text()


@pytest.mark.parametrize("benchmark", [None, "gqa"])
def test_every_question_of_a_file_with_numbers(opt, tmp_path, benchmark):
    """VQAv2, OK-VQA; GQA. A question that is blank has a number too."""
    photos = photos_with_gaps(tmp_path / "photos", "COCO_test2015_{:012d}.jpg" if not benchmark else "n{}.jpg")
    ids = [7000 - n for n in range(1, COUNT + 1)]  # not in the order of their numbers
    asked = ["what is it ?"] * (COUNT - 1) + ["  "]
    if benchmark:
        data = {str(q): {"imageId": f"n{n + 1}", "question": asked[n], "answer": "dog"} for n, q in enumerate(ids)}
    else:
        rows = [{"image_id": n + 1, "question": asked[n], "question_id": q} for n, q in enumerate(ids)]
        data = {"questions": rows, "data_subtype": "test-dev2015"}
    records, content = results_of(
        tmp_path / "out", task="vqa", benchmark=benchmark, model=opt, image_folder=photos,
        data=put(tmp_path / "questions.json", data),
    )  # fmt: skip
    number, answer = ("questionId", "prediction") if benchmark else ("question_id", "answer")
    results = json.loads(content)
    assert [int(one[number]) for one in results] == ids
    given = {record["image"].rsplit("/", 1)[-1]: record["prediction"] for record in records}
    assert [one[answer] for one in results] == [*(given.get(name) or "" for name in names_of(photos)), ""]
    reasons = {one["row"]: one["reason"] for one in json.loads((tmp_path / "out" / "skipped.json").read_text())}
    assert reasons.keys() == {1, 3, 4} and reasons[1] == "the file is missing" and reasons[4] == "blank question"


def names_of(photos: Path) -> list[str]:
    """Names of the photos from 1 to 4, the missing one too."""
    first = next(photos.iterdir()).name
    pattern = "COCO_test2015_{:012d}.jpg" if first.startswith("COCO") else "n{}.jpg"
    return [pattern.format(number) for number in range(1, COUNT)]


def test_every_line_of_daquar(opt, tmp_path):
    photos = photos_with_gaps(tmp_path / "photos", "image{}.png")
    lines = [line for n in range(1, COUNT + 1) for line in (f"what is in the image{n} ?", "chair")]
    records, content = results_of(
        tmp_path / "out", task="vqa", benchmark="daquar", metric="exact_match", model=opt, image_folder=photos,
        data=put(tmp_path / "qa.txt", "\n".join(lines)),
    )  # fmt: skip
    answers = content.split("\n")
    assert len(answers) == COUNT + 1 and answers.pop() == ""
    assert [n for n, answer in enumerate(answers, 1) if answer] == list(GOOD) and len(records) == len(GOOD)


@pytest.mark.parametrize("domains", [False, True])
def test_every_image_of_coco_and_nocaps(opt, tmp_path, domains):
    photos = photos_with_gaps(tmp_path / "photos", "{:012d}.jpg")
    images = [{"id": 100 - n, "file_name": f"{n:012d}.jpg"} for n in range(1, COUNT + 1)]
    images = [one | {"domain": "near-domain"} for one in images] if domains else images
    records, content = results_of(
        tmp_path / "out", task="caption", model=opt, image_folder=photos,
        data=put(tmp_path / "test.json", {"images": images, "info": {}}),
    )  # fmt: skip
    results = json.loads(content)
    assert [one["image_id"] for one in results] == [one["id"] for one in images]
    given = {record["image_id"]: record["prediction"] for record in records}
    assert [one["caption"] for one in results] == [given.get(one["id"], "") for one in images] and len(given) == 3


def test_an_image_with_one_bad_row_has_one_caption(opt, tmp_path):
    """Rows of one image id are one sample; a row of it whose file is missing asks for nothing more."""
    photos = photos_with_gaps(tmp_path / "photos", "{:012d}.jpg")
    files = ((1, 1), (MISSING, 1), (3, 3), (MISSING, 9), (MISSING, 9))
    rows = [{"image": f"{file:012d}.jpg", "image_id": number, "caption": f"a dog {file}"} for file, number in files]
    _, content = results_of(
        tmp_path / "out", task="caption", model=opt, image_folder=photos, data=put(tmp_path / "rows.json", rows)
    )
    results = json.loads(content)
    assert [(one["image_id"], bool(one["caption"])) for one in results] == [(1, True), (3, True), (9, False)]
