"""What must be finite before an optimiser step is taken: losses, and the norm of the gradient.

A kernel can give a gradient that is NaN or infinite where the loss is a number. The step would spoil every weight, and the
next checkpoint with it.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from ..models.full_tensors import whole

GRADIENT = "gradient"
SMALLEST_SCALE = 1e-4  # of float16's losses, as fairseq has it: what still overflows is not float16's fault


def gradient_norm(accelerator: Accelerator, model: torch.nn.Module) -> torch.Tensor:
    """Norm over all gradients, those of a sharded model included, without float16's loss scale."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine has clipped and stepped in the backward
        return torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), None) or 0.0)
    accelerator.unscale_gradients()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradients(model: torch.nn.Module, max_norm: float, norm: torch.Tensor) -> None:
    """Scale gradients whose norm is known down to `max_norm`; 0 leaves them as they are."""
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)


def agree(
    accelerator: Accelerator, losses: list[dict], norm: torch.Tensor, signal_number: int
) -> tuple[list[str], int]:
    """What is not finite on some process, losses or `GRADIENT`, and the signal that some process got; the same on all.

    One exchange of a few integers a step, so that processes stop together and none waits for one that has gone.

    Args:
        losses: of each forward of the step, by name. norm: of the gradient.
    """
    finite = [torch.stack([torch.isfinite(forward[name]) for forward in losses]).all() for name in losses[0]]
    finite.append(torch.isfinite(whole(norm)).to(finite[0].device) | scaler_skips(accelerator))
    flags = torch.cat([~torch.stack(finite), finite[0].new_zeros(1)]).to(torch.int32)
    flags[-1] = signal_number
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    *broken, signal_number = flags.tolist()
    return [name for name, is_broken in zip([*losses[0], GRADIENT], broken) if is_broken], signal_number


def scaler_skips(accelerator: Accelerator) -> bool:
    """Whether float16's loss scaler answers an overflow: it skips the step and lowers its scale."""
    if accelerator.mixed_precision != "fp16":
        return False
    return accelerator.scaler is None or accelerator.scaler.get_scale() > SMALLEST_SCALE  # None: DeepSpeed has its own


def not_finite(
    accelerator: Accelerator, model: torch.nn.Module, broken: list[str], losses: list[dict], step: int, output_dir: Path
) -> FloatingPointError:
    """The error that names the parts of the loss, or else the parameters, whose values are inf or NaN.

    All processes call it, and before gradients are clipped: a norm that is NaN makes NaN of all of them.
    """
    parts = [name for name in broken if name not in ("loss", GRADIENT)] or [name for name in broken if name == "loss"]
    values = "; ".join(str({name: value.item() for name, value in forward.items()}) for forward in losses)
    what = ", ".join(parts)
    if not parts:
        names = spoilt_parameters(accelerator, model)
        others = f" and of {len(names) - 1} more parameters" if len(names) > 1 else ""
        what = f"the gradient of {names[0]}{others}"
    return FloatingPointError(
        f"Step {step}: {what} is not finite (losses of this process: {values}). Nothing of this step is saved: the last "
        f"whole checkpoint under {output_dir / 'checkpoints'} is intact. Try a lower --learning_rate, more --warmup_steps, or bf16 "
        "in place of fp16."
    )


def spoilt_parameters(accelerator: Accelerator, model: torch.nn.Module) -> list[str]:
    """Names of parameters whose gradient is not finite on some process, the same list on all.

    DeepSpeed has dropped the gradients by then: where it has not spoilt the parameter itself, there is no name.
    """
    parameters = accelerator.unwrap_model(model).named_parameters()
    trained = {name: p if p.grad is None else p.grad for name, p in parameters if p.requires_grad}
    own = [name for name, tensor in trained.items() if not torch.isfinite(whole(tensor).norm())]
    found = set(gather_object(own))
    return [name for name in trained if name in found] or ["some parameter"]
