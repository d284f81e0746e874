"""Record what the two commands of the README show, and put it there.

    python docs/record.py             run them (minutes), write docs/recording.txt and README.md
    python docs/record.py --paste     only paste docs/recording.txt into README.md again
    python docs/record.py --check     exit code 1 if README.md is not what docs/recording.txt says

The recording is what the commands write, whole, less the progress bar, which hides itself where
nobody looks. The README shows it with all dialogues but the first one left out.
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
README = ROOT / "README.md"

CHAT = """\
Mia: Are we still on for the cinema tonight?
Tom: Sorry, I have to work late. Could we go tomorrow?
Mia: Tomorrow is fine. I'll get the tickets, the film starts at eight.
Tom: Great, I'll bring the snacks!
"""
COMMANDS = (
    "python train.py --rank 8",
    "cat chat.txt",
    "python evaluate.py runs/pocket-lora-r8 --text chat.txt",
)


def record() -> str:
    """Run the commands one after the other where there is nothing but them and a chat."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count()
    lines = [
        f"Recorded {time.strftime('%Y-%m-%d')} with {threads} of {os.cpu_count()} threads, load "
        f"average {os.getloadavg()[0]:.1f} before."
    ]
    with tempfile.TemporaryDirectory() as folder:
        for door in ("train.py", "evaluate.py"):
            Path(folder, door).symlink_to(ROOT / door)
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


def paste(readme: str, recording: str) -> str:
    """The README with the recording between its marks."""
    when, _, _ = recording.partition("\n")
    body = (
        f"<!-- recording -->\n```text\n{excerpt(recording)}\n```\n\n{when} All of it: "
        "[docs/recording.txt](docs/recording.txt).\n<!-- end of recording -->"
    )
    marks = r"<!-- recording -->\n.*?<!-- end of recording -->"
    return re.sub(marks, lambda _: body, readme, flags=re.DOTALL)


def main() -> int:
    if not {"--paste", "--check"} & set(sys.argv):
        RECORDING.write_text(record())
    readme = README.read_text()
    wanted = paste(readme, RECORDING.read_text())
    if "--check" in sys.argv:
        return int(wanted != readme)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
