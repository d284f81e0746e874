"""`python -m minilora COMMAND`: the command line of the installed package.

    train ...                 what `python train.py ...` does
    evaluate RUN ...          what `python evaluate.py RUN ...` does
    predict RUN FILE ...      summarize chats: `python evaluate.py RUN --predict FILE ...`
    inspect ADAPTER           layers, ranks, scales, norms and singular values, as a table
    merge ADAPTER OUT         a checkpoint that plain transformers loads
    report RUN                report.html of a run
    conformance FILE.py:make  test whether a LoRA layer is correct (docs/conformance.md)

ADAPTER is the directory of an adapter or of a run, or an adapter's name on the hub.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import minilora
from minilora import conformance
from minilora.config import LoRAError
from minilora.methods import AdaLoRAConfig, as_lora
from minilora.peft_format.directory import Adapter
from minilora.reports import count, fold_names
from minilora.summarization import errors
from minilora.summarization.errors import UserError
from minilora.summarization.flags import Parser, check_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 if a layer fails, 2 on bad input, 130 if stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["train"], ["evaluate"], ["predict"]):
        program = f"minilora {arguments[0]}"
        from minilora.summarization import cli  # it imports huggingface_hub: only when it is needed

        if arguments[0] == "predict":
            names = [word for word in arguments[1:3] if word == "-" or not word.startswith("-")]
            if len(names) < 2 and not {"-h", "--help"} & set(arguments):
                print(f"{program}: give RUN and FILE before any flag", file=sys.stderr)
                return 2
            arguments[2:2] = ["--predict"]
        entry_point = cli.train_main if arguments[0] == "train" else cli.evaluate_main
        return entry_point(arguments[1:], program)
    parsed = _parser().parse_args(arguments)
    return errors.run(f"minilora {parsed.command}", lambda: _logging(parsed.run, parsed))


def _logging(
    command: Callable[[argparse.Namespace], int | None], parsed: argparse.Namespace
) -> int | None:
    """Run a command and print what the library logs, such as rounding errors."""
    shown = logging.StreamHandler(sys.stdout)
    log = logging.getLogger("minilora")
    level = log.level
    log.addHandler(shown)
    log.setLevel(logging.INFO)
    try:
        return command(parsed)
    finally:
        log.removeHandler(shown)
        log.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minilora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minilora {minilora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", add_help=False)
    commands.add_parser("evaluate", add_help=False)
    commands.add_parser("predict", add_help=False)
    inspect = commands.add_parser(
        "inspect",
        description="Show layers, ranks, scales, norms and singular values of an adapter.",
    )
    inspect.add_argument("adapter", metavar="ADAPTER")
    inspect.set_defaults(
        run=lambda parsed: print(inspection(minilora.read_adapter(_directory(parsed.adapter))))
    )
    merge = commands.add_parser(
        "merge",
        description="Merge an adapter into its base: a checkpoint that plain transformers loads.",
    )
    merge.add_argument("adapter", metavar="ADAPTER")
    merge.add_argument("out", type=Path, metavar="OUT", help="a directory that is new or empty")
    merge.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the merged weights (default: the base's)"
    )
    merge.add_argument("--model", help="base model (default: the one named in the adapter)")
    merge.set_defaults(run=_merge)
    report = commands.add_parser("report", description="Write report.html of a run.")
    report.add_argument("directory", type=Path, metavar="RUN")
    report.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: report.html in the run"
    )
    report.set_defaults(run=_report)
    check = commands.add_parser(
        "conformance", description="Check any LoRA layer, including your own (docs/conformance.md)."
    )
    check.add_argument("target", metavar="FILE.py:make", help="or module:make")
    check.set_defaults(run=_conformance)
    return parser


def _conformance(parsed: argparse.Namespace) -> int:
    """Check `FILE.py:name` or `module:name`: a make, or a mapping of all of `check`'s arguments.

    Returns:
        The exit code: 1 if something failed, else 0.

    Raises:
        LoRAError: there is no such file, module or name, or it cannot be checked.
    """
    found, (place, _, name) = None, parsed.target.rpartition(":")
    if not place or not name:
        raise LoRAError(f"{parsed.target!r} must be FILE.py:make or module:make")
    try:
        if place.endswith(".py"):
            sys.path.insert(0, str(Path(place).parent))  # as `python FILE.py` does
            module = importlib.import_module(Path(place).stem)
            if Path(getattr(module, "__file__", None) or "").resolve() != Path(place).resolve():
                raise ImportError(f"{module.__name__} is another module: name an existing FILE.py")
        else:
            module = importlib.import_module(place)
        found = getattr(module, name)
        report = conformance.check(**found if isinstance(found, Mapping) else {"make": found})
    except Exception as error:
        text = f"cannot check {parsed.target!r}: {type(error).__name__}: {error}"
        if found is None and isinstance(error, ImportError | AttributeError):
            text += "; it must be FILE.py:make or module:make"
        raise LoRAError(text) from error
    print(report)
    return int(bool(report.named("failed")))


def _directory(name: str) -> Path:
    """Where the adapter lies; only for a hub name is transformers imported, which is slow."""
    if Path(name).is_dir():
        inside = Path(name) / "adapter"  # of a run
        return inside if inside.is_dir() else Path(name)
    from minilora.summarization.model.loading import adapter_directory

    return adapter_directory(name)


# report ------------------------------------------------------------------------------------------


def _report(parsed: argparse.Namespace) -> None:
    from minilora.summarization.report.page import write_report  # it imports transformers

    page: Path = parsed.output or parsed.directory / "report.html"
    check_file(page)
    if page.suffix != ".html":  # perhaps a file of the run
        raise UserError(f"--output {page}: the name of a page must end in .html")
    write_report(parsed.directory, page)
    print(f"written to {page}")


# merge --------------------------------------------------------------------------------------------


def _merge(parsed: argparse.Namespace) -> None:
    from minilora.summarization import merged  # it imports transformers

    directory = _directory(parsed.adapter)
    adapter = minilora.read_adapter(directory)
    merged.write(parsed.out, directory, adapter, parsed.model, DTYPES.get(parsed.dtype))
    print(f"written to {parsed.out}")


# inspect -----------------------------------------------------------------------------------------


def inspection(adapter: Adapter) -> str:
    """A table of the adapter's layers; the singular values are those of s B A.

    AdaLoRA is shown as the equivalent plain LoRA, with the ranks that training chose.
    """
    kind = "DoRA" if adapter.config.dora else "LoRA"
    if isinstance(adapter.config, AdaLoRAConfig):
        kind, adapter = "AdaLoRA as LoRA", as_lora(adapter)
    rows: list[tuple[str, ...]] = [
        ("module", "r", "s", "|A|", "|B|", "|sBA|", "singular values of sBA")
    ]
    for module in adapter.modules:
        A, B = (tensor.double() for tensor in adapter.pair(module))
        values = adapter.scale_of(module) * singular_values(A, B)
        shown = [f"{value:.3g}" for value in values.tolist()]
        if len(shown) > 8:
            shown = [*shown[:7], "..", shown[-1]]
        sizes = (adapter.scale_of(module), A.norm(), B.norm(), values.norm())
        cells = (f"{float(size):.4g}" for size in sizes)
        rows.append((module, str(A.shape[0]), *cells, " ".join(shown)))
    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in adapter.tensors.values()})
    others = [f"a {one.folder} of {one.length} tokens" for one in adapter.config.prompts]
    what = [f"{kind}, {count(adapter.modules)}"] if adapter.modules else []
    lines = [
        f"{', '.join(what + others)}, {numbers:,} numbers in {', '.join(dtypes)}, "
        f"base {adapter.base_model or 'unknown'}",
        *(_align(rows) if adapter.modules else []),
    ]
    if adapter.extras:
        names = fold_names(tuple(adapter.extras))
        lines += ["also trained:", *(f"  {name}" for name in names)]
    return "\n".join(lines)


def singular_values(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The singular values of B A, the largest first, without forming B A (out, in).

    With B = Q R and A^T = Q' R' they equal the singular values of R R'^T (r, r).
    """
    values: torch.Tensor = torch.linalg.svdvals(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T)
    return values


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
