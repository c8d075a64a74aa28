"""Names that other libraries do not document and that we lean on: a release that changes one fails here first.

A row is a dotted name, its parameters without self (None for what is no function), and what it is used for. A name of a
class may be an attribute that `__init__` sets. `module:name` is an attribute that a module looks for on any object, by
this string in its source. A row goes with its use; where there is a public way, there is no row.
"""

import importlib
import inspect
import re

import pytest

LIBRARY = [
    (
        "transformers.PreTrainedConfig._attn_implementation",
        None,
        "the Q-Former attends by what the user chose",
    ),
    (
        "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface",
        ("attn_implementation", "default"),
        "the Q-Former's attention by sdpa, flash or eager",
    ),
    (
        "transformers.PreTrainedModel._init_weights",
        ("module",),
        "our modules start as the official code starts them, all others as transformers does",
    ),
    ("transformers.PreTrainedModel._supports_sdpa", None, "says that attention may run by sdpa"),
    (
        "transformers.PreTrainedModel._supports_attention_backend",
        None,
        "says that attention may run by any registered function",
    ),
    (
        "transformers.PreTrainedModel._can_compile_fullgraph",
        None,
        "says that generate may compile the forward for a static cache",
    ),
    ("transformers.PreTrainedModel._no_split_modules", None, "what device_map keeps on one device"),
    ("transformers.PreTrainedModel._skip_keys_device_placement", None, "caches stay where they are under device_map"),
    (
        "transformers.initialization:_is_hf_initialized",
        None,
        "weights that came from other checkpoints are not drawn anew",
    ),
    (
        "transformers.PreTrainedModel._keep_in_fp32_modules",
        None,
        "narrow layers that quantisation and float16 leave alone",
    ),
    (
        "transformers.utils.output_capturing._hook_installation_lock",
        None,
        "an eager view of a model gets all of the hooks that record weights, or none, while other threads call it",
    ),
    (
        "torch.nn.Module._get_name",
        (),
        "Trainer shifts labels for label smoothing where it knows this name as a causal model's",
    ),
    ("accelerate.hooks:_hf_hook", None, "stage 1 in chunks reads the temperature of an offloaded model"),
    ("transformers.configuration_utils.SubConfigSpec", None, "how a config declares its sub-configs"),
    (
        "transformers.dynamic_module_utils.get_relative_import_files",
        ("module_file",),
        "which files of code go into a checkpoint",
    ),
    (
        "transformers.GenerationMixin._prefill",
        ("input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
        "a prompt is read once for all of its beams",
    ),
    (
        "transformers.GenerationMixin._prepare_text_encoder_decoder_kwargs_for_generation",
        ("inputs_tensor", "model_kwargs", "model_input_name", "generation_config"),
        "the encoder of T5 reads image and prompt once",
    ),
]

TRAINING = [
    (
        "accelerate.Accelerator.native_amp",
        None,
        "--fp16 on a CPU, where accelerate would stay with float32 and not say so",
    ),
    ("accelerate.Accelerator.scaler", None, "the same, and the scale of a resumed run"),
    ("accelerate.Accelerator.is_fsdp2", None, "whether `accelerate launch` asked for FSDP2"),
    (
        "accelerate.PartialState.distributed_type",
        None,
        "set for FSDP2 and DeepSpeed on CPUs, which accelerate gives to GPUs only",
    ),
    ("accelerate.state.AcceleratorState.fsdp_plugin", None, "the same for FSDP2"),
    ("accelerate.state.AcceleratorState.deepspeed_plugins", None, "the same for DeepSpeed"),
    ("accelerate.state.AcceleratorState.select_deepspeed_plugin", ("name",), "the same for DeepSpeed"),
    (
        "accelerate.state.AcceleratorState._reset_state",
        ("reset_partial_state",),
        "tests: a second precision in one process",
    ),
    (
        "peft.tuners.tuners_utils.BaseTunerLayer.get_base_layer",
        (),
        "layers without their adapter go into the root of a run with --lora",
    ),
    (
        "peft.tuners.tuners_utils:peft_config",
        None,
        "the root of such a run is saved as a model that never had an adapter",
    ),
    ("peft.tuners.lora.model:is_loaded_in_4bit", None, "QLoRA: how PEFT knows that a language model is in 4 bits"),
    ("transformers.modeling_utils:hf_quantizer", None, "QLoRA: a model around a 4-bit language model is saved as one"),
    (
        "transformers.PreTrainedModel._no_split_modules",
        None,
        "which layers of tower and language model FSDP2 gathers and frees as a unit",
    ),
]

SPACE = [
    (
        "gradio.Blocks.preprocess_data",
        ("block_fn", "inputs", "state", "explicit_call"),
        "an address is refused before Gradio downloads it; a request that cannot be read is answered in words",
    ),
]

AREAS = {"library": LIBRARY, "training": TRAINING, "space": SPACE}
ROWS = {f"{area}: {row[0]}": row for area, rows in AREAS.items() for row in rows}


@pytest.mark.parametrize("dotted, parameters, used_for", ROWS.values(), ids=ROWS)
def test_name_and_signature_are_those_we_lean_on(dotted, parameters, used_for):
    pytest.importorskip(re.split("[.:]", dotted)[0])  # gradio is not in every environment of the releases
    found = find(dotted)
    assert found is not None, f"{dotted} is gone. It is used for this: {used_for}."
    if parameters is not None:
        given = tuple(name for name in inspect.signature(found).parameters if name != "self")
        assert given == parameters, f"{dotted} takes other arguments now. It is used for this: {used_for}."


def find(dotted: str):
    """The function that a row names, or True for what is no function and is there; None for what is not there."""
    module, _, read = dotted.partition(":")
    if read:
        return f'"{read}"' in inspect.getsource(importlib.import_module(module)) or None
    *owners, name = dotted.split(".")
    owner = importlib.import_module(owners[0])
    for part in owners[1:]:
        owner = getattr(owner, part, None) or importlib.import_module(f"{owner.__name__}.{part}")
    missing = object()
    value = inspect.getattr_static(owner, name, missing)  # a property is not evaluated: it may want an instance
    if value is missing or not callable(getattr(owner, name)):
        set_by_init = inspect.isfunction(owner.__init__) and name in owner.__init__.__code__.co_names
        return value is not missing or set_by_init or None
    return getattr(owner, name)


def test_a_name_that_is_gone_is_not_found():
    assert find("accelerate.Accelerator.scaler") and find("transformers.GenerationMixin.generate")
    for gone in (
        "accelerate.Accelerator.scalar",
        "transformers.GenerationMixin._generate",
        "peft.tuners.lora.model:is_4bit",
    ):
        assert find(gone) is None, gone
