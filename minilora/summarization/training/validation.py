"""After each epoch: the loss and ROUGE on the validation split."""

from dataclasses import replace

import torch

from .. import processes
from ..data.batches import by_length
from ..evaluation.generate import summarize
from ..evaluation.rouge import METRICS, rouge, rouge_is_installed
from .failures import require_finite
from .loss import summed_loss
from .session import Session, Split

Scores = dict[str, float | None]


@torch.no_grad()
def validate(session: Session) -> Scores:
    """Loss per target token, and ROUGE of summaries (None where rouge_score is not installed)."""
    run, model, split = session.run, session.model.eval(), session.splits["validation"]
    parts = processes.run_on_all(lambda: _summed_losses(session, split))
    loss, tokens = (sum(numbers) for numbers in zip(*parts, strict=True))
    if not rouge_is_installed():
        return {"loss": loss / tokens, **dict.fromkeys(METRICS)}
    limit = run.training.validation_limit or len(split)
    generation = replace(run.generation, beams=run.training.validation_beams)
    how = (generation, session.autocast_dtype, None, split.states)
    summaries = summarize(model, session.tokenizer, split.encoded[:limit], *how)
    references = [example.references for example in split.examples[:limit]]
    rows = rouge([summary.text for summary in summaries], references)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return {"loss": loss / tokens, **{name: round(mean, 4) for name, mean in means.items()}}


def _summed_losses(session: Session, split: Split) -> tuple[float, int]:
    """The shard of this process: nats and target tokens."""
    loss, tokens = 0.0, 0
    for chosen in processes.shard(
        by_length(split.encoded, session.run.generation.evaluation_batch_size)
    ):
        rows = [split.encoded[i] for i in chosen]
        with session.autocast():
            summed, count = summed_loss(session.model, session.tensors(rows, "validation"))
        require_finite("validation loss", summed.item(), [rows])
        loss, tokens = loss + summed.item(), tokens + count
    return loss, tokens


def selection_score(scores: Scores) -> float:
    """The number that chooses the best epoch: ROUGE-1, or without ROUGE the negative loss."""
    rouge1, loss = scores["rouge1"], scores["loss"]
    assert loss is not None
    return -loss if rouge1 is None else rouge1


def describe(scores: Scores) -> str:
    """One line for the terminal."""
    line = f"validation loss {scores['loss']:.3f}"
    if scores["rouge1"] is None:
        return line
    return f"{line}, ROUGE-1/2/L " + "/".join(f"{scores[m]:.1f}" for m in METRICS[:3])
