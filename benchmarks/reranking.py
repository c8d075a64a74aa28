"""Re-ranking by ITM: 100 images, 500 texts, the 128 best texts of each image, as run_evaluation.py scores them.

Baselines: each pair by itself, its image through the key and value projections of the Q-Former each time; and plain
batches of 64 pairs, where every pair brings its own copy of the image. Q-Former 12 x 768, features (257, 1408) given, texts
of 8 to 16 tokens. All 12 800 pairs would take a CPU minutes: ours scores the whole shortlists of one image, the
baselines a part of the same pairs, and the table has the milliseconds a pair.
"""

import torch
from accelerate import Accelerator
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.measure import Row, alternating_seconds, faster
from blip2x_training.evaluation.retrieval import RetrievalSet, match_shortlists, shortlists
from modeling_blip2x import Blip2xForImageTextRetrieval, Blip2xForPreTraining, Blip2xQFormerConfig

IMAGES, TEXTS, K = 100, 500, 128
POSITIONS, WIDTH = 257, 1408
SCORED = 1  # images whose shortlists ours scores on a CPU
ALONE, BATCHED = 16, 64  # pairs that the baselines score
AIM = 3.0


class Encoded(RetrievalSet):
    """Features and texts as they are after ITC, with random cosines: what is measured is ITM alone."""

    def __init__(self, model: torch.nn.Module, device: str, images: int):
        self.model, self.accelerator, self.device = model, Accelerator(cpu=device == "cpu"), torch.device(device)
        self.kept = dict(enumerate(torch.randn(images, POSITIONS, WIDTH)))
        self.input_ids = torch.randint(1000, 30000, (TEXTS, 16))
        self.attention_mask = (torch.arange(16) < torch.randint(8, 17, (TEXTS, 1))).long()
        self.cosines = torch.randn(images, TEXTS)


def build_model(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16)
    )
    model = Blip2xForPreTraining.from_unimodal(tower, Blip2xQFormerConfig(encoder_hidden_size=WIDTH))
    scorer = Blip2xForImageTextRetrieval(model.config, vision_model=tower)
    scorer.load_state_dict(model.state_dict())
    return scorer.to(device).eval()


@torch.inference_mode()
def run(device: str) -> list[Row]:
    images = SCORED if device == "cpu" else IMAGES
    data = Encoded(build_model(device), device, images)
    # The best texts of each image; scoring the best images of each text is the same work.
    listed = shortlists(data.cosines, K) | {"t2i": torch.zeros_like(data.cosines, dtype=torch.bool)}
    rows, texts = listed["i2t"].nonzero(as_tuple=True)

    def ours() -> torch.Tensor:
        return match_shortlists(data, listed)[1][rows, texts]

    def plain(pairs: int, batch_size: int) -> torch.Tensor:
        logits = []
        for part in torch.arange(pairs).split(batch_size):
            embeds = torch.stack([data.kept[row] for row in rows[part].tolist()]).to(device)
            logits.append(data.model.itm_logits(vision_embeds=embeds, **data.text(texts[part]))[:, 1].cpu())
        return torch.cat(logits)

    found, alone, batched = ours(), plain(ALONE, 1), plain(BATCHED, 64)
    apart = max((found[:ALONE] - alone).abs().max(), (found[:BATCHED] - batched).abs().max()).item()
    calls = {"ours": ours, "alone": lambda: plain(ALONE, 1), "batched": lambda: plain(BATCHED, 64)}
    pairs = {"ours": len(rows), "alone": ALONE, "batched": BATCHED}
    seconds = alternating_seconds(calls, device, repeats=2, warmup=0)
    cost = {name: 1000 * value / pairs[name] for name, value in seconds.items()}
    return [
        faster(
            "reranking",
            f"pair by pair, logits {apart:.0e} apart",
            device,
            "float32",
            cost["ours"],
            cost["alone"],
            "ms/pair",
            AIM,
        ),
        faster(
            "reranking", "plain batches of 64 pairs", device, "float32", cost["ours"], cost["batched"], "ms/pair", None
        ),
    ]
