"""What the data-parallel ranks of the training do together: whole copies of the model (DDP), or shares of it (FSDP2).

Every rank runs the same code on its own responses. The functions here that communicate are collective: all ranks call
them, in the same order. `train_ranks.py` sees to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from expert_iteration.models import hugging_face_model

BUCKET_BYTES = 64 * 2**20  # of gradients that travel at once: fewer messages, and a copy of no more than that


class Alone:
    """A learner that is the only one: there is nothing to exchange, and torch.distributed is not used."""

    def prepare(self, module: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        """Make the module whose forward pass is trained ready for this kind of training; collective.

        Args:
            module: changed in place; its parameters are read (by an optimizer) after this only.
            autocast_dtype: of the forward pass; None: no autocast.
        """

    def mean(self, values: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
        """Means over the responses of all ranks, from those over this rank's; collective.

        Args:
            values: scalars by name, the same names on every rank.
            share: this rank's part of all responses, 0 to 1.
        """
        return dict(values)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every gradient the sum of all ranks', at the end of a window; collective."""

    def receive(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Of a whole tensor that rank 0 has, what this rank holds of `like`; collective.

        Args:
            tensor: on rank 0 the whole; on the others one without data (device "meta").
            like: a parameter of that whole shape, which this rank may hold a shard of.
        """
        return tensor


class Replicas(Alone):
    """Every rank holds the whole model, and takes the same optimizer steps (DDP).

    Gradients are summed once a window, and not while the backward pass computes them, as `DistributedDataParallel`
    does: accumulation then needs no exchange, a window that ends early none of its own, and no copy of all gradients
    stays in memory. The exchange is not hidden behind the backward pass; it is small where replicas are the choice.
    """

    def prepare(self, module: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        """See `Alone.prepare`.

        Raises:
            RuntimeError: the ranks did not load the same weights.
        """
        check_same_weights(module)

    def mean(self, values: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
        """See `Alone.mean`."""
        means = share * torch.stack([value.detach().float() for value in values.values()])
        dist.all_reduce(means)
        return dict(zip(values, means.unbind(), strict=True))

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Alone.reduce_gradients`."""
        gradients = _gradients_of_any_rank(parameters)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(own) for part, own in zip(parts, bucket, strict=True)])

    def receive(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See `Alone.receive`."""
        if tensor.is_meta:
            received = torch.empty(tensor.shape, dtype=tensor.dtype, device=like.device)
        else:
            received = tensor.to(like.device).contiguous()
        dist.broadcast(received, src=0)
        return received


class Shards(Replicas):
    """Every rank holds a share of weights, gradients and optimizer state (FSDP2, `fully_shard`).

    A decoder layer is gathered when it is needed and dropped afterwards. Its gradients are summed in the backward pass
    of every micro-batch: to put that off would keep whole gradients on every rank.

    Args:
        device_type: "cpu" or "cuda".
    """

    # Under autocast alone every linear layer would keep a half-precision copy of its whole weight for the backward
    # pass, which FSDP knows nothing of: together a whole model on every rank. So FSDP itself gathers the layers'
    # weights in autocast's dtype, and half the bytes travel. What autocast leaves in float32 (the residual stream,
    # because the embeddings belong to the root) stays so; gradients are summed in float32.

    def __init__(self, device_type: str) -> None:
        self._mesh = init_device_mesh(device_type, (dist.get_world_size(),))

    def prepare(self, module: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        """See `Replicas.prepare`. A model that lies in host memory moves to the accelerators share by share."""
        check_same_weights(module)
        policy = MixedPrecisionPolicy(
            param_dtype=autocast_dtype,
            reduce_dtype=None if autocast_dtype is None else torch.float32,
            cast_forward_inputs=False,
        )
        for layer in reversed(_decoder_layers(module)):  # a layer within another comes first
            fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        root = fully_shard(module, mesh=self._mesh)
        module.register_forward_hook(partial(_drop_weights_if_no_backward_follows, root))
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # Sums, for the learner divides by the number of responses; FSDP would divide by that of ranks.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing is left to do: see the class."""

    def receive(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See `Alone.receive`."""
        received = super().receive(tensor, like)
        if not isinstance(like, DTensor):
            return received
        # Each rank cuts its own shard out; nothing more is sent.
        return distribute_tensor(received, like.device_mesh, like.placements, src_data_rank=None)


def check_same_weights(module: nn.Module) -> None:
    """Refuse models that differ from rank to rank, for instance in the cache of another host; collective.

    Raises:
        RuntimeError: names the first parameter that differs from rank 0's.
    """
    names, tensors = zip(*module.named_parameters(), strict=True)
    # int64, because no backend sends uint64; NCCL sends what lies on the accelerator only.
    device = tensors[0].device
    digests = torch.stack([torch.hash_tensor(tensor.detach()).view(torch.int64).to(device) for tensor in tensors])
    expected = digests.clone()
    dist.broadcast(expected, src=0)
    different = (digests != expected).int()
    anywhere = different.clone()
    dist.all_reduce(anywhere)
    if anywhere.any():
        name = names[int(anywhere.argmax())]
        raise RuntimeError(
            f"The training ranks have loaded different weights ({anywhere.count_nonzero()} parameters differ from rank "
            f"0's, such as {name}): give every host the same model."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds only shards of the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the shards of all ranks in place, without gradient; collective if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, without gradient: of a sharded one its shard, which shares its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_on_cpu(state: Any, *, keep: bool = True) -> Any:
    """A nested state with its tensors whole and on the CPU, one after the other; collective if any is sharded.

    Tensors that stand in several places, as tied weights do, are one tensor in the result as well.

    Args:
        state: dictionaries, lists and tuples of anything.
        keep: False takes part only, and returns None in place of every tensor.
    """
    return _whole_on_cpu(state, keep, {})


def outline(state: Any) -> Any:
    """A nested state with its tensors replaced by such without data (device "meta"), but for single numbers."""
    if isinstance(state, dict):
        return {key: outline(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(outline(value) for value in state)
    return state.to("meta") if is_bulky(state) else state


def is_bulky(value: Any) -> bool:
    """Whether a value of a state is a tensor of more than a single number."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _whole_on_cpu(state: Any, keep: bool, moved: dict[int, torch.Tensor | None]) -> Any:
    if isinstance(state, dict):
        return {key: _whole_on_cpu(value, keep, moved) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_whole_on_cpu(value, keep, moved) for value in state)
    if not isinstance(state, torch.Tensor):
        return state
    # By identity and not by address: an empty shard has none.
    if id(state) not in moved:
        gathered = whole(state)
        moved[id(state)] = gathered.cpu() if keep else None
    return moved[id(state)]


def _decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model: what transformers names as not to be split over devices."""
    names = set(hugging_face_model(module)._no_split_modules or ())
    return [part for part in module.modules() if type(part).__name__ in names]


def _drop_weights_if_no_backward_follows(root: FSDPModule, *_: Any) -> None:
    """FSDP keeps the root's gathered weights for the backward pass; without one they would still be used, stale, after
    the next optimizer step.
    """
    if not torch.is_grad_enabled():
        root.reshard()


def _gradients_of_any_rank(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients that any rank has: where this one has none (an expert that it did not need), zeros take its place.

    A parameter that none has used stays without, as in training on one rank.
    """
    exists = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(exists, op=dist.ReduceOp.MAX)
    used = [p for p, exist in zip(parameters, exists.tolist(), strict=True) if exist]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in used if parameter.grad is not None]


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in order, cut into lists of about `BUCKET_BYTES`."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(member.nbytes for member in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
