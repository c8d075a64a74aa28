"""BLIP-2 checkpoints in and out.

    python -m modeling_blip2x.convert SOURCE OUT [--to blip2x,transformers,lavis] [--config FILE]
        [--vision_model X] [--language_model Y] [--qformer_tokenizer Z]

SOURCE: a folder or hub id of transformers' blip-2 or instructblip, a .pth or .safetensors of LAVIS or mmpretrain (to
blip2x); a blip2x folder (to transformers, a folder, or lavis, a .pth). LAVIS and mmpretrain save only what they trained:
--vision_model and --language_model name the rest. --config: JSON with config fields that tensors do not tell, such as
{"vision_config": {"num_attention_heads": 16}}. Weights are read and written tensor by tensor; OUT appears when whole.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    Blip2Processor,
    BlipImageProcessor,
    GenerationConfig,
    InstructBlipProcessor,
    PreTrainedModel,
)

from .convert_from_blip2x import Checkpoint, check_complete, import_lavis, import_transformers, load_tokenizer
from .convert_to_blip2x import check_exported, export_lavis, export_transformers, read_own
from .printable_blip2x import printable
from .processing_blip2x import Blip2xProcessor
from .weight_files_blip2x import write_folder

LAVIS_FILE = "lavis.pth"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def convert(
    source: str,
    out: str,
    *,
    to: str = "blip2x",
    config: dict | None = None,
    vision_model: str | None = None,
    language_model: str | None = None,
    qformer_tokenizer: str | None = None,
) -> list[str]:
    """Convert a checkpoint; returns notes on what was left out, added or lost.

    Args:
        source, out, to, vision_model, language_model: as on the command line.
        config: config fields that tensors of a LAVIS or mmpretrain file do not tell; a config.json of ours will do.
        qformer_tokenizer: id or folder of the BERT tokenizer, for the processor of a LAVIS or mmpretrain stage-1 file.

    Raises:
        ValueError: an unknown kind of source, tensors without a place or missing (all are named), a pickle that holds
            code, a target that cannot hold the source, or an `out` that exists.
    """
    if to not in ("blip2x", "transformers", "lavis"):
        raise ValueError(f"--to is {to!r}; choose blip2x, transformers or lavis.")
    target = Path(out)
    if target.exists():
        raise ValueError(f"{target} exists. Remove it, or name another OUT.")
    if to == "lavis" and target.suffix != ".pth":
        raise ValueError(f"LAVIS reads .pth files, but OUT is {target}. Name it {target}.pth.")
    path = Path(source)
    if not path.exists():
        if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or source.startswith((".", "/", "~")):
            raise ValueError(f"There is no {source}. Check the path, or give a hub id.")
        path = local_folder(source)

    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        kind = AutoConfig.from_pretrained(path).model_type if path.is_dir() else "file"
        if to == "blip2x":
            notes = _import(path, kind, unfinished, config, vision_model, language_model, qformer_tokenizer)
        elif kind != "blip2x":
            raise ValueError(f"{source} is a {kind} checkpoint; only blip2x folders go to {to}. Convert it first.")
        else:
            notes = _export(path, unfinished, to)
        # LAVIS has one file where the others have a folder.
        (unfinished / LAVIS_FILE if to == "lavis" else unfinished).rename(target)
        return notes
    except (ValueError, OSError):
        raise
    except Exception as error:  # a config that asks for nonsense fails deep in transformers, in any way at all
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(
            f"{source} cannot be converted ({type(error).__name__}: {reason}). Compare its config with that of a checkpoint "
            "of its kind."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _import(
    path: Path,
    kind: str,
    folder: Path,
    config: dict | None,
    vision_model: str | None,
    language_model: str | None,
    qformer_tokenizer: str | None,
) -> list[str]:
    """Write a blip2x checkpoint into `folder`; returns notes."""
    if kind in ("blip-2", "instructblip"):
        checkpoint = import_transformers(path)
        processor = _processor_of_folder(path, checkpoint)
    elif kind == "file":
        checkpoint = import_lavis(path, config, vision_model, language_model)
        processor = _processor_of_file(checkpoint, vision_model, language_model, qformer_tokenizer)
    else:
        raise ValueError(f"{path} is a {kind} checkpoint. To blip2x go blip-2, instructblip, LAVIS and mmpretrain.")
    check_complete(checkpoint, str(path))
    return _write_own(folder, checkpoint, processor, path, language_model)


def _export(path: Path, folder: Path, to: str) -> list[str]:
    """Write a checkpoint of transformers, or the file of LAVIS, into `folder`; returns notes."""
    config, weights = read_own(path)
    if to == "lavis":
        renamed, notes = export_lavis(config, weights)
        torch.save({"model": {name: weight.read() for name, weight in renamed.items()}}, folder / LAVIS_FILE)
        return notes
    model_class, their_config, renamed, notes = export_transformers(config, weights)
    check_exported(model_class, their_config, renamed)
    their_config.architectures = [model_class.__name__]
    their_config.save_pretrained(folder)
    write_folder(folder, renamed)
    _copy_generation_config(path, folder)
    return notes + _export_processor(path, folder, instruct=their_config.model_type == "instructblip")


def local_folder(source: str) -> Path:
    """The folder `source`, or a copy of the hub's."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.bin"]))


def load_transformers(source: str) -> tuple[PreTrainedModel, Blip2xProcessor, list[str]]:
    """Model and processor of a folder or hub id of transformers' blip-2 or instructblip, and notes; nothing is written.

    Raises ValueError for tensors without a place or missing, or a folder without a processor.
    """
    path = local_folder(source)
    checkpoint = import_transformers(path)
    processor = _processor_of_folder(path, checkpoint)
    if processor is None:
        raise ValueError(f"{source} holds weights without a processor. Give a folder with its tokenizer files.")
    check_complete(checkpoint, source)
    weights = {name: weight.read() for name, weight in checkpoint.weights.items()}
    dtype = weights["model.query_tokens.weight"].dtype
    model = checkpoint.model_class.from_pretrained(None, config=checkpoint.config, state_dict=weights, dtype=dtype)
    if checkpoint.config.text_config is not None and (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), processor, checkpoint.notes


def _write_own(folder: Path, checkpoint: Checkpoint, processor, source: Path, language_model: str | None) -> list[str]:
    config = checkpoint.config
    config.architectures = [checkpoint.model_class.__name__]
    # from_pretrained loads in this dtype: that of the trained part, where frozen ones were stored smaller.
    config.dtype = checkpoint.weights["model.query_tokens.weight"].dtype
    config.save_pretrained(folder)
    write_folder(folder, checkpoint.weights)
    if config.text_config is not None and source.is_dir():
        _copy_generation_config(source, folder)
    elif config.text_config is not None:
        generation = GenerationConfig.from_model_config(config.text_config)
        if language_model is not None:
            try:
                generation = GenerationConfig.from_pretrained(language_model)
            except OSError:
                pass  # a language model without one
        generation.suppress_tokens = [config.image_token_index]
        if config.text_config.model_type == "opt" and processor is not None:
            newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
            if len(newline) == 1 and newline[0] != processor.tokenizer.unk_token_id:
                generation.eos_token_id = newline[0]  # where the official OPT models end
        generation.save_pretrained(folder)
    if processor is None:
        wanted = "--language_model" if config.text_config is not None else "--qformer_tokenizer"
        return [*checkpoint.notes, f"No processor was written: no tokenizer is at hand. Pass {wanted} for one."]
    processor.save_pretrained(folder)
    return checkpoint.notes


def _copy_generation_config(source: Path, folder: Path) -> None:
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", folder)


def _processor_of_folder(folder: Path, checkpoint: Checkpoint) -> Blip2xProcessor | None:
    """Our processor with the components of theirs; None for a folder of weights alone."""
    if not any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
        return None
    theirs = AutoProcessor.from_pretrained(folder)
    is_stage1 = checkpoint.config.text_config is None
    ours = Blip2xProcessor(
        theirs.image_processor,
        theirs.tokenizer,
        getattr(theirs, "qformer_tokenizer", None),
        num_query_tokens=None if is_stage1 else checkpoint.config.num_query_tokens,
        is_encoder_decoder=None if is_stage1 else checkpoint.config.is_encoder_decoder,
    )
    _match_image_token(ours, checkpoint)
    return ours


def _processor_of_file(
    checkpoint: Checkpoint, vision_model: str | None, language_model: str | None, qformer_tokenizer: str | None
) -> Blip2xProcessor | None:
    """Processor of a LAVIS or mmpretrain model: its image size and CLIP's statistics, unless a tower brings its own."""
    config = checkpoint.config
    is_stage1 = config.text_config is None
    tokenizer = load_tokenizer(qformer_tokenizer if is_stage1 else language_model)
    if tokenizer is None:
        return None
    image_processor = None
    if vision_model is not None:
        try:
            image_processor = AutoImageProcessor.from_pretrained(vision_model)
        except (OSError, ValueError):
            pass  # a folder of weights alone
    if image_processor is None:
        side = config.vision_config.image_size
        image_processor = BlipImageProcessor(
            size={"height": side, "width": side}, image_mean=CLIP_MEAN, image_std=CLIP_STD
        )
    reads_text = not is_stage1 and config.qformer_config.use_qformer_text_input
    second = None
    if reads_text and qformer_tokenizer is not None:
        second = load_tokenizer(qformer_tokenizer)
    elif reads_text:
        checkpoint.notes.append(
            "The Q-Former reads the question, but its tokenizer is not known. Pass --qformer_tokenizer."
        )
    processor = Blip2xProcessor(
        image_processor,
        tokenizer,
        second,
        num_query_tokens=None if is_stage1 else config.num_query_tokens,
        is_encoder_decoder=None if is_stage1 else config.is_encoder_decoder,
    )
    _match_image_token(processor, checkpoint)
    return processor


def _match_image_token(processor: Blip2xProcessor, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    if config.text_config is not None and processor.image_token_id != config.image_token_index:
        checkpoint.notes.append(
            f"image_token_index is {processor.image_token_id}, the tokenizer's, in place of {config.image_token_index}."
        )
        config.image_token_index = processor.image_token_id


def _export_processor(source: Path, folder: Path, instruct: bool) -> list[str]:
    """transformers' processor with the components of ours."""
    try:
        ours = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError):
        return [f"No processor was written: {source} has none."]
    queries = ours.num_query_tokens
    if instruct:
        theirs = InstructBlipProcessor(
            ours.image_processor, ours.tokenizer, ours.qformer_tokenizer, num_query_tokens=queries
        )
    else:
        theirs = Blip2Processor(ours.image_processor, ours.tokenizer, num_query_tokens=queries)
    theirs.save_pretrained(folder)
    return []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_blip2x.convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="Folder, hub id, .pth or .safetensors.")
    parser.add_argument("out", metavar="OUT", help="Folder to write; for lavis a .pth file. Must not exist.")
    parser.add_argument("--to", default="blip2x", choices=["blip2x", "transformers", "lavis"])
    parser.add_argument(
        "--config", help="JSON file, or folder with a config.json, with fields that the tensors do not tell."
    )
    parser.add_argument("--vision_model", help="Id or folder of the vision tower, where SOURCE holds none.")
    parser.add_argument(
        "--language_model", help="Id or folder of the language model: its tokenizer, and weights if needed."
    )
    parser.add_argument("--qformer_tokenizer", help="Id or folder of the Q-Former's BERT tokenizer.")
    arguments = parser.parse_args(argv)
    fields = None
    if arguments.config:
        file = Path(arguments.config)
        try:
            fields = json.loads((file / "config.json" if file.is_dir() else file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--config {arguments.config} cannot be read: {error}.") from None
    notes = convert(
        arguments.source,
        arguments.out,
        to=arguments.to,
        config=fields,
        vision_model=arguments.vision_model,
        language_model=arguments.language_model,
        qformer_tokenizer=arguments.qformer_tokenizer,
    )
    print("\n".join([*notes, f"Converted {arguments.source} to {arguments.out}."]))


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")


if __name__ == "__main__":
    command()
