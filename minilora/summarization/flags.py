"""From flags to settings: one parser for training and one for evaluating."""

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from . import processes
from .errors import UserError
from .files import read_object
from .presets import LEARNING_RATES, OTHER_RATES, PRESETS, local_path, restored
from .settings import (
    FILES,
    GROUPS,
    PATHS,
    REMOVED,
    SPLITS,
    DataOptions,
    GenerationOptions,
    OutputOptions,
    RunConfig,
    spelt,
)  # fmt: skip

# A resumed run may change the device, the checkpoints it keeps and what it does at its end. What
# changes its result needs --accept-changes. Its directory and its preset cannot change.
RESUME_MAY_CHANGE = {
    *("resume", "accept_changes", "device", "evaluate", "report", "output"),
    *("checkpoint_minutes", "checkpoint_steps", "keep_checkpoints"),
    *("evaluation_batch_size", "cache_directory"),
}


class Parser(argparse.ArgumentParser):
    """Errors in one line; for a misspelt flag the nearest one is named."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments. Flags may be typed with underscores.

        Raises:
            SystemExit: an unknown flag or value (exit code 2), or --help.
        """
        words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), w) for w in argv]
        arguments, unknown = self.parse_known_args(words)
        if unknown:
            flag = unknown[0].split("=")[0]
            if removed := REMOVED.get(flag.lstrip("-").replace("-", "_")):
                self.error(f"{flag} was removed: {removed[1]}")
            close = get_close_matches(flag, self._option_string_actions, 1)
            self.error(
                f"unrecognized argument {flag}" + (f"; nearest: {close[0]}" if close else "")
            )
        for name, value in vars(arguments).items():  # often an unset variable of the shell
            if "" in (value if isinstance(value, list) else [value]) and name[:6] != "prompt":
                self.error(f"{'RUN' if name == 'run' else spelt(name)} must not be empty")
        return arguments


def training_parser(program: str = "train.py") -> Parser:
    """A flag for each field of the settings. What it parses holds only the flags that are typed."""
    what = "Fine-tune an encoder-decoder to summarize dialogues, and compare it with its base."
    usage = f"{command(program)} [--preset NAME] [--FLAG VALUE ...]"
    parser = Parser(prog=program, description=what, usage=usage, argument_default=argparse.SUPPRESS)
    _add_preset(parser, f"named settings; other flags override them: {', '.join(PRESETS)}")
    for kind in GROUPS.values():
        _add_settings(parser, kind)
    return parser


def _add_settings(parser: Parser, kind: Any, show_defaults: bool = True) -> None:
    """A flag for each field of a class of settings."""
    group = parser.add_argument_group(kind._argument_group_name)
    types, defaults = get_type_hints(kind), vars(kind())
    for setting in fields(kind):
        default, text = defaults[setting.name], setting.metadata["help"]
        shown = " ".join(default) if isinstance(default, list) else default
        if show_defaults and shown not in (None, "") and not isinstance(shown, bool):
            text += f" (default: {shown})"
        takes = _takes(types[setting.name], setting.name)
        takes |= {"help": text, "default": argparse.SUPPRESS, "dest": setting.name}
        group.add_argument(spelt(setting.name), **takes)


def command(program: str) -> str:
    """What is typed to call `train.py` or `minilora train` the way this process was called."""
    called, name = Path(sys.argv[0]), program.split()[-1].removesuffix(".py")
    shared = processes.active() and name == "train"  # evaluate.py needs one process only
    start = f"torchrun {processes.launch_options()}" if shared else "python"
    installed = called.stem == "minilora"  # by pip, without a train.py
    if called.parts[-2:] == ("minilora", "__main__.py") or (installed and shared):
        return f"{start} -m minilora {name}"
    if installed or not program.endswith(".py"):
        return f"minilora {name}"
    if called.name in ("train.py", "evaluate.py"):
        program = str(called.with_name(program))
    return f"{start} {shlex.quote(program)}"


def _takes(kind: Any, name: str) -> dict[str, Any]:
    """The arguments of `add_argument` for a field of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    number = [one for one in (int, float) if one in (kind, *get_args(kind))]
    many = "+" if get_origin(kind) is list else None
    return {"type": (*number, str)[0], "nargs": many, "metavar": name.rpartition("_")[2].upper()}


def _add_preset(parser: Parser, text: str, **more: Any) -> None:
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=text, **more)


def parse_run(argv: Sequence[str], program: str = "train.py") -> RunConfig:
    """The settings of the resumed run or of the preset, changed by the flags.

    Raises:
        UserError: --resume names no run, or a flag would change its result.
        SystemExit: an unknown flag or value (exit code 2), or --help.
    """
    given = vars(training_parser(program).parse(argv))
    before = read_run(Path(given["resume"])).to_dict() if given.get("resume") else None
    flat = before or PRESETS[given.get("preset", "pocket")]
    if "adapter" in given and not before:
        from .model.start import decided  # it imports transformers

        flat = flat | decided(given)
    if given.get("accept_changes") and not before:
        raise UserError("--accept-changes is for --resume: leave it out")
    run = RunConfig.from_dict(changed(flat, given))
    run.typed = frozenset(before or given)
    if before:
        _require_same(before, run)
    run.check()
    if run.training.learning_rate is None:
        run.training.learning_rate = usual_rate(run)
    return run


def usual_rate(run: RunConfig) -> float:
    """The preset's rate of the method. With LoRA+ it is the geometric mean of A's and B's."""
    rates, method = LEARNING_RATES[run.preset], run.model.method
    usual = OTHER_RATES | {"adalora": rates["lora"]} | rates
    plain = method == "prefix" and not run.virtual.prefix_hidden
    rate = rates.get("plain prefix" if plain else run.adapter.init, usual[method])
    return rate / math.sqrt(run.training.lora_plus_ratio)


def changed(flat: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings updated by those that were typed. --data replaces --train-file etc., and vice versa.

    Raises:
        UserError: both were typed.
    """
    if (files := given.keys() & set(FILES)) and "data" in given:
        raise UserError(f"--data and {spelt(min(files))} exclude each other")
    if files or "data" in given:
        flat = flat | dict.fromkeys(FILES)
    return flat | given


def _require_same(before: dict[str, Any], run: RunConfig) -> None:
    now, options = run.to_dict(), run.output
    stays = before["output"] == now["output"] or _same_place(options.output, options.resume)
    for name, same in (("output", stays), ("preset", before["preset"] == run.preset)):
        if not same:
            raise UserError(f"--resume {options.resume} keeps its {name}: leave --{name} out")
    different = [k for k in now if now[k] != before[k] and k not in RESUME_MAY_CHANGE]
    stored = read_object(Path(options.resume or "") / "config.json") or {}

    def agrees(name: str) -> bool:
        """Whether it is the same place, or the earlier one is gone: contents are compared too."""
        is_local = str(stored.get(name)).startswith((".", "/", "~"))
        is_gone = is_local and not local_path(before[name]).exists()
        return is_gone or _same_place(now[name], before[name])

    changed = [k for k in different if k not in PATHS or not agrees(k)]
    if changed and not options.accept_changes:
        what = ", ".join(f"{spelt(k)} (was {before[k]!r}, is {now[k]!r})" for k in changed)
        raise UserError(
            f"--resume {options.resume}: these settings differ from the original run: {what}. "
            "Restore them, or add --accept-changes to use the new ones"
        )


def _same_place(path: str | None, other: str | None) -> bool:
    if path is None or other is None:
        return path is other
    return local_path(path).resolve() == local_path(other).resolve()


def output_directory(run: RunConfig) -> Path:
    """The directory of the run. Without --output it is made here: no other run gets its name."""
    if named := run.output.resume or run.output.output:
        return Path(named)
    method, second = run.model.method, run.model.with_
    size = f"-r{run.adapter.rank}" if method not in ("full", "prompt", "prefix") else ""
    size += f"-{second}" if second != "none" else ""
    name = f"{_base_and_data(run)}-{method}{size}"
    path, number = Path("runs") / name, 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = path.with_name(f"{name}-{number}")


def _base_and_data(run: RunConfig) -> str:
    """The first part of a run's name: the preset, or of other model or data their own names."""
    if run.of_preset("model", "data", *FILES):
        return run.preset
    paths = [
        local_path(p).resolve() for p in (run.model.model, run.data.train_file or run.data.data)
    ]
    return "-".join(path.stem if path.is_file() else path.name for path in paths).lstrip(".")


def check_output(options: OutputOptions) -> None:
    """Refuse, before the work starts, a directory that is in use or cannot be written."""
    if options.resume:
        instead = "change its permissions, or copy the run"
        _require_writable(Path(options.resume), f"--resume {options.resume}", instead)
    elif options.output:
        check_free(Path(options.output))
    else:
        _require_writable(Path("runs"), "runs", "name another directory with --output")


def check_free(output: Path) -> None:
    """Refuse a file, and a directory that holds a run or other files."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file")
    if (output / "config.json").exists():
        raise UserError(
            f"--output {output} holds a run already: resume it with --resume {output}, or "
            "name another directory"
        )
    # A run that was killed early leaves names that begin with a dot.
    if output.is_dir() and any(path.name[0] != "." for path in output.iterdir()):
        raise UserError(f"--output {output} is not empty: name another directory")
    _require_writable(output, f"--output {output}", "name another directory")


def read_run(directory: Path) -> RunConfig:
    """The settings in a run's config.json. Removed ones that had an effect are named on stderr.

    Raises:
        UserError: there is no such file, or it is not that of a run.
    """
    path = directory / "config.json"
    flat = read_object(path)
    if flat is None:
        raise UserError(f"{directory} is not a run: it has no config.json")
    for name, (default, instead) in REMOVED.items():
        if (value := flat.pop(name, default)) != default:
            said = f"{spelt(name)} (was {value!r}) was removed and has no effect: {instead}"
            print(f"note: {path}: {said}", file=sys.stderr)
    paths = {n: restored(flat[n], directory) for n in PATHS if isinstance(flat.get(n), str)}
    try:
        return RunConfig.from_dict(flat | paths)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def evaluation_parser(program: str = "evaluate.py") -> Parser:
    """The flags of `evaluate.py`. Of a run's settings it returns only those that are typed."""
    what = "Score the base and the fine-tuned model side by side, or summarize chats."
    files = "FILE --output FILE [--base]" if program.endswith("predict") else "[--text FILE ...]"
    usage = f"{command(program)} RUN {files} [--FLAG VALUE ...]"
    parser = Parser(prog=program, description=what, usage=usage)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, an adapter, or its hub name")
    add("--split", choices=SPLITS, help="what to score (default: test, or all of a file)")
    add("--limit", type=int, default=0, help="only the first N dialogues; 0: all (default: 0)")
    chats = parser.add_mutually_exclusive_group()
    chats.add_argument(
        "--text", action="append", metavar="FILE",
        help="summarize this file; - is standard input; may be repeated",
    )  # fmt: skip
    chats.add_argument(
        "--predict", metavar="FILE", help="summarize the chats of this file; writes --output"
    )
    add("--base", action="store_true", help="also summarize the chats with the base model")
    add("--output", metavar="FILE", help="write all scores and texts (JSON), or the summaries")
    add("--device", default=argparse.SUPPRESS, help="auto, cpu, cuda, ...")
    add("--model", default=argparse.SUPPRESS, help="base model of an adapter directory")
    add(
        "--cache-encoder",
        default=argparse.SUPPRESS,
        choices=("auto", "on", "off"),
        help="auto: "
        "the base and the fine-tuned model share the encoder's states, if the encoder is frozen",
    )
    add("--cache-directory", default=argparse.SUPPRESS, metavar="DIRECTORY",
        help="directory of the encoder's states")  # fmt: skip
    _add_preset(parser, "settings for an adapter directory (default: pocket)")
    for kind in (DataOptions, GenerationOptions):
        _add_settings(parser, kind, show_defaults=False)
    return parser


def parse_evaluation(argv: Sequence[str], program: str = "evaluate.py") -> argparse.Namespace:
    """The flags; `changes` has settings that replace the run's. Most that do nothing are refused.

    Raises:
        UserError: flags that exclude each other, or a value out of its range.
        SystemExit: an unknown flag or value (exit code 2), or --help.
    """
    arguments = evaluation_parser(program).parse(argv)
    names = {
        *("model", "device", "cache_encoder", "cache_directory"),
        *(f.name for k in (DataOptions, GenerationOptions) for f in fields(k)),
    }
    arguments.changes = {name: value for name, value in vars(arguments).items() if name in names}
    chats = "--text" if arguments.text else "--predict" if arguments.predict else None
    if arguments.limit < 0:
        raise UserError(f"--limit must be 0 or more, not {arguments.limit}")
    for name in ("data", *FILES, "split", "limit", "cache_encoder", "cache_directory"):
        if chats and getattr(arguments, name, None):
            raise UserError(f"{chats} summarizes chats and does not take {spelt(name)}")
    if arguments.base and not chats:
        raise UserError("--base is for --text and --predict: scores are always of both models")
    if arguments.predict and processes.world_size() > 1:
        raise UserError("--predict takes one process: call evaluate.py without torchrun")
    if chats and bool(arguments.predict) != bool(arguments.output):
        raise UserError("--predict requires --output FILE.jsonl, and --text does not take --output")
    if arguments.output:
        check_file(output := Path(arguments.output))
        if arguments.predict and output.exists():
            raise UserError(f"--output {output} exists already: name another file")
        if arguments.predict and output.suffix.lower() in (".csv", ".tsv", ".parquet"):
            raise UserError(f"--output {output}: the summaries are JSON Lines: name a .jsonl file")
        if output.exists() and not _holds_scores(output):
            raise UserError(f"--output {output} exists and holds no scores: name another file")
    return arguments


def check_file(output: Path) -> None:
    """Refuse, before the work starts, a file that cannot be written at its end."""
    if output.is_dir():
        raise UserError(f"--output {output} is a directory: name a file in it")
    if output.exists() and not output.is_file():  # a device or a pipe, such as /dev/stdout
        raise UserError(f"--output {output} is not a regular file: name another file")
    _require_writable(output.resolve().parent, f"--output {output}", "name another file")


def _require_writable(directory: Path, what: str, instead: str) -> None:
    """Refuse a directory that cannot be written or, where it does not exist, cannot be made."""
    place = directory.resolve()
    folder = next(path for path in (place, *place.parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "is not writable" if folder.is_dir() else "is a file"
        raise UserError(f"{what}: {folder} {why}: {instead}")


def _holds_scores(path: Path) -> bool:
    """Whether a file may be replaced by new scores: nothing else is lost."""
    try:
        return not path.stat().st_size or "intervals" in (read_object(path) or {})
    except UserError:
        return False
