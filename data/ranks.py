"""Several processes, one a GPU, as torchrun starts them: who does what, what is summed, how the model is spread. One process: nothing happens."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; number 0 alone prints to stdout and writes."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Is this the one that prints to stdout and writes?"""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The name of this process' device: a GPU of its own for auto and cuda. Raises ValueError on another GPU, which all would share."""
        if self.world == 1 or name == "cpu" or name == "auto" and not torch.cuda.is_available():
            return name
        if name not in ("auto", "cuda"):
            raise ValueError(f"device: each of {self.world} processes has a GPU of its own; expected auto, cuda or cpu, found {name!r}")
        return f"cuda:{os.environ['LOCAL_RANK']}"

    def share(self, items: Sequence[T], filler: T) -> list[T]:
        """This process' items, every world-th; as many for each process, so that all meet in the same sums, with fillers at the end."""
        mine = list(items[self.rank::self.world])
        return mine + [filler] * (-(-len(items) // self.world) - len(mine))

    def sum(self, values: Tensor) -> Tensor:
        """The values (...) added up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, call: Callable[[], T]) -> T:
        """What this call, made in process 0 alone, returns. Its ValueError is raised there; the others end with exit code 1 and no word."""
        box: list[Any] = [None, False]
        try:
            box = [call(), True] if self.first else box
        finally:
            if self.world > 1:
                dist.broadcast_object_list(box)
        if not box[1]:
            raise SystemExit(1)
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


def open_ranks() -> Ranks:
    """This process among those that torchrun started. Opens the connection, once: NCCL between GPUs, one a process, gloo for all else;
    what processes other than the first print to stdout goes nowhere."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return Ranks()
    if not dist.is_initialized():
        own = None
        if int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count():
            own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(own)
        backends = "cpu:gloo,cuda:nccl" if own else "gloo"
        dist.init_process_group(backends, device_id=own, timeout=timedelta(hours=6))  # in scoring one may end long before another
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return Ranks(dist.get_rank(), dist.get_world_size())


def close_ranks() -> None:
    """End the connection, if there is one. All processes do so or none: one that fails ends without, as NCCL would wait for the others."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def spread(model: nn.Module, blocks: Sequence[nn.Module], ranks: Ranks, device: torch.device, shard: bool,
           idle: Sequence[nn.Parameter] = ()) -> nn.Module:
    """What is called in place of the model: the model itself, or torch's DDP around it, which takes the mean of the gradients.

    shard: frozen weights are cut over the processes by FSDP2, block by block, and put together while a block computes; what
    trains stays whole. idle: parameters that never get a gradient.
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
    idle = [p for p in idle if p.requires_grad]
    for p in idle:
        p.requires_grad_(False)  # DDP waits for the gradient of each parameter that requires one when it is made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers gets another name; older versions know this one only
        forward = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, init_sync=False)
    for p in idle:
        p.requires_grad_(True)
    return forward


def summing(forward: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """The backward pass in which DDP adds the gradients up is the last of a step."""
    return contextlib.nullcontext() if last or not isinstance(forward, nn.parallel.DistributedDataParallel) else forward.no_sync()
