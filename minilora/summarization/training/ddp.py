"""Data-parallel gradients: each process computes its shard, and the gradients are summed."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .. import processes
from .loss import summed_loss

# torch 2.13 renamed the option. Buffers are the same in every process, since none of them trains.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"


class Replica:
    """This process's copy of the model, whose gradients are the means over all processes.

    DistributedDataParallel sends the gradients of the parameters that train, and nothing else,
    while the backward pass is still running (Li et al. 2020, section 3.2). It averages them over
    the processes, so the loss is divided by the mean of their target tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.summed = _SummedLoss(model)
        self.parallel: DistributedDataParallel | None = None
        if not processes.active():
            return
        self.parallel = DistributedDataParallel(
            self.summed,
            init_sync=False,  # all have read the same files and drawn the same start
            **dict[str, Any]({_SYNC_BUFFERS: False}),
            gradient_as_bucket_view=True,
        )
        # DDP arranges its buckets by the first backward pass. With the same first pass in every
        # run, a resumed one adds in the same order and ends with the same bits.
        self.parallel(None).backward()
        model.zero_grad(set_to_none=True)

    def loss(self, batch: Mapping[str, Any] | None, last: bool) -> Tensor:
        """`summed_loss` of this process's shard of a batch: a scalar in nats.

        Args:
            batch: as `collate` makes it; None for an empty shard. Then the loss is 0, but its
                backward pass takes part in the sum, for which the others wait.
            last: whether the optimizer steps after this batch. Gradients are sent only then; those
                of the batches before are accumulated.
        """
        with nullcontext() if last or self.parallel is None else self.parallel.no_sync():
            loss: Tensor = (self.parallel or self.summed)(batch)
        return loss


class _SummedLoss(nn.Module):
    """DistributedDataParallel takes a module whose output is differentiated."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any] | None) -> Tensor:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        loss = trained[0].new_zeros(()) if batch is None else summed_loss(self.model, batch)[0]
        reaching: Tensor = _ReachAll.apply(loss, *trained)  # type: ignore[no-untyped-call]
        return reaching


class _ReachAll(torch.autograd.Function):
    """The identity on the loss, which connects every trainable parameter to the graph.

    DistributedDataParallel waits for each parameter's gradient. Layers that LayerDrop skips in this
    process, experts without tokens and an empty shard have none; this passes None for them.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *trained: Tensor) -> Tensor:
        ctx.count = len(trained)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        return G, *[None] * ctx.count
