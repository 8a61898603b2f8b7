"""Several processes, one a GPU, as torchrun starts them: who does what, what is summed, how the model is spread. One process: nothing happens."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; number 0 alone prints and writes."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Is this the one that prints and writes?"""
        return self.rank == 0

    def share(self, items: Sequence[T], filler: T) -> list[T]:
        """This process' items, every world-th; as many for each process, so that all meet in the same sums, with fillers at the end."""
        mine = list(items[self.rank::self.world])
        return mine + [filler] * (-(-len(items) // self.world) - len(mine))

    def sum(self, values: Tensor) -> Tensor:
        """The values (...) added up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: T) -> T:
        """What this is in process 0."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def join(self, mine: Sequence[T]) -> list[T]:
        """The whole of which each process holds every world-th, without fillers: the inverse of `share`."""
        parts: list[Any] = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, mine)
        whole: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank::self.world] = part
        return whole

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def open_ranks(device: str = "auto") -> tuple[Ranks, str]:
    """(this process among those that torchrun started, its device: a GPU of its own for auto and cuda). Opens the connection once."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return Ranks(), device
    gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu and device in ("auto", "cuda") else device
    if not dist.is_initialized():
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpu else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def close_ranks() -> None:
    """End the connection, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def spread(model: nn.Module, blocks: Sequence[nn.Module], ranks: Ranks, device: torch.device, shard: bool, idle: bool) -> nn.Module:
    """What is called in place of the model: the model itself, or torch's DDP around it, which takes the mean of the gradients.

    shard: frozen weights are cut over the processes by FSDP2, block by block, and put together while a block computes; what
    trains stays whole. idle: some parameters may get no gradient.
    """
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh, whole = init_device_mesh(device.type, (ranks.world,)), {p for p in model.parameters() if p.requires_grad}
        for p in whole:
            p.data = p.data.to(device)
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=module is not model, ignored_params=whole)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
    if ranks.world == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers gets another name; older versions know this one only
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, init_sync=False, find_unused_parameters=idle)


def summing(forward: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """The backward pass in which DDP adds the gradients up is the last of a step."""
    return contextlib.nullcontext() if last or not isinstance(forward, nn.parallel.DistributedDataParallel) else forward.no_sync()
