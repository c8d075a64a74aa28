"""What a training step sends: predicted by formula, and counted in two processes.

`Exchange` counts what a rank hands to torch.distributed's functions. What goes over the wire is that times (n - 1) for
all_gather, 2 (n - 1) / n for all_reduce (ring), and what is for other ranks for all_to_all.
"""

import gc
import tempfile
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

FLOAT, LONG = 4, 8
STAGE1_MEANS = 4  # global means of ITC, ITM, its accuracy and ITG: two floats each


@dataclass
class Shape:
    """Stage 1 on one rank: pairs, queries, width of ITC, text length, image positions and width, trained parameters."""

    pairs: int
    queries: int
    projection: int
    text: int
    positions: int
    vision_width: int
    trained: int


def predict_stage1(shape: Shape, ranks: int, images_asked: int, images_given: int) -> dict[str, int]:
    """Bytes a rank hands over in a forward and backward of stage 1, by purpose; one forward a step.

    images_asked: images of other ranks that this rank drew as negatives; images_given: of this rank, by others.
    """
    features = shape.pairs * (shape.queries + 1) * shape.projection * FLOAT
    return {
        "all_gather features": features,
        "all_gather text and ids": shape.pairs * (2 * shape.text + 1) * LONG,
        "all_reduce feature gradients": ranks * features,
        "all_to_all images": images_given * shape.positions * shape.vision_width * FLOAT,
        "all_to_all numbers": images_asked * LONG + (ranks - 1) * LONG,
        "all_reduce sizes and means": ranks * LONG + LONG + STAGE1_MEANS * 2 * FLOAT,
        "all_reduce gradients": shape.trained * FLOAT,
    }


def predict_stage2(trained: int) -> dict[str, int]:
    """Stage 2 sends gradients, and two floats for the mean loss."""
    return {"all_reduce gradients": trained * FLOAT, "all_reduce sizes and means": 2 * FLOAT}


def on_the_wire(handed: dict[str, int], ranks: int) -> float:
    """Bytes a rank sends for what it hands over."""
    factor = {"all_gather": ranks - 1, "all_reduce": 2 * (ranks - 1) / ranks, "all_to_all": 1}
    return sum(size * factor[purpose.split()[0]] for purpose, size in handed.items())


class Exchange:
    """Counts the bytes handed to torch.distributed, by function and shape of a row, while it is entered."""

    NAMES = ("all_gather", "all_reduce", "all_to_all_single")

    def __enter__(self) -> "Exchange":
        self.bytes: Counter = Counter()
        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name in self.NAMES:
            setattr(dist, name, self.counted(name))
        return self

    def __exit__(self, *_) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def counted(self, name: str):
        def call(tensor, *args, **kwargs):
            sent = tensor if name == "all_reduce" else args[0]
            size = sent.nbytes
            if name == "all_to_all_single":  # what a rank gives itself goes nowhere
                splits = kwargs.get("input_split_sizes") or [1] * dist.get_world_size()
                size = sent.nbytes * (sum(splits) - splits[dist.get_rank()]) // max(sum(splits), 1)
            self.bytes[(name.removesuffix("_single"), str(sent.dtype), tuple(sent.shape[1:]))] += size
            return self.originals[name](tensor, *args, **kwargs)

        return call

    def gradient_hook(self, state, bucket):
        """For DDP, whose all_reduce does not pass python."""
        self.bytes[("all_reduce", "gradients", ())] += bucket.buffer().nbytes
        mean = bucket.buffer().div_(dist.get_world_size())
        return self.originals["all_reduce"](mean, async_op=True).get_future().then(lambda done: done.value()[0])


def count_step(rank: int, stage: int, pairs: int) -> dict:
    """One step of a tiny model in this process group: bytes counted, bytes predicted."""
    from tests.helpers import tiny

    if stage == 1:
        model, data = tiny.stage1().train(), tiny.batch(rows=pairs, seed=rank)
        data["image_ids"] = torch.arange(pairs) + rank * pairs
        extra = {"negative_seed": 3}
    else:
        model = tiny.stage2("opt", qformer={"use_qformer_text_input": False})
        model.freeze_unimodal()
        data, extra = tiny.prompt(model.train(), rows=pairs, seed=rank), {}
        data["labels"] = data["input_ids"].masked_fill(data["input_ids"] == model.config.image_token_index, -100)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parallel = DistributedDataParallel(model)
    with Exchange() as exchange:
        parallel.register_comm_hook(None, exchange.gradient_hook)
        parallel(**data, **extra).loss.backward()
    counted = by_purpose(exchange.bytes)
    if stage == 2:
        return {"counted": counted, "predicted": predict_stage2(trained), "raw": dict(exchange.bytes)}
    config = model.config
    positions, width = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1, 48
    shape = Shape(pairs, config.num_query_tokens, 16, data["input_ids"].shape[1], positions, width, trained)
    given = counted["all_to_all images"] // (positions * width * FLOAT)
    asked = (counted["all_to_all numbers"] - (dist.get_world_size() - 1) * LONG) // LONG
    return {
        "counted": counted,
        "predicted": predict_stage1(shape, dist.get_world_size(), asked, given),
        "raw": dict(exchange.bytes),
        "given": given,
        "asked": asked,
    }


def by_purpose(counted: dict[tuple, int]) -> dict[str, int]:
    """The counts under the names of the prediction; what fits nowhere keeps its own."""
    purposes: Counter = Counter()
    for (name, dtype, shape), size in counted.items():
        integer = dtype in ("torch.int64", "torch.bool")
        if dtype == "gradients":
            purposes["all_reduce gradients"] += size
        elif name == "all_gather":
            purposes["all_gather text and ids" if integer else "all_gather features"] += size
        elif name == "all_to_all":
            purposes["all_to_all numbers" if integer else "all_to_all images"] += size
        elif shape:
            purposes["all_reduce feature gradients"] += size
        else:
            purposes["all_reduce sizes and means"] += size
    return dict(purposes)


def run_rank(rank: int, folder: str, stage: int, pairs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(count_step(rank, stage, pairs), f"{folder}/rank{rank}.pt")
    # DDP and its hook hold the process group in circles: left to the interpreter's end, its threads could outlive it.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def count_in_two_processes(stage: int, pairs: int = 4) -> list[dict]:
    """`count_step` of both ranks."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, args=(folder, stage, pairs), nprocs=2)
        return [torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in range(2)]


# The paper's sizes: ViT-g/14 at 224 (257 x 1408), 32 queries, BERT-base, batch of 100 pairs a GPU.
TOWER, TRAINED1, TRAINED2, LLM = 986e6, 187e6, 107e6, 2.65e9
FLOPS, LINK = 150e12, 25e9  # assumed: what a GPU really computes a second in bf16, bytes a second to its neighbour
RANKS = (1, 2, 4, 8, 16)


def table() -> str:
    """Markdown for docs/scale.md: stages x ranks at 100 pairs a rank."""
    rows = [
        "| stage | ranks | global batch | MB sent a step | GB of states | GB of ITC scores | s a step | steps / s |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|")
    for stage in (1, 2):
        for ranks in RANKS:
            pairs = 100
            remote = expected_remote(pairs, ranks)
            shape = Shape(pairs, 32, 256, 32, 257, 1408, int(TRAINED1))
            handed = predict_stage1(shape, ranks, remote, remote) if stage == 1 else predict_stage2(int(TRAINED2))
            sent = on_the_wire(handed, ranks)
            seconds = flops(stage, pairs) / FLOPS + sent / LINK
            trained, frozen = (TRAINED1, TOWER) if stage == 1 else (TRAINED2, TOWER + LLM)
            states = (2 * frozen + 16 * trained) / 1e9
            scores = 2 * pairs * ranks * pairs * 32 * FLOAT / 1e9 if stage == 1 else 0
            cells = (stage, ranks, ranks * pairs, f"{sent / 1e6:.0f}", f"{states:.1f}", f"{scores:.2f}")
            rows.append("| " + " | ".join(map(str, (*cells, f"{seconds:.2f}", f"{1 / seconds:.2f}"))) + " |")
    return "\n".join(rows)


def expected_remote(pairs: int, ranks: int) -> int:
    """Different images of other ranks among `pairs` negatives drawn evenly from all others; drawn hard, at most as many."""
    others = ranks * pairs - 1
    return round((ranks - 1) * pairs * (1 - (1 - 1 / max(others, 1)) ** pairs))


def flops(stage: int, pairs: int) -> float:
    """Two operations a parameter and token forward, four backward (two where nothing below trains)."""
    tower = 2 * TOWER * 257 * pairs
    block = 85e6  # BERT-base without embeddings, one feed-forward
    # Of the image, in every other layer; forward and gradient of the weights.
    keys = 2 * 12 / 2 * 2 * 1408 * 768 * 257 * pairs * 2.0
    if stage == 1:
        tokens = 32 + 32 + 3 * 64 + 32  # queries, text alone, three pairs of ITM, text of ITG
        return tower + 6 * block * tokens * pairs + keys
    return tower + 6 * block * 32 * pairs + keys + 4 * LLM * 64 * pairs
