"""What the tests of run_evaluation.py start from: photos, official files over them, and tiny checkpoints of both stages."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from blip2x_training import run_evaluation
from modeling_blip2x import Blip2xConfig, Blip2xForPreTraining, Blip2xProcessor
from tests.helpers.tiny import bert_tokenizer, config, image_processor, liven, stage2, stage2_processor

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255)}
CAPTIONS = {
    1: ["A red square .", "the red square"],
    2: ["a green square on the left", "green"],
    3: ["a blue dog", "a dog"],
}


def put(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def make_photos(folder: Path, pattern: str = "{:012d}.jpg", count: int = 3) -> Path:
    """Photos called by number from 1, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(1, count + 1):
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        pixels[8:22, 4 * number : 4 * number + 12] = list(COLOURS.values())[number % 3]
        (folder / pattern.format(number)).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / pattern.format(number))
    return folder


def make_stage1(folder: Path) -> str:
    """Untrained, but with weights so large that images, texts and queries differ."""
    processor = Blip2xProcessor(image_processor(), bert_tokenizer())
    size = len(processor.tokenizer)
    tokens = {"vocab_size": size, "bos_token_id": processor.tokenizer.bos_token_id, "eos_token_id": 3}
    shape: Blip2xConfig = config(qformer=tokens)
    torch.manual_seed(0)
    model = Blip2xForPreTraining(shape).eval()
    liven(model.model.vision_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "vision_model" not in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def make_stage2(folder: Path, llm: str = "opt", **changes) -> str:
    processor = stage2_processor(bos=llm != "t5")
    stage2(llm, std=0.3, image_token_index=processor.image_token_id, **changes).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def coco_file(path: Path, captions: dict[int, list[str]] = CAPTIONS, **of_images: list) -> str:
    """captions_val2017.json; of_images: more keys of the images, a list each."""
    images = [{"id": number, "file_name": f"{number:012d}.jpg", "height": 30, "width": 40} for number in captions]
    for key, values in of_images.items():
        for image, value in zip(images, values, strict=True):
            image[key] = value
    notes = [(number, text) for number, texts in captions.items() for text in texts]
    annotations = [{"image_id": number, "id": n, "caption": text} for n, (number, text) in enumerate(notes)]
    return put(path, {"info": {}, "licenses": [], "images": images, "annotations": annotations})


def evaluate(out: Path, **fields) -> tuple[dict, list[dict]]:
    """Run the script; metrics.json and predictions.json."""
    fields = {"split": "all", "java_metrics": False, "report": False, "num_beams": 1, "max_skip_fraction": 0, **fields}
    flags = [f"--{name}={value}" for name, value in fields.items() if value is not None]
    run_evaluation.main([*flags, f"--output_dir={out}"])
    return json.loads((out / "metrics.json").read_text()), json.loads((out / "predictions.json").read_text())


def texts_of(records: list[dict]) -> list[str]:
    return [record["prediction"] for record in records]
