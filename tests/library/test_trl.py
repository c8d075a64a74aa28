"""TRL's SFTTrainer trains LoRA on a conversation data set with pictures."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.helpers.tiny import image, stage2, stage2_processor

COLOURS = ("red", "green", "blue", "red")
QUESTION = [{"role": "user", "content": "what colour is it ?"}]


def trainer_for(rows: list[dict], model, folder, steps: int, batch_size: int = 4) -> SFTTrainer:
    arguments = SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=batch_size, gradient_accumulation_steps=4 // batch_size,
        max_grad_norm=1e9, learning_rate=2e-2, lr_scheduler_type="constant",
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, max_length=None, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    lora = LoraConfig(r=8, target_modules=r"language_model\..*\.(q_proj|v_proj|fc1|fc2)")
    return SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=stage2_processor(), peft_config=lora
    )


@pytest.fixture
def model():
    model = stage2("opt", std=0.3, qformer={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    for part in model.modules():
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.0
    model.config.image_token_index = stage2_processor().image_token_id
    return model


def test_conversations_train_the_adapter_alone(model, tmp_path):
    rows = [
        {"images": [image(colour)], "messages": [*QUESTION, {"role": "assistant", "content": colour}]}
        for colour in COLOURS
    ]
    trainer = trainer_for(rows, model, tmp_path, steps=15)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_the_loss_is_that_of_the_model(model, tmp_path):
    """TRL runs `base_model` and multiplies by the output layer itself: the completion's tokens, images included."""
    rows = [
        {"images": [image(colour)], "prompt": QUESTION, "completion": [{"role": "assistant", "content": colour}]}
        for colour in COLOURS
    ]
    trainer = trainer_for(rows, model, tmp_path, steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    right = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert (batch["labels"] != -100).sum() == 2 * len(rows)  # the colour and its full stop
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(right.item(), abs=1e-4)


def test_accumulation_weighs_tokens_alike(model, tmp_path):
    """Three answers of one word and one of nine: the same loss and gradient however the four are cut."""
    answers = ("red", "green", "a photo of the blue circle on the left", "red")
    rows = [
        {"images": [image(colour)], "prompt": QUESTION, "completion": [{"role": "assistant", "content": answer}]}
        for colour, answer in zip(COLOURS, answers)
    ]
    lines = []
    for batch_size in (4, 2, 1):
        trainer = trainer_for(rows, copy.deepcopy(model), tmp_path, steps=1, batch_size=batch_size)
        trainer.train()
        lines.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert lines[1] == pytest.approx(lines[0], rel=1e-5) and lines[2] == pytest.approx(lines[0], rel=1e-5)
