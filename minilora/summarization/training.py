"""The mixed-precision loop: from a base model and dialogues to the best adapter.

output/
    config.json      every setting, the learning rate resolved
    log.jsonl        one record a line: start, step, validation, end
    adapter/         the best so far by validation ROUGE-1 (model/ after --method full)
    checkpoints/     what --resume needs
"""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import minilora
from minilora import InjectReport, LoRAConfig
from minilora.files import write_file
from minilora.summarization.checkpoint import Progress, load_checkpoint, save_checkpoint
from minilora.summarization.data import Encoded, Example, batches, by_length, collate, encode, load
from minilora.summarization.evaluation import rouge, summarize
from minilora.summarization.loss import summed_loss
from minilora.summarization.model import (
    choose_device,
    choose_precision,
    limit_lengths,
    load_model,
    load_tokenizer,
)
from minilora.summarization.presets import DataOptions, RunConfig, UserError


@dataclass
class Session:
    """What a run works with, checked and in memory, before anything is written."""

    run: RunConfig
    device: torch.device
    autocast_dtype: torch.dtype | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: list[Encoded]
    validation: list[Example]
    validation_encoded: list[Encoded]
    data: DataOptions
    """The run's, with lengths that the model has positions for."""
    report: InjectReport
    notices: list[str]


@dataclass
class Outcome:
    """How a run ended."""

    progress: Progress
    interrupted: bool
    peak_bytes: int


def open_session(run: RunConfig) -> Session:
    """Load data, model and tokenizer and make the model ready to train.

    Raises:
        UserError: data or model are missing or malformed.
        LoRAError: the adapter's settings do not fit the model.
    """
    device = choose_device(run.model.device)
    config = adapter_config(run) if run.model.method == "lora" else None
    data, notices = load(run.data, ("train", "validation"))
    tokenizer = load_tokenizer(run.model.model)
    model = load_model(run.model.model, device)
    lengths = limit_lengths(run.data, model)
    train, truncation = encode(data["train"], tokenizer, lengths)
    validation_encoded, _ = encode(data["validation"], tokenizer, lengths)
    if truncation.sources or truncation.targets:
        notices.append(str(truncation))
    torch.manual_seed(run.model.seed)  # the start of A, then dropout
    if config is None:
        report = InjectReport((), model.num_parameters(), model.num_parameters())
    else:
        report = minilora.inject(model, config)
    return Session(
        run=run,
        device=device,
        autocast_dtype=choose_precision(run.model.precision, device),
        model=model,
        tokenizer=tokenizer,
        train=train,
        validation=data["validation"],
        validation_encoded=validation_encoded,
        data=lengths,
        report=report,
        notices=notices,
    )


def adapter_config(run: RunConfig) -> LoRAConfig:
    """The library's configuration for a run's settings."""
    options = run.adapter
    return LoRAConfig(
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        targets=_targets(options.targets),
        exclude=_targets(options.exclude) if options.exclude else (),
        rslora=options.rslora,
        init=options.init,
        task_type="SEQ_2_SEQ_LM",
    )


def fit(session: Session, output: Path) -> Outcome:
    """Train until the last step, or until Ctrl-C or SIGTERM; go on from `output`'s checkpoint.

    Raises:
        UserError: a loss that is not finite; its step and dialogues are named.
    """
    run, model = session.run, session.model
    peak = run.training.learning_rate
    assert peak is not None
    parameters = list(minilora.trainable_parameters(model))
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, weight_decay=run.training.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(
        session.device.type, enabled=session.autocast_dtype == torch.float16
    )
    progress, notices = load_checkpoint(output / "checkpoints", model, optimizer, scaler)
    for notice in notices:
        print(notice, file=sys.stderr)
    log = Log(output / "log.jsonl", progress.log_bytes)
    if progress.step == 0:
        log.write("start", trainable=session.report.trainable, total=session.report.total)

    steps_per_epoch = math.ceil(
        math.ceil(len(session.train) / run.training.batch_size) / run.training.accumulate
    )
    last = run.training.epochs * steps_per_epoch
    last = min(last, run.training.max_steps) if run.training.max_steps else last
    warmup = max(1, round(run.training.warmup * last))
    clock = Clock(progress.seconds)

    def checkpoint() -> None:
        progress.seconds, progress.log_bytes = clock.seconds(), log.flush()
        save_checkpoint(output / "checkpoints", progress, model, optimizer, scaler)

    bar = tqdm(total=last, initial=progress.step, unit="step", disable=None, dynamic_ncols=True)
    with bar, stop_requests() as stop:
        while progress.step < last:
            groups = _groups(session, progress.epoch)
            for group in groups[progress.position :]:
                rate = learning_rate(progress.step, last, warmup, peak)
                measures = optimizer_step(
                    session, group, parameters, optimizer, scaler, rate, progress.step
                )
                progress.step += 1
                progress.position += 1
                log.write("step", step=progress.step, epoch=progress.epoch + 1, **measures)
                bar.update()
                bar.set_postfix_str(
                    f"loss {measures['loss']:.3f}, {measures['tokens_per_second']:,.0f} tokens/s"
                )
                if stop.requested or progress.step == last:
                    break
                if clock.minutes_since_mark() >= run.output.checkpoint_minutes:
                    checkpoint()
                    clock.mark()
            if stop.requested and progress.step < last:
                checkpoint()
                if progress.best is None:
                    save_trained(session, output)
                return Outcome(progress, True, peak_bytes(session.device))
            scores = validate(session)
            log.write("validation", step=progress.step, epoch=progress.epoch + 1, **scores)
            better = progress.best is None or scores["rouge1"] > progress.best
            if better:
                progress.best = scores["rouge1"]
                save_trained(session, output)
            bar.write(_epoch_line(progress, run.training.epochs, scores, better), file=sys.stdout)
            progress.epoch, progress.position = progress.epoch + 1, 0
            checkpoint()
            clock.mark()
    log.write("end", seconds=round(clock.seconds(), 1), peak_bytes=peak_bytes(session.device))
    log.flush()
    progress.seconds = clock.seconds()
    return Outcome(progress, False, peak_bytes(session.device))


def optimizer_step(
    session: Session,
    group: Sequence[Sequence[Encoded]],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rate: float,
    step: int,
) -> dict[str, float]:
    """One step of AdamW on the batches of a group.

    The loss is the sum over all target tokens of the group divided by their number, so that
    accumulating k batches equals one batch k times as large.

    Returns:
        loss (nats per target token), learning_rate, gradient_norm, tokens (source and target,
        padding not counted), seconds, tokens_per_second.
    """
    start = time.perf_counter()
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    session.model.train()
    optimizer.zero_grad(set_to_none=True)
    target_tokens = sum(len(row.target) for batch in group for row in batch)
    total = 0.0
    for batch in group:
        with _autocast(session):
            loss, _ = summed_loss(session.model, _tensors(session, batch))
        total += loss.item()
        if not math.isfinite(total):
            ids = ", ".join(row.id for row in batch)
            raise UserError(
                f"the loss is {loss.item()} in step {step + 1}, in the batch of the dialogues "
                f"{ids}: lower --learning-rate or use --precision fp32; the best adapter so far "
                "is kept"
            )
        scaler.scale(loss / target_tokens).backward()
    scaler.unscale_(optimizer)
    limit = session.run.training.clip or math.inf
    norm = nn.utils.clip_grad_norm_(parameters, limit).item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise UserError(f"the gradient is not finite in step {step + 1}: lower --learning-rate")
    scaler.step(optimizer)  # skips the step if fp16 overflowed
    scaler.update()
    seconds = time.perf_counter() - start
    tokens = sum(len(row.source) + len(row.target) for batch in group for row in batch)
    return {
        "loss": total / target_tokens,
        "learning_rate": rate,
        "gradient_norm": norm,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def learning_rate(step: int, last: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps to `peak`, then linear decay to 0 at step `last`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (last - step) / max(1, last - warmup)


@torch.no_grad()
def validate(session: Session) -> dict[str, float]:
    """Loss per target token on the validation split, and ROUGE of the summaries written for it."""
    model, encoded = session.model.eval(), session.validation_encoded
    loss, tokens = 0.0, 0
    for chosen in by_length(encoded, session.run.generation.evaluation_batch_size):
        with _autocast(session):
            summed, count = summed_loss(model, _tensors(session, [encoded[i] for i in chosen]))
        loss, tokens = loss + summed.item(), tokens + count
    some = session.run.training.validation_limit or len(encoded)
    summaries = summarize(
        model, session.tokenizer, encoded[:some], session.run.generation, session.autocast_dtype
    )
    references = [example.summary for example in session.validation[:some]]
    rows = rouge([summary.text for summary in summaries], references)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return {"loss": loss / tokens, **{name: round(mean, 4) for name, mean in means.items()}}


def save_trained(session: Session, output: Path) -> None:
    """Write the adapter (or, after a full fine-tune, the model), whole or not at all."""
    if session.run.model.method == "lora":
        minilora.save_adapter(session.model, trained_path(output, session.run))
        return
    beside, target = output / ".model", trained_path(output, session.run)
    shutil.rmtree(beside, ignore_errors=True)
    session.model.save_pretrained(beside)
    session.tokenizer.save_pretrained(beside)
    if target.exists():
        shutil.rmtree(target)
    beside.rename(target)


def trained_path(output: Path, run: RunConfig) -> Path:
    """Where a run keeps what it trained."""
    return output / ("adapter" if run.model.method == "lora" else "model")


class Log:
    """log.jsonl: appended to, and on resuming cut back to what the checkpoint had seen."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        content = path.read_bytes()[:keep_bytes] if path.exists() else b""
        write_file(path, content)
        self.file = path.open("ab")

    def write(self, kind: str, **values: Any) -> None:
        self.file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
        self.file.flush()

    def flush(self) -> int:
        """The length of the log in bytes, all of it on the disk."""
        self.file.flush()
        return self.file.tell()


class Clock:
    """Seconds of training, those before a resume included."""

    def __init__(self, before: float) -> None:
        self.start = time.monotonic() - before
        self.mark()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def mark(self) -> None:
        self.marked = time.monotonic()

    def minutes_since_mark(self) -> float:
        return (time.monotonic() - self.marked) / 60


class StopRequest:
    """Whether Ctrl-C or SIGTERM came. A second Ctrl-C stops at once."""

    requested = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step under way."""
    stop = StopRequest()

    def on_signal(number: int, _: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    handled = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, on_signal) for number in handled}
    except ValueError:  # not in the main thread: nobody sends signals here
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _groups(session: Session, epoch: int) -> list[list[list[Encoded]]]:
    """The epoch's batches, in groups of one optimizer step."""
    training = session.run.training
    lengths = [(len(row.source), len(row.target)) for row in session.train]
    order = batches(lengths, training.batch_size, session.run.model.seed, epoch)
    rows = [[session.train[i] for i in chosen] for chosen in order]
    return [rows[i : i + training.accumulate] for i in range(0, len(rows), training.accumulate)]


def _tensors(session: Session, batch: Sequence[Encoded]) -> dict[str, Tensor]:
    pad = session.tokenizer.pad_token_id
    assert isinstance(pad, int)
    return {key: t.to(session.device) for key, t in collate(batch, pad).items()}


def _autocast(session: Session) -> torch.autocast:
    dtype = session.autocast_dtype
    return torch.autocast(session.device.type, dtype, enabled=dtype is not None)


def _targets(values: list[str]) -> str | tuple[str, ...]:
    """A single value with a character that no module name has is a regular expression."""
    if len(values) == 1 and not values[0].replace("_", "").replace(".", "").isalnum():
        return values[0]
    return tuple(values)


def _epoch_line(progress: Progress, epochs: int, scores: dict[str, float], better: bool) -> str:
    return (
        f"epoch {progress.epoch + 1}/{epochs}, step {progress.step}: "
        f"validation loss {scores['loss']:.3f}, ROUGE-1/2/L "
        f"{scores['rouge1']:.1f}/{scores['rouge2']:.1f}/{scores['rougeL']:.1f}"
        + (" (best so far, saved)" if better else "")
    )
