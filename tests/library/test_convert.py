"""Checkpoints of transformers, LAVIS and mmpretrain, in and out, by the function behind the command."""

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    CLIPVisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from modeling_blip2x.assembling_blip2x import load_vision_model
from modeling_blip2x.convert import convert, main
from modeling_blip2x.tensor_names_blip2x import lavis_names, mmpretrain_names
from tests.helpers.golden import Golden, stage1_outputs, stage2_inputs
from tests.helpers.official_checkpoints import SHAPES, golden_config, their_config, write_official
from tests.helpers.tiny import TOWERS, batch, prompt


def randomised(model, std=0.4):
    """Weights large enough that the image matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "patch" not in name:
                parameter.normal_(0, std / 2 if "vision" in name else std)
            elif "norm" not in name.lower():
                parameter.normal_(0, 0.1)
    return model.eval()


def read_by_both(their_class, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    reloaded = their_class.from_pretrained(tmp_path / "theirs").eval()
    return reloaded, AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("language_model", ["opt", "t5"])
@torch.no_grad()
def test_blip2_of_transformers_gives_the_same_numbers(language_model, shape, tmp_path):
    theirs = randomised(Blip2ForConditionalGeneration(their_config(Blip2Config, language_model, shape)))
    theirs, ours = read_by_both(Blip2ForConditionalGeneration, theirs, tmp_path)
    inputs = prompt(ours)
    given = inputs | ({"decoder_input_ids": inputs["input_ids"][:, :3] * 0} if language_model == "t5" else {})
    assert torch.allclose(theirs(**given).logits, ours(**given).logits, atol=1e-5)
    other = given | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.allclose(ours(**given).logits, ours(**other).logits, atol=1e-3), "the image does not matter here"
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
        expected = theirs.generate(**inputs, **options)
        assert torch.equal(expected, ours.generate(**inputs, **options))


@pytest.mark.parametrize("language_model", ["t5", "llama"])
@torch.no_grad()
def test_instructblip_of_transformers_reads_the_instruction(language_model, tmp_path):
    theirs = randomised(InstructBlipForConditionalGeneration(their_config(InstructBlipConfig, language_model, "small")))
    theirs, ours = read_by_both(InstructBlipForConditionalGeneration, theirs, tmp_path)
    given = prompt(ours)
    if language_model == "t5":
        given["decoder_input_ids"] = given["input_ids"][:, :3] * 0
    given["qformer_input_ids"] = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    given["qformer_attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = theirs(**given).logits
    assert torch.allclose(expected, ours(**given).logits, atol=1e-5)
    given["qformer_input_ids"] = given["qformer_input_ids"].flip(0)
    assert not torch.allclose(expected, ours(**given).logits, atol=1e-3)


@torch.no_grad()
def test_retrieval_of_transformers_gives_the_same_scores(tmp_path, recwarn):
    theirs = randomised(
        Blip2ForImageTextRetrieval(their_config(Blip2Config, "opt", "small", use_qformer_text_input=True))
    )
    theirs.config.image_token_index = None
    theirs.save_pretrained(tmp_path / "theirs")
    notes = convert(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    assert "neither the ITC temperature nor the ITG head" in notes[0]
    ours = AutoModelForPreTraining.from_pretrained(tmp_path / "ours").eval()
    inputs = batch(3)
    images = ours.get_image_features(inputs["pixel_values"]).pooler_output
    texts = ours.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    expected = theirs(**inputs, use_image_text_matching_head=False).logits_per_image
    assert torch.allclose(expected, ours.itc_scores(images, texts), atol=1e-5)
    expected = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    assert torch.allclose(expected, ours.itm_logits(**inputs), atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_lavis_stage1_gives_the_golden_numbers(suffix, tmp_path):
    write_official("stage1", tmp_path / f"lavis{suffix}")
    convert(str(tmp_path / f"lavis{suffix}"), str(tmp_path / "ours"), config=golden_config("stage1"))
    golden = Golden("stage1")
    outputs = stage1_outputs(golden, AutoModelForPreTraining.from_pretrained(tmp_path / "ours").eval())
    for name, expected in {**golden.outputs, **golden.expected}.items():
        assert torch.allclose(outputs[name], torch.as_tensor(expected), atol=1e-4), name


@pytest.mark.parametrize("name", ["stage2_opt", "stage2_t5"])
@torch.no_grad()
def test_lavis_stage2_gives_the_golden_numbers(name, tmp_path):
    write_official(name, tmp_path / "lavis.pth")
    convert(str(tmp_path / "lavis.pth"), str(tmp_path / "ours"), config=golden_config(name))
    golden = Golden(name)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    assert model(**stage2_inputs(golden, model)).loss.item() == pytest.approx(golden.expected["loss"], abs=1e-4)
    model.save_pretrained(tmp_path / "again")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()
    assert model(**stage2_inputs(golden, model)).loss.item() == pytest.approx(golden.expected["loss"], abs=1e-4)


@torch.no_grad()
def test_mmpretrain_retrieval_gives_the_golden_numbers(tmp_path):
    golden = Golden("mmpretrain_retrieval")
    torch.save({"state_dict": golden.official, "meta": {}}, tmp_path / "mm.pth")
    convert(str(tmp_path / "mm.pth"), str(tmp_path / "ours"), config=golden_config("mmpretrain_retrieval"))
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "ours").eval()
    inputs = golden.inputs
    outputs = {
        "image_embeds": model.model.ln_vision(model.model.get_vision_embeds(inputs["pixel_values"])),
        "image_features": model.get_image_features(inputs["pixel_values"]).pooler_output,
        "text_features": model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
        "itm_logits": model.itm_logits(**inputs),
    }
    assert outputs.keys() == golden.outputs.keys()
    for name, expected in golden.outputs.items():
        assert torch.allclose(outputs[name], expected, atol=1e-4), name


@pytest.mark.parametrize("name", ["stage2_opt", "stage2_t5"])
def test_partial_lavis_file_is_completed_by_tower_and_language_model(name, tmp_path):
    official = Golden(name).official
    trained = {n: t for n, t in official.items() if not n.startswith(("visual_encoder.", "opt_model.", "t5_model."))}
    torch.save({"model": trained}, tmp_path / "lavis.pth")
    heads = {"qformer_config": {"num_attention_heads": 4}}
    with pytest.raises(ValueError, match="no vision tower.*--vision_model"):
        convert(str(tmp_path / "lavis.pth"), str(tmp_path / "ours"), config=heads)
    width = official["ln_vision.weight"].shape[0]
    CLIPVisionModel(TOWERS["clip"].__class__(**(TOWERS["clip"].to_dict() | {"hidden_size": width}))).save_pretrained(
        tmp_path / "tower"
    )
    given = {"config": heads, "vision_model": str(tmp_path / "tower")}
    with pytest.raises(ValueError, match="no language model.*--language_model"):
        convert(str(tmp_path / "lavis.pth"), str(tmp_path / "ours"), **given)
    assert not (tmp_path / "ours").exists()
    text = Golden(name).config["text"]
    kind = OPTForCausalLM if "opt" in name else T5ForConditionalGeneration
    kind(kind.config_class(**{k: v for k, v in text.items() if k != "lm_head"})).save_pretrained(tmp_path / "llm")
    notes = convert(str(tmp_path / "lavis.pth"), str(tmp_path / "ours"), **given, language_model=str(tmp_path / "llm"))
    assert any("vision tower comes from" in note for note in notes)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert model.config.vision_feature_layer == -2  # CLIP, as the official code reads it
    projection = "opt_proj.weight" if "opt" in name else "t5_proj.weight"
    assert torch.equal(model.language_projection.weight, official[projection])


@pytest.mark.parametrize("has_newline", [True, False])
def test_official_opt_stops_at_a_newline(has_newline, tmp_path):
    write_official("stage2_opt", tmp_path / "lavis.pth")
    pieces = {
        piece: number for number, piece in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", *["Ċ"] * has_newline])
    }
    backend = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "llm")
    given = {"config": golden_config("stage2_opt"), "language_model": str(tmp_path / "llm")}
    convert(str(tmp_path / "lavis.pth"), str(tmp_path / "ours"), **given)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert (model.generation_config.eos_token_id == pieces.get("Ċ")) == has_newline
    assert model.generation_config.suppress_tokens == [model.config.image_token_index]


@pytest.mark.parametrize("retrieval", [True, False])
def test_missing_and_unknown_tensors_are_named(retrieval, tmp_path):
    official = Golden("stage1").official
    if retrieval:
        del official["itm_head.weight"], official["Qformer.bert.encoder.layer.1.output.dense.weight"]
        message = "2 missing: .*model.qformer.layers.1.text_feed_forward.down.weight.*itm_head.weight"
    else:
        official["novel.weight"] = torch.zeros(2)
        message = "1 tensors of .* have no counterpart: novel.weight"
    torch.save(official, tmp_path / "lavis.pth")
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "lavis.pth"), str(tmp_path / "ours"), config=golden_config("stage1"))
    assert [path.name for path in tmp_path.iterdir()] == ["lavis.pth"]


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"model": {"query_tokens": torch.zeros(1)}, "config": print}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors.*could run its code"):
        convert(str(tmp_path / "evil.pth"), str(tmp_path / "ours"))


def test_a_cut_file_is_refused(tmp_path):
    write_official("stage1", tmp_path / "lavis.pth")
    content = (tmp_path / "lavis.pth").read_bytes()
    (tmp_path / "lavis.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole torch file"):
        convert(str(tmp_path / "lavis.pth"), str(tmp_path / "ours"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["missing.pth", "out"], "There is no missing.pth"),
        (["here.txt", "out"], "neither a folder nor a .safetensors"),
        (["here.txt", "here.txt"], "exists. Remove it"),
        (["here.txt", "out", "--config", "none.json"], "--config none.json cannot be read"),
        (["here.txt", "out", "--to", "lavis"], "LAVIS reads .pth files"),
    ],
)
def test_command_line_errors(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("x")
    with pytest.raises(ValueError, match=message):
        main(argv)


def test_tower_of_a_blip2_checkpoint_keeps_its_weights(tmp_path):
    theirs = Blip2ForConditionalGeneration(their_config(Blip2Config, "opt", "small"))
    theirs.save_pretrained(tmp_path)
    expected = theirs.vision_model.state_dict()
    tower = load_vision_model(str(tmp_path)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tower.items())
    assert expected.keys() - tower.keys() == {"post_layernorm.weight", "post_layernorm.bias"}


def test_a_tower_without_weights_is_an_error(tmp_path):
    CLIPVisionModel(TOWERS["clip"]).save_pretrained(tmp_path)
    save_file({"something.else": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no weights for .* tensors of a CLIPVisionModel"):
        load_vision_model(str(tmp_path))


@torch.no_grad()
def test_mmpretrain_caption_gives_the_golden_numbers(tmp_path):
    """The official stage-2 weights under mmpretrain's names, without the LLM, which its files do not hold."""
    golden = Golden("stage2_opt")
    table, names = mmpretrain_names(retrieval=False), {}
    for name, tensor in golden.official.items():
        if name.startswith("opt_model.") or name.endswith("position_ids"):
            continue
        if name.endswith(("q_bias", "v_bias")):
            layer = name.split(".")[2]
            names[f"vision_backbone.layers.{layer}.attn.{name.rsplit('.', 1)[1]}"] = tensor
        else:
            names[table.theirs(lavis_names("opt").ours(name))] = tensor
    torch.save({"state_dict": names}, tmp_path / "mm.pth")
    text = {k: v for k, v in golden.config["text"].items() if k not in ("lm_head", "model_type")}
    state = {n.removeprefix("opt_model."): t for n, t in golden.official.items() if n.startswith("opt_model.")}
    llm = OPTForCausalLM.from_pretrained(None, config=OPTForCausalLM.config_class(**text), state_dict=state)
    llm.save_pretrained(tmp_path / "llm")
    fields = {name: value for name, value in golden_config("stage2_opt").items() if name != "text_config"}
    convert(str(tmp_path / "mm.pth"), str(tmp_path / "ours"), config=fields, language_model=str(tmp_path / "llm"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    assert model(**stage2_inputs(golden, model)).loss.item() == pytest.approx(golden.expected["loss"], abs=1e-4)
