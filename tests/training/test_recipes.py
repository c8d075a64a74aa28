"""The YAML files of training/configs: each is read as a script reads it; the paper's figures and parameter counts hold."""

from pathlib import Path

import pytest
import torch
from transformers import Blip2VisionConfig, CLIPVisionConfig, OPTConfig, T5Config

from blip2x_training.arguments.finetuning import FinetuneArguments
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.arguments.pretraining import Stage1Arguments, Stage2Arguments
from blip2x_training.engine.optimizer import Schedule, build_optimizer, set_learning_rate
from modeling_blip2x import Blip2xConfig, Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xQFormerConfig
from tests.helpers.tiny import stage1, stage2

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
PAPER = CONFIGS / "paper"
PROCESSES = 16
# Shapes of the published models, as their config.json give them.
VIT = {
    "vit_g": Blip2VisionConfig(),
    "vit_l": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
    ),
}
LLM = {
    "opt2.7b": OPTConfig(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32),
    "opt6.7b": OPTConfig(hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32),
    "flant5xl": T5Config(d_model=2048, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"),
    "flant5xxl": T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"),
}
for llm in LLM.values():
    llm.word_embed_proj_dim = llm.hidden_size


def read(path: Path, kind: type, *flags: str):
    return parse_arguments(kind, ["--config", str(path), "--dataset", "d", "--output_dir", "o", *flags])


def kind_of(path: Path) -> type:
    name = path.stem.removeprefix("flickr8k_").removeprefix("quickstart_").removeprefix("photos_")
    return {"stage1": Stage1Arguments, "stage2": Stage2Arguments, "finetune": FinetuneArguments}[name.split("_")[0]]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*stage*.yaml")) + sorted(PAPER.glob("finetune*")), ids=str)
def test_every_recipe_is_read(path):
    kind = kind_of(path)
    flags = ["--vision_model", "v"] if kind is Stage1Arguments else ["--init_from", "o"]
    flags += ["--language_model", "l"] if kind is Stage2Arguments else []
    assert read(path, kind, *flags).output_dir == "o"


@pytest.mark.parametrize("vit, batch, layer", [("vit_g", 1680, -1), ("vit_l", 2320, -2)])
def test_stage1_recipes_hold_the_papers_figures(vit, batch, layer):
    args = read(PAPER / f"stage1_{vit}.yaml", Stage1Arguments)
    assert args.per_device_train_batch_size * PROCESSES * args.gradient_accumulation_steps == batch
    assert (args.max_steps, args.warmup_steps) == (250_000, 2000)
    assert (args.learning_rate, args.min_learning_rate, args.weight_decay) == (1e-4, 1e-5, 0.05)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.98)
    assert (args.image_size, args.max_text_length, args.num_query_tokens) == (224, 32, 32)
    assert args.augment and args.clean_captions and args.bf16 and args.hard_negative_steps == 0
    assert args.objectives == ["itc", "itm", "itg"] and args.qformer_init == "google-bert/bert-base-uncased"
    assert args.vision_feature_layer == layer and args.image_text_hidden_size == 256


@pytest.mark.parametrize("llm", LLM)
def test_stage2_recipes_hold_the_papers_figures(llm):
    args = read(PAPER / f"stage2_vit_g_{llm}.yaml", Stage2Arguments, "--init_from", "s")
    batch = 1520 if "t5" in llm else 1920
    assert args.per_device_train_batch_size * PROCESSES * args.gradient_accumulation_steps == batch
    assert (args.max_steps, args.warmup_steps) == (80_000, 2000)
    assert (args.learning_rate, args.min_learning_rate, args.weight_decay) == (1e-4, 5e-5, 0.05)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.98)
    assert (args.image_size, args.max_text_length, args.prompt) == (224, 32, "")
    assert args.augment and args.clean_captions and args.bf16


@pytest.mark.parametrize(
    "name, task, batch, size, rate, beta2, decay, prompt",
    [
        ("caption_opt2.7b", "caption", 256, 364, 1e-5, 0.999, 1.0, "a photo of"),
        ("caption_opt6.7b", "caption", 256, 364, 1e-5, 0.999, 0.95, "a photo of"),
        ("caption_flant5xl", "caption", 256, 364, 1e-5, 0.999, 1.0, "a photo of"),
        ("vqa_opt2.7b", "vqa", 128, 490, 1e-5, 0.999, 0.95, "Question: {} Answer:"),
        ("vqa_opt6.7b", "vqa", 128, 490, 1e-5, 0.999, 0.9, "Question: {} Answer:"),
        ("vqa_flant5xl", "vqa", 128, 490, 1e-5, 0.999, 0.95, "Question: {} Answer:"),
        ("retrieval_vit_g", "retrieval", 224, 364, 1e-5, 0.999, 0.95, ""),
        ("retrieval_vit_l", "retrieval", 224, 364, 5e-6, 0.98, 1.0, ""),
    ],
)
def test_finetuning_recipes_hold_the_papers_figures(name, task, batch, size, rate, beta2, decay, prompt):
    args = read(PAPER / f"finetune_{name}.yaml", FinetuneArguments, "--init_from", "s")
    assert args.per_device_train_batch_size * PROCESSES * args.gradient_accumulation_steps == batch
    assert (args.task, args.image_size, args.learning_rate, args.prompt) == (task, size, rate, prompt)
    assert (args.num_train_epochs, args.warmup_steps, args.weight_decay) == (5, 1000, 0.05)
    assert (args.adam_beta1, args.adam_beta2, args.layer_decay) == (0.9, beta2, decay)
    assert args.train_vision and args.augment == (task != "vqa") and args.qformer_text_input == (task == "vqa")
    assert args.lora is None  # the language model stays frozen


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("vit", VIT)
def test_stage1_trains_as_many_parameters_as_the_paper(vit):
    """188 million with the text branch (section 3.1); ours are 186.7 with ViT-g's features and 183.1 with ViT-L's, whose
    keys and values are narrower."""
    args = read(PAPER / f"stage1_{vit}.yaml", Stage1Arguments)
    with torch.device("meta"):
        config = Blip2xConfig(
            vision_config=VIT[vit].to_dict(),
            qformer_config=Blip2xQFormerConfig().to_dict(),  # of google-bert/bert-base-uncased
            num_query_tokens=args.num_query_tokens,
            image_text_hidden_size=args.image_text_hidden_size,
        )
        model = Blip2xForPreTraining(config)
    model.freeze_unimodal()
    assert trainable(model) == pytest.approx(188e6, rel=0.03)


@pytest.mark.parametrize(
    "llm, total", [("opt2.7b", 3.8e9), ("opt6.7b", 7.8e9), ("flant5xl", 4.1e9), ("flant5xxl", 12.1e9)]
)
def test_stage2_trains_as_many_parameters_as_the_paper(llm, total):
    """Table 2: 107 million of 3.8 billion with OPT-2.7b; with the others 108 of 7.8, 107 of 4.1, 108 of 12.1 billion."""
    with torch.device("meta"):
        config = Blip2xConfig(
            vision_config=VIT["vit_g"].to_dict(),
            qformer_config=Blip2xQFormerConfig(use_qformer_text_input=False).to_dict(),
            text_config=LLM[llm].to_dict(),
        )
        model = Blip2xForConditionalGeneration(config)
    model.freeze_unimodal()
    assert trainable(model) == pytest.approx(107e6 if llm in ("opt2.7b", "flant5xl") else 108e6, rel=0.005)
    # FlanT5's output layer is its own; transformers unties it when a checkpoint holds one, so here it is not counted.
    head = LLM[llm].vocab_size * LLM[llm].hidden_size if "t5" in llm else 0
    assert head + sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(total, rel=0.04)


def test_layer_decay_reaches_the_optimiser():
    """The lr of each group, after the schedule has set it, by the layer its parameters are in."""
    args = read(PAPER / "finetune_retrieval_vit_g.yaml", FinetuneArguments, "--init_from", "s")
    with torch.device("meta"):
        vision = Blip2VisionConfig().to_dict() | {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        qformer = Blip2xQFormerConfig(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2)
        model = Blip2xForPreTraining(Blip2xConfig(vision_config=vision, qformer_config=qformer.to_dict()))
    model.freeze_unimodal()
    model.unfreeze_vision()
    optimizer = build_optimizer(
        model,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        layer_decay=args.layer_decay,
    )
    peak = Schedule(max_steps=2000, warmup_steps=1000, peak=args.learning_rate, floor=0).rate_at(1000)
    set_learning_rate(optimizer, peak)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in rates
            continue
        rate, weight_decay = rates[id(parameter)]
        assert weight_decay == (0.05 if parameter.ndim >= 2 else 0.0), name
        above = 0
        if ".vision_model." in name:
            above = 40 if ".embeddings." in name else 39 - int(name.split(".layers.")[1].split(".")[0])
        assert rate == pytest.approx(1e-5 * 0.95**above), name


@pytest.mark.parametrize("stage", (1, 2))
def test_what_began_with_trained_weights_may_train_more_slowly(stage):
    """In stage 1 what text passes in BERT, in stage 2 all that stage 1 has trained."""
    if stage == 1:
        begun, kind, model = ["--qformer_init", "bert", "--vision_model", "v"], Stage1Arguments, stage1()
        slow = ("embeddings", ".attention.", "text_feed_forward", "qformer.layernorm")
        fast = (
            "crossattention",
            "query_feed_forward",
            "query_tokens",
            "ln_vision",
            "projection",
            "head",
            "temperature",
        )
    else:
        begun, kind, model = ["--init_from", "s", "--language_model", "l"], Stage2Arguments, stage2("opt")
        slow, fast = ("qformer", "query_tokens", "ln_vision"), ("language_projection",)
    needed = ["--dataset", "d", "--output_dir", "o"]
    args = parse_arguments(kind, [*needed, *begun, "--pretrained_lr_scale", "0.25", "--learning_rate", "0.01"])
    model.freeze_unimodal()
    optimizer = build_optimizer(
        model,
        learning_rate=0.01,
        weight_decay=0.05,
        betas=(0.9, 0.98),
        pretrained=args.pretrained,
        pretrained_scale=args.pretrained_lr_scale,
    )
    set_learning_rate(optimizer, 0.01)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert any(part in name for part in slow) != any(part in name for part in fast), name
            assert rates[id(parameter)] == (0.0025 if any(part in name for part in slow) else 0.01), name
    with pytest.raises(ValueError, match="every trained part is new"):
        parse_arguments(Stage1Arguments, [*needed, "--vision_model", "v", "--pretrained_lr_scale", "0.25"])
