"""Compare all methods, each at its own best learning rate, on minichat with pocket-bart.

    python benchmarks/methods.py --pretraining-data DIR [--minutes 60] [--processes 2]
    python benchmarks/methods_page.py

    search       one seed and a third of the steps: five rates of each method, a factor of two
                 apart; as long as the best is the lowest or the highest, one more
    seeds        all steps, three seeds at the best rate
    neighbours   the same at half and at twice that rate

The mean validation loss over the seeds decides which of the three rates is a method's own. Every
run is a line of WORK/runs.jsonl, so an interrupted study continues. After --minutes no further run
starts. Lines of other weights or settings do not count. benchmarks/results/methods.json has the
result and lists what was not run. Each process has one thread. The whole study is about 190 runs
and takes nine and a half hours on two cores.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import ROOT, write_result

WEIGHTS = ROOT / "minilora" / "summarization" / "assets" / "pocket-bart" / "model.safetensors"
# Train as many numbers as LoRA of rank 8 on query and value, 135,168, where they can.
QV, ALL = ["--targets", "q_proj", "v_proj"], ["--targets", "all-linear"]
METHODS: dict[str, tuple[list[str], float]] = {
    "LoRA r 8, q/v": (["--rank", "8", *QV], 4e-3),
    "full fine-tuning": (["--method", "full"], 2.5e-4),
    "LoRA r 2, all-linear": (["--rank", "2", *ALL], 4e-3),
    "DoRA r 8, q/v": (["--rank", "8", "--dora", *QV], 4e-3),
    "PiSSA r 8, q/v": (["--rank", "8", "--init", "pissa", *QV], 1e-3),
    "LoRA+ r 8, q/v": (["--rank", "8", "--lora-plus-ratio", "16", *QV], 1e-3),
    "AdaLoRA r 8, q/v": (["--method", "adalora", "--rank", "8", *QV], 3.2e-2),
    "prefix of 16": (["--method", "prefix", "--virtual-tokens", "16"], 3e-3),
    "prefix of 16, no MLP": (
        ["--method", "prefix", "--virtual-tokens", "16", "--prefix-hidden", "0"], 0.1,
    ),
    "prompt of 50": (["--method", "prompt", "--virtual-tokens", "50"], 0.2),
    "LoRA r 4 with a prefix of 8": (
        ["--rank", "4", *QV, "--with", "prefix", "--virtual-tokens", "8"], 2e-3,
    ),
    "LoRA r 64, q/v": (["--rank", "64", *QV], 4e-3),
    "rsLoRA r 64, q/v": (["--rank", "64", "--rslora", *QV], 1e-3),
}  # fmt: skip
"""Flags of train.py, and the middle of the rates, from smaller studies (docs/log.md)."""
BASE = "pocket-bart as it ships"


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    rate: float | None  # None: the base, without training
    seed: int
    search: bool


@dataclass(frozen=True)
class Plan:
    """The jobs of the study. `done` has the finished ones with their results."""

    methods: Sequence[str]
    seeds: Sequence[int]
    rates: int
    more: int  # further rates at most, while the best one is at an end

    def wanted(self, done: dict[Job, dict[str, Any]]) -> Iterator[Job]:
        """Jobs that are not done, by their worth."""
        jobs = [Job(BASE, None, self.seeds[0], False)]
        for method in self.methods:
            jobs += [Job(method, r, self.seeds[0], True) for r in self.searched(method, done)]
        best = {method: self.chosen(method, done) for method in self.methods}
        known = {method: rate for method, rate in best.items() if rate is not None}
        for factors in ((1.0,), (0.5, 2.0)):
            for seed in self.seeds:
                jobs += [
                    Job(method, shifted(rate, factor), seed, False)
                    for method, rate in known.items()
                    for factor in factors
                ]
        return (job for job in jobs if job not in done)

    def searched(self, method: str, done: dict[Job, dict[str, Any]]) -> list[float]:
        """The rates of the search, as far as they are known."""
        middle = METHODS[method][1]
        low, high = -(self.rates // 2), self.rates - 1 - self.rates // 2
        for _ in range(self.more):
            found = self.losses(
                method, [shifted(middle, 2.0**k) for k in (*range(low, high + 1),)], done
            )
            if None in found.values():
                break
            best = min(found, key=lambda rate: found[rate] or 0)
            low -= best == shifted(middle, 2.0**low)
            high += best == shifted(middle, 2.0**high)
        return [shifted(middle, 2.0**k) for k in range(low, high + 1)]

    def losses(
        self, method: str, rates: Sequence[float], done: dict[Job, dict[str, Any]]
    ) -> dict[float, float | None]:
        """The validation loss of the search by rate, None where it is not done."""
        jobs = {rate: Job(method, rate, self.seeds[0], True) for rate in rates}
        return {rate: loss_of(done[job]) if job in done else None for rate, job in jobs.items()}

    def chosen(self, method: str, done: dict[Job, dict[str, Any]]) -> float | None:
        """The best rate of a search that is finished."""
        losses = self.losses(method, self.searched(method, done), done)
        finished = [(loss, rate) for rate, loss in losses.items() if loss is not None]
        return min(finished)[1] if len(finished) == len(losses) else None


def shifted(rate: float, factor: float) -> float:
    """Rates in three digits, so that they are the same however they came about."""
    return float(f"{rate * factor:.3g}")


def loss_of(result: dict[str, Any]) -> float:
    """Infinite for a rate at which training failed."""
    loss = result["validation_loss"]
    return float("inf") if loss is None else float(loss)


def read(path: Path, setting: dict[str, Any]) -> dict[Job, dict[str, Any]]:
    """The finished jobs of this setting. A line that was cut off by a crash does not count."""
    done = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["setting"] == setting:
            done[Job(**row["job"])] = row["result"]
    return done


def run(job: Job, setting: dict[str, Any], work: Path, data: str | None) -> dict[str, Any]:
    """Train in a process of its own, with one thread."""
    steps = setting["steps"] // 3 if job.search else setting["steps"]
    task = asdict(job) | {key: setting[key] for key in ("data", "epochs", "limit")}
    name = f"{job.method} {job.rate} {job.seed} {job.search}".replace("/", "-").replace(" ", "_")
    flags = [] if job.rate is None else METHODS[job.method][0]
    task |= {"flags": flags, "steps": steps, "work": str(work), "pretraining_data": data}
    task["answer"] = str(work / f"{name}.json")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("methods_run.py")), json.dumps(task)]
    with (work / f"{name}.txt").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(f"{job} ended with exit code {code}: see {log.name}")
    return json.loads(Path(task["answer"]).read_text())


def study(plan: Plan, setting: dict[str, Any], options: argparse.Namespace) -> dict[Job, Any]:
    """Run what is wanted until the minutes are over. One line is written for each run.

    Raises:
        RuntimeError: a run failed; those that ran beside it are written.
    """
    path, end = options.work / "runs.jsonl", time.monotonic() + 60 * options.minutes
    done, running = read(path, setting), dict[Future[dict[str, Any]], Job]()
    failed: BaseException | None = None
    with ThreadPoolExecutor(options.processes) as pool:
        while True:
            waiting = [job for job in plan.wanted(done) if job not in running.values()]
            while waiting and len(running) < options.processes and time.monotonic() < end:
                if failed:
                    break
                job = waiting.pop(0)
                arguments = (job, setting, options.work, options.pretraining_data)
                running[pool.submit(run, *arguments)] = job
            if not running and failed:
                raise failed
            if not running:
                return done
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job, failed = running.pop(future), future.exception() or failed
                if future.exception():
                    continue
                result = future.result()
                done[job] = result
                row = {"job": asdict(job), "setting": setting, "result": result}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{job}: loss {loss_of(result):.4f}", flush=True)


def collected(plan: Plan, done: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a method: its search, and the runs of all steps by rate and seed."""
    rows = []
    for method in plan.methods:
        losses = plan.losses(method, plan.searched(method, done), done)
        full = [(job, r) for job, r in done.items() if job.method == method and not job.search]
        order = sorted(full, key=lambda one: (one[0].rate, one[0].seed))
        runs = [{"rate": job.rate, "seed": job.seed, **result} for job, result in order]
        tried = [{"rate": rate, "loss": loss} for rate, loss in losses.items()]
        tried = [row | {"loss": None} if row["loss"] == float("inf") else row for row in tried]
        rows.append({"name": method, "flags": METHODS[method][0], "search": tried, "runs": runs})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=float("inf"), help="start no run after these")
    add("--processes", type=int, default=2)
    add("--work", type=Path, default=Path.home() / ".cache" / "minilora" / "methods",
        help="folder of the finished runs")  # fmt: skip
    add("--pretraining-data", default=str(ROOT / "build" / "pocket-bart" / "data"),
        help="what pretraining/prepare.py wrote; '' leaves out what was forgotten")  # fmt: skip
    add("--data", default="minichat")
    add("--epochs", type=int, default=2)
    add("--steps", type=int, default=430, help="of all epochs: 215 batches of 8 in each")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rates", type=int, default=5, help="of each method, before further ones")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--limit", type=int, default=0, help="test dialogues and held-out texts; 0: all")
    add("--small", action="store_true", help="few steps: the result goes to results/small/")
    options = parser.parse_args()
    if options.small:
        options.steps, options.limit = min(options.steps, 9), 4
    if options.pretraining_data and not Path(options.pretraining_data, "chats.jsonl.xz").exists():
        parser.error(f"--pretraining-data {options.pretraining_data}: no chats.jsonl.xz is in it")
    options.work.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    names = ("data", "epochs", "steps", "limit")
    setting = {"weights": weights} | {name: getattr(options, name) for name in names}
    setting["forgotten"] = bool(options.pretraining_data)
    plan = Plan(options.methods, options.seeds, options.rates, 0 if options.small else 3)
    done = study(plan, setting, options)
    if (base := done.get(Job(BASE, None, options.seeds[0], False))) is None:
        parser.exit(1, "no run is done: there is no result\n")
    left = [asdict(job) for job in plan.wanted(done)]
    content = {
        **setting, "seeds": options.seeds, "search_steps": options.steps // 3,
        "base": base, "methods": collected(plan, done), "left_out": left,
    }  # fmt: skip
    print(f"{len(done)} runs are done, {len(left)} are left")
    print(write_result("methods", content, options.small))


if __name__ == "__main__":
    main()
