"""Cross-entropy over the real target positions, and over nothing else."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def summed_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """-sum log p(target token) over the real target positions of a batch, in nats.

    A batch of targets (b, t) padded with -100 is up to half padding, and the head is the largest
    product of a small model: hidden states (b, t, d) times the vocabulary (d, v). So the padding
    is dropped before it: only the n real rows (n, d) reach the head.

    Args:
        model: an encoder-decoder of transformers; its head is `get_output_embeddings()`.
        batch: input_ids and attention_mask (b, s), labels (b, t) with -100 at padding.

    Returns:
        The sum (a scalar, float32) and n, the number of tokens that it sums. The loss of an
        optimizer step is the sum over all its batches divided by all their tokens.
    """
    labels = batch["labels"]  # (b, t)
    real = labels != -100  # (b, t)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)

    def keep_real(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][real],)  # (b, t, d) -> (n, d)

    hook = head.register_forward_pre_hook(keep_real)
    try:
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            # The decoder reads the target shifted by one: </s> y1 y2 ... predicts y1 y2 y3 ...
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),  # type: ignore[operator]
            use_cache=False,
        ).logits  # (n, v)
    finally:
        hook.remove()
    targets = labels[real]  # (n,)
    loss: Tensor = F.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, targets.numel()


@torch.no_grad()
def token_count(batch: dict[str, Tensor]) -> int:
    """Real tokens of a batch, source and target."""
    return int(batch["attention_mask"].sum()) + int((batch["labels"] != -100).sum())
