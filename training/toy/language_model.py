"""Language model of the embedded default: a small OPT with its own tokenizer, pre-trained on text alone.

A document lists the facts of a scene in eight words and then says one thing about it: its caption, or a question with
its answer. The documents name every colour-shape pair, the held-out ones too, as a large text collection would; no
picture plays a part. In stage 2 the eight projected queries stand where the facts stood.

    python -m blip2x_training.toy.language_model --output_dir language_model --seed 0
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from modeling_blip2x.language_blip2x import IGNORE

from .scenes import ALL_PAIRS, CAPTION_PROMPT, QUESTION_PROMPT, Scene, ask, draw_scene

FACT_WORDS = 8
WIDTH, LAYERS, HEADS = 64, 3, 4
SCENES = 8000
STEPS, BATCH_SIZE, LEARNING_RATE = 1400, 128, 3e-3
STREAM = 12  # keeps the scenes apart from those of the splits


def facts(scene: Scene) -> str:
    """Eight words: how many things, their layout, and size, colour and shape of each; `none` where there is no more."""
    if len(scene.things) == 2:
        words = ["two", scene.layout]
    else:
        words = ["one", *scene.layout.split()]
    words += [word for thing in scene.things for word in thing.name.split()]
    return " ".join(words + ["none"] * (FACT_WORDS - len(words)))


def draw_documents(count: int, rng: np.random.Generator) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(facts, [(type, prompt, text), ...]) of `count` scenes; each text makes a document with the facts."""
    documents = []
    for _ in range(count):
        scene = draw_scene(rng, ALL_PAIRS)
        asked = [qa for _ in range(2) for qa in ask(scene, rng, ALL_PAIRS)]
        texts = [(kind, QUESTION_PROMPT.format(question), answer) for kind, question, answer in asked]
        documents.append((facts(scene), [("caption", CAPTION_PROMPT, scene.caption), *texts]))
    return documents


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words and punctuation marks of `texts`; like OPT's it puts </s> before a text and ends one with it."""
    splitter = Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), splitter
    tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def make_model(vocabulary_size: int) -> OPTForCausalLM:
    std = 0.65 / WIDTH**0.5  # transformers' 0.02 is meant for widths near 1000
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary_size, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, ffn_dim=2 * WIDTH, max_position_embeddings=64, dropout=0.0, init_std=std,
            activation_function="gelu", pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    for layer in model.model.decoder.layers:
        # Equal query and key maps let a word attend to its like from the start: the question's `circle` to the facts'.
        attention = layer.self_attn
        nn.init.normal_(attention.q_proj.weight, std=WIDTH**-0.5)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
    # Positions of one thing start alike, and so do positions of one attribute: training then pairs them sooner.
    layout, things, attributes = torch.randn(WIDTH) * std, torch.randn(2, WIDTH) * std, torch.randn(3, WIDTH) * std
    places = model.model.decoder.embed_positions
    for place in range(FACT_WORDS):
        shared = layout if place < 2 else things[(place - 2) // 3] + attributes[(place - 2) % 3]
        places.weight.data[place + places.offset] *= 0.3
        places.weight.data[place + places.offset] += shared
    return model


def encode(tokenizer: PreTrainedTokenizerFast, fact_words: str, prompt: str, text: str) -> tuple[list[int], int]:
    """Ids of facts, </s>, prompt, text, </s>, and how many of them precede the text."""
    before = tokenizer.encode(fact_words, add_special_tokens=False) + tokenizer.encode(prompt)
    return before + tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id], len(before)


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (B, longest). Facts and questions are drawn at random, so only the texts are learned."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[IGNORE] * n + ids[n:] + [IGNORE] * (longest - len(ids)) for ids, n in rows])
    return ids, labels


@torch.no_grad()
def text_accuracy(model: OPTForCausalLM, rows: list[tuple[str, list[int], int]], pad: int) -> dict[str, float]:
    """Share of texts of each type that are predicted word for word."""
    model.eval()
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(rows), 500):
        part = rows[start : start + 500]
        ids, labels = collate([(ids, n) for _, ids, n in part], pad)
        predicted = model(input_ids=ids).logits[:, :-1].argmax(-1)
        right = ((predicted == labels[:, 1:]) | (labels[:, 1:] == IGNORE)).all(dim=1)
        for (kind, _, _), hit in zip(part, right.tolist(), strict=True):
            hits.setdefault(kind, []).append(hit)
    return {kind: sum(of_kind) / len(of_kind) for kind, of_kind in hits.items()}


def pretrain_language(output_dir: str | Path, seed: int, steps: int = STEPS, scenes: int = SCENES) -> None:
    """Trains the language model and saves it with its tokenizer and metrics.jsonl."""
    torch.manual_seed(seed)
    documents = draw_documents(scenes, np.random.default_rng([seed, STREAM]))
    tokenizer = make_tokenizer([f"{words} {prompt} {text}" for words, texts in documents for _, prompt, text in texts])
    pad = tokenizer.pad_token_id
    rows = [
        [(kind, *encode(tokenizer, words, prompt, text)) for kind, prompt, text in texts] for words, texts in documents
    ]
    kept_back = max(1, scenes // 20)
    training = [row[1:] for texts in rows[kept_back:] for row in texts]

    model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    log = []
    for step in range(1, steps + 1):
        picked = torch.randint(len(training), (BATCH_SIZE,)).tolist()
        ids, labels = collate([training[i] for i in picked], pad)
        logits = model(input_ids=ids).logits[:, :-1]  # padding stands on the right, where the causal mask hides it
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            log.append({"step": step, "loss": loss.item()})
        if step % 200 == 0 or step == steps:
            print(f"language model: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    accuracy = text_accuracy(model, [row for texts in rows[:kept_back] for row in texts], pad)
    print("language model, new texts: " + ", ".join(f"{kind} {value:.3f}" for kind, value in accuracy.items()))

    output_dir = Path(output_dir)
    model.eval().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    (output_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train the toy language model.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--scenes", type=int, default=SCENES)
    arguments = parser.parse_args()
    pretrain_language(arguments.output_dir, arguments.seed, arguments.steps, arguments.scenes)
