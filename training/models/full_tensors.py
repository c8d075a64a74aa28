"""Parameters and optimiser state by name and in full, whatever sharding made of them, and back.

One path for one process, DDP and FSDP2: a checkpoint of any of them continues under any other. DeepSpeed keeps the
optimiser to itself and saves it itself (engine/checkpoint.py).
"""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def free_gathered(model: torch.nn.Module) -> None:
    """Let a sharded model go back to its shards, which are the parameters the optimiser knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters with a gradient, by name; of a sharded model its shards, on all processes alike."""
    free_gathered(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in full, on the CPU. All processes call it: a sharded one is gathered."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def whole_tensors(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """`whole` of each; processes that do not `keep` get none, and never hold more than one."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full
    return found


def optimizer_tensors(parameters: dict[str, torch.nn.Parameter], optimizer, keep: bool) -> dict[str, dict]:
    """State of the optimiser in full, {parameter: {"exp_avg": ..., "step": ...}}. Its groups come from the fields."""
    state = optimizer.state
    found = {name: whole_tensors(state[p], keep) for name, p in parameters.items() if state.get(p)}
    return found if keep else {}


@torch.no_grad()
def put_tensors(tensors: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
    """Copy full tensors, which every process holds, into the targets of the same names."""
    for name, target in targets.items():
        target.copy_(like(tensors[name], target))


def put_optimizer_tensors(saved: dict[str, dict], parameters: dict[str, torch.nn.Parameter], optimizer) -> None:
    """Give the optimiser the state that `optimizer_tensors` read. Raises ValueError for another model's."""
    unknown = sorted(saved.keys() - parameters.keys())
    if unknown:
        raise ValueError(f"the optimiser's state is of other parameters: {unknown[:3]}")
    for name, values in saved.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: like(value, parameter) if value.shape == parameter.shape else value for key, value in values.items()
        }


def like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A full tensor where and as the target is: on its device, sharded as it is."""
    tensor = tensor.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
    return tensor


def unshard_for_saving(model: torch.nn.Module, keep: bool) -> None:
    """Replace sharded parameters by full ones on the CPU, where `keep`; the model can be saved then, not trained.

    All processes call it. A parameter that two modules share stays shared.
    """
    free_gathered(model)
    full = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, DTensor):
                if parameter not in full:
                    tensor = whole(parameter)
                    full[parameter] = torch.nn.Parameter(tensor, parameter.requires_grad) if keep else parameter
                setattr(module, name, full[parameter])
