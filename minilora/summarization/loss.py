"""Cross-entropy over the real target positions, and over nothing else."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilora.summarization.data import IGNORED


def summed_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """-sum log p(target token) over the real target positions of a batch, in nats.

    A batch of targets (b, t) padded with -100 is up to half padding, and the head is the largest
    product of a small model: hidden states (b, t, d) times the vocabulary (d, v). So the padding
    is dropped before it: only the n real rows (n, d) reach the head.

    Args:
        model: an encoder-decoder of transformers; its head is `get_output_embeddings()`. A head
            that is called in another way sees all rows, and the padding is dropped after it.
        batch: input_ids and attention_mask (b, s), labels (b, t) with -100 at padding.

    Returns:
        The sum (a scalar, float32) and n, the number of tokens that it sums. The loss of an
        optimizer step is the sum over all its batches divided by all their tokens.
    """
    labels = batch["labels"]  # (b, t)
    real = labels != IGNORED  # (b, t)

    def keep_real(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, *others = inputs
        if hidden.shape[:-1] != real.shape:  # such as ProphetNet's (b, n-gram, t, d)
            return None
        return (hidden[real], *others)  # (b, t, d) -> (n, d)

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(keep_real) if isinstance(head, nn.Module) else None
    try:
        logits: Tensor = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=decoder_inputs(model, labels),
            use_cache=False,
        ).logits  # (n, v)
    finally:
        if hook is not None:
            hook.remove()
    if logits.dim() == 3:
        logits = logits[real]  # (b, t, v) -> (n, v)
    targets = labels[real]  # (n,)
    return F.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The target shifted by one, (b, t): the decoder reads </s> y1 y2 ... to predict y1 y2 y3 ...

    Most models do it themselves: mBART, for one, starts with the language. NLLB and Blenderbot
    leave it to their forward, which does what is done here.
    """
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        shifted: Tensor = prepare(labels)
        return shifted
    config = model.config
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
