"""How a command ends: a mistake is one sentence, a fault of ours keeps its traceback."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import ViTConfig

from blip2x_training.system.commands import run_command


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("kind", [ValueError, OSError, FloatingPointError])
def test_a_mistake_is_a_sentence_with_its_names_escaped(kind):
    with pytest.raises(SystemExit) as ended:
        run_command(raising(kind("no image in a\x1b[2Jb.png\nGive another.")))
    assert ended.value.code == "error: no image in a\\x1b[2Jb.png\nGive another."


def test_a_wrong_field_in_the_config_of_a_model_is_a_mistake_too():
    with pytest.raises(StrictDataclassFieldValidationError) as found:
        ViTConfig(hidden_size="many")
    with pytest.raises(SystemExit, match="^error: Validation error for field 'hidden_size'"):
        run_command(raising(found.value))


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(raising(KeyError("bug")))
