"""Run the commands and the Python of README.md, CONTRIBUTING.md and docs/*.md.

    python docs/check.py              run them, list every block; exit code 1 if one fails
    python docs/check.py docs/x.md    only this page

Blocks fenced as `sh` or `python` are run, page by page and from top to bottom, in a folder with
toy models, a few dialogues, a run and an adapter (`furnish`). The Python of a page shares one
namespace, as in a notebook. A comment on the line before a block changes what is run:

    <!-- check: A => B; C => D -->    B replaces A
    <!-- check: toy -->               train.py gets the model, the data and the lengths of TOY
    <!-- check: not run, WHY -->      the block is only listed, with the reason

`python train.py`, `python evaluate.py` and `minilora` are called within this process, because
starting Python for each of them would take most of the time.
"""

import contextlib
import doctest
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOY = (
    "--model toy-bart --data chats --max-steps 2 --max-source-length 64 --min-length 2 "
    "--max-length 12 --beams 1"
)
LINKED = (
    "train.py", "evaluate.py", "Makefile", "pyproject.toml", "constraints.txt", "docs", "examples",
)  # fmt: skip

FENCE = re.compile(
    r"^(?:<!-- check: (?P<how>.*?) -->\n+)?```(?P<language>sh|bash|console|python)\n"
    r"(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    toy: bool = False
    reason: str = ""
    """Why it is not run."""
    error: str = ""

    def __str__(self) -> str:
        state = "FAILED" if self.error else "not run" if self.reason else "ran"
        where = f"{self.page.relative_to(ROOT)}:{self.line}"
        return f"{state:<8} {where:<28} {self.language:<7} {self.reason}".rstrip()


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, with the replacements of their comments made."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        block = Block(page, line, match["language"], match["code"])
        how = match["how"] or ""
        if how.startswith("not run, "):
            block.reason, how = how.removeprefix("not run, "), ""
        for part in filter(None, how.split("; ")):
            if part == "toy":
                block.toy = True
            elif " => " in part and part.split(" => ")[0] in block.code:
                block.code = block.code.replace(*part.split(" => "))
            else:
                block.error = f"<!-- check: {part} --> changes nothing in this block"
        found.append(block)
    return found


# The folder in which the commands run -------------------------------------------------------------


def furnish(folder: Path) -> None:
    """Toy models with random weights, twelve dialogues, a chat, a run and an adapter."""
    import torch
    import transformers as t

    import minilora

    torch.manual_seed(0)
    assets = ROOT / "minilora" / "summarization" / "assets"
    tokenizer = t.AutoTokenizer.from_pretrained(assets / "pocket-bart")
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    size, layers = {"vocab_size": len(tokenizer), "d_model": 16}, {}
    for side in ("encoder", "decoder"):
        layers |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
    bart = t.BartConfig(
        **size, **layers, **ids, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    t5 = t.T5Config(**size, **ids, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                    decoder_start_token_id=tokenizer.pad_token_id)  # fmt: skip
    llama = t.LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                          num_hidden_layers=1, num_attention_heads=2, **ids)  # fmt: skip
    models: dict[str, Any] = {
        "toy-bart": t.BartForConditionalGeneration(bart),
        "toy-t5": t.T5ForConditionalGeneration(t5),
        "toy-llama": t.LlamaForCausalLM(llama),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "chats").mkdir()
    rows = (assets / "minichat" / "validation.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("train", rows[:6]), ("validation", rows[6:9]), ("test", rows[9:12])):
        (folder / "chats" / f"{name}.jsonl").write_text("".join(some))
    (folder / "chat.txt").write_text(json.loads(rows[0])["dialogue"])
    base = t.AutoModelForSeq2SeqLM.from_pretrained(folder / "toy-bart", dtype=torch.float32)
    minilora.inject(base, minilora.LoRAConfig(rank=2, init="random"))
    minilora.save_adapter(base, folder / "adapter")
    run("python train.py --rank 8", folder, toy=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)


# Running ------------------------------------------------------------------------------------------


def run(command: str, folder: Path, toy: bool = False) -> None:
    """One command in a folder.

    Raises:
        RuntimeError: it ended with another exit code than 0.
    """
    from minilora.__main__ import main as minilora_main
    from minilora.summarization import cli

    words = shlex.split(command, comments=True)
    entry_points = {
        ("python", "train.py"): cli.train_main,
        ("python", "evaluate.py"): cli.evaluate_main,
        ("python", "-m", "minilora"): minilora_main,
        ("minilora",): minilora_main,
    }
    if toy and {"train.py", "train"} & set(words) and "--resume" not in words:
        words += _missing(words)
    for start, entry_point in entry_points.items():
        if tuple(words[: len(start)]) == start:
            with _inside(folder):
                code = _exit_code(entry_point, words[len(start) :])
            break
    else:
        if words[0] == "torchrun":
            command = shlex.join([sys.executable, "-m", "torch.distributed.run", *words[1:]])
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        print(done.stdout)
        code = done.returncode
    if code:
        raise RuntimeError(f"exit code {code}: {command}")


def _missing(arguments: list[str]) -> list[str]:
    """The flags of TOY that the command does not set; its model and data in every case."""
    pairs = re.findall(r"(--[a-z-]+) (\S+)", TOY)
    always = {"--model", "--data"} if not {"chats", "toy-bart"} & set(arguments) else set()
    return [w for f, v in pairs if f in always or f not in arguments for w in (f, v)]


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """As contextlib.chdir, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _exit_code(entry_point: Any, arguments: list[str]) -> int:
    try:
        return int(entry_point(arguments))
    except SystemExit as end:  # --help, and argparse's errors
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def execute(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Run a block, and store its error in it."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if block.language == "python":
                with _inside(folder):
                    _execute_python(block, names)
            else:
                for line in block.code.replace("\\\n", " ").splitlines():
                    if line.strip() and not line.startswith("#"):
                        run(line.removeprefix("$ "), folder, block.toy)
    except Exception:
        block.error = f"{output.getvalue()[-2000:]}\n{traceback.format_exc(limit=-3)}"


def _execute_python(block: Block, names: dict[str, Any]) -> None:
    if ">>>" in block.code:
        place = f"{block.page.name}:{block.line}"
        test = doctest.DocTestParser().get_doctest(block.code, names, place, place, 0)
        if doctest.DocTestRunner().run(test, clear_globs=False).failed:
            raise RuntimeError("the output differs")
        names |= test.globs
    else:
        exec(compile(block.code, f"{block.page}:{block.line}", "exec"), names)


def check(pages: list[Path]) -> Iterator[Block]:
    """Run the blocks of the pages, each page in a folder of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        toys = Path(scratch, "toys")
        toys.mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            furnish(toys)
        for page in pages:
            folder = Path(scratch, page.stem)
            shutil.copytree(toys, folder, symlinks=True)
            names: dict[str, Any] = {"__name__": "__main__"}
            for block in blocks(page):
                if not (block.reason or block.error):
                    execute(block, folder, names)
                yield block


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    done = []
    for block in check(pages):
        done.append(block)
        print(block, flush=True)
    failed = [block for block in done if block.error]
    for block in failed:
        print(f"\n{block.page.relative_to(ROOT)}:{block.line}\n{block.error}")
    unrun = sum(bool(block.reason) for block in done)
    print(f"\n{len(done)} blocks: {len(done) - unrun - len(failed)} ran, {unrun} not run, "
          f"{len(failed)} failed")  # fmt: skip
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
