"""Every way in for images goes through one opener: the same pixels for any mode, a reason for what is no picture."""

import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MobileNetV2ImageProcessor, ViTImageProcessor

from blip2x_training import bootstrap_captions, cache_features
from blip2x_training.data.caption_dataset import CaptionDataset
from blip2x_training.data.formats import image_start, load_rows
from blip2x_training.toy.vision_tower import make_image_processor
from modeling_blip2x import Blip2xProcessor
from modeling_blip2x.images_blip2x import rgb_image
from tests.helpers.evaluation_parts import evaluate, make_photos, make_stage1, put
from tests.helpers.picture_files import EVERYWHERE, LEFT_OUT_OF_THE_SPACE
from tests.helpers.tiny import SIZE, bert_tokenizer, llm_tokenizer
from tests.helpers.training_parts import make_vision_model

SQUARE = {"height": SIZE, "width": SIZE}
PROCESSORS = {
    "vit": lambda: ViTImageProcessor(size=SQUARE),
    "mobilenet": lambda: MobileNetV2ImageProcessor(size=SQUARE, do_center_crop=False),
    "quickstart": make_image_processor,
}
FILES = EVERYWHERE | {name: content for name, (content, *_) in LEFT_OUT_OF_THE_SPACE.items()}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
GOOD, PIPE, PAGE = 1, 2, 3
REASONS = {PIPE: "not a regular file", PAGE: "no known image format"}


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("tokenizer, queries", [(bert_tokenizer, None), (llm_tokenizer, 4)])
def test_processors_that_convert_nothing_get_rgb(kind, tokenizer, queries):
    """Those of ViT, MobileNet and the quickstart take three channels and make no RGB of others themselves."""
    image_processor = PROCESSORS[kind]()
    processor = Blip2xProcessor(image_processor, tokenizer(), num_query_tokens=queries)
    for name, content in FILES.items():
        expected = image_processor(images=[rgb_image(content)], return_tensors="pt")["pixel_values"]
        for given in (content, Image.open(io.BytesIO(content))):
            found = processor(images=given, text="a dog", return_tensors="pt")["pixel_values"]
            assert found.shape[1] == 3 and torch.equal(found, expected), name


def test_tars_and_parquet(tmp_path):
    """Each file by its content: as a member of a tar, and as bytes in a table."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in FILES.items():
            stem = name.replace(".", "_")
            for ending, part in ((name.partition(".")[2], content), ("txt", b"a dog")):
                member = tarfile.TarInfo(f"{stem}.{ending}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    cells = [{"bytes": content, "path": None} for content in FILES.values()]
    table = datasets.Dataset.from_dict({"image": cells, "text": ["a dog"] * len(cells)})
    table.to_parquet(tmp_path / "rows.parquet")
    for source in ("a.tar", "rows.parquet"):
        data = CaptionDataset(load_rows(str(tmp_path / source), "train"), text_column="text")
        assert len(data) == len(FILES) and not data.left_out
        for row, content in enumerate(FILES.values()):
            item = data[0, row]
            assert not item["skipped"] and np.array_equal(item["image"], rgb_image(content)), (source, row)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """photos/ with a photo, a pipe and a page of EPS by the names of photos, rows.json over them, tower/ and stage1/."""
    root = tmp_path_factory.mktemp("entries")
    photos = make_photos(root / "photos", count=3)
    for number in (PIPE, PAGE):
        (photos / f"{number:012d}.jpg").unlink()
    os.mkfifo(photos / f"{PIPE:012d}.jpg")
    (photos / f"{PAGE:012d}.jpg").write_bytes(EPS)
    put(root / "rows.json", [{"image": f"photos/{n:012d}.jpg", "caption": f"a dog {n}"} for n in (GOOD, PIPE, PAGE)])
    make_vision_model(root / "tower")
    make_stage1(root / "stage1")
    return root


def test_training_and_evaluation_leave_them_out(parts, tmp_path):
    rows = str(parts / "rows.json")
    data = CaptionDataset(load_rows(rows, "train"), text_column="caption", folder=image_start(rows, None))
    skipped = [report for index in range(len(data)) for report in data[0, index]["skipped"]]
    reports = {report["row"] + 1: report["reason"] for report in data.left_out + skipped}
    assert reports.keys() == REASONS.keys()
    assert all(reports[number].startswith(reason) for number, reason in REASONS.items())
    _, records = evaluate(tmp_path / "out", task="caption", model=parts / "stage1", data=rows, max_skip_fraction=0.7)
    assert [record["image"].rsplit("/", 1)[-1] for record in records] == [f"{GOOD:012d}.jpg"]
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [one["row"] + 1 for one in skipped] == [PIPE, PAGE]
    assert all(one["reason"].startswith(REASONS[one["row"] + 1]) for one in skipped)


def test_caches_and_bootstrapping_name_them(parts, tmp_path, capsys):
    given = ["--dataset", str(parts / "rows.json"), "--vision_model", str(parts / "tower")]
    cache_features.main(
        [*given, "--output_dir", str(tmp_path / "cache"), "--splits", "train", "--max_skip_fraction", "0.7"]
    )
    said = "".join(capsys.readouterr())
    assert all(reason in said for reason in REASONS.values()), said
    flags = [
        "--captioner",
        str(parts / "stage1"),
        "--num_captions",
        "2",
        "--max_new_tokens",
        "3",
        "--min_new_tokens",
        "1",
    ]
    flags += ["--max_skip_fraction", "0.7", "--text_column", "caption"]
    bootstrap_captions.main([*given[:2], *flags, "--output_dir", str(tmp_path / "more")])
    lines = [json.loads(line) for line in (tmp_path / "more" / "train.jsonl").read_text().splitlines()]
    assert [Path(line["image"]).name for line in lines] == [f"{GOOD:012d}.jpg"]
