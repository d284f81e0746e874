"""Execute every lesson and write it as a notebook with its outputs, for GitHub.

    python lessons/render.py [2 5 ...]

Execution times, versions and random cell ids are left out, so that rendering again gives small
diffs.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

LESSONS = Path(__file__).resolve().parent
LARGEST = 150_000  # bytes of a notebook: images stay small


def is_shown(output: dict[str, Any]) -> bool:
    return output["output_type"] == "display_data" or output.get("name") == "stdout"


def render(path: Path) -> Path:
    """NAME.py executed in a fresh kernel -> NAME.ipynb beside it."""
    notebook = jupytext.read(path, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.clear()
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(LESSONS)}},
    )
    client.execute()
    # Keep what was printed and drawn, not warnings or values with addresses.
    for cell in notebook.cells:
        cell["outputs"] = [output for output in cell.get("outputs", []) if is_shown(output)]
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    if len(text) > LARGEST:
        raise SystemExit(f"{path.name}: {len(text):,} bytes as a notebook, above {LARGEST:,}")
    target = path.with_suffix(".ipynb")
    target.write_text(text + "\n", encoding="utf-8")
    return target


def main() -> None:
    os.environ.pop("MPLBACKEND", None)  # the kernel draws inline
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wanted = sys.argv[1:]
    for path in sorted(LESSONS.glob("[0-9]_*.py")):
        if not wanted or path.name[0] in wanted:
            print(render(path).relative_to(LESSONS.parent))


if __name__ == "__main__":
    main()
