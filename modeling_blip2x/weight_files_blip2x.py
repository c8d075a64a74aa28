"""Weight files, read and written tensor by tensor: a conversion holds no second copy of a checkpoint in memory.

safetensors can only write tensors that are all in memory, hence `write_safetensors` here. The format is eight bytes of
length, a JSON header and the tensors' bytes.
"""

import json
import os
import pickle
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
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_pickle(path)
    raise ValueError(f"{path} is neither a folder nor a .safetensors, .pth, .pt or .bin file.")


def _read_folder(folder: Path) -> dict[str, Weight]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{stem}.index.json").exists():
            shards = set(json.loads((folder / f"{stem}.index.json").read_text())["weight_map"].values())
            return {name: weight for shard in sorted(shards) for name, weight in read_weights(folder / shard).items()}
        if (folder / stem).exists():
            return read_weights(folder / stem)
    raise ValueError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin. Name a folder with whole weights; a LoRA adapter "
        "must be merged first (pretrain_stage2.py --merge_lora, or PEFT's merge_and_unload)."
    )


def _read_safetensors(path: Path) -> dict[str, Weight]:
    try:
        file = safe_open(path, framework="pt")
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}. Copy or download it again.") from None
    return {
        name: Weight(tuple(part.get_shape()), DTYPES[part.get_dtype()], lambda name=name: file.get_tensor(name))
        for name, part in slices.items()
    }


def _read_pickle(path: Path) -> dict[str, Weight]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors, and loading it could run its code: {reason} Save its state dict alone, with "
            "torch.save({'model': model.state_dict()}, ...), or as safetensors."
        ) from None
    except (RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a whole torch file: {reason}. Copy or download it again.") from None
    # LAVIS keeps the optimiser and the epoch beside `model`, mmpretrain beside `state_dict`.
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} holds values that are no tensors: {', '.join(map(str, others[:5]))}. Save a state dict."
        )
    return {name: Weight.of(tensor) for name, tensor in content.items()}


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
    with open(unfinished, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = weights[name].read().contiguous()
            if tuple(tensor.shape) != weights[name].shape or tensor.dtype != weights[name].dtype:
                raise ValueError(f"'{name}' became {tuple(tensor.shape)} {tensor.dtype}, not {weights[name].shape}.")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
    os.replace(unfinished, path)
