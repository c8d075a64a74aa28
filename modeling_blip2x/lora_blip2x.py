"""LoRA presets: `lm`, `qformer`, `vision`.

    model.freeze_unimodal()
    peft.get_peft_model(model, lora_config(model, "lm"))  # or transformers' own way, which from 5.24 on wants peft 0.22:
    model.add_adapter(lora_config(model, "lm"))

Targets are a regular expression anchored on the part's name: a list of names such as q_proj would also hit another part.
"""

import json
import re
import subprocess
import sys

import torch

PATIENCE = 3  # seconds for an expression over the names of a model, which takes milliseconds
PARTS = {"lm": "language_model", "qformer": "model.qformer", "vision": "model.vision_model"}


def lora_targets(model: torch.nn.Module, preset: str) -> str:
    """A regular expression that matches the linear layers of a part, or `preset` itself if it is one already.

    preset: `lm` (the language model without its output layer), `qformer`, `vision`, or a regular expression over module
    names. Raises ValueError if it matches no linear layer, is no regular expression, or is one that does not come to an
    end on these names.
    """
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    if preset not in PARTS:
        matched = _matched(preset, [name for name, _ in model.named_modules()])
        if not matched.intersection(linear):
            raise ValueError(
                f"No linear layer of the model matches {preset!r}. Choose {', '.join(PARTS)}, or a regular expression over "
                f"names such as {', '.join(linear[:3])}."
            )
        return preset
    part, head = PARTS[preset], model.get_output_embeddings()
    kinds = {
        name.rsplit(".", 1)[-1]
        for name in linear
        if name.startswith(f"{part}.") and model.get_submodule(name) is not head
    }
    if not kinds:
        raise ValueError(f"The model has no linear layer in {part}, where {preset!r} puts LoRA. Leave it out.")
    return rf"{re.escape(part)}\..*\.({'|'.join(sorted(map(re.escape, kinds)))})"


def lora_config(model: torch.nn.Module, preset: str, rank: int = 8, alpha: int = 16, dropout: float = 0.05):
    """A `peft.LoraConfig` for the preset. Query tokens and the projection are trained and saved whole."""
    from peft import LoraConfig  # peft is optional

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_targets(model, preset),
        modules_to_save=["query_tokens", "language_projection"],
    )


def _matched(pattern: str, names: list[str]) -> set[str]:
    """The names that a regular expression matches as a whole.

    peft will match the same names in this process, where an expression such as (a+)+b cannot be told to stop. So it is
    tried in another process first.
    """
    check_expression(pattern)
    script = "import json, re, sys; p, names = json.load(sys.stdin); print(json.dumps([n for n in names if re.fullmatch(p, n)]))"
    try:
        found = subprocess.run(
            [sys.executable, "-I", "-S", "-c", script],
            input=json.dumps([pattern, names]),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"The regular expression {pattern!r} takes more than {PATIENCE} seconds over the model's layers: a repetition "
            "within a repetition, such as (a+)+, can take for ever. Write it without."
        ) from None
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"The regular expression {pattern!r} fails on the model's layers: {error.stderr.splitlines()[-1]}"
        ) from None
    return set(json.loads(found.stdout))


def check_expression(pattern: str) -> None:
    """Raise ValueError for a pattern that is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression: {error}. Choose {', '.join(PARTS)}, or mend it; outside of groups "
            r"a parenthesis is written \(."
        ) from None


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear layer
