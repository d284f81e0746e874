"""The little that torch.distributed needs: who am I, what do the others have, and a clean end.

`torchrun --nproc-per-node N train.py ...` starts N processes. Each holds the whole model, takes its
share of every batch, and adds its gradients to the others':

    global loss = sum over processes (sum over their target tokens) / target tokens of all

Every process comes to the same calls in the same order; what one of them finds out alone (an
error, a signal) is told to the others by `together` before anybody acts on it. Without torchrun
there is one process, and everything here does nothing.
"""

import inspect
import json
import os
import signal
import socket
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from minilora import LoRAError
from minilora.summarization.loss import summed_loss
from minilora.summarization.presets import UserError

T = TypeVar("T")

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by torchrun
# How long a process waits for the others' next call: longer than the slowest share of a validation
# set. A process that dies is noticed at once, by its closed connection or by torchrun.
PATIENCE = timedelta(minutes=30)
# torch 2.13's new name of it; buffers are the same everywhere, and none of them trains.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"
# From SIGTERM to the end, whatever the process waits for: torchrun kills after 30.
GRACE_SECONDS = 20.0


class LostProcess(RuntimeError):
    """Another process of the job is gone, and with it the next collective call."""


# Who ----------------------------------------------------------------------------------------------


def active() -> bool:
    """Whether this process is one of a job of torchrun's (which may have one only)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def size() -> int:
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part: the parts of all processes are disjoint and together everything.

    Sorted items stay sorted, and neighbours go to different processes, so that the longest
    dialogues do not all come to one. The part is empty where there are fewer items than processes.
    """
    return items[rank() :: size()]


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on a machine with several GPUs, the one of its local rank.

    Raises:
        UserError: a GPU would have to serve two processes.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size())) if active() else 1
    if device.type != "cpu" and here > 1:
        if device.type != "cuda" or device.index is not None:
            raise UserError(f"--device {device} is one device for {here} processes: say cuda")
        if (found := torch.cuda.device_count()) < here:
            raise UserError(
                f"--device cuda: {here} processes on this machine, but {found} GPU"
                f"{'s'[: found != 1]}: start torchrun with --nproc-per-node {max(found, 1)}"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # random states and peak memory are those of "the" GPU
    return device


def launch_options() -> str:
    """What torchrun is to be told to start this many processes again."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    nodes = f"--nnodes {size() // here} " if size() > here else ""
    return f"{nodes}--nproc-per-node {here}"


# What the others have -----------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """Everybody's value, by rank. It travels as JSON: no pickle, whatever listens on the port."""
    if size() == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([content.numel()]))
    longest = int(max(lengths))
    padded = [torch.empty(longest, dtype=torch.uint8) for _ in range(size())]
    dist.all_gather(padded, nn.functional.pad(content, (0, longest - content.numel())))
    return [
        json.loads(row[: int(length)].numpy().tobytes())
        for row, length in zip(padded, lengths, strict=True)
    ]


def gather_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everybody's tensors of bytes, in one mapping; their names must differ."""
    if size() == 1:
        return dict(tensors)
    rows = gather({name: tensor.tolist() for name, tensor in tensors.items()})
    return {name: torch.tensor(v, dtype=torch.uint8) for row in rows for name, v in row.items()}


def total(*numbers: float) -> list[float]:
    """Each number summed over the processes, in float64."""
    if size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def anywhere(*flags: bool) -> list[bool]:
    """Whether each flag is set in any process: what all of them may act on."""
    return [number > 0 for number in total(*map(float, flags))]


_working = False
_interrupted = False


def interrupt() -> None:
    """Raise KeyboardInterrupt: at once, or in `together`, where the others hear of it.

    In a collective call they would wait for a process that has left it.
    """
    global _interrupted
    if _working or size() == 1:
        raise KeyboardInterrupt
    _interrupted = True


def forget_interrupt() -> None:
    """What `interrupt` put off is not to be raised any more."""
    global _interrupted
    _interrupted = False


def together(work: Callable[[], T]) -> list[T]:
    """Do `work` in every process; afterwards all have all results (JSON values), by rank.

    An interrupt or an error of one is an interrupt or an error of all.

    Raises:
        UserError: of the first process that raised one (LoRAError and OSError too); the process
            that it came from raises what it was.
    """
    if size() == 1:
        return [work()]
    global _working
    mine: dict[str, Any] = {}
    error: Exception | None = None
    try:
        try:
            _working = True
            if _interrupted:
                raise KeyboardInterrupt
            mine["value"] = work()
        finally:
            _working = False
    except KeyboardInterrupt:
        mine["interrupted"] = True
    except (UserError, LoRAError, OSError) as raised:
        error, mine["error"] = raised, str(raised)
    everyone = gather(mine)
    if error is not None:
        raise error
    if errors := [row["error"] for row in everyone if "error" in row]:
        raise UserError(errors[0])
    if any("interrupted" in row for row in everyone):
        raise KeyboardInterrupt
    return [row["value"] for row in everyone]


def from_main(work: Callable[[], T]) -> T:
    """Do `work` in the main process only; all get its result (a JSON value), or its error."""
    return together(lambda: work() if is_main() else None)[0]  # type: ignore[return-value]


def on_main(work: Callable[[], object]) -> None:
    """Do `work` in the main process, while the others wait for its end; its error is all's."""

    def discard() -> None:
        work()

    from_main(discard)


def require_same(facts: Mapping[str, Any]) -> None:
    """Refuse to go on, in all processes, where one of them knows other facts than process 0.

    Raises:
        UserError: the first fact that differs, and whose it is.
    """
    everyone = gather(dict(facts))
    for other, theirs in enumerate(everyone):
        if different := [name for name in theirs if theirs[name] != everyone[0][name]]:
            raise UserError(
                f"process {other} of {size()} has {different[0]} unlike process 0: all must read "
                "the same files, with the same settings"
            )


def checksum(model: nn.Module) -> int:
    """CRC-32 over the parameters that train: whether processes start from the same."""
    found = 0
    for tensor in (p for p in model.parameters() if p.requires_grad):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(flat.numpy().data, found)
    return found


def seed_apart(seed: int) -> None:
    """Other dropout in every process; that of process 0 is that of a run with one process."""
    if rank() > 0:  # mt19937 takes the lower 32 bits; an odd factor keeps them apart
        torch.manual_seed((seed + rank() * 0x9E3779B97F4A7C15) % 2**63)


# The model ----------------------------------------------------------------------------------------


class Replica:
    """This process's copy of the model, whose gradients are the sums over all processes.

    DistributedDataParallel sends the gradients of the parameters that train, and nothing else,
    while the backward pass is still under way (Li et al. 2020, section 3.2). It would average
    them; each loss here is divided by the target tokens of all processes, so they are added.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.sent_bytes = 0
        """Gradients handed to the others; whoever counts sets it to zero."""
        self.summed = _SummedLoss(model)
        self.parallel: DistributedDataParallel | None = None
        if not active():
            return
        # LayerDrop leaves other layers out in each process: nobody may wait for their gradients.
        drops = [getattr(model.config, f"{side}_layerdrop", 0) for side in ("encoder", "decoder")]
        self.parallel = DistributedDataParallel(
            self.summed,
            init_sync=False,  # all have read the same files and drawn the same start
            **dict[str, Any]({_SYNC_BUFFERS: False}),
            gradient_as_bucket_view=True,
            find_unused_parameters=any(drops),
        )
        self.parallel.register_comm_hook(self, lambda self, bucket: _add_up(self, bucket))
        # DDP arranges its buckets by the first backward pass. A first pass that is the same in
        # every run lets a resumed one add in the same order, and so end with the same bits.
        self.parallel(None).backward()
        model.zero_grad(set_to_none=True)
        self.sent_bytes = 0

    def loss(self, batch: dict[str, Tensor] | None, last: bool) -> Tensor:
        """`summed_loss` of this process's share of a batch: a scalar in nats.

        Args:
            batch: as `collate` makes it; None where the share is empty. Then the loss is 0, but
                its backward pass takes part in the sum, for which the others wait.
            last: whether the optimizer steps after this batch. Only then are gradients sent; those
                of the batches before have been accumulated.
        """
        if self.parallel is None:
            loss: Tensor = self.summed(batch)
            return loss
        with nullcontext() if last else self.parallel.no_sync():
            sent: Tensor = self.parallel(batch)
        return sent


class _SummedLoss(nn.Module):
    """DistributedDataParallel wants a module whose output is what is differentiated."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor] | None) -> Tensor:
        if batch is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return torch.stack([(0.0 * parameter).sum().float() for parameter in trained]).sum()
        return summed_loss(self.model, batch)[0]


def _add_up(replica: Replica, bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: a GradBucket's gradients are summed in place, and counted."""
    gradients = bucket.buffer()
    replica.sent_bytes += gradients.nbytes
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


# Beginning and end --------------------------------------------------------------------------------


@contextmanager
def processes() -> Iterator[None]:
    """Join the job that torchrun started, and leave it; without torchrun, nothing.

    Inside, only the main process prints. Of several that fail the first says why; the others end
    with its exit code and without a word, since they failed with it.

    Raises:
        LostProcess: another process is gone.
        SystemExit: another process has said what went wrong.
    """
    if not (dist.is_available() and all(name in os.environ for name in ENVIRONMENT)):
        yield
        return
    store, number, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
    # For each kind of tensor its own: what is counted and said travels between CPUs
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        with _end_in_time(), _only_main_prints():
            yield
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and _is_lost(error)
        code = 2 if isinstance(error, (UserError, LoRAError, OSError)) else 1
        if isinstance(error, KeyboardInterrupt):
            code = 130
        if isinstance(error, SystemExit):
            raise
        _exit_after(GRACE_SECONDS, code)  # a communicator may wait for who is gone
        if not _first_to_fail(store):
            raise SystemExit(code) from None
        if lost:
            raise LostProcess(
                f"process {number} of {count} waits in vain for another, which is gone "
                f"({' '.join(str(error).split())[:200]})"
            ) from None
        raise
    dist.destroy_process_group()


def _first_to_fail(store: Any) -> bool:
    try:
        return bool(store.add("minilora/failures", 1) == 1)
    except RuntimeError:  # the store is gone as well
        return True


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective call failed because another process is gone."""
    signs = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "socket")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        "gloo" in text and any(sign in text for sign in signs)
    )


@contextmanager
def _only_main_prints() -> Iterator[None]:
    with ExitStack() as stack:
        if not is_main():
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def _end_in_time() -> Iterator[None]:
    """After SIGTERM this process ends within `GRACE_SECONDS`, whatever it waits for.

    torchrun sends it when another process has died. While one waits for that other in C code,
    Python's handlers do not run: so a thread reads the signal, where Python writes it at once.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    try:
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not in the main thread: nobody sends signals here
        yield
        return

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] == signal.SIGTERM:
                _exit_after(GRACE_SECONDS, 128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


def _exit_after(seconds: float, code: int) -> None:
    """End the process then, whatever it is doing."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
