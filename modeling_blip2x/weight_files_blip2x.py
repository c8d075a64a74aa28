"""Weight files, read and written tensor by tensor: a conversion holds no second copy of a checkpoint in memory.

safetensors can only write tensors that are all in memory, hence `write_safetensors` here. The format is eight bytes of
length, a JSON header and the tensors' bytes.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

SHARD_BYTES = 5 * 10**9
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass
class Weight:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Weight":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> "Weight":
        """The tensor after `change`, which gives it `shape`."""
        return Weight(shape, self.dtype, lambda: change(self.read()))


def read_weights(path: str | Path) -> dict[str, Weight]:
    """Tensors of a .safetensors, .pth, .pt or .bin file, or of a transformers folder, by name; none is read yet.

    Raises ValueError for a folder without weights, a broken file, or a pickle that holds anything but tensors and plain
    containers.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is not a file. Check the path.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_pickle(path)
    raise ValueError(f"{path} is neither a folder nor a .safetensors, .pth, .pt or .bin file.")


def _read_folder(folder: Path) -> dict[str, Weight]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.exists():
            return {name: weight for file in _shards(index) for name, weight in read_weights(folder / file).items()}
        if (folder / stem).exists():
            return read_weights(folder / stem)
    raise ValueError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin. Name a folder with whole weights; a LoRA adapter "
        "must be merged first (pretrain_stage2.py --merge_lora, or PEFT's merge_and_unload)."
    )


def _shards(index: Path) -> list[str]:
    """File names that an index lists, each once. They lie beside it: a name with a folder in it is refused."""
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        strange = [file for file in files if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is not an index of weight files ({type(error).__name__}: {error}). Download it again."
        ) from None
    if strange:
        raise ValueError(f"{index} names {strange[0]!r}, which is not a file beside it. Download the checkpoint again.")
    return files


def _read_safetensors(path: Path) -> dict[str, Weight]:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}. Copy or download it again.") from None
    unknown = {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in DTYPES}
    _refuse_dtypes(path, unknown)
    return {
        name: Weight(tuple(part.get_shape()), DTYPES[part.get_dtype()], lambda name=name: file.get_tensor(name))
        for name, part in slices.items()
    }


def _read_pickle(path: Path) -> dict[str, Weight]:
    mapped = _can_be_mapped(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # The message begins with advice to load it with weights_only=False, the last thing to do here.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors, and loading it could run its code: {reason} Save its state dict alone, with "
            "torch.save({'model': model.state_dict()}, ...), or as safetensors."
        ) from None
    except Exception as error:  # broken bytes make the unpickler fail in any way at all
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a whole torch file: {reason}. Copy or download it again.") from None
    return _tensors_of(content, path)


def _can_be_mapped(path: Path) -> bool:
    """Whether tensors can stay on the disk until they are read; else torch.load reads all of them at once.

    They cannot in torch's format of before 2020, nor in a file that was packed again with compression: mapped, its
    compressed bytes would be taken for weights. Raises ValueError for a damaged file; mapped tensors are never compared
    with their checksums, and a flipped bit would be converted like any other.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            compressed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    except Exception as error:  # names, lengths and flags of a broken archive fail in any way at all
        raise ValueError(f"{path} is not a whole torch file: {error}. Copy or download it again.") from None
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged!r} in it is wrong. Copy or download it again.")
    return not compressed


def _tensors_of(content: object, path: Path) -> dict[str, Weight]:
    """The state dict in what a torch file holds."""
    # LAVIS keeps the optimizer and the epoch beside `model`, mmpretrain beside `state_dict`.
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not tensors by name. Save a state dict.")
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} holds values that are no tensors: {', '.join(map(str, others[:5]))}. Save a state dict."
        )
    unnamed = [name for name in content if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f"{path} has {unnamed[0]!r} where the name of a tensor belongs. Save a state dict.")
    special = {name: str(tensor.layout) for name, tensor in content.items() if tensor.layout != torch.strided}
    dtypes = {name: str(tensor.dtype) for name, tensor in content.items() if tensor.dtype not in DTYPES.values()}
    _refuse_dtypes(path, special | dtypes)
    return {name: Weight.of(tensor) for name, tensor in content.items()}


def _refuse_dtypes(path: Path, unknown: dict[str, str]) -> None:
    if unknown:
        name, kind = next(iter(unknown.items()))
        raise ValueError(
            f"{path} holds {len(unknown)} tensors of a kind that is not converted: {name!r} is {kind}. Save them as "
            "bfloat16, float16 or float32."
        )


def write_folder(folder: Path, weights: dict[str, Weight], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` with their index, as transformers reads them."""
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: weights[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_safetensors(path: Path, weights: dict[str, Weight]) -> None:
    """Write one file, holding one tensor at a time. A file that breaks off never gets its name."""
    names_of = {dtype: name for name, dtype in DTYPES.items()}
    # Wider types first, as safetensors itself orders them: every tensor then begins at a multiple of its item size.
    order = sorted(weights, key=lambda name: (-weights[name].dtype.itemsize, name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        weight = weights[name]
        header[name] = {
            "dtype": names_of[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.bytes],
        }
        offset += weight.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with open(unfinished, "xb") as file:  # a new file, never one that a link under this name points to
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = weights[name].read().contiguous()
            if tuple(tensor.shape) != weights[name].shape or tensor.dtype != weights[name].dtype:
                raise ValueError(f"'{name}' became {tuple(tensor.shape)} {tensor.dtype}, not {weights[name].shape}.")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
    os.replace(unfinished, path)
