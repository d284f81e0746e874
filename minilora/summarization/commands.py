"""What `train.py` and `evaluate.py` do, once their flags are read."""

import argparse
import shlex
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import minilora

from . import flags, processes
from .data.batches import encode
from .data.reading import Example, line_feeds, load_file
from .data.splits import load
from .errors import EXPECTED, UserError, one_line
from .evaluation.compare import Evaluation
from .evaluation.generate import evaluate, summarize
from .evaluation.rouge import require_rouge, rouge_is_installed
from .files import write_json
from .model import loading, requirements, speed
from .model.device import choose_device, choose_precision
from .model.loading import load_model
from .presets import PRESETS
from .report import terminal
from .report.page import write_report
from .settings import RunConfig
from .training.failures import out_of_memory, smaller_evaluation_batch, try_out
from .training.lock import lock
from .training.session import Session, Split, four_bits, open_session, trained_path, write_config
from .training.stopping import stop_requests
from .training.trainer import fit


def _command(program: str) -> str:
    """What a person types to call `train.py` or `evaluate.py` again."""
    if processes.active() and program == "train.py":  # evaluate.py needs one process only
        return f"torchrun {processes.launch_options()} {program}"
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("minilora", "__main__.py"):
        return f"python -m minilora {program.removesuffix('.py')}"
    return f"python {program}"


# train.py -----------------------------------------------------------------------------------------


def train(run: RunConfig) -> int:
    """Fine-tune, score, and report. Returns the exit code: 0, or 130 when interrupted."""
    started = time.monotonic()
    output = Path(processes.from_rank0(lambda: str(flags.output_directory(run))))
    session = open_session(run)
    with ExitStack() as held:  # process 0 holds the lock
        processes.on_rank0(lambda: held.enter_context(lock(output)))
        return _train_into(output, run, session, started)


def _train_into(output: Path, run: RunConfig, session: Session, started: float) -> int:
    if not run.output.resume:  # checked again: another run may have taken it meanwhile
        processes.on_rank0(lambda: flags.check_free(output))
    if not run.output.resume or run.output.accept_changes:  # the next resume compares with these
        processes.on_rank0(lambda: write_config(run, output))
    if not all(processes.gather((output / "config.json").exists())):
        raise UserError(f"{output} must be on a file system that the machines share")
    for notice in session.notices:
        print(f"note: {notice}", file=sys.stderr)
    print(terminal.header(session, output), flush=True)
    again = shlex.quote(str(output))
    try:
        outcome = fit(session, output)
    except OSError as error:
        raise UserError(
            f"cannot write to {output} ({error.strerror}). Earlier checkpoints are intact. Free "
            f"some space or fix the permissions, then run: {_command('train.py')} --resume {again}"
        ) from None
    if outcome.interrupted:
        _write_report(run, output)
        where = f"the result so far is in {trained_path(output, run)}"
        print(f"\nstopped after step {outcome.progress.step}; {where}")
        print(f"resume with: {_command('train.py')} --resume {again}")
        return 130
    if run.output.evaluate and rouge_is_installed():
        try:
            with stop_requests() as stop, stop.at_once():
                evaluation = _final_evaluation(session, output)
        except KeyboardInterrupt:
            _write_report(run, output)
            print(f"\ntrained, not scored; score it with: {_command('evaluate.py')} {again}")
            return 130
        processes.on_rank0(lambda: write_json(output / "evaluation.json", evaluation.to_dict()))
        print(f"\n{terminal.format_examples(evaluation, terminal.first(evaluation, 3))}")
        print(f"\n{terminal.format_comparison(evaluation)}")
    seconds = time.monotonic() - started
    page = _write_report(run, output)
    print(f"\n{terminal.summary(session, outcome, output, seconds, _command('evaluate.py'), page)}")
    return 0


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
        minilora.load_adapter(session.model, trained_path(output, run), inference=True)
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

    def check(self, run: RunConfig) -> RunConfig:
        """The settings as the models allow; what is set right is noted."""
        for model in filter(None, (self.base, self.tuned)):
            for notice in requirements.check(model, self.tokenizer, run.model.model):
                print(f"note: {notice}", file=sys.stderr)
        return requirements.limit_lengths(run, self.tuned)

    def score(self, run: RunConfig, name: str, split: Split) -> Evaluation:
        """Both models on a split of the run's data."""
        smaller = smaller_evaluation_batch(run.generation.evaluation_batch_size)
        how: dict[str, Any] = {"data": run.data.data, "split": name, "base_model": self.base}
        how |= {"autocast_dtype": self.autocast_dtype, "progress": sys.stderr.isatty()}
        texts = (split.examples, split.encoded)
        with out_of_memory("while writing summaries", smaller):
            return evaluate(self.tuned, self.tokenizer, *texts, run.generation, **how)

    def encode(self, run: RunConfig, examples: list[Example], cut: str) -> Split:
        """Token ids; dialogues that are cut are noted as `cut` says, with `{truncation}`."""
        encoded, truncation = encode(examples, self.tokenizer, run.data)
        loading.check_vocabulary(self.tuned, encoded, run.model.model)
        for model in filter(None, (self.base, self.tuned)):
            try_out(model, self.tokenizer, encoded[0], run.generation, self.autocast_dtype)
        if truncation.sources:
            print(f"note: {cut.format(truncation=truncation)}", file=sys.stderr)
        return Split(examples, encoded)


# evaluate.py --------------------------------------------------------------------------------------


def score(arguments: argparse.Namespace) -> int:
    """Score or summarize with a run or an adapter. Returns the exit code 0."""
    directory, run = _run_of(loading.adapter_directory(arguments.run), arguments)
    text = _read_text(arguments.text) if arguments.text else None
    device = processes.own_device(choose_device(arguments.device or run.model.device))
    if text is None:
        require_rouge()
        examples, split = _examples(run, arguments)
    models = _load_trained(directory, run, device)
    run = models.check(run)
    if text is not None:
        print(_summaries_of(text, run, models))
        return 0
    evaluation = models.score(run, split, models.encode(run, examples, "{truncation}"))
    if arguments.output:
        path, scores = Path(arguments.output), evaluation.to_dict()
        processes.on_rank0(lambda: write_json(path, scores))
    changed = terminal.most_changed(evaluation, 3)
    print(f"the largest differences:\n\n{terminal.format_examples(evaluation, changed)}")
    print(f"\n{terminal.format_comparison(evaluation)}")
    return 0


def _is_adapter(directory: Path) -> bool:
    return (directory / loading.ADAPTER_FILES[0]).exists()


def _run_of(directory: Path, arguments: argparse.Namespace) -> tuple[Path, RunConfig]:
    """A run and its settings. A bare adapter has the preset's settings, and names its base model.

    The adapter directory inside a run means the run, with its own settings.
    """
    if directory.name == "adapter" and (directory.parent / "config.json").exists():
        directory = directory.parent
    if _is_adapter(directory):
        run = RunConfig.from_dict(PRESETS[arguments.preset] | {"preset": arguments.preset})
        adapter = minilora.read_adapter(directory)
        model = arguments.model or adapter.base_model
        if model is None:
            raise UserError(f"{directory} does not name its base model: say --model")
        run.model.model = model
        if adapter.config.init == "loftq":  # such an adapter belongs to a base in four bits
            run.model.method = "qlora"
    else:
        run = flags.read_run(directory)
        run.model.model = arguments.model or run.model.model
    run.data.data = arguments.data or run.data.data
    size = arguments.evaluation_batch_size
    run.generation.evaluation_batch_size = size or run.generation.evaluation_batch_size
    return directory, run


def _examples(run: RunConfig, arguments: argparse.Namespace) -> tuple[list[Example], str]:
    """The dialogues to score. If --data is a file and no split is asked for, all of it."""
    split = arguments.split or "test"
    if arguments.data and Path(arguments.data).is_file() and arguments.split is None:
        split, (examples, notices) = "all", load_file(arguments.data, run.data)
    else:
        data, notices = load(run.data, (split,))
        examples = data[split]
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    return (examples[: arguments.limit] if arguments.limit else examples), split


def _load_trained(directory: Path, run: RunConfig, device: torch.device) -> Models:
    """Both models. Nothing trains any more, so all weights are kept as decoding is fastest."""
    tokenizer = loading.load_tokenizer(run.model.model)
    autocast_dtype = choose_precision(run.model.precision, device)
    tuned = base = load_model(run.model.model, device, four_bits(run))
    path = directory if _is_adapter(directory) else trained_path(directory, run)
    if run.model.method == "full":
        tuned = load_model(str(path.resolve()), device)
    else:
        minilora.load_adapter(tuned, path, inference=True)
    for model in {tuned, base}:
        speed.hold_frozen_linears(model.requires_grad_(False), autocast_dtype)
        speed.release_file(model)
    return Models(tuned, None if base is tuned else base, tokenizer, autocast_dtype)


def _read_text(name: str) -> str:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = line_feeds(content.decode("utf-8-sig")).strip()
    except UnicodeDecodeError as error:
        raise UserError(f"--text {name}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--text {name}: {error.strerror}") from None
    if not text:
        raise UserError(f"--text {name}: there is nothing to summarize")
    return text


def _summaries_of(text: str, run: RunConfig, models: Models) -> str:
    """The text summarized by both models."""
    cut = f"only the first {run.data.max_source_length} tokens are read"
    encoded = models.encode(run, [Example("text", text, "")], cut).encoded

    def write(model: PreTrainedModel) -> str:
        written = summarize(model, models.tokenizer, encoded, run.generation, models.autocast_dtype)
        return terminal.printable(written[0].text).strip() or "(empty)"

    tuned = write(models.tuned)
    with minilora.disabled(models.tuned) if models.base is None else nullcontext():
        base = write(models.base or models.tuned)
    return f"base        {base}\nfine-tuned  {tuned}"
