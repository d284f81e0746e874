"""The two doors, `train.py` and `evaluate.py`: flags in, a screen out, exit code 2 on bad input."""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

import minilora
from minilora import LoRAError
from minilora.adapter import CONFIG_FILE
from minilora.files import write_file
from minilora.summarization.data import encode, load
from minilora.summarization.evaluation import Evaluation, evaluate, summarize, write_json
from minilora.summarization.model import (
    adapter_directory,
    check_vocabulary,
    choose_device,
    choose_precision,
    limit_lengths,
    load_model,
    load_tokenizer,
)
from minilora.summarization.presets import (
    GROUPS,
    LEARNING_RATES,
    PRESETS,
    RunConfig,
    UserError,
)
from minilora.summarization.reading import Example, line_feeds, load_file
from minilora.summarization.report import (
    closing,
    first,
    format_comparison,
    format_examples,
    most_changed,
    opening,
)
from minilora.summarization.training import Session, fit, open_session, trained_path

# A resumed run may change where it runs and what it does at its end, nothing that it computes.
RESUME_MAY_CHANGE = {"resume", "device", "evaluate", "checkpoint_minutes"}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every flag once, spelt with hyphens; a default where it says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(name for name in action.option_strings if "_" not in name)
        if not names or action.nargs in (0, "?"):  # an argument; a switch
            return names or super()._format_action_invocation(action)
        metavar = action.dest.rpartition("_")[2].upper()
        return f"{names} {self._format_args(action, metavar)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = isinstance(action.default, bool) or action.default in (None, "", [])
        return action.help if silent else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Errors in one line; a misspelt flag is answered with the nearest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def refuse(self, unknown: Sequence[str]) -> None:
        """End in an error if arguments are left over."""
        if unknown:
            flag = unknown[0].split("=")[0]
            known = [option for option in self._option_string_actions if "_" not in option]
            close = get_close_matches(flag.replace("_", "-"), known, 1)
            nearest = f"; nearest: {close[0]}" if close else ""
            self.error(f"unrecognized argument {flag}{nearest}")


def train_main(argv: Sequence[str] | None = None) -> int:
    """`python train.py ...`. Returns the exit code: 0, 2 on bad input, 130 when interrupted."""
    return _one_line_errors("train.py", lambda: _train(sys.argv[1:] if argv is None else argv))


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """`python evaluate.py RUN ...`. Returns the exit code: 0, or 2 on bad input."""
    return _one_line_errors(
        "evaluate.py", lambda: _evaluate(sys.argv[1:] if argv is None else argv)
    )


def _one_line_errors(program: str, main: Callable[[], int]) -> int:
    # Without a network it tells of every retry; what comes of them is said in one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return main()
    except (UserError, LoRAError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def _command(door: str) -> str:
    """What a person types to come through `train.py` or `evaluate.py` again."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("minilora", "__main__.py"):
        return f"python -m minilora {door.removesuffix('.py')}"
    return f"python {door}"


# Training ----------------------------------------------------------------------------------------


def parse_run(argv: Sequence[str]) -> RunConfig:
    """The settings that the flags ask for: the resumed run's or the preset's, then the flags.

    Raises:
        UserError: the run to resume is none, or a flag would change its result.
        SystemExit: an unknown flag or value (exit code 2), or --help.
    """
    parser = Parser(
        list(GROUPS.values()),
        prog="train.py",
        usage="python train.py [--preset NAME] [--FLAG VALUE ...]",
        description="Fine-tune an encoder-decoder to summarize dialogues; score what it gained.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="pocket",
        metavar="NAME",
        help=f"a whole configuration, which the other flags change: {', '.join(PRESETS)}",
    )
    parser._option_string_actions["--evaluate"].help = argparse.SUPPRESS  # what it does anyway
    parser._option_string_actions["--no-evaluate"].help = "do not score the test split at the end"
    # The flags that say what the other flags' defaults are come first.
    early, _ = _early_parser().parse_known_args(argv)
    resumed = _read_run(Path(early.resume)) if early.resume else None
    parser.set_defaults(**(resumed.to_dict() if resumed else PRESETS[early.preset]))
    *groups, rest, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    parser.refuse(unknown)
    run = RunConfig(**dict(zip(GROUPS, groups, strict=True)), preset=rest.preset)
    if resumed:
        _require_same(resumed.to_dict(), run.to_dict(), early.resume)
    if run.training.learning_rate is None:
        run.training.learning_rate = LEARNING_RATES[run.preset][run.model.method]
    _check(run)
    return run


def _early_parser() -> Parser:
    parser = Parser([], prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="pocket")
    parser.add_argument("--resume")
    return parser


def _require_same(before: dict[str, Any], now: dict[str, Any], resume: str) -> None:
    changed = [k for k in now if now[k] != before[k] and k not in RESUME_MAY_CHANGE]
    if changed:
        what = ", ".join(
            f"--{k.replace('_', '-')} (was {before[k]!r}, is {now[k]!r})" for k in changed
        )
        raise UserError(f"--resume {resume}: other settings than the run began with: {what}")


def _train(argv: Sequence[str]) -> int:
    run = parse_run(argv)
    output = _output_directory(run)
    session = open_session(run)
    if not run.output.resume:
        output.mkdir(parents=True, exist_ok=True)
        write_file(output / "config.json", json.dumps(run.to_dict(), indent=2).encode() + b"\n")
    for notice in session.notices:
        print(f"note: {notice}", file=sys.stderr)
    print(opening(session, output), flush=True)
    outcome = fit(session, output)
    again = shlex.quote(str(output))
    if outcome.interrupted:
        print(
            f"\nstopped after step {outcome.progress.step}; what was trained so far is in "
            f"{trained_path(output, run)}\ngo on with: {_command('train.py')} --resume {again}"
        )
        return 130
    if run.output.evaluate:
        try:
            evaluation = _final_evaluation(session, output)
        except KeyboardInterrupt:
            print(f"\ntrained, not scored; do it with: {_command('evaluate.py')} {again}")
            return 130
        write_json(output / "evaluation.json", evaluation.to_dict())
        print(f"\n{format_examples(evaluation, first(evaluation, 3))}")
        print(f"\n{format_comparison(evaluation)}")
    print(f"\n{closing(session, outcome, output, _command('evaluate.py'))}")
    return 0


def _final_evaluation(session: Session, output: Path) -> Evaluation:
    """Base and best fine-tuned model on the test split."""
    run, model, base_model, test = session.run, session.model, None, session.splits["test"]
    if run.model.method == "full":
        base_model = load_model(run.model.model, session.device)
        model = load_model(str(trained_path(output, run).resolve()), session.device)
    else:
        minilora.load_adapter(model, trained_path(output, run), inference=True)
    return evaluate(
        model,
        session.tokenizer,
        test.examples,
        test.encoded,
        run.generation,
        data=run.data.data,
        split="test",
        base_model=base_model,
        autocast_dtype=session.autocast_dtype,
        progress=sys.stderr.isatty(),
    )


def _check(run: RunConfig) -> None:
    """Settings that argparse cannot refuse by their type."""
    training, generation = run.training, run.generation
    positive = {
        "--epochs": training.epochs,
        "--batch-size": training.batch_size,
        "--accumulate": training.accumulate,
        "--learning-rate": training.learning_rate,
        "--beams": generation.beams,
        "--evaluation-batch-size": generation.evaluation_batch_size,
        "--max-source-length": run.data.max_source_length,
        "--max-target-length": run.data.max_target_length,
    }
    for flag, value in positive.items():
        if value is None or not 0 < value < float("inf"):
            raise UserError(f"{flag} must be above 0, not {value}")
    not_negative = {
        "--max-steps": training.max_steps,
        "--clip": training.clip,
        "--weight-decay": training.weight_decay,
        "--validation-limit": training.validation_limit,
        "--min-length": generation.min_length,
        "--no-repeat-ngram": generation.no_repeat_ngram,
        "--checkpoint-minutes": run.output.checkpoint_minutes,
        "--seed": run.model.seed,
    }
    for flag, number in not_negative.items():
        if not number >= 0:  # NaN too
            raise UserError(f"{flag} must be 0 or more, not {number}")
    if run.model.seed >= 2**63:
        raise UserError(f"--seed must be below 2^63, not {run.model.seed}")
    if not 0 <= training.warmup < 1:
        raise UserError(
            f"--warmup is a share of the steps, from 0 to below 1, not {training.warmup}"
        )


def _output_directory(run: RunConfig) -> Path:
    """Where the run goes; a directory that holds another run is never written over."""
    if run.output.resume:
        return Path(run.output.resume)
    if run.output.output:
        output = Path(run.output.output)
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output} is a file")
        if (output / "config.json").exists():
            raise UserError(
                f"--output {output} holds a run already: go on with it by --resume {output}, or "
                "name another directory"
            )
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"--output {output} is not empty: name another directory")
        return output
    rank = f"-r{run.adapter.rank}" if run.model.method == "lora" else ""
    name = f"{run.preset}-{run.model.method}{rank}"
    names = (name, *(f"{name}-{i}" for i in range(2, 10000)))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def _read_run(directory: Path) -> RunConfig:
    path = directory / "config.json"
    try:
        flat = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{directory} is not a run: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(flat, dict):
        raise UserError(f"{path}: holds no object")
    try:
        return RunConfig.from_dict(flat)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# Evaluation --------------------------------------------------------------------------------------


def _evaluate(argv: Sequence[str]) -> int:
    parser = _evaluation_parser()
    arguments, unknown = parser.parse_known_args(argv)
    parser.refuse(unknown)
    _check_evaluation(arguments)
    directory, run = _run_of(adapter_directory(arguments.run), arguments)
    text = _read_text(arguments.text) if arguments.text else None
    device = choose_device(arguments.device or run.model.device)
    examples, split = ([], "") if text is not None else _examples(run, arguments)
    tokenizer = load_tokenizer(run.model.model)
    model, base_model = _load_trained(directory, run, device)
    run = limit_lengths(run, model)
    autocast_dtype = choose_precision(run.model.precision, device)
    if text is not None:
        print(_summaries_of(text, run, model, base_model, tokenizer, autocast_dtype))
        return 0
    encoded, truncation = encode(examples, tokenizer, run.data)
    check_vocabulary(model, encoded, run.model.model)
    if truncation.sources:
        print(f"note: {truncation}", file=sys.stderr)
    evaluation = evaluate(
        model,
        tokenizer,
        examples,
        encoded,
        run.generation,
        data=run.data.data,
        split=split,
        base_model=base_model,
        autocast_dtype=autocast_dtype,
        progress=sys.stderr.isatty(),
    )
    if arguments.output:
        write_json(Path(arguments.output), evaluation.to_dict())
    print(f"where they differ most:\n\n{format_examples(evaluation, most_changed(evaluation, 3))}")
    print(f"\n{format_comparison(evaluation)}")
    return 0


def _evaluation_parser() -> Parser:
    parser = Parser(
        [],
        prog="evaluate.py",
        allow_abbrev=False,
        description="Score the base and the fine-tuned model side by side, or summarize a text.",
    )
    parser.add_argument("run", metavar="RUN", help="a run, an adapter, or its hub name")
    parser.add_argument("--data", default=None, help="other data than the run's")
    parser.add_argument("--split", default=None, help="train, validation or test (default: test)")
    parser.add_argument("--limit", type=int, default=0, help="only the first N dialogues; 0: all")
    parser.add_argument("--text", default=None, help="summarize this file instead; - is stdin")
    parser.add_argument("--output", default=None, help="write all scores and texts to FILE.json")
    parser.add_argument("--device", default=None, help="auto, cpu, cuda, ...")
    parser.add_argument("--model", default=None, help="base model of an adapter directory")
    parser.add_argument(
        "--preset", choices=PRESETS, default="pocket", help="settings for an adapter directory"
    )
    return parser


def _check_evaluation(arguments: argparse.Namespace) -> None:
    """What would be ignored, or found out only after all summaries are written."""
    if arguments.limit < 0:
        raise UserError(f"--limit must be 0 or more, not {arguments.limit}")
    for name in ("data", "split", "limit", "output"):
        if arguments.text and getattr(arguments, name):
            raise UserError(f"--text goes without --{name}: it summarizes one text")
    if arguments.output and Path(arguments.output).is_dir():
        raise UserError(f"--output {arguments.output} is a directory: name a file in it")


def _run_of(directory: Path, arguments: argparse.Namespace) -> tuple[Path, RunConfig]:
    """A run and its settings; for a bare adapter the preset's, with the base model it names.

    The adapter directory inside a run is the run: its own settings are what it was trained with.
    """
    if directory.name == "adapter" and (directory.parent / "config.json").exists():
        directory = directory.parent
    if (directory / CONFIG_FILE).exists():
        run = RunConfig.from_dict(PRESETS[arguments.preset] | {"preset": arguments.preset})
        model = arguments.model or minilora.read_adapter(directory).base_model
        if model is None:
            raise UserError(f"{directory} does not name its base model: say --model")
        run.model.model = model
    else:
        run = _read_run(directory)
        run.model.model = arguments.model or run.model.model
    run.data.data = arguments.data or run.data.data
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
    base = load_model(run.model.model, device)
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
        return summarize(which, tokenizer, encoded, run.generation, autocast_dtype)[0].text

    finetuned = write(model)
    if base_model is not None:
        return f"base        {write(base_model)}\nfine-tuned  {finetuned}"
    with minilora.disabled(model):
        base = write(model)
    return f"base        {base}\nfine-tuned  {finetuned}"
