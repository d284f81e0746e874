"""The two doors, `train.py` and `evaluate.py`: flags in, a screen out, exit code 2 on bad input."""

import argparse
import io
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import minilora
from minilora import LoRAError
from minilora.peft_format.config import CONFIG_FILE
from minilora.summarization import distributed, speed
from minilora.summarization.data import encode, load
from minilora.summarization.evaluation import Evaluation, evaluate, summarize, write_json
from minilora.summarization.flags import (
    check_evaluation,
    check_free,
    evaluation_parser,
    output_directory,
    parse_run,
    read_run,
)
from minilora.summarization.guards import out_of_memory, smaller_evaluation_batch
from minilora.summarization.lock import hold
from minilora.summarization.model import (
    adapter_directory,
    check_vocabulary,
    choose_device,
    choose_precision,
    limit_lengths,
    load_model,
    load_tokenizer,
)
from minilora.summarization.page import write_report
from minilora.summarization.presets import PRESETS, RunConfig, UserError
from minilora.summarization.reading import Example, line_feeds, load_file
from minilora.summarization.report import (
    closing,
    first,
    format_comparison,
    format_examples,
    most_changed,
    opening,
    printable,
)
from minilora.summarization.session import (
    Session,
    Split,
    four_bits,
    open_session,
    trained_path,
    write_config,
)
from minilora.summarization.stopping import stop_requests
from minilora.summarization.training import fit


def train_main(argv: Sequence[str] | None = None) -> int:
    """`python train.py ...`. Returns the exit code: 0, 2 on bad input, 130 when interrupted."""
    return _one_line_errors("train.py", lambda: _train(sys.argv[1:] if argv is None else argv))


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """`python evaluate.py RUN ...`. Returns the exit code: 0, or 2 on bad input."""
    return _one_line_errors(
        "evaluate.py", lambda: _evaluate(sys.argv[1:] if argv is None else argv)
    )


def _one_line_errors(program: str, main: Callable[[], int]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a letter the terminal has not got becomes a ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Without a network it tells of every retry; what comes of them is said in one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with distributed.processes():
            return main()
    except distributed.LostProcess as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except (UserError, LoRAError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def _command(door: str) -> str:
    """What a person types to come through `train.py` or `evaluate.py` again."""
    if distributed.active() and door == "train.py":  # one process is enough for the other
        return f"torchrun {distributed.launch_options()} {door}"
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("minilora", "__main__.py"):
        return f"python -m minilora {door.removesuffix('.py')}"
    return f"python {door}"


def _train(argv: Sequence[str]) -> int:
    started = time.monotonic()
    run = parse_run(argv)
    output = Path(distributed.from_main(lambda: str(output_directory(run))))
    session = open_session(run)
    with ExitStack() as held:

        def enter() -> None:
            output.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(output))

        distributed.on_main(enter)
        return _train_into(output, run, session, started)


def _train_into(output: Path, run: RunConfig, session: Session, started: float) -> int:
    if not run.output.resume:
        distributed.on_main(lambda: check_free(output))  # another may have come in the meantime
        distributed.on_main(lambda: write_config(run, output))
    if not all(distributed.gather((output / "config.json").exists())):
        raise UserError(f"{output} must be on a file system that the machines share")
    for notice in session.notices:
        print(f"note: {notice}", file=sys.stderr)
    print(opening(session, output), flush=True)
    again = shlex.quote(str(output))
    try:
        outcome = fit(session, output)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}): all that was written before is whole; "
            f"make room or give permission, then go on with: {_command('train.py')} --resume "
            f"{again}"
        ) from None
    if outcome.interrupted:
        _write_report(run, output)
        print(
            f"\nstopped after step {outcome.progress.step}; what was trained so far is in "
            f"{trained_path(output, run)}\ngo on with: {_command('train.py')} --resume {again}"
        )
        return 130
    if run.output.evaluate:
        try:
            with stop_requests() as stop, stop.at_once():
                evaluation = _final_evaluation(session, output)
        except KeyboardInterrupt:
            _write_report(run, output)
            print(f"\ntrained, not scored; do it with: {_command('evaluate.py')} {again}")
            return 130
        distributed.on_main(lambda: write_json(output / "evaluation.json", evaluation.to_dict()))
        print(f"\n{format_examples(evaluation, first(evaluation, 3))}")
        print(f"\n{format_comparison(evaluation)}")
    seconds = time.monotonic() - started
    page = _write_report(run, output)
    print(f"\n{closing(session, outcome, output, seconds, _command('evaluate.py'), page)}")
    return 0


def _write_report(run: RunConfig, output: Path) -> Path | None:
    """report.html, if wanted. The run is safe by now: a page that fails is only told of."""
    page = output / "report.html"
    try:
        if run.output.report and distributed.is_main():
            write_report([output], page)
            return page
    except (UserError, LoRAError, OSError) as error:
        print(f"note: {page} was not written: {' '.join(str(error).split())}", file=sys.stderr)
    return None


def _final_evaluation(session: Session, output: Path) -> Evaluation:
    """Base and best fine-tuned model on the test split."""
    run, model, base_model, test = session.run, session.model, None, session.splits["test"]
    if run.model.method == "full":
        base_model = load_model(run.model.model, session.device)
        model = load_model(str(trained_path(output, run).resolve()), session.device)
        for loaded in (base_model, model):
            _only_to_decode(loaded, session.autocast_dtype)
    else:
        minilora.load_adapter(model, trained_path(output, run), inference=True)
    return _score(run, "test", test, model, base_model, session.tokenizer, session.autocast_dtype)


def _only_to_decode(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> None:
    """Nothing of it trains any more, so that all of it is held as decoding is cheapest."""
    speed.hold_frozen_linears(model.requires_grad_(False), autocast_dtype)
    speed.release_file(model)


def _score(
    run: RunConfig,
    name: str,
    split: Split,
    model: PreTrainedModel,
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    autocast_dtype: torch.dtype | None,
) -> Evaluation:
    """Base and fine-tuned model on a split of the run's data."""
    smaller = smaller_evaluation_batch(run.generation.evaluation_batch_size)
    with out_of_memory("writing summaries", smaller):
        return evaluate(
            model,
            tokenizer,
            split.examples,
            split.encoded,
            run.generation,
            data=run.data.data,
            split=name,
            base_model=base_model,
            autocast_dtype=autocast_dtype,
            progress=sys.stderr.isatty(),
        )


def _evaluate(argv: Sequence[str]) -> int:
    parser = evaluation_parser()
    arguments, unknown = parser.parse_known_args(argv)
    parser.refuse(unknown)
    check_evaluation(arguments)
    directory, run = _run_of(adapter_directory(arguments.run), arguments)
    text = _read_text(arguments.text) if arguments.text else None
    device = distributed.own_device(choose_device(arguments.device or run.model.device))
    examples, split = ([], "") if text is not None else _examples(run, arguments)
    tokenizer = load_tokenizer(run.model.model)
    autocast_dtype = choose_precision(run.model.precision, device)
    model, base_model = _load_trained(directory, run, device)
    for loaded in filter(None, (model, base_model)):
        _only_to_decode(loaded, autocast_dtype)
    run = limit_lengths(run, model)
    if text is not None:
        print(_summaries_of(text, run, model, base_model, tokenizer, autocast_dtype))
        return 0
    encoded, truncation = encode(examples, tokenizer, run.data)
    check_vocabulary(model, encoded, run.model.model)
    if truncation.sources:
        print(f"note: {truncation}", file=sys.stderr)
    scored = Split(examples, encoded)
    evaluation = _score(run, split, scored, model, base_model, tokenizer, autocast_dtype)
    if arguments.output:
        path, scores = Path(arguments.output), evaluation.to_dict()
        distributed.on_main(lambda: write_json(path, scores))
    print(f"where they differ most:\n\n{format_examples(evaluation, most_changed(evaluation, 3))}")
    print(f"\n{format_comparison(evaluation)}")
    return 0


def _run_of(directory: Path, arguments: argparse.Namespace) -> tuple[Path, RunConfig]:
    """A run and its settings; for a bare adapter the preset's, with the base model it names.

    The adapter directory inside a run is the run: its own settings are what it was trained with.
    """
    if directory.name == "adapter" and (directory.parent / "config.json").exists():
        directory = directory.parent
    if (directory / CONFIG_FILE).exists():
        run = RunConfig.from_dict(PRESETS[arguments.preset] | {"preset": arguments.preset})
        adapter = minilora.read_adapter(directory)
        model = arguments.model or adapter.base_model
        if model is None:
            raise UserError(f"{directory} does not name its base model: say --model")
        run.model.model = model
        if adapter.config.init == "loftq":  # it belongs to what the base's four bits mean
            run.model.method = "qlora"
    else:
        run = read_run(directory)
        run.model.model = arguments.model or run.model.model
    run.data.data = arguments.data or run.data.data
    size = arguments.evaluation_batch_size
    run.generation.evaluation_batch_size = size or run.generation.evaluation_batch_size
    return directory, run


def _examples(run: RunConfig, arguments: argparse.Namespace) -> tuple[list[Example], str]:
    """The dialogues to score. A file named by --data is taken whole if no split is asked for."""
    split = arguments.split or "test"
    if arguments.data and Path(arguments.data).is_file() and arguments.split is None:
        examples, notices = load_file(arguments.data, run.data)
        split = "all"
    else:
        data, notices = load(run.data, (split,))
        examples = data[split]
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    return (examples[: arguments.limit] if arguments.limit else examples), split


def _load_trained(
    directory: Path, run: RunConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The fine-tuned model, and after a full fine-tune the base beside it."""
    base = load_model(run.model.model, device, four_bits(run))
    if run.model.method == "full":
        return load_model(str(trained_path(directory, run).resolve()), device), base
    bare = (directory / CONFIG_FILE).exists()
    minilora.load_adapter(base, directory if bare else trained_path(directory, run), inference=True)
    return base, None


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


def _summaries_of(
    text: str,
    run: RunConfig,
    model: PreTrainedModel,
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    autocast_dtype: torch.dtype | None,
) -> str:
    encoded, truncation = encode([Example("text", text, "")], tokenizer, run.data)
    check_vocabulary(model, encoded, run.model.model)
    if truncation.sources:
        print(f"note: only the first {run.data.max_source_length} tokens are read", file=sys.stderr)

    def write(which: Any) -> str:
        summary = summarize(which, tokenizer, encoded, run.generation, autocast_dtype)[0]
        return printable(summary.text).strip() or "(empty)"

    finetuned = write(model)
    with nullcontext() if base_model is not None else minilora.disabled(model):
        base = write(model if base_model is None else base_model)
    return f"base        {base}\nfine-tuned  {finetuned}"
