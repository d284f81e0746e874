"""The training loop: from a base model and dialogues to the best adapter.

output/
    config.json      every setting, the learning rate resolved
    log.jsonl        one record a line: start, step, check, validation, end
    adapter/         the best by validation ROUGE-1, then by the loss (model/ after --method full)
    checkpoints/     for --resume
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

import minilora
from minilora import TrainingReport
from minilora.inject import config_of
from minilora.methods import AdaLoRAConfig

from .. import processes
from ..data.batches import Encoded
from ..errors import UserError
from ..files import sweep
from ..model import speed
from ..model.device import out_of_memory, peak_bytes
from .checkpoint import Progress, load_checkpoint, newest_first, save_checkpoint
from .ddp import Replica
from .failures import require_finite, smaller_evaluation_batch, step_memory
from .fingerprint import differences
from .first_steps import FirstSteps, problems
from .log import Log, open_log, tells_of_more
from .schedule import Group, epoch_groups, last_step, learning_rate, steps_per_epoch
from .session import KEPT, Session, save_trained, trained_path
from .stopping import StopRequest, stop_requests
from .validation import describe, selection_score, validate

# What is noted, not refused, when a run continues on another machine.
EFFECTS = {
    "torch": "the dropout masks are not those of an uninterrupted run",
    "precision": "the steps are not rounded as in an uninterrupted run",
}
UPDATING = (
    "while AdamW updates the parameters",
    "a lower --rank, fewer --targets, or --method lora instead of full, trains fewer of them",
)


@dataclass
class Outcome:
    """How a run ended."""

    progress: Progress
    finished: bool
    """False: stopped before the end of training, by Ctrl-C or SIGTERM."""
    stopped: bool
    """Whether one of these came, if only after the last step."""


def fit(session: Session, output: Path, accept: Callable[[], None] = lambda: None) -> Outcome:
    """Train until the last step, or until Ctrl-C or SIGTERM; continue from `output`'s checkpoint.

    Args:
        session: what to train.
        output: the directory of the run.
        accept: called in process 0 once a run is resumed with --accept-changes.

    Raises:
        UserError: a loss that is not finite; its step and dialogues are named.
        OSError: the output cannot be written.
    """
    trainer = Trainer(session, output)
    processes.on_rank0(lambda: sweep(output))  # first: it restores a checkpoint half replaced
    for notice in trainer.restore():
        print(f"note: {notice}", file=sys.stderr)
    if session.run.output.accept_changes:
        processes.on_rank0(accept)
    with trainer.open():
        finished = trainer.run()
    return Outcome(trainer.progress, finished, processes.any_rank(trainer.stop.requested))


class Trainer:
    """A run in progress: its optimizer, and where it stands."""

    log: Log
    bar: "tqdm[Any]"
    stop: StopRequest
    first_steps: FirstSteps

    def __init__(self, session: Session, output: Path) -> None:
        training = session.run.training
        assert training.learning_rate is not None  # resolved by the command line
        self.session, self.output = session, output
        self.peak = training.learning_rate
        rows = len(session.splits["train"])
        self.last, self.steps_per_epoch = last_step(training, rows), steps_per_epoch(training, rows)
        self.parameters = list(minilora.trainable_parameters(session.model))
        groups: list[dict[str, Any]] = [{"params": self.parameters, "lr": self.peak}]
        if training.lora_plus_ratio != 1:
            ratio = training.lora_plus_ratio
            groups = minilora.parameter_groups(session.model, self.peak, ratio)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)
        self.ratios = [group["lr"] / self.peak for group in groups]
        fp16 = session.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=fp16)
        self.replica = Replica(session.model)
        self.progress = Progress()
        self.began = self.saved = time.monotonic()
        precision = str(session.autocast_dtype or torch.float32).removeprefix("torch.")
        self.origin = session.origin | {"torch": torch.__version__, "precision": precision}
        self.accepted = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside the block there are a log, a progress bar and handlers of Ctrl-C and SIGTERM."""
        bar = tqdm(
            total=self.last, initial=self.progress.step, unit="step", dynamic_ncols=True,
            disable=None,  # no bar when stderr is not a terminal
        )  # fmt: skip
        log = open_log(self.output / "log.jsonl", self.progress.log_bytes)
        # A resumed run was checked before. A full fine-tune is not checked: it copies what trains.
        wanted = self.progress.step == 0 and self.session.run.model.method != "full"
        self.first_steps = FirstSteps(self.session.model, self.optimizer, wanted)
        with log as self.log, bar as self.bar, stop_requests() as self.stop, self.first_steps.block:
            yield

    # The loop -------------------------------------------------------------------------------------

    def train_epoch(self) -> bool:
        """The optimizer steps that are left of this epoch. False if stopped before its end."""
        for group in self.groups()[self.progress.position :]:
            if self.progress.step >= self.last:  # --max-steps
                break
            if processes.any_rank(self.stop.requested):
                return False
            self.advance(self.step(group))
            if processes.any_rank(self.checkpoint_is_due()):
                self.checkpoint()
        return True

    def step(self, group: Group) -> dict[str, Any]:
        """One step of AdamW. The loss is the sum over all target tokens divided by their number."""
        start, session, total = time.perf_counter(), self.session, 0.0
        target_tokens = sum(len(row.target) for batch in group for row in batch)
        mean_tokens = target_tokens / processes.world_size()  # DDP averages over the processes
        self.set_learning_rate()
        session.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.cheap_step():
            for batch in group:  # one, or --accumulate
                mine = processes.shard(batch)
                with step_memory(mine, session.run.training, self.progress.step + 1):
                    with session.autocast():
                        tensors = session.tensors(mine) if mine else None
                        loss = self.replica.loss(tensors, last=batch is group[-1])  # summed, nats
                    self.scaler.scale(loss / mean_tokens).backward()
                total += loss.item()
        total = processes.all_reduce_sum(total)
        require_finite("loss", total, group, self.progress.step + 1)
        self.scaler.unscale_(self.optimizer)
        norm = self.clip(group)
        with out_of_memory(*UPDATING):
            self.scaler.step(self.optimizer)  # skipped if fp16 overflowed
        self.scaler.update()
        return self.measures(group, total / target_tokens, norm, time.perf_counter() - start)

    # Its neighbours -------------------------------------------------------------------------------

    def groups(self) -> list[list[list[Encoded]]]:
        run, train = self.session.run, self.session.splits["train"].encoded
        return epoch_groups(train, run.training, run.model.seed, self.progress.epoch)

    def set_learning_rate(self) -> None:
        warmup = max(1, round(self.session.run.training.warmup * self.last))
        rate = learning_rate(self.progress.step, self.last, warmup, self.peak)
        for settings, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
            settings["lr"] = rate * ratio

    def cheap_step(self) -> AbstractContextManager[Any]:
        """`speed.CheapStep` on a CPU, unless layers are compiled or recomputed in the backward."""
        options = self.session.run.training
        plain = options.compile or options.checkpoint_activations
        return nullcontext() if self.session.device.type != "cpu" or plain else speed.CheapStep()

    def clip(self, group: Group) -> float:
        """Limit the norm of the gradient to --clip. Returns the norm before.

        Raises:
            UserError: it is not finite, and no GradScaler skips the step.
        """
        limit = self.session.run.training.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit).item()
        if not self.scaler.is_enabled():
            require_finite("gradient's norm", norm, group, self.progress.step + 1)
        return norm

    def measures(self, group: Group, loss: float, norm: float, seconds: float) -> dict[str, Any]:
        """A step's record: nats per target token, norm before clipping, tokens without padding."""
        tokens = sum(len(row.source) + len(row.target) for batch in group for row in batch)
        return {
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
        }

    def advance(self, measures: dict[str, Any]) -> None:
        progress = self.progress
        progress.step, progress.position = progress.step + 1, progress.position + 1
        progress.validated = False
        self.log.write("step", step=progress.step, epoch=progress.epoch + 1, **measures)
        self.bar.update()
        loss, rate = measures["loss"], measures["tokens_per_second"]
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
        if checked := self.first_steps.after(measures["gradient_norm"]):
            self.tell(checked)

    def tell(self, checked: TrainingReport) -> None:
        """Print the report of `verify_training`, or a note for each problem; log the problems."""
        found = problems(checked)
        for problem in found:
            self.bar.write(f"note: {problem}", file=sys.stderr)
        if found:
            self.log.write("check", step=self.progress.step, problems=found)
        else:
            self.bar.write(f"first {checked}", file=sys.stdout)

    # A whole run ----------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the end. False if stopped before; then a checkpoint and an adapter are saved."""
        progress, report = self.progress, self.session.report
        if progress.log_bytes == 0:
            self.log.write("start", trainable=report.trainable, total=report.total)
        if self.accepted:  # the next resume compares with what was accepted
            self.checkpoint()
        while progress.step < self.last or not progress.validated:
            if not (self.train_epoch() and self.end_epoch()):
                self.checkpoint()
                if progress.best is None and not progress.best_step:
                    self.save_trained()
                return False
        self.measure()
        seconds, peak = round(progress.seconds, 1), progress.peak_bytes
        self.log.write("end", seconds=seconds, peak_bytes=peak)
        return True

    def end_epoch(self) -> bool:
        """Validate, save the adapter if it is the best so far, and begin the next epoch.

        False if stopped before: an interrupted validation is discarded.
        """
        progress = self.progress
        doing = f"validating after step {progress.step}"
        size = self.session.run.generation.evaluation_batch_size
        instead = smaller_evaluation_batch(size, "--validation-beams")
        try:
            with self.stop.at_once(), out_of_memory(f"while {doing}", instead):
                scores = validate(self.session)
        except KeyboardInterrupt:
            return False
        score, loss = selection_score(scores), cast(float, scores["loss"])
        by_loss = score == progress.best and loss < (progress.best_loss or 0)
        settled = self.settled(progress.step)
        first = progress.best is None or settled > self.settled(progress.best_step)
        better = first or score > cast(float, progress.best) or by_loss
        where = {"step": progress.step, "epoch": progress.epoch + 1, "best": better}
        self.log.write("validation", **where, **scores)
        epochs = self.session.run.training.epochs
        line = f"epoch {progress.epoch + 1}/{epochs}, step {progress.step}: {describe(scores)}"
        why = "ROUGE-1 ties, the loss is lower: " if by_loss else ""
        self.bar.write(line + f" ({why}best so far, saved)" * better, file=sys.stdout)
        if better:
            progress.best, progress.best_loss, progress.best_step = score, loss, progress.step
            self.save_trained()
        progress.validated = True
        if progress.position >= self.steps_per_epoch:  # --max-steps may end a run before
            progress.epoch, progress.position = progress.epoch + 1, 0
        self.checkpoint()
        return True

    def settled(self, step: int) -> bool:
        """False until AdaLoRA has its final ranks: an adapter with these replaces earlier ones."""
        config = config_of(self.session.model)  # of LoRA; the public function may return a list
        if not isinstance(config, AdaLoRAConfig):
            return True
        return step >= config.total_steps - config.final_steps

    def save_trained(self) -> None:
        processes.on_rank0(lambda: save_trained(self.session, self.output))

    # Checkpoints ----------------------------------------------------------------------------------

    def restore(self) -> list[str]:
        """Continue from the newest checkpoint of `output`, if there is one. Returns notices.

        Raises:
            UserError: the result would change, and --accept-changes was not given; or it would be
                replaced, since there is no checkpoint.
        """
        what = (self.session.model, self.optimizer, self.scaler)
        self.progress, origin, notices = load_checkpoint(self.output / "checkpoints", *what)
        processes.require_same({f"the checkpoint in {self.output}": self.progress.step})
        if self.session.run.output.resume and not newest_first(self.output / "checkpoints"):
            notices.append(self.begin_again())
        self.began = time.monotonic() - self.progress.seconds
        if other := differences(origin, self.session.origin):
            changed = f"changed since the run began: {', '.join(other)}"
            if not self.session.run.output.accept_changes:
                if KEPT in other:
                    choice = "on" if origin[KEPT] == "True" else "off"
                    changed += (
                        f" (--cache-encoder {choice} --accept-changes keeps the earlier choice)"
                    )
                instead = "; restore what changed, or use --accept-changes to resume with it"
                raise UserError(f"--resume {self.output}: {changed}{instead}")
            notices.append(changed)
            self.accepted = True
        return notices + self.go_on(origin)

    def begin_again(self) -> str:
        """Refuse to replace what a run has trained after its first checkpoint; returns a notice."""
        trained = trained_path(self.output, self.session.run)
        if trained.exists() and tells_of_more(self.output / "log.jsonl"):
            raise UserError(
                f"--resume {self.output}: its checkpoints/ is gone, and training would replace "
                f"{trained}: score it with evaluate.py, or train into another --output"
            )
        return f"{self.output} has no checkpoint: it begins again at step 0"

    def go_on(self, origin: dict[str, str]) -> list[str]:
        """Find the place among the batches, and the last step; returns notices.

        Args:
            origin: what the run began with.

        Raises:
            UserError: AdaLoRA's ranks fall in another number of steps.
        """
        progress, now, notices = self.progress, self.origin, list[str]()
        training, rows = self.session.run.training, len(self.session.splits["train"])
        self.origin = origin | now
        changed = [name for name in now if origin.get(name, now[name]) != now[name]]
        other = [name for name in changed if name.startswith("validation ")]
        if other:
            progress.best = None
        if progress.position and {"batches", "train tokens"}.intersection(changed):
            progress.position = 0
            notices.append(f"epoch {progress.epoch + 1} begins again, because its batches changed")
        begun = progress.step - progress.position
        self.last = last_step(training, rows, progress.epoch, begun)
        if progress.step < self.last:
            if other and progress.best_step:
                what = "the validation data or settings changed"
                notices.append(f"{what}: the best of the next epochs is saved")
            config = config_of(self.session.model)
            if isinstance(config, AdaLoRAConfig) and config.total_steps != self.last:
                raise UserError(
                    f"--method adalora plans its ranks for {config.total_steps} steps, and with "
                    f"these batches the run takes {self.last}: keep the batches it began with"
                )
            notices += [
                f"the run began with {name} {origin[name]} and continues with {now[name]}: {effect}"
                for name, effect in EFFECTS.items()
                if name in changed
            ]
        elif progress.step > self.last:
            run, taken = self.output, progress.step
            notices.append(
                f"{run} has taken {taken} steps, and is asked for {self.last}: it takes no "
                "further step"
            )
        elif progress.validated:
            notices.append(f"{self.output} is finished: it is only scored again")
        return notices

    def checkpoint_is_due(self) -> bool:
        options = self.session.run.output
        by_steps = options.checkpoint_steps and self.progress.step % options.checkpoint_steps == 0
        minutes = (time.monotonic() - self.saved) / 60
        return bool(by_steps) or minutes >= options.checkpoint_minutes

    def measure(self) -> None:
        """Time and memory, since the run began; a part before a resumption counts too."""
        progress, now = self.progress, peak_bytes(self.session.device)
        progress.seconds = time.monotonic() - self.began
        progress.peak_bytes = max(progress.peak_bytes, now)

    def checkpoint(self) -> None:
        progress, session = self.progress, self.session
        self.measure()
        progress.log_bytes = self.log.flush()
        what = (session.model, self.optimizer, self.scaler, self.origin)
        path, keep = self.output / "checkpoints", session.run.output.keep_checkpoints
        save_checkpoint(path, progress, *what, keep)
        self.saved = time.monotonic()
