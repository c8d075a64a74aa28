"""Losses by a trainer's own count of tokens (`num_items_in_batch`), and transformers' Trainer, which counts them."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_blip2x.grad_cache_blip2x import chunked_backward
from tests.helpers.tiny import QUERIES, batch, prompt, stage1, stage2

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTHS = (5, 1, 1, 4, 1, 1, 2, 1)  # supervised tokens of each row


def language_model(name: str):
    model = stage2(name, std=0.3, qformer={**NO_DROPOUT, "use_qformer_text_input": False})
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
    model.freeze_unimodal()
    return model


def labelled(model) -> dict[str, torch.Tensor]:
    rows = prompt(model, rows=8)
    text = rows["input_ids"] if not model.config.is_encoder_decoder else rows["input_ids"][:, QUERIES:]
    rows["labels"] = text.clone()
    for row, length in zip(rows["labels"], LENGTHS):
        row[:-length] = -100
    return rows


def cut(rows: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor[part] for name, tensor in rows.items()} for part in (slice(0, 3), slice(3, 8))]


@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
def test_parts_of_a_batch_add_up_to_its_mean_over_tokens(name):
    model = language_model(name)
    rows = labelled(model)
    for mode in (model.eval(), model.train()):
        whole = mode(**rows).loss
        parts = [mode(**part, num_items_in_batch=sum(LENGTHS)).loss for part in cut(rows)]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
        assert parts[0].item() != pytest.approx(mode(**cut(rows)[0]).loss.item(), rel=0.1)
        assert torch.equal(parts[0], mode(**cut(rows)[0], num_items_in_batch=torch.tensor(sum(LENGTHS))).loss)


def test_placeholders_that_were_counted_do_not_lessen_the_loss():
    """Labels made as a copy of the ids: whoever counts them counts the places of images, which are never supervised."""
    model = language_model("opt").train()
    rows = prompt(model, rows=8)
    rows["labels"] = rows["input_ids"].clone()
    counted = (rows["labels"][:, 1:] != -100).sum()
    assert model(**rows, num_items_in_batch=counted).loss.item() == pytest.approx(model(**rows).loss.item(), rel=1e-6)


def test_nothing_supervised_is_no_loss():
    model = language_model("opt").train()
    rows = labelled(model)
    rows["labels"][:] = -100
    loss = model(**rows, num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert loss.item() == 0 and not model.language_projection.weight.grad.any()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_stage_1_divides_itg_alone(chunk_size):
    """ITC and ITM stay means of their batch, in chunks too."""
    model, rows = stage1(qformer=NO_DROPOUT).train(), batch(rows=8)
    rows["attention_mask"][2:, 4:] = 0
    tokens = rows["attention_mask"][:, 1:].sum()

    def run(part, **count):
        if chunk_size:
            return chunked_backward(model, chunk_size=chunk_size, negative_seed=5, **part, **count)
        return model(negative_seed=5, **part, **count)

    whole, parts = run(rows), [run(part, num_items_in_batch=tokens) for part in cut(rows)]
    assert sum(part.loss_itg for part in parts).item() == pytest.approx(whole.loss_itg.item(), rel=1e-6)
    plain = [run(part) for part in cut(rows)]
    for part, same in zip(parts, plain):
        assert part.loss_itc.item() == same.loss_itc.item() and part.loss_itm.item() == same.loss_itm.item()
        total = part.loss_itc + part.loss_itm + part.loss_itg
        assert part.loss.item() == pytest.approx(total.item(), rel=1e-6)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.rows.items()}


def trained(name: str, folder, batch_size: int, smoothing: float) -> tuple[float, float, float]:
    """Loss and gradient norm of one step over eight rows by Trainer, and the loss that it evaluates."""
    model = language_model(name)
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size,
        per_device_eval_batch_size=8, label_smoothing_factor=smoothing, max_grad_norm=1e9, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", remove_unused_columns=False, disable_tqdm=True, learning_rate=0.0,
    )  # fmt: skip
    rows = labelled(model)
    if smoothing and name == "t5":  # Trainer takes the labels away
        rows["decoder_input_ids"] = model.language_model.prepare_decoder_input_ids_from_labels(labels=rows["labels"])
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(rows), eval_dataset=Rows(rows))
    trainer.train()
    line = trainer.state.log_history[0]
    return line["loss"], line["grad_norm"], trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_trainer_weighs_tokens_alike(name, smoothing, tmp_path):
    """Also with its label smoothing. The loss that it logs has four decimals up to some release."""
    whole = trained(name, tmp_path, 8, smoothing)
    assert whole[0] == pytest.approx(whole[2], abs=1e-4)
    for batch_size in (4, 2, 1):
        assert trained(name, tmp_path, batch_size, smoothing) == pytest.approx(whole, rel=1e-5), batch_size
