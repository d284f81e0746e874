"""What `train.py` and `evaluate.py` do, once their flags are read."""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import minilora

from . import flags, processes
from .data.batches import Encoded, encode
from .data.formats import is_data
from .data.reading import Example, load_file
from .data.splits import load
from .errors import EXPECTED, UserError, counted, one_line
from .evaluation.compare import Evaluation
from .evaluation.generate import evaluate, summarize
from .evaluation.rouge import require_rouge, rouge_is_installed
from .files import read_object, write_json
from .model import loading, requirements, speed
from .model.device import choose_device, choose_precision, out_of_memory
from .model.encoder_cache import EncoderStates, keep_states
from .model.loading import load_model
from .model.start import base_of, run_of
from .predict import Row, read_chats, write_summaries
from .presets import PRESETS, local_path
from .report import terminal
from .report.page import write_report
from .settings import RunConfig
from .training.card import write_card
from .training.failures import smaller_evaluation_batch, try_out
from .training.lock import lock
from .training.session import Session, Split, four_bits, open_session, trained_path, write_config
from .training.stopping import stop_requests
from .training.trainer import fit

ELSEWHERE = "free some space, or name another directory with --output"

# train.py -----------------------------------------------------------------------------------------


def train(run: RunConfig) -> int:
    """Fine-tune, score, and report. Returns the exit code: 0, or 130 when interrupted."""
    started = time.monotonic()
    processes.on_rank0(lambda: flags.check_output(run.output))
    session = open_session(run)
    with _writing(Path("runs"), ELSEWHERE):
        output = Path(processes.from_rank0(lambda: str(flags.output_directory(run))))
    with ExitStack() as held:  # process 0 holds the lock
        with _writing(output, ELSEWHERE):
            processes.on_rank0(lambda: held.enter_context(lock(output)))
        return _train_into(output, run, session, started)


def _train_into(output: Path, run: RunConfig, session: Session, started: float) -> int:
    if not run.output.resume:  # checked again: another run may have taken it meanwhile
        processes.on_rank0(lambda: flags.check_free(output))
        with _writing(output, ELSEWHERE):
            processes.on_rank0(lambda: write_config(run, output))
    if not all(processes.gather((output / "config.json").exists())):
        raise UserError(f"{output} must be on a file system that the machines share")
    _print(session.notices)
    print(terminal.header(session, output), flush=True)
    resume = f"{flags.command('train.py')} --resume {shlex.quote(str(output))}"
    free = "earlier checkpoints are intact: free some space or fix the permissions, then run: "
    with _writing(output, free + resume):
        outcome = fit(session, output, accept=lambda: write_config(run, output))
    if not outcome.finished:
        _write_report(run, output)
        where = f"the result so far is in {trained_path(output, run)}"
        print(f"\nstopped after step {outcome.progress.step}; {where}")
        print(f"resume with: {resume}")
        return 130
    if run.output.evaluate and rouge_is_installed():
        try:
            if outcome.stopped:
                raise KeyboardInterrupt
            with stop_requests() as stop, stop.at_once():
                evaluation = _final_evaluation(session, output)
        except KeyboardInterrupt:
            _write_report(run, output)
            print(f"\ntrained, not scored; score it with: {resume} --evaluate")
            return 130
        first = range(min(3, evaluation.n))  # no score has chosen them
        print(f"\n{terminal.format_examples(evaluation, first)}")
        print(f"\n{terminal.format_comparison(evaluation)}", flush=True)
        with _writing(output, free + resume):
            processes.on_rank0(lambda: _write_scores(session.run, output, evaluation.to_dict()))
    seconds = time.monotonic() - started
    page = _write_report(run, output)
    again = flags.command("evaluate.py")
    print(f"\n{terminal.summary(session, outcome, output, seconds, again, page)}")
    return 0


@contextmanager
def _writing(path: Path, advice: str) -> Iterator[None]:
    """Inside the block an error of the disk ends in one line that says what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write to {path} ({why}): {advice}") from None


def _write_scores(run: RunConfig, output: Path, evaluation: dict[str, Any]) -> None:
    write_json(output / "evaluation.json", evaluation)
    if run.model.method != "full":
        write_card(run, trained_path(output, run), evaluation)


def _write_report(run: RunConfig, output: Path) -> Path | None:
    """report.html, if wanted. The run is complete by now, so an error is only a note."""
    page = output / "report.html"
    try:
        if run.output.report and processes.rank() == 0:
            write_report(output, page)
            return page
    except EXPECTED as error:
        print(f"note: {page} was not written: {one_line(error)}", file=sys.stderr)
    return None


def _final_evaluation(session: Session, output: Path) -> Evaluation:
    """Base and best fine-tuned model on the test split."""
    run = session.run
    if run.model.method == "full":
        models = _load_trained(output, run, session.device)
    else:
        loaded = minilora.load_adapter(session.model, trained_path(output, run), inference=True)
        _print([loaded.notice] if loaded.notice else [])
        models = Models(session.model, None, session.tokenizer, session.autocast_dtype)
    return models.score(run, "test", session.splits["test"])


@dataclass
class Models:
    """The fine-tuned model and its base, to write summaries."""

    tuned: PreTrainedModel
    base: PreTrainedModel | None
    """None: `tuned` with its adapter disabled."""
    tokenizer: PreTrainedTokenizerBase
    autocast_dtype: torch.dtype | None
    encoder: str = ""
    """Digest of the tuned encoder, once it is known: nothing trains here."""

    def check(self, run: RunConfig) -> RunConfig:
        """The settings with lengths that the models allow; prints notes of corrections."""
        for model in filter(None, (self.base, self.tuned)):
            _print(requirements.check(model, self.tokenizer, run.model.model))
        limited = requirements.limit_lengths(run, self.tuned)
        _print(requirements.cut_notice(run, limited))
        return limited

    def score(self, run: RunConfig, name: str, split: Split) -> Evaluation:
        """Both models on a split of the run's data."""
        smaller = smaller_evaluation_batch(run.generation.evaluation_batch_size)
        how: dict[str, Any] = {"data": run.data.name, "split": name, "base_model": self.base}
        how |= {"autocast_dtype": self.autocast_dtype, "progress": sys.stderr.isatty()}
        texts = (split.examples, split.encoded)
        with out_of_memory("while writing summaries", smaller):
            how["states"] = self.states(run, split.encoded)
            return evaluate(self.tuned, self.tokenizer, *texts, run.generation, **how)

    def states(self, run: RunConfig, encoded: list[Encoded]) -> EncoderStates | None:
        """The encoder's states, to be shared by both models; None if they are not kept."""
        options, sources = run.training, [row.source for row in encoded]
        if self.base is not None and options.cache_encoder == "auto":
            return None
        how = (options.cache_encoder, options.cache_directory, self.encoder)
        kept = keep_states(self.tuned, sources, self.autocast_dtype, *how)
        self.encoder = kept.encoder if kept else ""
        return kept

    def summaries(self, run: RunConfig, encoded: list[Encoded], base: bool) -> list[Row]:
        """Summaries of the user's chats, in order. A shared encoder is computed once.

        Args:
            run: its settings.
            encoded: the chats.
            base: also summarize with the base model.
        """
        smaller = smaller_evaluation_batch(run.generation.evaluation_batch_size)
        with out_of_memory("while writing summaries", smaller):
            states = self.states(run, encoded) if base and self.base is None else None
            how = (self.tokenizer, encoded, run.generation, self.autocast_dtype, None, states)
            rows = [{"summary": written.text} for written in summarize(self.tuned, *how)]
            if base:
                with minilora.disabled(self.tuned) if self.base is None else nullcontext():
                    before = summarize(self.base or self.tuned, *how)
                rows = [{**r, "base": b.text} for r, b in zip(rows, before, strict=True)]
        return rows

    def encode(self, run: RunConfig, examples: list[Example]) -> Split:
        """Tokenize, and check that the models can summarize; prints a note of cut dialogues."""
        encoded, truncation = encode(examples, self.tokenizer, run.data)
        loading.check_vocabulary(self.tuned, encoded, run.model.model)
        for model in filter(None, (self.base, self.tuned)):
            try_out(model, self.tokenizer, encoded[0], run.generation, self.autocast_dtype)
        if truncation.sources:
            print(f"note: {truncation}", file=sys.stderr)
        return Split(examples, encoded)


# evaluate.py --------------------------------------------------------------------------------------


def score(arguments: argparse.Namespace) -> int:
    """Score or summarize with a run or an adapter. Returns the exit code: 0, or 130 if stopped."""
    directory, run = _run_of(loading.adapter_directory(arguments.run), arguments)
    files = [arguments.predict] if arguments.predict else arguments.text
    needs_base = not files or arguments.base
    if needs_base and _is_model(directory) and "model" not in arguments.changes:
        raise UserError(f"{directory} is a model: name its base with --model BASE")
    if _is_alone(directory):
        source, lengths = run.data.max_source_length, run.generation
        limits = f"--min-length {lengths.min_length} --max-length {lengths.max_length}"
        said = (
            f"{directory} is not a run: unless flags say otherwise, no text is put before or after "
            f"a dialogue, and the lengths are the preset {run.preset}'s: "
            f"--max-source-length {source} {limits}"
        )
        _print([said])
    if not (trained := _trained(directory, run)).exists():
        resume = f"{flags.command('train.py')} --resume {shlex.quote(str(directory))}"
        raise UserError(f"{directory} has no {trained.name} yet: continue with {resume}")
    if not files:
        require_rouge()
    examples, split = (_chats(run, files), "") if files else _examples(run, arguments)
    device = processes.own_device(choose_device(run.model.device))
    models = _load_trained(directory, run, device, needs_base)
    run = models.check(run)
    texts = models.encode(run, examples)
    if arguments.predict:
        return _predict(arguments, directory, run, models, texts)
    if arguments.text:
        found = models.summaries(run, texts.encoded, arguments.base)
        print("\n---\n".join(map(terminal.format_summary, found)))
        return 0
    evaluation = models.score(run, split, texts)
    changed = terminal.most_changed(evaluation, 3)
    print(f"the largest differences:\n\n{terminal.format_examples(evaluation, changed)}")
    print(f"\n{terminal.format_comparison(evaluation)}")
    if arguments.output:
        path, scores = Path(arguments.output), evaluation.to_dict()
        with _writing(path, "name another file"):
            processes.on_rank0(lambda: write_json(path, scores))
    return 0


def _predict(
    arguments: argparse.Namespace, directory: Path, run: RunConfig, models: Models, texts: Split
) -> int:
    """Write the summaries of many chats to --output."""
    trained = _trained(directory, run)
    size, options, output = run.generation.evaluation_batch_size, run.data, Path(arguments.output)
    settings = {
        "run": _as_it_is(trained),
        "base": _as_it_is(local_path(run.model.model)),
        "method": run.model.method,
        "precision": str(models.autocast_dtype),
        "device": models.tuned.device.type,
        "lengths": asdict(run.generation) | {"evaluation_batch_size": 0},
        "prompt": [options.prompt_before, options.prompt_after, options.max_source_length],
        "--base": arguments.base,
    }

    def summarize(encoded: list[Encoded]) -> list[Row]:
        return models.summaries(run, encoded, arguments.base)

    with _writing(output, "nothing is lost: free some space and run the same command again"):
        done = write_summaries(output, texts.examples, texts.encoded, settings, size, summarize)
    if done < len(texts):
        print(f"stopped after {done:,} of {len(texts):,} chats; the same command continues")
        return 130
    print(f"summaries of {counted(done, 'chat')} are in {output}")
    return 0


def _as_it_is(directory: Path) -> str:
    """A model or an adapter, and when it was last written; one of the hub by its name only."""
    files = [file for file in directory.rglob("*") if file.suffix in (".json", ".safetensors")]
    times = [file.stat().st_mtime for file in files]
    return f"{directory.resolve()} {max(times)}" if times else str(directory)


def _is_model(directory: Path) -> bool:
    """Whether it holds a whole model, as `minilora merge` or transformers writes it."""
    config = read_object(directory / "config.json") or {}
    return "model_type" in config and not loading.is_adapter(directory)


def _trained(directory: Path, run: RunConfig) -> Path:
    """The directory of the adapter or model, in a run or by itself."""
    return directory if _is_alone(directory) else trained_path(directory, run)


def _is_alone(directory: Path) -> bool:
    """Whether it is an adapter or a model without a run around it."""
    return loading.is_adapter(directory) or _is_model(directory)


def _run_of(directory: Path, arguments: argparse.Namespace) -> tuple[Path, RunConfig]:
    """A run's directory and settings. An adapter outside a run gets those of the preset.

    The directory of the adapter or model inside a run stands for the run.

    Raises:
        UserError: the adapter does not name its base model, or a run is given a preset.
    """
    directory = run_of(directory)
    preset = arguments.preset or "pocket"
    flat = PRESETS[preset] | {"preset": preset}
    if loading.is_adapter(directory):
        base = base_of(directory, minilora.read_adapter(directory))
        if "model" not in base | arguments.changes:
            raise UserError(f"{directory} does not name its base model: pass --model")
        flat |= base
    elif _is_model(directory):
        flat |= {"method": "full", "model": str(directory)}
    else:
        flat = flags.read_run(directory).to_dict()
        if arguments.preset:
            raise UserError(f"{directory} is a run and has its own settings: leave --preset out")
    run = RunConfig.from_dict(flags.changed(flat, arguments.changes))
    run.check()
    return directory, run


def _chats(run: RunConfig, files: list[str]) -> list[Example]:
    """The chats of the user's files."""
    chats: list[Example] = []
    for name in files:
        found, notices = read_chats(name, run.data)
        chats += found
        _print(notices)
    return chats


def _examples(run: RunConfig, arguments: argparse.Namespace) -> tuple[list[Example], str]:
    """The dialogues to score. If --data is a file and no split is asked for, all of it."""
    path = local_path(run.data.data)
    if "data" in arguments.changes and arguments.split is None and path.exists() and is_data(path):
        split, (examples, notices) = "all", load_file(path, run.data)
    else:
        split = arguments.split or "test"
        data, notices = load(run.data, (split,))
        examples = data[split]
    _print(notices)
    return (examples[: arguments.limit] if arguments.limit else examples), split


def _print(notices: list[str]) -> None:
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)


def _load_trained(
    directory: Path, run: RunConfig, device: torch.device, needs_base: bool = True
) -> Models:
    """Both models, with their weights in the form that decodes fastest, since nothing trains.

    Args:
        directory: of the run, adapter or model.
        run: its settings.
        device: where the models go.
        needs_base: load the base of a full fine-tune too.
    """
    autocast_dtype = choose_precision(run.model.precision, device)
    path = _trained(directory, run)
    is_full = run.model.method == "full"  # such a model has its tokenizer beside it
    tokenizer = loading.load_tokenizer(str(path.resolve()) if is_full else run.model.model)
    if is_full:
        tuned = load_model(str(path.resolve()), device)
        base = load_model(run.model.model, device) if needs_base else tuned
    else:
        tuned = base = load_model(run.model.model, device, four_bits(run))
        loaded = minilora.load_adapter(tuned, path, inference=True)
        _print([loaded.notice] if loaded.notice else [])
    for model in {tuned, base}:
        speed.hold_frozen_linears(model.requires_grad_(False), autocast_dtype)
        speed.release_file(model)
    return Models(tuned, None if base is tuned else base, tokenizer, autocast_dtype)
