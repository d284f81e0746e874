"""Shared by the benchmarks: alternate the contestants, take medians, write JSON."""

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from minilora.summarization.data.reading import Example

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
POCKET_BART = ROOT / "minilora" / "summarization" / "assets" / "pocket-bart"
WEIGHTS = POCKET_BART / "model.safetensors"
NUMBERS = re.compile(r"\[\n([-+.\de,\s]+)\]")  # a list of numbers becomes one line


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of every benchmark: --device and --small."""
    flags = argparse.ArgumentParser(
        description=(description or " ").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument("--device", default="cpu", help="cpu or cuda")
    flags.add_argument(
        "--small",
        action="store_true",
        help="tiny sizes, to see that it runs; the result goes to benchmarks/results/small/",
    )
    return flags


def keep_freed_memory() -> None:
    """Start the script again with settings that make glibc keep freed memory.

    Otherwise glibc returns memory to the system at times and gets new pages, at about 1 us each.
    In a short measurement it depends on chance which contestant pays for that.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    if not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def alternate(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; each round runs all of them once, in turn.

    A machine that is slower for a while is slower for all contestants, so the ratios within a round
    are more reliable than absolute times. The order rotates from round to round.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronize()
            start = time.perf_counter()
            contestants[name]()
            synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median seconds of each contestant, and the ratio of its median to the base's."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {"median_seconds": median, "ratio": median / medians[base]}
        for name, median in medians.items()
    }


def digest(paths: Sequence[Path], *more: str) -> str:
    """Of the content of files, and of more texts: finished runs of another one do not count."""
    found = hashlib.sha256(json.dumps(more).encode() if more else b"")
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def run_digest(flags: Sequence[str] = ()) -> str:
    """Of what decides a run: its flags, the files of --data and pocket-bart, the library's code."""
    from minilora.summarization.presets import local_path

    read = [path for path in POCKET_BART.iterdir() if path.name not in ("README.md", "LICENSE")]
    read += (ROOT / "minilora").rglob("*.py")
    if "--data" in flags:
        place = local_path(flags[flags.index("--data") + 1])
        read += (path for path in place.rglob("*") if path.is_file())
    return digest(sorted(read), *flags)[:12]


def flags_of_data(data: str) -> list[str]:
    """Data and decoding for train.py: 5 to 60 tokens, as in the preset, on every data set.

    train.py fits the lengths to the references of data that is not embedded. On SAMSum that is a
    minimum of 19 tokens, which forces many summaries on after their end.
    """
    from minilora.summarization.presets import EMBEDDED

    lengths = [] if data in EMBEDDED else ["--min-length", "5", "--max-length", "60"]
    return ["--data", data, *lengths]


def extended(rates: list[float], loss: Callable[[float], float | None], more: int) -> list[float]:
    """The rates, and up to `more` further ones while the best one is the lowest or the highest."""
    for _ in range(more):
        losses = {rate: loss(rate) for rate in rates}
        known = {rate: value for rate, value in losses.items() if value is not None}
        if len(known) < len(losses):
            break
        best = min(known, key=lambda rate: known[rate])
        if best == rates[0]:
            rates = [shifted(best, 0.5), *rates]
        elif best == rates[-1]:
            rates = [*rates, shifted(best, 2.0)]
    return rates


def shifted(rate: float, factor: float) -> float:
    """Rates in three digits, so that they are the same however they came about."""
    return float(f"{rate * factor:.3g}")


def read_split(data: str, split: str) -> "list[Example]":
    """The dialogues of a split; data that cannot be read ends the script in one line."""
    from minilora.summarization.data.splits import load
    from minilora.summarization.errors import UserError
    from minilora.summarization.settings import DataOptions

    try:
        return load(DataOptions(data=data), (split,))[0][split]
    except UserError as error:
        refuse(str(error))


def refuse(message: str) -> NoReturn:
    """End the script with one line and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def run_beside(command: Sequence[str], log: Path, jobs: int) -> None:
    """A process of its own; with one thread, if `jobs` of them run side by side."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if jobs > 1:
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        raise SystemExit(f"a run ended with exit code {done.returncode}: see {log}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file. A last line that a crash cut off is removed from the file."""
    if not path.exists():
        return []
    whole, end, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        os.truncate(path, len(whole + end))
    return [json.loads(line) for line in whole.splitlines()]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Versions and hardware, for the caption of every table."""
    packages = ["torch", "transformers", "peft", "safetensors"]
    return {
        "python": platform.python_version(),
        **{package: version_of(package) for package in packages},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def version_of(package: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    vectors = torch.backends.cpu.get_cpu_capability()
    try:
        text = Path("/proc/cpuinfo").read_text()
        lines = text.splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        amx = ", AMX" if "amx_bf16" in text else ""  # decides what --precision auto is
        return f"{names[0]}, {os.cpu_count()} cores, {vectors}{amx}"
    except (OSError, IndexError):
        return f"{platform.machine()}, {os.cpu_count()} cores, {vectors}"


def beside_bitsandbytes(name: str) -> str:
    """The name of a result: with a suffix on processors without AVX-512.

    bitsandbytes has special code for AVX-512, so the two results cannot be compared.
    """
    vectors = torch.backends.cpu.get_cpu_capability()
    return name if vectors == "AVX512" else f"{name}_{vectors.lower()}"


def write_result(
    name: str, result: Mapping[str, Any], small: bool = False, folder: Path | None = None
) -> Path:
    """Write benchmarks/results/NAME.json: the figures with the date, versions and hardware.

    A small run says nothing about speed. Its result goes to another folder, which no table reads.
    """
    folder = folder or (RESULTS / "small" if small else RESULTS)
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    content = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **result}
    text = json.dumps(content, indent=2)
    text = NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n")
    return path
