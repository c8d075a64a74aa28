"""Fields of the training scripts: YAML and flags, and every mistake reported at once."""

import pytest

from blip2x_training.arguments.finetuning import FinetuneArguments
from blip2x_training.arguments.parsing import parse_arguments, save_arguments
from blip2x_training.arguments.pretraining import Stage1Arguments, Stage2Arguments

NEEDED = ["--output_dir", "out", "--dataset", "data", "--vision_model", "tower"]


def test_yaml_gives_defaults_and_flags_override(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1e-3\nmax_steps: 7\nqformer_config: {hidden_size: 64}\nobjectives: [itc, itm]\n")
    args = parse_arguments(
        Stage1Arguments, ["--config", str(config), "--max_steps", "9", "--vision_feature_layer", "-2", *NEEDED]
    )
    assert (args.learning_rate, args.max_steps, args.vision_feature_layer) == (1e-3, 9, -2)
    assert args.qformer_config == {"hidden_size": 64} and args.objectives == ["itc", "itm"]


def test_written_config_reads_back(tmp_path):
    args = parse_arguments(
        Stage2Arguments, [*NEEDED, "--language_model", "llm", "--prompt", "a photo of", "--no_augment"]
    )
    save_arguments(args, tmp_path / "config.yaml")
    assert parse_arguments(Stage2Arguments, ["--config", str(tmp_path / "config.yaml")]) == args


def test_all_mistakes_are_reported_at_once(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("max_step: 3\nbf16: perhaps\n")
    flags = [
        "stray",
        "--config",
        str(config),
        "--lerning_rate",
        "1",
        "--seed",
        "-3",
        "--warmup_steps",
        "many",
        "--objectives",
        "itc",
        "itx",
        "--output_dir",
        "a",
        "b",
    ]
    with pytest.raises(ValueError) as caught:
        parse_arguments(Stage1Arguments, flags)
    message = str(caught.value)
    for part in (
        "'stray'",
        "--max_step is not a field. Did you mean --max_steps?",
        "--bf16 perhaps",
        str(config),
        "Did you mean --learning_rate?",
        "--seed is -3",
        "--warmup_steps many: invalid int value",
        "'itx'",
        "--output_dir takes one value",
        "--dataset is missing",
        "--vision_model is missing",
    ):
        assert part in message, f"{part!r} is not in:\n{message}"


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--bf16", "--fp16"], "Choose one"),
        (["--feature_cache", "c"], "--augment is true"),
        (["--eval_steps", "5"], "no --eval_split"),
        (["--learning_rate", "1e-6"], "--min_learning_rate"),
        (["--itc_chunk_size", "4", "--torch_compile"], "never called. Drop one"),
        (["--itc_chunk_size", "0"], "--itc_chunk_size is 0"),
        (["--learning_rate", "-1"], "--learning_rate is -1.0, but must be above 0 and at most 10."),
        (["--batch_size", "4"], "Did you mean --per_device_train_batch_size or --per_device_eval_batch_size?$"),
        (["--epochs", "4"], "Did you mean --num_train_epochs?$"),
        (["--learning-rat", "1"], "Did you mean --learning_rate?$"),
        (["--zzz", "1"], "See --help"),
        (["--qformer_config", "[1]"], "must be a mapping"),
        (["--config", "nowhere.yaml"], "cannot be read"),
        (["--dataset="], "--dataset holds an empty name"),
        (["--lora", "("], r"--lora '\(' is not a regular expression"),
        (["--learning_rate", "null"], "--learning_rate cannot be null"),
    ],
)
def test_mistakes_that_concern_two_fields(flags, part):
    with pytest.raises(ValueError, match=part.replace("?", r"\?")):
        parse_arguments(Stage1Arguments, [*NEEDED, *flags])


def test_stage_2_asks_for_stage_1_first():
    flags = ["--output_dir", "out", "--dataset", "data", "--language_model", "llm"]
    with pytest.raises(ValueError, match="1 wrong field:\n  --init_from is missing.*from scratch, --vision_model"):
        parse_arguments(Stage2Arguments, flags)
    assert parse_arguments(Stage2Arguments, [*flags, "--vision_model", "tower"]).init_from is None


def test_missing_folders_and_misspelt_flags_are_reported_together():
    argv = ["--output_dir", "out", "--dataset", "../no/folder", "--vision_model", "/no/such", "--max_stepz", "4"]
    with pytest.raises(ValueError, match="3 wrong field") as error:
        parse_arguments(Stage1Arguments, argv)
    for part in ("--max_stepz", "--dataset is ../no/folder", "--vision_model is /no/such"):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", (Stage1Arguments, Stage2Arguments))
def test_fields_of_a_new_model_are_refused_beside_an_earlier_stage(kind):
    """It brings its own tower and queries: a value given here would do nothing."""
    flags = ["--output_dir", "out", "--dataset", "data", "--init_from", "stage1"]
    flags += ["--language_model", "llm"] * (kind is Stage2Arguments)
    assert parse_arguments(kind, flags).init_from == "stage1"
    with pytest.raises(ValueError) as caught:
        parse_arguments(kind, [*flags, "--vision_model", "tower", "--num_query_tokens", "8", "--qformer_init", "bert"])
    for name in ("vision_model", "num_query_tokens", "qformer_init"):
        assert f"--{name} has no effect with --init_from, which brings its own. Leave it out." in str(caught.value)


def test_fine_tuning_has_no_fields_of_a_new_model():
    flags = ["--output_dir", "out", "--dataset", "data", "--init_from", "stage2", "--task", "caption"]
    assert parse_arguments(FinetuneArguments, flags).task == "caption"
    for name in ("vision_model", "num_query_tokens", "qformer_init", "vision_feature_layer"):
        with pytest.raises(ValueError, match=f"--{name} is not a field"):
            parse_arguments(FinetuneArguments, [*flags, f"--{name}", "7"])
