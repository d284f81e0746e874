"""Does training do what it should? A check around the first steps of any training loop.

These mistakes raise no error: the optimizer does not have the adapter, no gradient reaches it, the
steps are too small for the weights' dtype, or weight decay still moves a frozen weight.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from minilora.config import LoRAError
from minilora.inject import injection_of
from minilora.modules import plain_model
from minilora.reports import fold_names
from minilora.trained_whole import tensors

BITS = {1: torch.uint8, 2: torch.int16}
"""Bytes per entry -> the integer dtype that views a tensor's bits; int32 for wider entries."""


@dataclass
class TrainingReport:
    """What the steps did, filled when the block ends. It prints a line, then a line per problem.

    Attributes:
        steps: number of steps that the optimizer took.
        moved: the share of entries that changed, for each trained tensor by name.
        not_in_optimizer: trained tensors that the optimizer does not have.
        no_gradient: trained tensors without a gradient, or with a zero gradient in every step.
        not_moved: trained tensors of which no bit changed.
        base_changed: frozen tensors, buffers included, of which a bit changed.
    """

    steps: int = 0
    moved: dict[str, float] = field(default_factory=dict)
    not_in_optimizer: tuple[str, ...] = ()
    no_gradient: tuple[str, ...] = ()
    not_moved: tuple[str, ...] = ()
    base_changed: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """A line for each kind of problem, with like names folded; or that no step was taken."""
        found = [] if self.steps else ["the optimizer took no step"]
        for what in ("not_in_optimizer", "no_gradient", "not_moved", "base_changed"):
            found += [f"{what.replace('_', ' ')}: {n}" for n in fold_names(getattr(self, what))]
        return found

    def __str__(self) -> str:
        least = min(self.moved.values(), default=0.0)
        count = "1 tensor trains" if len(self.moved) == 1 else f"{len(self.moved)} tensors train"
        share = "all entries" if least == 1 else f"at least {least:.0%} of the entries"
        same = "the base changed" if self.base_changed else "the base is unchanged"
        plural = "s" * (self.steps != 1)
        text = f"{self.steps} step{plural}: {count}, {share} of each changed; {same}"
        return "\n  ".join([text, *self.problems])


@contextmanager
def verify_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[TrainingReport]:
    """Watch the first steps of training: what did not move, got no gradient, is in no optimizer.

    Two or three steps are enough. B starts at zero, so A's gradient is zero in the first step; if
    the learning rate also starts at zero, in the second too. Trained tensors are copied, and each
    frozen one gets a checksum: one pass over the weights on entry and one on exit. The steps
    themselves do not change.

    Args:
        model: with an adapter of minilora, or any model with parameters that train.
        optimizer: the optimizer of the loop.

    Returns:
        A context manager; its report is filled when the block ends.

    Raises:
        LoRAError: nothing in the model trains.

    Example:
        >>> from minilora import LoRAConfig, inject, trainable_parameters
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> optimizer = torch.optim.SGD([model["q_proj"].lora_B], lr=0.1)  # A is forgotten
        >>> with verify_training(model, optimizer) as report:
        ...     for _ in range(2):
        ...         model["q_proj"](torch.ones(8)).sum().backward()
        ...         optimizer.step()
        >>> print(report)
        2 steps: 2 tensors train, at least 0% of the entries of each changed; the base is unchanged
          not in optimizer: q_proj.lora_A
          not moved: q_proj.lora_A
    """
    model = plain_model(model)
    before = _tensors(model)
    trained = {name: tensor for name, tensor in before.items() if tensor.requires_grad}
    if not trained:
        raise LoRAError("nothing in the model trains: minilora.inject or load_adapter first")
    copies = {name: tensor.detach().clone() for name, tensor in trained.items()}
    sums = {name: checksum(t) for name, t in before.items() if name not in trained}
    report, reached = TrainingReport(), set[str]()
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it

    def count(*_: object) -> None:
        report.steps += 1

    def reach(name: str, tensor: Tensor) -> None:
        if tensor.grad is not None and tensor.grad.any():
            reached.add(name)

    with ExitStack() as hooks:
        hooks.enter_context(optimizer.register_step_post_hook(count))
        for name, tensor in trained.items():
            hooks.enter_context(tensor.register_post_accumulate_grad_hook(partial(reach, name)))
        yield report
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    now = before | _tensors(model)  # `before` has also what the block removed, such as by unwrap
    report.moved = {n: (now[n] != copy).float().mean().item() for n, copy in copies.items()}
    report.not_in_optimizer = tuple(n for n, tensor in trained.items() if id(tensor) not in held)
    report.no_gradient = tuple(name for name in trained if name not in reached)
    report.not_moved = tuple(name for name, share in report.moved.items() if not share)
    report.base_changed = tuple(name for name, kept in sums.items() if checksum(now[name]) != kept)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors to check: tied ones once, without buffers of modules that train whole."""
    extras = getattr(injection_of(model), "extras", ())
    live = {id(tensor) for extra in extras for tensor in extra.find(model).values()}
    held = {id(t): (name, t) for name, t in tensors(model).items() if isinstance(t, Tensor)}
    return {name: t for name, t in held.values() if id(t) not in live or t.requires_grad}


def checksum(tensor: Tensor) -> int:
    """The sum over the words of at most 32 bits, each times a random odd number, modulo 2^64.

    An odd number has an inverse modulo 2^64, so a change of one word always changes the sum. A
    change of several is missed with a probability below 2^-25. It works in chunks, without a copy:
    a word's number is that of its place in the chunk times that of the chunk.
    """
    bits = tensor.detach().flatten().view(BITS.get(tensor.element_size(), torch.int32))
    draw = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (2**18,), generator=draw).to(bits.device) * 2 + 1
    sums = (int((chunk * odd[: len(chunk)]).sum()) for chunk in bits.split(len(odd)))
    factors = random.Random(0)
    return sum(total * (factors.getrandbits(64) | 1) for total in sums) % 2**64
