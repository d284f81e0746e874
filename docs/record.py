"""Record what the first commands print, and put it into the pages.

    python docs/record.py             run them (minutes), write docs/recording.txt and the pages
    python docs/record.py --paste     only write the pages from docs/recording.txt
    python docs/record.py --check     exit code 1 if a page and docs/recording.txt differ, or the
                                      commands below and those that were recorded

docs/recording.txt holds all that the commands print, without the progress bar, which is not shown
when stderr is not a terminal. docs/first-run.md leaves out all dialogues but the first, README.md
shows the lines that training ends with.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDING = ROOT / "docs" / "recording.txt"
README, FIRST_RUN = ROOT / "README.md", ROOT / "docs" / "first-run.md"

CHAT = """\
Mia: Hi, we'd like to eat Italian in Leeds tomorrow. Do you have an idea?
Tom: Luigi's Kitchen is very good. Shall I book a table?
Mia: Yes please, for four people at 7 pm.
Tom: Your table at Luigi's Kitchen is booked for tomorrow at 7 pm.
Mia: Lovely, thanks!
"""
COMMANDS = (
    "python train.py --rank 8",
    "cat chat.txt",
    "python evaluate.py runs/pocket-lora-r8 --text chat.txt --base",
)


def record() -> str:
    """Run the commands one after the other in a folder that holds only them and a chat."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count()
    lines = [
        f"Recorded {time.strftime('%Y-%m-%d')} with {threads} of {os.cpu_count()} threads, load "
        f"average {os.getloadavg()[0]:.1f} before."
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train.py", "evaluate.py"):
            Path(folder, name).symlink_to(ROOT / name)
        Path(folder, "chat.txt").write_text(CHAT)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for command in COMMANDS:
            program, *arguments = command.split()
            real = sys.executable if program == "python" else program
            done = subprocess.run(
                [real, *arguments],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(f"{command} ended with exit code {done.returncode}:\n{done.stdout}")
            lines += [f"$ {command}", done.stdout.rstrip(), ""]
    return "\n".join(lines).rstrip() + "\n"


def recorded(recording: str) -> tuple[str, ...]:
    """The commands of a recording."""
    return tuple(re.findall(r"^\$ (.*)$", recording, re.MULTILINE))


def excerpt(recording: str) -> str:
    """The recording without the second and later dialogues of each list."""
    blocks = recording.split("\n\n")
    first = re.compile(r"\[1 of \d+\]")
    other = re.compile(r"\[(?!1 of)\d+ of \d+\]")
    dropped = sum(bool(other.match(block)) for block in blocks)
    kept: list[str] = []
    for block in blocks:
        if not other.match(block):
            kept.append(block)
            if first.match(block) and dropped:
                kept.append(f"[... {dropped} more dialogues, in docs/recording.txt]")
    return "\n\n".join(kept).split("\n", 1)[1].rstrip()


def ending(recording: str) -> str:
    """The scores and the summary at the end of training, without the paragraph between them."""
    training, _, _ = recording.partition("$ cat chat.txt")
    scores, _, summary = training.rstrip().split("\n\n")[-3:]
    return f"{scores}\n\n{summary}"


def paste(page: str, recording: str) -> str:
    """A page with its part of the recording between its marks."""
    when, _, _ = recording.partition("\n")
    whole = (
        f"```text\n{excerpt(recording)}\n```\n\n{when} All of it: [recording.txt](recording.txt)."
    )
    for mark, part in (("recording", whole), ("ending", f"```text\n{ending(recording)}\n```")):
        body = f"<!-- {mark} -->\n{part}\n<!-- end of {mark} -->"
        marks = rf"<!-- {mark} -->\n.*?<!-- end of {mark} -->"
        page = re.sub(marks, lambda _, body=body: body, page, flags=re.DOTALL)
    return page


def main() -> int:
    if not {"--paste", "--check"} & set(sys.argv):
        RECORDING.write_text(record())
    recording, stale = RECORDING.read_text(), False
    for page in (README, FIRST_RUN):
        text = page.read_text()
        wanted = paste(text, recording)
        if "--check" not in sys.argv:
            page.write_text(wanted)
        elif wanted != text:
            print(f"{page.relative_to(ROOT)} and docs/recording.txt differ: run `make docs`")
            stale = True
    if recorded(recording) != COMMANDS:
        print("docs/recording.txt holds other commands: run `python docs/record.py`")
        stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
