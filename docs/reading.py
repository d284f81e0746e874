"""Write the reading order of README.md: the core's files, with the lines of each.

    python docs/reading.py            write it
    python docs/reading.py --check    exit code 1 if the README and the files differ

The table stands between `<!-- reading order -->` and `<!-- end -->`, the core's lines of code
between `<!-- lines of code -->` and `<!-- end -->`. Lines of code are those without docstrings,
comments and blank lines.
"""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

CORE = {
    "functional.py": "the equation",
    "config.py": "`LoRAConfig`: how its fields enter the equation",
    "linears.py": "which layers can be wrapped",
    "initialization.py": "how A and B start",
    "layer.py": "`LoRALinear`: forward, delta, merge, unmerge",
    "targets.py": "which modules a configuration names",
    "inject.py": "wrap, freeze, unwrap",
    "merge.py": "merge, unmerge and disable, over a whole model",
}
NOTHING = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
}  # fmt: skip


def lines_of_code(source: str) -> int:
    """Lines that hold code: no docstring, comment or blank line."""
    found = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in NOTHING and token.string
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def counts(name: str) -> tuple[int, int] | None:
    """All lines of a file of the library, and those of code; None if there is no such file."""
    path = ROOT / "minilora" / name
    if not path.exists():
        return None
    source = path.read_text(encoding="utf-8")
    return len(source.splitlines()), lines_of_code(source)


def table() -> str:
    rows = ["| file | lines | of code | what |", "| --- | ---: | ---: | --- |"]
    for name, what in CORE.items():
        found = counts(name)
        link = f"[{name}](minilora/{name})" if found else name
        lines, code = found or ("", "")
        rows.append(f"| {link} | {lines} | {code} | {what} |")
    return "\n".join(rows)


def fill(text: str) -> str:
    """The README with the table and the sum as the files say."""
    total = sum(found[1] for name in CORE if (found := counts(name)))
    text = put(text, "reading order", f"\n{table()}\n")
    return put(text, "lines of code", f"{total:,}")


def put(text: str, mark: str, part: str) -> str:
    """The text with `part` between `<!-- mark -->` and `<!-- end -->`."""
    whole = f"<!-- {mark} -->{part}<!-- end -->"
    return re.sub(rf"<!-- {mark} -->.*?<!-- end -->", lambda _: whole, text, flags=re.DOTALL)


def main() -> int:
    text = README.read_text(encoding="utf-8")
    wanted = fill(text)
    if "--check" in sys.argv:
        if wanted != text:
            print("README.md and the files of minilora/ differ: run `make docs`")
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
