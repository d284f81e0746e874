"""The mixed-precision loop: from a base model and dialogues to the best adapter.

output/
    config.json      every setting, the learning rate resolved
    log.jsonl        one record a line: start, step, validation, end
    adapter/         the best so far by validation ROUGE-1 (model/ after --method full)
    checkpoints/     what --resume needs
"""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import minilora
from minilora.summarization import distributed, speed
from minilora.summarization.checkpoint import (
    Progress,
    load_checkpoint,
    random_states,
    save_checkpoint,
)
from minilora.summarization.data import Encoded, batches, by_length
from minilora.summarization.directories import sweep
from minilora.summarization.distributed import Replica
from minilora.summarization.evaluation import rouge, summarize
from minilora.summarization.guards import (
    IN_A_ROW,
    BadBatch,
    changed,
    is_out_of_memory,
    out_of_memory,
    pieces,
    smaller_evaluation_batch,
    too_large,
)
from minilora.summarization.log import Clock, Log, NoLog
from minilora.summarization.loss import summed_loss
from minilora.summarization.origin import differences
from minilora.summarization.presets import TrainingOptions, UserError
from minilora.summarization.session import Session, Split, save_trained, write_config
from minilora.summarization.stopping import StopRequest, stop_requests


@dataclass
class Outcome:
    """How a run ended."""

    progress: Progress
    interrupted: bool
    peak_bytes: int


def fit(session: Session, output: Path) -> Outcome:
    """Train until the last step, or until Ctrl-C or SIGTERM; go on from `output`'s checkpoint.

    Raises:
        UserError: a loss that is not finite; its step and dialogues are named.
        OSError: the output cannot be written.
    """
    trainer = Trainer(session, output)
    with trainer.log, trainer.bar, stop_requests() as stop:
        finished = trainer.run(stop)
    return Outcome(trainer.progress, not finished, peak_bytes(session.device))


class Trainer:
    """A run under way: what changes from step to step, and where it is written."""

    def __init__(self, session: Session, output: Path) -> None:
        training = session.run.training
        assert training.learning_rate is not None  # resolved by the command line
        self.session, self.output = session, output
        self.peak = training.learning_rate
        self.last = last_step(training, len(session.splits["train"]))
        self.warmup = max(1, round(training.warmup * self.last))
        self.parameters = list(minilora.trainable_parameters(session.model))
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.peak, weight_decay=training.weight_decay, fused=True
        )
        fp16 = session.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=fp16)
        self.replica = Replica(session.model)
        self.progress, origin, notices = load_checkpoint(
            output / "checkpoints",
            session.model,
            self.optimizer,
            self.scaler,
            rank=distributed.rank(),
        )
        distributed.require_same({f"a checkpoint in {output}": self.progress.step})
        for notice in [*notices, *self.compare(origin)]:
            print(f"note: {notice}", file=sys.stderr)
        if session.run.output.accept_changes:  # the next resume begins with these
            distributed.on_main(lambda: write_config(session.run, output))
        distributed.on_main(lambda: sweep(output))
        self.clock = Clock(self.progress.seconds)
        self.log = (Log if distributed.is_main() else NoLog)(
            output / "log.jsonl", self.progress.log_bytes
        )
        self.bad_steps = 0  # left out in a row
        self.bar = tqdm(
            total=self.last,
            initial=self.progress.step,
            unit="step",
            disable=None,  # where nobody looks
            dynamic_ncols=True,
        )

    def compare(self, origin: dict[str, str]) -> list[str]:
        """Notices on what differs from what the run began with.

        Raises:
            UserError: the end would be another, and --accept-changes was not given.
        """
        what, where = differences(origin, self.session.origin)
        if what and not self.session.run.output.accept_changes:
            raise UserError(
                f"--resume {self.output}: not what the run began with: {', '.join(what)}; put it "
                "back, or --accept-changes goes on all the same"
            )
        notices = [f"not what the run began with: {', '.join(what)}"] if what else []
        if where:
            notices.append(f"the run began elsewhere, the last bits may differ: {', '.join(where)}")
        return notices

    def run(self, stop: StopRequest) -> bool:
        """Train to the end. False if stopped before: a checkpoint and an adapter are there."""
        progress = self.progress
        if progress.log_bytes == 0:
            report = self.session.report
            self.log.write("start", trainable=report.trainable, total=report.total)
        # A position above 0 after the last step: stopped before that epoch was validated.
        while progress.step < self.last or progress.position:
            if not (self.train_epoch(stop) and self.end_epoch(stop)):
                self.checkpoint()
                if progress.best is None:
                    distributed.on_main(lambda: save_trained(self.session, self.output))
                return False
        progress.seconds = self.clock.seconds()
        peak = peak_bytes(self.session.device)
        self.log.write("end", seconds=round(progress.seconds, 1), peak_bytes=peak)
        return True

    def train_epoch(self, stop: StopRequest) -> bool:
        """The optimizer steps of this epoch that are left. False if stopped before its end."""
        progress = self.progress
        for group in epoch_groups(self.session, progress.epoch)[progress.position :]:
            if progress.step == self.last:  # --max-steps
                break
            if distributed.anywhere(stop.requested)[0]:
                return False
            measures = self.step_or_skip(group)
            progress.step += 1
            progress.position += 1
            self.log.write("step", step=progress.step, epoch=progress.epoch + 1, **measures)
            self.bar.update()
            self.bar.set_postfix_str(
                f"loss {measures['loss']:.3f}, {measures['tokens_per_second']:,.0f} tokens/s"
            )
            if distributed.anywhere(self.checkpoint_is_due())[0]:
                self.checkpoint()
        return True

    def end_epoch(self, stop: StopRequest) -> bool:
        """Validate, save what was trained if it is the best so far, and turn to the next epoch.

        False if stopped before: summaries take long, nothing of them is kept, and so nobody waits
        for them.
        """
        size = self.session.run.generation.evaluation_batch_size
        doing = f"validating after step {self.progress.step}"
        try:
            with stop.at_once(), out_of_memory(doing, smaller_evaluation_batch(size)):
                scores = validate(self.session)
        except KeyboardInterrupt:
            return False
        self.look_at_data()
        progress = self.progress
        better = progress.best is None or scores["rouge1"] > progress.best
        self.log.write("validation", step=progress.step, epoch=progress.epoch + 1, **scores)
        line = _epoch_line(progress, self.session.run.training.epochs, scores, better)
        self.bar.write(line, file=sys.stdout)
        if better:
            progress.best, progress.best_step = scores["rouge1"], progress.step
            distributed.on_main(lambda: save_trained(self.session, self.output))
        progress.epoch, progress.position = progress.epoch + 1, 0
        self.checkpoint()
        return True

    def checkpoint_is_due(self) -> bool:
        options = self.session.run.output
        by_steps = options.checkpoint_steps and self.progress.step % options.checkpoint_steps == 0
        return by_steps or self.clock.minutes_since_mark() >= options.checkpoint_minutes

    def checkpoint(self) -> None:
        progress, session = self.progress, self.session
        progress.seconds, progress.log_bytes = self.clock.seconds(), self.log.flush()
        random = distributed.gather_tensors(random_states(distributed.rank()))
        distributed.on_main(
            lambda: save_checkpoint(
                self.output / "checkpoints",
                progress,
                session.model,
                self.optimizer,
                self.scaler,
                session.origin,
                session.run.output.keep_checkpoints,
                random,
            )
        )
        self.clock.mark()

    def look_at_data(self) -> None:
        """Say once which of the data's files were written to since they were read."""
        session = self.session
        for path in changed(session.run.data.data, session.stamps):
            self.say(f"{path} was written to: this run goes on with what it read at its start")
            session.stamps = {k: v for k, v in session.stamps.items() if k != path}

    def say(self, notice: str) -> None:
        self.bar.write(f"note: {notice}", file=sys.stderr)

    def step_or_skip(self, group: Sequence[Sequence[Encoded]]) -> dict[str, Any]:
        """A step, or with --skip-bad-batches the record of one that was left out."""
        try:
            measures = self.step(group)
        except BadBatch as error:
            self.bad_steps += 1
            if not self.session.run.training.skip_bad_batches or self.bad_steps == IN_A_ROW:
                raise
            ids = ", ".join(error.ids)
            self.say(f"step {self.progress.step + 1} left out, not finite on the dialogues {ids}")
            return {"loss": math.nan, "tokens_per_second": 0.0, "skipped": error.ids}
        self.bad_steps = 0
        return measures

    def step(self, group: Sequence[Sequence[Encoded]]) -> dict[str, float]:
        """One step of AdamW on the batches of a group, of which each process takes its share.

        The loss is the sum over all target tokens of the group divided by their number, so that
        accumulating k batches equals one batch k times as large, on any number of processes.

        Returns:
            loss (nats per target token), learning_rate, gradient_norm (before clipping; not finite
            where fp16 overflowed and the step was skipped), tokens (source and target, padding not
            counted), seconds, tokens_per_second; of several processes sent_bytes, the
            gradients that each gave to the others.

        Raises:
            BadBatch: the loss is not finite, or the gradient is not and no GradScaler sees to it.
            UserError: out of memory, and --auto-batch-size is off or has nothing left to halve.
        """
        start, session = time.perf_counter(), self.session
        rate = learning_rate(self.progress.step, self.last, self.warmup, self.peak)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        session.model.train()
        target_tokens = sum(len(row.target) for batch in group for row in batch)
        options = session.run.training  # compiled, a step is cheap already
        plain = options.compile or options.checkpoint_activations
        cheap = session.device.type == "cpu" and not plain
        longest = max(
            len(text) for batch in group for row in batch for text in (row.source, row.target)
        )
        with speed.cheap_step(session.model, longest) if cheap else nullcontext():
            while (total := self.backward(group, target_tokens)) is None:
                pass  # again, with smaller batches
        self.scaler.unscale_(self.optimizer)
        limit = session.run.training.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit).item()
        if not (self.scaler.is_enabled() or math.isfinite(norm)):
            ids = [row.id for batch in group for row in batch]
            raise BadBatch("gradient's norm", norm, self.progress.step + 1, ids)
        with out_of_memory("AdamW moves the parameters", "--method lora trains fewer of them"):
            self.scaler.step(self.optimizer)  # skips the step if fp16 overflowed
        self.scaler.update()
        seconds = time.perf_counter() - start
        tokens = sum(len(row.source) + len(row.target) for batch in group for row in batch)
        return {
            "loss": total / target_tokens,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            **({"sent_bytes": self.replica.sent_bytes} if distributed.size() > 1 else {}),
        }

    def backward(self, group: Sequence[Sequence[Encoded]], target_tokens: int) -> float | None:
        """Sum the group's gradients and return its summed loss, or None if memory ran out.

        Then the batches are half as large from now on (--auto-batch-size); no parameter has moved,
        so that the step can be taken again.
        """
        session, parts = self.session, pieces(group, self.progress.rows_at_once)
        self.optimizer.zero_grad(set_to_none=True)
        total, self.replica.sent_bytes = 0.0, 0
        mine: Sequence[Encoded] = ()
        bad = list[str]()
        try:
            for number, batch in enumerate(parts, 1):
                mine = distributed.share(batch)
                with session.autocast():
                    loss = self.replica.loss(
                        session.tensors(mine) if mine else None, last=number == len(parts)
                    )
                total += (value := loss.item())
                bad += [] if math.isfinite(value) else [row.id for row in mine]
                self.scaler.scale(loss / target_tokens).backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            alone = distributed.size() == 1  # others wait for gradients of this very batch
            if not (session.run.training.auto_batch_size and alone) or len(mine) == 1:
                raise too_large(mine, session.run.training, self.progress.step + 1) from None
        else:
            (total,) = distributed.total(total)
            if not math.isfinite(total):
                ids = [name for found in distributed.gather(bad) for name in found]
                raise BadBatch("loss", total, self.progress.step + 1, ids)
            return total
        self.optimizer.zero_grad(set_to_none=True)  # after the error has let go of its frames
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        self.progress.rows_at_once = max(map(len, parts)) // 2
        self.say(
            f"out of memory: at most {self.progress.rows_at_once} dialogues at once from now on"
        )
        return None


def last_step(training: TrainingOptions, rows: int) -> int:
    """How many optimizer steps a run takes; the last group of an epoch may be smaller."""
    batches_per_epoch = math.ceil(rows / training.batch_size)
    steps = training.epochs * math.ceil(batches_per_epoch / training.accumulate)
    return min(steps, training.max_steps) if training.max_steps else steps


def learning_rate(step: int, last: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps to `peak`, then linear decay to 0 at step `last`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (last - step) / max(1, last - warmup)


@torch.no_grad()
def validate(session: Session) -> dict[str, float]:
    """Loss per target token on the validation split, and ROUGE of the summaries written for it."""
    run, model, split = session.run, session.model.eval(), session.splits["validation"]
    parts = distributed.together(lambda: _summed_losses(session, split))
    loss, tokens = (sum(numbers) for numbers in zip(*parts, strict=True))
    some = run.training.validation_limit or len(split)
    generation = replace(run.generation, beams=run.training.validation_beams)
    summaries = summarize(
        model, session.tokenizer, split.encoded[:some], generation, session.autocast_dtype
    )
    references = [example.summary for example in split.examples[:some]]
    rows = rouge([summary.text for summary in summaries], references)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return {"loss": loss / tokens, **{name: round(mean, 4) for name, mean in means.items()}}


def _summed_losses(session: Session, split: Split) -> tuple[float, int]:
    """This process's part: nats and target tokens."""
    loss, tokens = 0.0, 0
    for chosen in distributed.share(
        by_length(split.encoded, session.run.generation.evaluation_batch_size)
    ):
        with session.autocast():
            batch = session.tensors([split.encoded[i] for i in chosen])
            summed, count = summed_loss(session.model, batch)
        loss, tokens = loss + summed.item(), tokens + count
    return loss, tokens


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def epoch_groups(session: Session, epoch: int) -> list[list[list[Encoded]]]:
    """The epoch's batches, in groups of one optimizer step."""
    training, train = session.run.training, session.splits["train"].encoded
    lengths = [(len(row.source), len(row.target)) for row in train]
    order = batches(lengths, training.batch_size, session.run.model.seed, epoch)
    rows = [[train[i] for i in chosen] for chosen in order]
    return [rows[i : i + training.accumulate] for i in range(0, len(rows), training.accumulate)]


def _epoch_line(progress: Progress, epochs: int, scores: dict[str, float], better: bool) -> str:
    return (
        f"epoch {progress.epoch + 1}/{epochs}, step {progress.step}: "
        f"validation loss {scores['loss']:.3f}, ROUGE-1/2/L "
        f"{scores['rouge1']:.1f}/{scores['rouge2']:.1f}/{scores['rougeL']:.1f}"
        + (" (best so far, saved)" if better else "")
    )
