"""What stage 1 exchanges between processes. Without a process group every function is the identity of one process.

Per step a rank sends its ITC features (gathered with gradient), its token ids, and only those image features that some
other rank drew as hard negatives (`fetch_rows`). Image features are never all-gathered.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def batch_sizes(local: int, device: torch.device) -> list[int]:
    """Rows on each rank; they may differ in the last batch."""
    if world_size() == 1:
        return [local]
    sizes = torch.zeros(world_size(), dtype=torch.long, device=device)
    sizes[rank()] = local
    dist.all_reduce(sizes)
    return sizes.tolist()


def gather_rows(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Concatenate (local, ...) of all ranks to (sum(sizes), ...), in rank order, with gradient to every rank's rows."""
    return rows if world_size() == 1 else _GatherRows.apply(rows, sizes)


def gather_text(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, sizes: list[int], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and masks of all ranks (sum(sizes), longest L of any rank)."""
    if world_size() == 1:
        return input_ids, attention_mask
    longest = torch.tensor(input_ids.shape[1], device=input_ids.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    missing = longest.item() - input_ids.shape[1]
    input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=pad_token_id)
    attention_mask = torch.nn.functional.pad(attention_mask, (0, missing), value=0)
    return gather_rows(input_ids, sizes), gather_rows(attention_mask, sizes)


def fetch_rows(rows: torch.Tensor, index: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Rows with global numbers `index` (wanted,), wherever they are -> (wanted, ...), with gradient to their owners.

    Collective: every rank calls it, also with an empty index. Sends only the rows that are asked for.
    """
    if world_size() == 1:
        return rows[index]
    return _FetchRows.apply(rows, index, sizes)


def global_mean(local_sum: torch.Tensor, local_count: torch.Tensor | int) -> torch.Tensor:
    """Mean over the global batch of a loss whose terms are spread over ranks.

    Every rank gets the same value. Its gradient is that of world_size * local_sum / global_count, so that the mean that
    DDP takes over ranks is the gradient of the global mean.
    """
    count = torch.as_tensor(local_count, dtype=local_sum.dtype, device=local_sum.device)
    if world_size() == 1:
        return global_share(local_sum, count)
    total, total_count = global_sum(torch.stack([local_sum.detach(), count]))
    share = global_share(local_sum, total_count)
    # The value of the global mean with the gradient of this rank's share.
    return share + (total / total_count.clamp(min=1) - share.detach())


def share_of_items(local_sum: torch.Tensor, num_items_in_batch: torch.Tensor | float) -> torch.Tensor:
    """What the terms of this forward add to a mean whose terms a trainer has counted: their sum over its count.

    transformers' convention (`num_items_in_batch`): the trainer counts over all forwards of an optimiser step and all
    processes, and undoes what it divides by itself. No exchange with other processes; 0 where there is nothing to count.
    """
    count = torch.as_tensor(num_items_in_batch, dtype=local_sum.dtype, device=local_sum.device)
    return local_sum / count.clamp(min=torch.finfo(count.dtype).tiny)


def global_sum(local: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, without gradient; the same on every rank."""
    total = local.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def global_share(local_sum: torch.Tensor, global_count: torch.Tensor) -> torch.Tensor:
    """This rank's sum, or a part of it, as a share of a global mean, times world_size: DDP's mean divides by that again."""
    return local_sum * world_size() / global_count.clamp(min=1)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over ranks, as DDP does after a backward that went through it.

    Collective: every rank calls it, with gradients on the same parameters. Doing it again changes nothing.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for reduction in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        reduction.wait()
    for gradient in gradients:
        gradient.div_(world_size())


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.sizes = sizes
        longest = max(sizes)  # all_gather wants equal shapes: shorter ranks send padding, which is cut off on arrival
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return torch.cat([part[:size] for part, size in zip(received, sizes)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Every rank's loss depends on the rows of all ranks: a row's gradient is the sum over ranks.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = sum(ctx.sizes[: rank()])
        return gradient[start : start + ctx.sizes[rank()]], None


class _FetchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, index: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        starts = torch.tensor([0, *sizes]).cumsum(0)
        owner = torch.bucketize(index.cpu(), starts[1:], right=True)
        order = owner.argsort(stable=True)  # all_to_all sends in the order of ranks; undone on arrival
        wanted = torch.bincount(owner, minlength=len(sizes))  # rows this rank asks of each rank
        asked = _exchange_counts(wanted, rows.device)  # rows each rank asks of this one
        numbers = _all_to_all(index[order.to(index.device)], asked, wanted.tolist())
        local = numbers - starts[rank()].item()
        received = _all_to_all(rows[local], wanted.tolist(), asked)
        ctx.save_for_backward(local, order)
        ctx.asked, ctx.wanted, ctx.shape = asked, wanted.tolist(), rows.shape
        result = torch.empty_like(received)
        result[order.to(rows.device)] = received
        return result

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        local, order = ctx.saved_tensors
        # index_add_, not assignment: several ranks may have asked for the same row.
        returned = _all_to_all(gradient[order.to(gradient.device)], ctx.asked, ctx.wanted)
        return gradient.new_zeros(ctx.shape).index_add_(0, local, returned), None, None


def _exchange_counts(wanted: torch.Tensor, device: torch.device) -> list[int]:
    asked = torch.empty_like(wanted, device=device)
    dist.all_to_all_single(asked, wanted.to(device))
    return asked.tolist()


def _all_to_all(rows: torch.Tensor, receive: list[int], send: list[int]) -> torch.Tensor:
    result = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), output_split_sizes=receive, input_split_sizes=send)
    return result
