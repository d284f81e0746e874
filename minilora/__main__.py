"""`python -m minilora COMMAND`: the command line of the installed package.

    train ...                 what `python train.py ...` does
    evaluate RUN ...          what `python evaluate.py RUN ...` does
    predict RUN FILE ...      summaries of own chats: `python evaluate.py RUN --predict FILE ...`
    inspect ADAPTER           layers, ranks, scales, norms and singular values, as a table
    merge ADAPTER OUT         a checkpoint that plain transformers loads
    report RUN                report.html of a run
    conformance FILE.py:make  is this LoRA layer right? docs/conformance.md

ADAPTER is the directory of an adapter or of a run, or an adapter's name on the hub.
"""

import argparse
import importlib.util
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import minilora
from minilora import conformance
from minilora.arithmetic import singular_values
from minilora.config import LoRAError
from minilora.peft_format.apply import apply_adapter
from minilora.peft_format.directory import Adapter
from minilora.reports import fold_names
from minilora.summarization import errors
from minilora.summarization.errors import UserError
from minilora.summarization.presets import restored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 if a layer fails, or 2 on bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["train"], ["evaluate"], ["predict"]):
        from minilora.summarization import cli  # it imports transformers: only when it is needed

        if arguments[0] == "predict":
            arguments[2:2] = ["--predict"]
        entry_point = cli.train_main if arguments[0] == "train" else cli.evaluate_main
        return entry_point(arguments[1:])
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int | None] = parsed.run
    shown = logging.StreamHandler(sys.stdout)  # what the library logs, such as rounding errors
    log = logging.getLogger("minilora")
    log.addHandler(shown)
    log.setLevel(logging.INFO)
    try:
        return errors.run(f"minilora {parsed.command}", lambda: command(parsed))
    finally:
        log.removeHandler(shown)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minilora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minilora {minilora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="fine-tune a model", add_help=False)
    commands.add_parser("evaluate", help="score a run", add_help=False)
    commands.add_parser("predict", help="summarize chats", add_help=False)
    inspect = commands.add_parser("inspect", help="show what an adapter holds")
    inspect.add_argument("adapter", metavar="ADAPTER")
    inspect.set_defaults(
        run=lambda parsed: print(inspection(minilora.read_adapter(_directory(parsed.adapter))))
    )
    merge = commands.add_parser("merge", help="write a merged checkpoint")
    merge.add_argument("adapter", metavar="ADAPTER")
    merge.add_argument("out", type=Path, metavar="OUT", help="a directory that is new or empty")
    merge.add_argument("--dtype", choices=DTYPES, help="of the weights written; the base's if not")
    merge.add_argument("--model", help="the base model; the one that the adapter names if not")
    merge.set_defaults(run=_merge)
    report = commands.add_parser("report", help="write report.html of a run")
    report.add_argument("directory", type=Path, metavar="RUN")
    report.add_argument(
        "--output", type=Path, metavar="FILE.html", help="report.html in the run if not given"
    )
    report.set_defaults(run=_report)
    check = commands.add_parser("conformance", help="check a LoRA layer of anybody's")
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
    place, _, name = parsed.target.rpartition(":")
    try:
        if place.endswith(".py"):
            sys.path.insert(0, str(Path(place).parent))  # as `python FILE.py` does
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found = getattr(module, name)
        report = conformance.check(**found if isinstance(found, Mapping) else {"make": found})
    except Exception as error:
        text = f"cannot check {parsed.target!r}: {type(error).__name__}: {error}"
        raise LoRAError(f"{text}; it should be FILE.py:make or module:make") from error
    print(report)
    return int(bool(report.named("failed")))


def _directory(name: str) -> Path:
    """Where the adapter lies; only for a hub name is transformers imported, which is slow."""
    if Path(name).is_dir():
        return Path(name)
    from minilora.summarization.model.loading import adapter_directory

    return adapter_directory(name)


# report ------------------------------------------------------------------------------------------


def _report(parsed: argparse.Namespace) -> None:
    from minilora.summarization.report.page import write_report  # it imports rouge_score and NLTK

    page: Path = parsed.output or parsed.directory / "report.html"
    if page.is_dir():
        raise UserError(f"--output {page} is a directory: name a file in it")
    write_report(parsed.directory, page)
    print(f"written to {page}")


# inspect -----------------------------------------------------------------------------------------


def inspection(adapter: Adapter) -> str:
    """A table of the adapter's layers; the singular values are those of s B A."""
    rows: list[tuple[str, ...]] = [
        ("module", "r", "s", "|A|", "|B|", "|sBA|", "singular values of sBA")
    ]
    for module in adapter.modules:
        A, B = (tensor.double() for tensor in adapter.pair(module))
        values = adapter.scale_of(module) * singular_values((A, B))
        shown = [f"{value:.3g}" for value in values.tolist()]
        if len(shown) > 8:
            shown = [*shown[:7], "..", shown[-1]]
        numbers = (adapter.scale_of(module), A.norm(), B.norm(), values.norm())
        rows.append(
            (module, str(A.shape[0]), *(f"{float(n):.4g}" for n in numbers), " ".join(shown))
        )
    config = adapter.config
    count = sum(tensor.numel() for tensor in adapter.tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in adapter.tensors.values()})
    kind = "DoRA" if config.dora else "LoRA"
    lines = [
        f"{kind}, {len(adapter.modules)} modules, {count:,} numbers in {', '.join(dtypes)}, "
        f"base {adapter.base_model or 'unknown'}",
        *_align(rows),
    ]
    if adapter.extras:
        names = fold_names(tuple(adapter.extras))
        lines += ["trained besides:", *(f"  {name}" for name in names)]
    return "\n".join(lines)


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Text columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# merge -------------------------------------------------------------------------------------------


def _merge(parsed: argparse.Namespace) -> None:
    out: Path = parsed.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoRAError(f"{out} exists and is not an empty directory: name another")
    directory = _directory(parsed.adapter)
    adapter = minilora.read_adapter(directory)
    name = parsed.model or _setting(directory, "model") or adapter.base_model
    if name is None:
        raise LoRAError(f"{parsed.adapter} does not name its base model: say --model")
    model, stored = _load(name)
    # The adapter of a base in four bits belongs to what those mean, not to the weights before.
    if four_bits := _setting(directory, "method") == "qlora" or adapter.config.init == "loftq":
        print(minilora.quantize(model))
    before_adapter = _logits(model)
    print(apply_adapter(model, adapter, inference=True))
    before = _logits(model)
    if not four_bits:
        print(minilora.merge(model))
    minilora.unwrap(model, dequantize=four_bits)

    dtype = DTYPES[parsed.dtype] if parsed.dtype else stored
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        torch.nn.Module.to(model, dtype)
        model.save_pretrained(beside)
        _save_tokenizer(name, beside)
        after = _logits(_load(str(beside))[0])  # what whoever loads it will get
        apart = (after - before).abs().max().item()
        print(
            f"logits on sample tokens, unmerged against the checkpoint in {dtype}: at most "
            f"{apart:.2g} apart; the adapter itself changes them by up to "
            f"{(before - before_adapter).abs().max().item():.2g}"
        )
        if dtype == torch.float32 and apart > 1e-3 * before.abs().max().item():
            raise LoRAError(f"the merged logits differ by {apart:.2g}: nothing is written")
        beside.chmod(0o755)
        if out.exists():
            out.rmdir()
        beside.replace(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    print(f"written to {out}")


def _setting(run: Path, name: str) -> str | None:
    """A value in a run's config.json, which may be asked for the adapter directory inside it."""
    for directory in (run, run.parent) if run.name == "adapter" else (run,):
        try:
            value = json.loads((directory / "config.json").read_bytes())[name]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return restored(value, directory) if isinstance(value, str) else None
    return None


def _load(name: str) -> "tuple[PreTrainedModel, torch.dtype]":
    """The model in float32 (its sums are rounded once, when it is cast), and the dtype it has."""
    import transformers

    from minilora.summarization.model.loading import check_complete, loading

    with loading(name) as source:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:
            raise UserError(f"model {name}: config.json names no architecture of transformers")
        model, info = kind.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # to be told which they are
            output_loading_info=True,
        )
    check_complete(name, info)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return model.eval(), stored


def _logits(model: Any) -> torch.Tensor:
    """(2, 16, ...) on random token ids, the same for every model of one vocabulary."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 16), generator=draw)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits.float()
    return logits


def _save_tokenizer(name: str, directory: Path) -> None:
    """Beside the model, where the base has one: then the directory is complete."""
    from minilora.summarization.model.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(name)
    except UserError:
        print(f"note: {name} has no tokenizer to write beside the model", file=sys.stderr)
    else:
        tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
