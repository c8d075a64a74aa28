"""A checkpoint that carries its code: it loads where the package is not installed, with `trust_remote_code=True`."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .generation_blip2x import Blip2xForConditionalGeneration
from .processing_blip2x import Blip2xProcessor

CONFIG = {"AutoConfig": "configuration_blip2x.Blip2xConfig", "AutoModel": "modeling_blip2x.Blip2xModel"}
STAGE1 = {
    "AutoModelForPreTraining": "pretraining_blip2x.Blip2xForPreTraining",
    "AutoModelForZeroShotImageClassification": "retrieval_blip2x.Blip2xForImageTextRetrieval",
}
STAGE2 = dict.fromkeys(
    ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"), "generation_blip2x.Blip2xForConditionalGeneration"
)
PROCESSOR = {"AutoProcessor": "processing_blip2x.Blip2xProcessor"}


def save_with_code(model: PreTrainedModel, processor: Blip2xProcessor, folder: str | Path) -> None:
    """Save model and processor to `folder` together with the source files they need.

    `AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)` then works where this package is absent.
    Where it is installed, the installed code is used. The model card (README.md) of the folder that the model was loaded
    from comes along, unless `folder` has one already: it states the licence, the limits, and how the demo asks.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    heads = STAGE2 if isinstance(model, Blip2xForConditionalGeneration) else STAGE1
    _add_auto_map(folder / "config.json", CONFIG | heads)
    _add_auto_map(folder / "processor_config.json", PROCESSOR)
    sources = Path(__file__).parent
    entries = {sources / f"{name.split('.')[0]}.py" for name in (CONFIG | heads | PROCESSOR).values()}
    needed = {Path(file) for entry in entries for file in get_relative_import_files(entry)}
    for source in entries | needed:
        shutil.copy(source, folder)
    card = Path(model.name_or_path or folder, "README.md")
    if card.is_file() and not (folder / card.name).exists():
        shutil.copy(card, folder)


def _add_auto_map(file: Path, auto_map: dict[str, str]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"auto_map": auto_map}, indent=2), encoding="utf-8")
