"""From flags to settings: one parser for training and one for evaluating."""

import argparse
import json
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from minilora.summarization.presets import (
    GROUPS,
    LEARNING_RATES,
    PRESETS,
    OutputOptions,
    RunConfig,
    UserError,
)

# A resumed run may change where it runs, what it keeps and what it does at its end, but nothing
# that it computes unless told so, and never where it is.
RESUME_MAY_CHANGE = {
    *("resume", "accept_changes", "device", "evaluate", "report"),
    *("checkpoint_minutes", "checkpoint_steps", "keep_checkpoints"),
    *("auto_batch_size", "skip_bad_batches", "evaluation_batch_size"),
}
RESUME_MUST_NOT_CHANGE = {"output"}


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
    options = parser._option_string_actions
    options["--evaluate"].help = options["--report"].help = argparse.SUPPRESS  # done anyway
    options["--no-evaluate"].help = "do not score the test split at the end"
    options["--no-report"].help = "do not write report.html"
    # The flags that say what the other flags' defaults are come first.
    early, _ = _early_parser().parse_known_args(argv)
    resumed = read_run(Path(early.resume)) if early.resume else None
    parser.set_defaults(**(resumed.to_dict() if resumed else PRESETS[early.preset]))
    *groups, rest, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    parser.refuse(unknown)
    run = RunConfig(**dict(zip(GROUPS, groups, strict=True)), preset=rest.preset)
    if resumed:
        _require_same(resumed.to_dict(), run.to_dict(), run.output)
    if run.training.learning_rate is None:
        rates, method = LEARNING_RATES[run.preset], run.model.method
        run.training.learning_rate = rates.get(run.adapter.init, rates[method])
    _check(run)
    return run


def _early_parser() -> Parser:
    parser = Parser([], prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="pocket")
    parser.add_argument("--resume")
    return parser


def _require_same(before: dict[str, Any], now: dict[str, Any], options: OutputOptions) -> None:
    changed = [k for k in now if now[k] != before[k] and k not in RESUME_MAY_CHANGE]
    if options.accept_changes and not RESUME_MUST_NOT_CHANGE.intersection(changed):
        return
    if changed:
        what = ", ".join(
            f"--{k.replace('_', '-')} (was {before[k]!r}, is {now[k]!r})" for k in changed
        )
        raise UserError(
            f"--resume {options.resume}: other settings than the run began with: {what}; "
            "--accept-changes goes on all the same"
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
        "--validation-beams": training.validation_beams,
        "--evaluation-batch-size": generation.evaluation_batch_size,
        "--keep-checkpoints": run.output.keep_checkpoints,
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
        "--checkpoint-steps": run.output.checkpoint_steps,
        "--seed": run.model.seed,
    }
    for flag, number in not_negative.items():
        if not number >= 0:  # NaN too
            raise UserError(f"{flag} must be 0 or more, not {number}")
    if not math.isfinite(generation.length_penalty):
        raise UserError(f"--length-penalty must be finite, not {generation.length_penalty}")
    if run.model.seed >= 2**63:
        raise UserError(f"--seed must be below 2^63, not {run.model.seed}")
    if run.adapter.init == "loftq" and run.model.method != "qlora":
        raise UserError("--init loftq repairs what quantization broke: it goes with --method qlora")
    if not 0 <= training.warmup < 1:
        raise UserError(
            f"--warmup is a share of the steps, from 0 to below 1, not {training.warmup}"
        )


def output_directory(run: RunConfig) -> Path:
    """Where the run goes; a directory that holds another run is never written over."""
    if run.output.resume:
        return Path(run.output.resume)
    if run.output.output:
        output = Path(run.output.output)
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output} is a file")
        check_free(output)
        return output
    rank = f"-r{run.adapter.rank}" if run.model.method != "full" else ""
    name = f"{run.preset}-{run.model.method}{rank}"
    names = (name, *(f"{name}-{i}" for i in range(2, 10000)))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def check_free(output: Path) -> None:
    """Refuse a directory that holds a run or anything else, and so would be written over."""
    if (output / "config.json").exists():
        raise UserError(
            f"--output {output} holds a run already: go on with it by --resume {output}, or "
            "name another directory"
        )
    # A name with a dot is what a run that was killed at once leaves behind.
    if output.is_dir() and any(path.name[0] != "." for path in output.iterdir()):
        raise UserError(f"--output {output} is not empty: name another directory")


def read_run(directory: Path) -> RunConfig:
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


def evaluation_parser() -> Parser:
    parser = Parser(
        [],
        prog="evaluate.py",
        allow_abbrev=False,
        description="Score the base and the fine-tuned model side by side, or summarize a text.",
        formatter_class=Help,
    )
    parser.add_argument("run", metavar="RUN", help="a run, an adapter, or its hub name")
    parser.add_argument("--data", default=None, help="other data than the run's")
    parser.add_argument("--split", default=None, help="train, validation or test (default: test)")
    parser.add_argument("--limit", type=int, default=0, help="only the first N dialogues; 0: all")
    parser.add_argument("--text", default=None, help="summarize this file instead; - is stdin")
    parser.add_argument("--output", default=None, help="write all scores and texts to FILE.json")
    parser.add_argument(
        "--evaluation-batch-size", type=int, default=None, help="dialogues summarized at once"
    )
    parser.add_argument("--device", default=None, help="auto, cpu, cuda, ...")
    parser.add_argument("--model", default=None, help="base model of an adapter directory")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="pocket",
        metavar="NAME",
        help="settings for an adapter directory",
    )
    return parser


def check_evaluation(arguments: argparse.Namespace) -> None:
    """What would be ignored, or found out only after all summaries are written."""
    if arguments.limit < 0:
        raise UserError(f"--limit must be 0 or more, not {arguments.limit}")
    if arguments.evaluation_batch_size is not None and arguments.evaluation_batch_size < 1:
        size = arguments.evaluation_batch_size
        raise UserError(f"--evaluation-batch-size must be above 0, not {size}")
    for name in ("data", "split", "limit", "output"):
        if arguments.text and getattr(arguments, name):
            raise UserError(f"--text goes without --{name}: it summarizes one text")
    if arguments.output and Path(arguments.output).is_dir():
        raise UserError(f"--output {arguments.output} is a directory: name a file in it")
