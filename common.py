"""What every script shares: command lines, files, seeds, devices, records, several processes."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gzip
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent
Record = dict[str, Any]


def setting(default: Any, help: str) -> Any:
    """A field of a settings dataclass with its line of --help."""
    return dataclasses.field(default=default, metadata={"help": help})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SystemExit(f"{self.prog}: {message} (--help lists every flag)")


def parse_cli(kind: type, prog: str, argv: Sequence[str] | None = None) -> Record:
    """What the command line names alone: --a-b 1, --flag or --no-flag, --list x y or x,y."""
    parser = _Parser(prog=prog, description=kind.__doc__, allow_abbrev=False)
    for field in dataclasses.fields(kind):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{field.metadata['help']} (default: {shown})".replace("%", "%%")
        options: Record = {"default": argparse.SUPPRESS, "help": text}
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif isinstance(default, tuple):
            parser.add_argument(flag, nargs="+", metavar="X", **options)
        else:
            parser.add_argument(flag, type=type(default), metavar="X", **options)
    found = vars(parser.parse_args(argv))
    lists = {k: ",".join(v).strip(",").split(",") for k, v in found.items() if isinstance(v, list)}
    return found | {name: tuple(words) for name, words in lists.items()}


def run_script(main: Any, kind: type, prog: str, argv: Sequence[str] | None = None) -> None:
    """main(what the command line names); a ValueError or OSError ends in one sentence."""
    overrides = parse_cli(kind, prog, argv)
    try:
        main(overrides)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"{prog}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def check_numbers(settings: Any, **least: float) -> None:
    """Raise ValueError that lists every setting which is not finite or below its least value."""
    values = {name: getattr(settings, name) for name in least}
    wrong = [f"{k} {v}" for k, v in values.items() if not least[k] <= v < 1e30]
    if wrong:
        raise ValueError(
            f"settings: expected numbers of at least {least}, found {', '.join(wrong)}"
        )


def parse_object(text: bytes, where: str) -> Record:
    """One JSON object. Raises ValueError that begins with `where`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {str(value)[:200]}")
    return value


def read_json(file: Path) -> Record:
    """The JSON object in a file. Raises ValueError, also when there is no such file."""
    if not file.is_file():  # a pipe or device would be read for ever
        raise ValueError(f"{file}: expected a JSON file, found none")
    return parse_object(file.read_bytes(), str(file))


def read_lines(file: str | Path) -> Iterator[tuple[str, bytes]]:
    """("file:line", bytes) of each line that is not blank; .gz is unpacked. Raises ValueError."""
    try:
        with gzip.open(file) if str(file).endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}:{number}", line.removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: expected a readable JSONL file: {error}") from None


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary file or folder, renamed to `path` when the block ends well, else removed.

    All of it is on the disk before the rename: a power cut leaves the old or the new, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        for part in (*tmp.rglob("*"), tmp):
            fsync(part)
        os.replace(tmp, path)
        fsync(path.parent)
    finally:
        remove(tmp)


def fsync(path: Path) -> None:
    """Return once the disk has this file's bytes, or this folder's names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def checkpoint_folder(folder: str | Path) -> Path:
    """The newest step-N folder of a run; the folder itself when there is none."""
    steps = [p for p in Path(folder).glob("step-*") if p.name[5:].isdigit()]
    return max(steps, key=lambda p: int(p.name[5:]), default=Path(folder))


def write_json(file: str | Path, value: Any) -> None:
    """Indented JSON, whole or not at all."""
    with atomic(file) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n")


def file_hash(file: str | Path) -> str:
    """sha256 of a file's bytes, read piece by piece."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """One sha256 of what makes a backbone: weights, config and tokenizer files of its folder."""
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".json", ".jinja")]
    hashes = [(f.name, file_hash(f)) for f in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def run_header(settings: Any, device: torch.device) -> Record:
    """What a record begins with: settings, commit (-dirty: changed since), versions, hardware."""
    git, commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"], ""
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    found: Record = {"settings": dataclasses.asdict(settings), "commit": commit or None}
    found |= {"device": str(device), "hardware": hardware, "threads": torch.get_num_threads()}
    return found | {"python": platform.python_version(), "torch": torch.__version__}


def read_record(run: Path) -> Record:
    """The first line of a run's metrics.jsonl: what it was started with; {} without one."""
    file = run / "metrics.jsonl"
    first = next(read_lines(file), None) if file.exists() else None
    return parse_object(first[1], first[0]) if first else {}


def generator(*parts: Any) -> torch.Generator:
    """A generator seeded by the text of `parts`, as (seed, tensor name): no two share a stream."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def choose_device(name: str) -> torch.device:
    """auto: a GPU, if there is one; each of torchrun's processes has its own. Raises ValueError."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    rank, (kind, _, index) = os.environ.get("LOCAL_RANK"), name.partition(":")
    number = rank or index or "0"
    if kind not in ("auto", "cuda") or rank and index or not number.isdecimal():
        raise ValueError(
            f"device: expected auto, cpu, cuda or (one process) cuda:N, found {name!r}"
        )
    if int(number) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} asked for, {torch.cuda.device_count()} GPUs found")
    # torch asks cuDNN first for attention (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp),
    # which plans each new shape for tens of milliseconds (.../native/cudnn/MHA.cpp)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", int(number))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU. Raises ValueError on another name."""
    name = ("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: expected auto, float32 or bfloat16, found {name!r}")
    return getattr(torch, name)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: page faults cost a step on a CPU as much as its arithmetic."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, mallopt(3)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` that torchrun started; rank 0 alone prints and writes."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Does this process print and write?"""
        return self.rank == 0

    def shard(self, items: Sequence[Any], filler: Any) -> list[Any]:
        """Every world-th item, with fillers up to the same number in each process."""
        mine = list(items[self.rank :: self.world])
        return mine + [filler] * (-(-len(items) // self.world) - len(mine))

    def gather(self, mine: Sequence[Any]) -> list[Any]:
        """The whole of which each process holds every world-th item: the inverse of `shard`."""
        parts: list[Any] = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, mine)
        total = sum(map(len, parts))
        return [parts[i % self.world][i // self.world] for i in range(total)]

    def sum(self, values: Tensor) -> Tensor:
        """The values (...) added up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def run_on_main(self, call: Callable[[], Any]) -> Any:
        """What the call returns in rank 0, for all. Where it raises there, the others exit."""
        box: list[Any] = [None, False]
        try:
            box = [call(), True] if self.is_main else box
        finally:
            if self.world > 1:
                dist.broadcast_object_list(box)
        if not box[1]:
            raise SystemExit(1)
        return box[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()


def open_ranks() -> Ranks:
    """This process among those of torchrun: NCCL where each has a GPU, else gloo."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return Ranks()
    if not dist.is_initialized():
        own = None
        if int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count():
            own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl" if own else "gloo"
        dist.init_process_group(backend, device_id=own, timeout=timedelta(hours=6))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    return Ranks(dist.get_rank(), dist.get_world_size())


def distribute(
    model: nn.Module, blocks: Any, whole: set[nn.Parameter], ranks: Ranks, device: Any, fsdp: bool
) -> nn.Module:
    """What is called in the model's place: itself, or torch's DDP, which averages the gradients.

    fsdp: FSDP2 cuts the weights over the processes, save those that stay whole.
    """
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for tensor in (*whole, *model.buffers()):
            tensor.data = tensor.data.to(device)
        mesh = init_device_mesh(device.type, (ranks.world,))
        for module in (*blocks, model):
            again = module is not model  # reshard after forward, as backward gathers it again
            fully_shard(module, mesh=mesh, reshard_after_forward=again, ignored_params=whole)
    if ranks.world == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, init_sync=False)


def no_sync(ddp_model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
    """DDP adds the gradients up in the last backward pass of a step only."""
    is_ddp = isinstance(ddp_model, DistributedDataParallel)
    return ddp_model.no_sync() if is_ddp and not last else contextlib.nullcontext()
