"""Cross-entropy over the real target positions only."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilora.fused import compute_dtype

from ..data.batches import IGNORED
from ..model.requirements import decoder_inputs

# Models whose logits are the head's output plus `final_logits_bias`, if there is one. Others scale
# or cap them.
PLAIN_HEADS = {"bart", "blenderbot", "m2m_100", "marian", "mbart", "t5"}
CHUNK = 2**23  # logits in memory at a time: 166 rows of BART's vocabulary, 34 MB in float32


def summed_loss(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """-sum log p(target token) over the real target positions of a batch, in nats.

    Up to half of a batch of targets (b, t) is padding (-100), and the head is the largest product
    of a small model: hidden states (b, t, d) times the vocabulary (d, v). So only the n real rows
    (n, d) go to the head. A frozen head takes them in chunks, so that the logits (n, v) never exist
    as a whole.

    Args:
        model: an encoder-decoder of transformers; its head is `get_output_embeddings()`. If the
            head is called in another way, the padding is dropped after it.
        batch: input_ids, or encoder_outputs, and attention_mask (b, s), labels (b, t) with -100 at
            padding.

    Returns:
        The sum (a scalar, float32) and n, the number of tokens that it sums. The loss of an
        optimizer step is the sum over all its batches divided by all their tokens.
    """
    labels = batch["labels"]  # (b, t)
    real = labels != IGNORED  # (b, t)

    rows: list[Tensor] = []  # the n real hidden states (n, d)
    head = model.get_output_embeddings()
    chunked = _is_plain_and_frozen(model, head)

    def keep_real(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, *others = inputs
        if hidden.shape[:-1] != real.shape:  # such as ProphetNet's (b, n-gram, t, d)
            return None
        rows.append(hidden[real])  # (b, t, d) -> (n, d)
        return (rows[0][:0] if chunked else rows[0], *others)

    hook = head.register_forward_pre_hook(keep_real) if isinstance(head, nn.Module) else None
    try:
        logits: Tensor = model(
            **{name: value for name, value in batch.items() if name != "labels"},
            decoder_input_ids=decoder_inputs(model, labels),
            use_cache=False,
        ).logits  # (n, v); (0, v) if chunked
    finally:
        if hook is not None:
            hook.remove()
    targets = labels[real]  # (n,)
    if chunked and rows:
        assert isinstance(head, nn.Linear)
        biases = (head.bias, getattr(model, "final_logits_bias", None))
        loss: Tensor = FrozenHeadLoss.apply(rows[0], head.weight, biases, targets)  # type: ignore[no-untyped-call]
        return loss, targets.numel()
    if logits.dim() == 3:
        logits = logits[real]  # (b, t, v) -> (n, v)
    return F.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()


def _is_plain_and_frozen(model: PreTrainedModel, head: Any) -> bool:
    return (
        type(head) is nn.Linear
        and model.config.model_type in PLAIN_HEADS
        and not any(parameter.requires_grad for parameter in head.parameters())
    )


class FrozenHeadLoss(torch.autograd.Function):
    """L = sum_i (log sum_j exp z_ij - z_i,t(i)), z = H W^T + b, for a W that does not train.

    H is (n, d), W (v, d), t (n,), and dL/dz = softmax(z) - onehot(t). The gradient from above is
    only a factor G, so dL/dH = dL/dz W is computed in the forward pass, chunk by chunk, while z
    exists: (n, d) is saved instead of (n, v), and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, H: Tensor, W: Tensor, biases: tuple[Tensor | None, ...], targets: Tensor
    ) -> Tensor:
        dtype = compute_dtype(H)
        with torch.autocast(H.device.type, enabled=False):
            W, narrow = W.to(dtype), H.to(dtype)
            loss = torch.zeros((), device=H.device)
            gradient = torch.empty_like(H) if ctx.needs_input_grad[0] else None
            size = max(1, CHUNK // len(W))
            for start in range(0, len(H), size):
                part = slice(start, start + size)
                z = (narrow[part] @ W.T).float()  # (c, v)
                for bias in filter(torch.is_tensor, biases):
                    z += bias
                t, log_p = targets[part, None], z.log_softmax(dim=1)  # (c, 1), (c, v)
                loss -= log_p.gather(1, t).sum()
                if gradient is not None:
                    dz = log_p.exp_().scatter_add_(1, t, loss.new_full(t.shape, -1))
                    gradient[part] = dz.to(dtype) @ W  # (c, v) (v, d) -> (c, d)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return G * gradient, None, None, None
