"""Models from parts, and the hand-over from stage 1 to stage 2."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPT2Model,
)

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xQFormerConfig
from tests.helpers.tiny import LANGUAGE_MODELS, TOWERS, batch, bert_tokenizer, qformer_config, stage1, stage1_processor


def language_model(name: str):
    torch.manual_seed(3)
    config = LANGUAGE_MODELS[name]
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)


def vision_model(name: str = "clip"):
    torch.manual_seed(2)
    return AutoModel.from_config(TOWERS[name])


def equal_states(a: torch.nn.Module, b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("tower", ["clip", "dinov2", "mobilenet"])
def test_loaded_tower_and_llm_are_left_alone(tower):
    vision, llm = vision_model(tower), language_model("opt")
    before = {k: v.clone() for k, v in vision.state_dict().items()}, {k: v.clone() for k, v in llm.state_dict().items()}
    model = Blip2xForConditionalGeneration.from_unimodal(
        vision, llm, Blip2xQFormerConfig(**qformer_config()), image_token_index=69
    )
    assert equal_states(model.model.vision_model, before[0]) and equal_states(model.language_model, before[1])


def test_tower_from_a_folder_equals_the_module(tmp_path):
    vision_model().save_pretrained(tmp_path)
    from_folder = Blip2xForPreTraining.from_unimodal(str(tmp_path), Blip2xQFormerConfig(**qformer_config()))
    assert equal_states(from_folder.model.vision_model, vision_model().state_dict())


def test_only_the_tower_of_an_image_text_model_is_read(tmp_path):
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config=TOWERS["clip"].to_dict(),
        text_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 40,
        },
    )
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path)
    model = Blip2xForPreTraining.from_unimodal(str(tmp_path), Blip2xQFormerConfig(**qformer_config()))
    pixels = batch()["pixel_values"]
    with torch.no_grad():
        expected = clip.eval().vision_model(pixels).last_hidden_state
        assert torch.allclose(model.eval().model.get_vision_embeds(pixels), expected, atol=1e-6)


def test_feature_layer_picks_the_layer():
    tower = vision_model().eval()
    model = Blip2xForPreTraining.from_unimodal(tower, Blip2xQFormerConfig(**qformer_config()), vision_feature_layer=-2)
    pixels = batch()["pixel_values"]
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(model.eval().model.get_vision_embeds(pixels), expected)


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(1)
    model = BertModel(
        BertConfig(vocab_size=60, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
                   max_position_embeddings=64, type_vocab_size=2)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "bert")
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


def test_qformer_starts_from_bert(bert):
    """Text alone gives BERT's own output; the query feed-forward is a copy of BERT's; [DEC] is one more row."""
    folder, model = bert
    ours = Blip2xForPreTraining.from_unimodal(vision_model(), str(folder)).eval()
    config = ours.config.qformer_config
    assert (config.vocab_size, config.bos_token_id) == (61, 60)
    data = batch()
    with torch.no_grad():
        expected = model.eval()(data["input_ids"], data["attention_mask"]).last_hidden_state
        hidden = ours.model.qformer.encode_text(data["input_ids"], data["attention_mask"]).hidden
    assert torch.allclose(hidden[0], expected[0], atol=1e-5)
    for layer in ours.model.qformer.layers:
        text, query = layer.text_feed_forward.state_dict(), layer.query_feed_forward.state_dict()
        assert all(torch.equal(text[name], query[name]) for name in text)
    assert ours.model.qformer.layers[0].crossattention.query.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_tokenizer_must_fit(bert):
    tokenizer = stage1_processor().tokenizer
    with pytest.raises(ValueError, match=rf"tokenizer has {len(tokenizer)} tokens but the Q-Former's vocab_size is 20"):
        Blip2xForPreTraining.from_unimodal(
            vision_model(), Blip2xQFormerConfig(**qformer_config(vocab_size=20, bos_token_id=19)), tokenizer=tokenizer
        )
    with pytest.raises(ValueError, match=r"bos_token_id \(\[DEC\]\) is"):
        Blip2xForPreTraining.from_unimodal(vision_model(), Blip2xQFormerConfig(**qformer_config()), tokenizer=tokenizer)
    model = Blip2xForPreTraining.from_unimodal(vision_model(), str(bert[0]), tokenizer=tokenizer)
    assert model.config.qformer_config.bos_token_id == tokenizer.bos_token_id
    assert model.config.qformer_config.eos_token_id == tokenizer.sep_token_id


def test_other_than_bert_is_refused(tmp_path):
    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a gpt2 model"):
        Blip2xForPreTraining.from_unimodal(vision_model(), str(tmp_path))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_hand_over_is_bit_equal_and_printed(name, tmp_path, capsys):
    first = stage1()
    first.save_pretrained(tmp_path)
    llm = language_model(name)
    before = {k: v.clone() for k, v in llm.state_dict().items()}
    model = Blip2xForConditionalGeneration.from_stage1(str(tmp_path), llm, image_token_index=69)
    source, target = first.state_dict(), model.state_dict()
    shared = [k for k in target if not k.startswith(("language_model.", "language_projection."))]
    assert shared and all(torch.equal(source[k], target[k]) for k in shared)
    assert equal_states(model.language_model, before)
    printed = capsys.readouterr().out
    assert "loaded   vision_model" in printed and "query_tokens (1)" in printed
    assert "dropped" in printed and "itm_head (2)" in printed and "temperature (1)" in printed
    assert "new" in printed and "language_projection (2)" in printed


def test_hand_over_can_keep_the_text_branch():
    model = Blip2xForConditionalGeneration.from_stage1(
        stage1(), language_model("opt"), image_token_index=69, use_qformer_text_input=True
    )
    assert model.model.qformer.embeddings is not None


def test_llm_without_room_for_the_placeholder_grows_by_one_frozen_row():
    llm = language_model("llama")
    before = llm.get_input_embeddings().weight.clone()
    model = Blip2xForConditionalGeneration.from_stage1(stage1(), llm)
    assert model.config.image_token_index == 70
    assert torch.equal(model.get_input_embeddings().weight[:70], before)
    assert model.language_model.config.vocab_size == model.config.text_config.vocab_size == 71
    assert model.generation_config.suppress_tokens == [70]


def test_classes_refuse_the_wrong_kind_of_checkpoint():
    model = Blip2xForConditionalGeneration.from_stage1(stage1(), language_model("opt"), image_token_index=69)
    with pytest.raises(ValueError, match="has no language model, but the config has a text_config"):
        Blip2xForPreTraining(model.config)
    with pytest.raises(ValueError, match="no text_config: this is a stage-1 checkpoint"):
        Blip2xForConditionalGeneration(stage1().config)


def test_summary_counts_parameters():
    model = stage1()
    text = model.trainable_parameters_summary()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.model.vision_model.parameters())
    assert f"{trained:,}" in text and f"{frozen:,}" in text and "vision_model" in text


def gemma(scaled: bool):
    """Gemma 3 scales in its embedding layer, Gemma after it, by the root of its width: what is passed in is scaled too."""
    config = (Gemma3TextConfig if scaled else GemmaConfig)(
        vocab_size=70, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


FAMILIES = {name: lambda name=name: language_model(name) for name in LANGUAGE_MODELS}
FAMILIES |= {"gemma": lambda: gemma(False), "gemma3": lambda: gemma(True)}


@pytest.mark.parametrize("after_stage1", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_soft_prompt_starts_at_the_norm_of_the_embeddings(family, after_stage1):
    llm = FAMILIES[family]()
    words = llm.get_input_embeddings()(torch.arange(69)).norm(dim=-1).mean().item()
    if after_stage1:
        first = stage1()
        with torch.no_grad():  # trained norms are neither 1 nor 0
            norm = first.model.qformer.layers[-1].query_feed_forward.layernorm
            norm.weight.uniform_(0.2, 0.9)
            norm.bias.normal_(0, 0.3)
        model = Blip2xForConditionalGeneration.from_stage1(first, llm, image_token_index=69)
    else:
        qformer = Blip2xQFormerConfig(**qformer_config())
        model = Blip2xForConditionalGeneration.from_unimodal(vision_model(), llm, qformer, image_token_index=69)
    prompt = model.eval().get_image_features(batch()["pixel_values"]).pooler_output
    # 32 channels of random weights: a fifth of scatter; unscaled it is a tenth to seven times as long.
    assert prompt.norm(dim=-1).mean().item() == pytest.approx(words, rel=0.25)
