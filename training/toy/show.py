"""Loads a trained checkpoint as any user would, through the Auto classes, and describes scenes of a split.

python -m blip2x_training.toy.show --model runs/quickstart/stage2 --dataset runs/quickstart/scenes --output_dir shown
"""

import argparse
import json
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xProcessor  # importing registers them
from modeling_blip2x.images_blip2x import rgb_image


def answer(model: Blip2xForConditionalGeneration, processor: Blip2xProcessor, image, prompt: str) -> str:
    batch = processor(images=image, text=prompt, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=16, do_sample=False)
    return processor.batch_decode_new(ids, batch["input_ids"])[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Describe scenes with a trained checkpoint.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="test_held_out")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--output_dir", required=True, help="Folder for the pictures and shown.json.")
    arguments = parser.parse_args(argv)

    model = AutoModelForImageTextToText.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    shown = []
    for index, row in enumerate(load_dataset(arguments.dataset, split=f"{arguments.split}[:{arguments.count}]")):
        image = rgb_image(row["image"])
        picture = output_dir / f"{arguments.split}_{index}.png"
        image.save(picture)
        caption = answer(model, processor, image, row["prompt"][0])
        print(f"{picture}: {caption}" + ("" if caption == row["caption"] else f"   (true: {row['caption']})"))
        answers = []
        for question, prompt, truth in list(zip(row["question"], row["prompt"], row["text"]))[1:4]:
            answers.append((question, answer(model, processor, image, prompt), truth))
            print(f"    {question} {answers[-1][1]}" + ("" if answers[-1][1] == truth else f"   (true: {truth})"))
        shown.append({"image": str(picture), "caption": caption, "true_caption": row["caption"], "answers": answers})
    (output_dir / "shown.json").write_text(json.dumps(shown, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
