"""From flags to settings: one parser for training and one for evaluating."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .errors import UserError
from .files import read_object
from .presets import LEARNING_RATES, PRESETS
from .settings import GROUPS, REMOVED, OutputOptions, RunConfig, removed_settings, spelt

# A resumed run may change the device, the checkpoints it keeps and what it does at its end. What
# changes its result needs --accept-changes, and its directory cannot change.
RESUME_MAY_CHANGE = {
    *("resume", "accept_changes", "device", "evaluate", "report"),
    *("checkpoint_minutes", "checkpoint_steps", "keep_checkpoints"),
    "evaluation_batch_size",
}
RESUME_MUST_NOT_CHANGE = {"output"}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every flag once, with hyphens. Defaults that are empty or a switch are not shown."""

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
    """Errors in one line; for a misspelt flag the nearest one is named."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def refuse(self, unknown: Sequence[str]) -> None:
        """End in an error if arguments are left over."""
        if unknown:
            flag = unknown[0].split("=")[0]
            if removed := REMOVED.get(flag.lstrip("-").replace("-", "_")):
                self.error(f"{flag} was removed: {removed[1]}")
            known = [option for option in self._option_string_actions if "_" not in option]
            close = get_close_matches(flag.replace("_", "-"), known, 1)
            nearest = f"; nearest: {close[0]}" if close else ""
            self.error(f"unrecognized argument {flag}{nearest}")


def parse_run(argv: Sequence[str]) -> RunConfig:
    """The settings of the resumed run or of the preset, changed by the flags.

    Raises:
        UserError: --resume names no run, or a flag would change its result.
        SystemExit: an unknown flag or value (exit code 2), or --help.
    """
    parser = Parser(
        list(GROUPS.values()),
        prog="train.py",
        usage="python train.py [--preset NAME] [--FLAG VALUE ...]",
        description="Fine-tune an encoder-decoder to summarize; compare it with its base.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    _add_preset(parser, f"a whole configuration that the other flags change: {', '.join(PRESETS)}")
    options = parser._option_string_actions
    options["--evaluate"].help = options["--report"].help = argparse.SUPPRESS  # the default
    options["--no-evaluate"].help = "do not score the test split at the end"
    options["--no-report"].help = "do not write report.html"
    # --preset and --resume set the defaults of the other flags, so they are read first.
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
    run.check()
    return run


def _early_parser() -> Parser:
    parser = Parser([], prog="train.py", add_help=False, allow_abbrev=False)
    _add_preset(parser)
    parser.add_argument("--resume")
    return parser


def _add_preset(parser: Parser, text: str = "") -> None:
    parser.add_argument("--preset", choices=PRESETS, default="pocket", metavar="NAME", help=text)


def _require_same(before: dict[str, Any], now: dict[str, Any], options: OutputOptions) -> None:
    changed = [k for k in now if now[k] != before[k] and k not in RESUME_MAY_CHANGE]
    if options.accept_changes and not RESUME_MUST_NOT_CHANGE.intersection(changed):
        return
    if changed:
        what = ", ".join(f"{spelt(k)} (was {before[k]!r}, is {now[k]!r})" for k in changed)
        raise UserError(
            f"--resume {options.resume}: settings differ from those the run began with: {what}; "
            "--accept-changes resumes with the new ones"
        )


def output_directory(run: RunConfig) -> Path:
    """The directory of the run. One that holds another run is never overwritten."""
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
    """Refuse a directory that holds a run or other files."""
    if (output / "config.json").exists():
        raise UserError(
            f"--output {output} holds a run already: resume it with --resume {output}, or "
            "name another directory"
        )
    # A run that was killed early leaves names that begin with a dot.
    if output.is_dir() and any(path.name[0] != "." for path in output.iterdir()):
        raise UserError(f"--output {output} is not empty: name another directory")


def read_run(directory: Path) -> RunConfig:
    """The settings in a run's config.json. Removed ones that had an effect are named on stderr.

    Raises:
        UserError: there is no such file, or it is not that of a run.
    """
    path = directory / "config.json"
    flat = read_object(path)
    if flat is None:
        raise UserError(f"{directory} is not a run: it has no config.json")
    try:
        run = RunConfig.from_dict(flat)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for line in removed_settings(flat):
        print(f"note: {path}: {line}", file=sys.stderr)
    return run


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
    parser.add_argument("--text", default=None, help="summarize this file; - is standard input")
    parser.add_argument("--output", default=None, help="write all scores and texts to FILE.json")
    size = "--evaluation-batch-size"
    parser.add_argument(size, type=int, default=None, help="dialogues summarized at once")
    parser.add_argument("--device", default=None, help="auto, cpu, cuda, ...")
    parser.add_argument("--model", default=None, help="base model of an adapter directory")
    _add_preset(parser, "settings for an adapter directory")
    return parser


def check_evaluation(arguments: argparse.Namespace) -> None:
    """Refuse flags that would be ignored, or fail only after all summaries are written."""
    if arguments.limit < 0:
        raise UserError(f"--limit must be 0 or more, not {arguments.limit}")
    if arguments.evaluation_batch_size is not None and arguments.evaluation_batch_size < 1:
        size = arguments.evaluation_batch_size
        raise UserError(f"--evaluation-batch-size must be above 0, not {size}")
    for name in ("data", "split", "limit", "output"):
        if arguments.text and getattr(arguments, name):
            raise UserError(f"--text summarizes one text and does not take --{name}")
    if arguments.output and Path(arguments.output).is_dir():
        raise UserError(f"--output {arguments.output} is a directory: name a file in it")
