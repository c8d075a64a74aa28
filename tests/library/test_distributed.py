"""Two gloo processes give the losses and gradients of one process with the same global batch."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from modeling_blip2x.distributed_blip2x import average_gradients
from modeling_blip2x.grad_cache_blip2x import chunked_backward
from tests.helpers.tiny import batch, prompt, stage1, stage2

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LOSSES = ("loss", "loss_itc", "loss_itm", "loss_itg", "loss_spread", "itm_accuracy")
SPLITS = {"even": (4, 4), "uneven": (3, 5), "one row": (7, 1)}


def stage1_inputs() -> dict[str, torch.Tensor]:
    data = batch(rows=8)
    data["image_ids"] = torch.tensor([0, 1, 2, 3, 4, 5, 1, 7])  # rows 1 and 6, on different ranks, are one image
    return data


def stage2_inputs(model) -> dict[str, torch.Tensor]:
    data = prompt(model, rows=8)
    labels = data["input_ids"].masked_fill(data["input_ids"] == model.config.image_token_index, -100)
    labels[:3, :-1] = -100  # ranks supervise different numbers of tokens
    return {**data, "labels": labels}


def make(stage: int | str):
    """Trainable model in train mode without dropout, its inputs, and what else the forward takes."""
    if stage in (1, "sigmoid"):
        model = stage1(qformer=NO_DROPOUT, itc_loss="softmax" if stage == 1 else stage, query_spread=1.0)
        return model.train(), stage1_inputs(), {"negative_seed": 5}
    model = stage2("opt", std=0.1, qformer={**NO_DROPOUT, "use_qformer_text_input": False})
    model.freeze_unimodal()
    return model.train(), stage2_inputs(model), {}


def shared(data: dict[str, torch.Tensor], rank: int, sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    start = sum(sizes[:rank])
    return {name: value[start : start + sizes[rank]] for name, value in data.items()}


def train_step(rank: int, stage: int | str, sizes: tuple[int, int], chunk_size: int | None = None) -> dict:
    model, data, extra = make(stage)
    share = shared(data, rank, sizes)
    if rank == 1 and stage != 2:  # this rank's texts are padded less
        longest = share["attention_mask"].sum(1).max()
        share["input_ids"], share["attention_mask"] = (share[k][:, :longest] for k in ("input_ids", "attention_mask"))
    parallel = DistributedDataParallel(model)  # kept: its hooks go with it
    out = parallel(**share, **extra)
    out.loss.backward()
    if chunk_size:  # after a plain step, which must leave nothing behind in DDP
        parallel.zero_grad()
        for _ in range(2):  # accumulation: averaged once at the end
            half = SimpleNamespace(autocast=nullcontext, backward=lambda loss: (loss / 2).backward())
            out = chunked_backward(model, chunk_size=chunk_size, accelerator=half, **share, **extra)
        average_gradients(parallel.parameters())
    return {
        "losses": {name: out[name].detach() for name in LOSSES if out.get(name) is not None},
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


def count_sent(rank: int) -> list[tuple[str, tuple[int, ...]]]:
    """Shapes of what a stage-1 forward hands to the collectives that move rows."""
    model, data, extra = make(1)
    sent, originals = [], {name: getattr(dist, name) for name in ("all_gather", "all_to_all_single")}

    def counted(name):
        def send(out, rows, *args, **kwargs):
            sent.append((name, tuple(rows.shape)))
            return originals[name](out, rows, *args, **kwargs)

        return send

    for name in originals:
        setattr(dist, name, counted(name))
    model(**shared(data, rank, (4, 4)), **extra)
    for name, original in originals.items():
        setattr(dist, name, original)
    return sent


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    steps = {
        f"{stage} {split}": train_step(rank, stage, SPLITS[split]) for stage in (1, 2, "sigmoid") for split in SPLITS
    }
    steps |= {f"chunks {split}": train_step(rank, 1, SPLITS[split], chunk_size=2) for split in SPLITS}
    steps |= {f"sigmoid chunks {split}": train_step(rank, "sigmoid", SPLITS[split], chunk_size=2) for split in SPLITS}
    torch.save({"steps": steps, "sent": count_sent(rank)}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Everything in one pair of processes: starting them costs more than what they do."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("stage", [1, 2, "chunks", "sigmoid", "sigmoid chunks"])
def test_two_processes_equal_one(ranks, stage, split):
    model, data, extra = make({"chunks": 1, "sigmoid chunks": "sigmoid"}.get(stage, stage))
    out = model(**data, **extra)
    out.loss.backward()
    for rank, results in enumerate(ranks):
        step = results["steps"][f"{stage} {split}"]
        for name, value in step["losses"].items():
            assert torch.allclose(value, out[name], atol=1e-5), f"{name} of rank {rank}"
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert torch.allclose(step["gradients"][name], parameter.grad, atol=1e-5), f"{name} of rank {rank}"


def test_image_embeddings_are_not_all_gathered(ranks):
    """Features (5, 48) of an image travel only to a rank that drew the image as a negative."""
    for results in ranks:
        sent = results["sent"]
        assert not any(name == "all_gather" and shape[1:] == (5, 48) for name, shape in sent)
        assert any(name == "all_to_all_single" and shape[1:] == (5, 48) and shape[0] <= 4 for name, shape in sent)
