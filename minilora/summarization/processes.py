"""torch.distributed for one job of several processes: rank, collectives, shutdown.

`torchrun --nproc-per-node N train.py ...` starts N processes. Each holds the whole model, takes its
shard of every batch, and the gradients are summed:

    global loss = sum over processes (sum over their target tokens) / target tokens of all

Every process makes the same calls in the same order. What one of them finds alone (an error, a
signal) reaches the others through `run_on_all` or `any_rank` before any process acts on it. Without
torchrun there is one process, and every call is trivial.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from .errors import EXPECTED, LostPeer, UserError, exit_code, one_line

T = TypeVar("T")

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by torchrun
# The timeout of a collective call: longer than the slowest shard of a validation set. A process
# that dies is noticed at once, by its closed connection or by torchrun.
PATIENCE = timedelta(minutes=30)


# Rank ---------------------------------------------------------------------------------------------


def active() -> bool:
    """Whether torchrun started this process (the job may have one process only)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def shard(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every world_size-th one, from its rank on.

    Sorted items stay sorted, and the longest dialogues go to different processes. The shard is
    empty where there are fewer items than processes.
    """
    return items[rank() :: world_size()]


def own_device(device: torch.device) -> torch.device:
    """The device of this process: with several GPUs on a machine, the one of its local rank.

    Raises:
        UserError: two processes would share a GPU.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if active() else 1
    if device.type != "cpu" and here > 1:
        if device.type != "cuda" or device.index is not None:
            raise UserError(f"--device {device} is one device for {here} processes: use cuda")
        if (found := torch.cuda.device_count()) < here:
            raise UserError(
                f"--device cuda: {here} processes on this machine, but {found} GPU"
                f"{'s'[: found != 1]}: start torchrun with --nproc-per-node {max(found, 1)}"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # random states and peak memory are read from this one
    return device


def launch_options() -> str:
    """The options of torchrun that start as many processes again."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = f"--nnodes {world_size() // here} " if world_size() > here else ""
    return f"{nodes}--nproc-per-node {here}"


# Collectives --------------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank. They travel as JSON: nothing is unpickled."""
    if world_size() == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([content.numel()]))
    longest = int(max(lengths))
    padded = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size())]
    dist.all_gather(padded, nn.functional.pad(content, (0, longest - content.numel())))
    return [
        json.loads(row[: int(length)].numpy().tobytes())
        for row, length in zip(padded, lengths, strict=True)
    ]


def gather_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The byte tensors of all processes in one mapping; their names must differ."""
    rows = gather({name: tensor.tolist() for name, tensor in tensors.items()})
    return {name: torch.tensor(v, dtype=torch.uint8) for row in rows for name, v in row.items()}


def all_reduce_sum(number: float) -> float:
    """The number summed over the processes, in float64."""
    return float(sum(gather(number)))


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return any(gather(flag))


def run_on_all(work: Callable[[], T]) -> list[T]:
    """Do `work` in every process. Returns the results of all (JSON values), by rank.

    An error in one process is raised in all.

    Raises:
        UserError: the first error of another process. A process raises its own error as it is.
    """
    if world_size() == 1:
        return [work()]
    mine: dict[str, Any] = {}
    error: Exception | None = None
    try:
        mine["value"] = work()
    except EXPECTED as raised:
        error, mine["error"] = raised, str(raised)
    everyone = gather(mine)
    if error is not None:
        raise error
    if errors := [row["error"] for row in everyone if "error" in row]:
        raise UserError(errors[0])
    return [row["value"] for row in everyone]


def from_rank0(work: Callable[[], T]) -> T:
    """Do `work` in process 0. All get its result (a JSON value), or its error."""
    return run_on_all(lambda: work() if rank() == 0 else None)[0]  # type: ignore[return-value]


def on_rank0(work: Callable[[], object]) -> None:
    """Do `work` in process 0 while the others wait. Its error is raised in all."""

    def discard() -> None:
        work()

    from_rank0(discard)


def require_same(facts: Mapping[str, Any]) -> None:
    """Stop all processes if one of them has other facts than process 0.

    Raises:
        UserError: the first fact that differs, and the process.
    """
    everyone = gather(dict(facts))
    for other, theirs in enumerate(everyone):
        if different := [name for name in theirs if theirs[name] != everyone[0][name]]:
            raise UserError(
                f"process {other} of {world_size()} and process 0 differ in {different[0]}: all "
                "processes need the same files and settings"
            )


def seed_by_rank(seed: int) -> None:
    """Different dropout in every process. Process 0 draws as a run with one process does."""
    if rank() > 0:  # mt19937 takes the lower 32 bits; an odd factor keeps them apart
        torch.manual_seed((seed + rank() * 0x9E3779B97F4A7C15) % 2**63)


# Shutdown -----------------------------------------------------------------------------------------


@contextmanager
def join() -> Iterator[None]:
    """Join the job that torchrun started, and leave it at the end; without torchrun, nothing.

    Only process 0 prints. Of several processes that fail, the first names its error, and the others
    exit in silence with their exit code. torchrun ends the processes that do not.

    Raises:
        LostPeer: a collective call failed because another process is gone.
        SystemExit: another process has named its error already.
    """
    if not (dist.is_available() and all(name in os.environ for name in ENVIRONMENT)):
        yield
        return
    # Imported after init_process_group, as DDP does, it keeps the group as a default argument. Then
    # gloo's threads outlive the group, and one that frees a tensor at exit aborts the process.
    import torch.distributed.nn

    store, number, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
    # Counts and messages travel between CPUs, gradients between GPUs.
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            out, err = (nowhere, nowhere) if number else (sys.stdout, sys.stderr)
            with redirect_stdout(out), redirect_stderr(err):
                yield
    except (Exception, KeyboardInterrupt) as error:
        if not _first_to_fail(store):
            raise SystemExit(exit_code(error)) from None
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            what = f"process {number} of {count} lost contact with a peer"
            advice = "see the other processes' messages, then --resume"
            raise LostPeer(f"{what} ({one_line(error)[:200]}): {advice}") from None
        raise
    dist.destroy_process_group()


def _first_to_fail(store: Any) -> bool:
    try:
        return bool(store.add("minilora/failures", 1) == 1)
    except RuntimeError:  # the store is gone as well
        return True
