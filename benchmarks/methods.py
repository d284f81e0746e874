"""Compare all methods, each at its own best learning rate, on minichat with pocket-bart.

    python benchmarks/methods.py --pretraining-data DIR [--minutes 60] [--processes 2]
    python benchmarks/methods_page.py

    search       one seed and a third of the steps: five rates of each method, a factor of two
                 apart; as long as the best is the lowest or the highest, one more
    seeds        all steps, three seeds at the best rate
    neighbours   the same at half and at twice that rate; as long as the best mean loss is at an
                 end of these rates, one more

The mean validation loss over the seeds decides which of these rates is a method's own. Every run is
a line of WORK/runs.jsonl, so an interrupted study continues. No run starts that would not end
within --minutes, by the longest of its kind so far; --minutes 0 only writes the result anew. Lines
of other weights, code, data, flags or settings do not count. A job that fails is left out and tried
again by the next call. benchmarks/results/methods.json has the result, the hours it took and what
was not run. Each process has one thread. The whole study is about 190 runs of at most one epoch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import ROOT, WEIGHTS, digest, extended, read_lines, run_digest, shifted, write_result

# Train as many numbers as LoRA of rank 8 on query and value, 135,168, where they can.
QV, ALL = ["--targets", "q_proj", "v_proj"], ["--targets", "all-linear"]
METHODS: dict[str, tuple[list[str], float]] = {
    "LoRA r 8, q/v": (["--rank", "8", *QV], 2e-3),
    "full fine-tuning": (["--method", "full"], 1.25e-4),
    "LoRA r 2, all-linear": (["--rank", "2", *ALL], 2e-3),
    "DoRA r 8, q/v": (["--rank", "8", "--dora", *QV], 2e-3),
    "PiSSA r 8, q/v": (["--rank", "8", "--init", "pissa", *QV], 5e-4),
    "LoRA+ r 8, q/v": (["--rank", "8", "--lora-plus-ratio", "16", *QV], 5e-4),
    "AdaLoRA r 8, q/v": (["--method", "adalora", "--rank", "8", *QV], 3.2e-2),
    "prefix of 16": (["--method", "prefix", "--virtual-tokens", "16"], 3e-3),
    "prefix of 16, no MLP": (
        ["--method", "prefix", "--virtual-tokens", "16", "--prefix-hidden", "0"], 0.1,
    ),
    "prompt of 50": (["--method", "prompt", "--virtual-tokens", "50"], 0.2),
    "LoRA r 4 with a prefix of 8": (
        ["--rank", "4", *QV, "--with", "prefix", "--virtual-tokens", "8"], 1e-3,
    ),
    "LoRA r 64, q/v": (["--rank", "64", *QV], 2e-3),
    "rsLoRA r 64, q/v": (["--rank", "64", "--rslora", *QV], 5e-4),
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
        for is_best in (True, False):
            for seed in self.seeds:
                jobs += [
                    Job(method, rate, seed, False)
                    for method in self.methods
                    for rate in self.final(method, done)
                    if (rate == best[method]) is is_best
                ]
        return (job for job in jobs if job not in done)

    def searched(self, method: str, done: dict[Job, dict[str, Any]]) -> list[float]:
        """The rates of the search, as far as they are known."""
        middle, low = METHODS[method][1], -(self.rates // 2)
        rates = [shifted(middle, 2.0 ** (low + k)) for k in range(self.rates)]
        return extended(rates, lambda rate: self.loss(method, rate, done), self.more)

    def final(self, method: str, done: dict[Job, dict[str, Any]]) -> list[float]:
        """The rates that all seeds run, as far as they are known."""
        if (best := self.chosen(method, done)) is None:
            return []
        rates = [shifted(best, factor) for factor in (0.5, 1.0, 2.0)]

        def mean(rate: float) -> float | None:
            jobs = [Job(method, rate, seed, False) for seed in self.seeds]
            losses = [loss_of(done[job]) for job in jobs if job in done]
            return statistics.mean(losses) if len(losses) == len(jobs) else None

        return extended(rates, mean, self.more)

    def loss(self, method: str, rate: float, done: dict[Job, dict[str, Any]]) -> float | None:
        """The validation loss of the search at a rate, None if it is not done."""
        job = Job(method, rate, self.seeds[0], True)
        return loss_of(done[job]) if job in done else None

    def chosen(self, method: str, done: dict[Job, dict[str, Any]]) -> float | None:
        """The best rate of a search that is finished."""
        losses = {rate: self.loss(method, rate, done) for rate in self.searched(method, done)}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        return min(known, key=lambda rate: known[rate]) if len(known) == len(losses) else None


def loss_of(result: dict[str, Any]) -> float:
    """Infinite for a rate at which training failed."""
    loss = result["validation_loss"]
    return float("inf") if loss is None else float(loss)


def flags_of(job: Job) -> list[str]:
    """What makes the method, for train.py."""
    return METHODS[job.method][0] if job.method in METHODS else []


def read(path: Path, setting: dict[str, Any]) -> dict[Job, dict[str, Any]]:
    """The finished jobs of this setting."""
    return {
        Job(**row["job"]): row["result"]
        for row in read_lines(path)
        if row["setting"] == setting and row["flags"] == flags_of(Job(**row["job"]))
    }


def longest(done: dict[Job, dict[str, Any]], search: bool) -> float:
    """Minutes of the longest run so far, of the search or of all steps; 0 if there is none."""
    return max((r["wall_minutes"] for job, r in done.items() if job.search is search), default=0.0)


def run(job: Job, setting: dict[str, Any], work: Path, data: str | None) -> dict[str, Any]:
    """Train in a process of its own, with one thread."""
    steps = setting["steps"] // 3 if job.search else setting["steps"]
    task = asdict(job) | {key: setting[key] for key in ("data", "epochs", "limit")}
    name = f"{job.method} {job.rate} {job.seed} {job.search}".replace("/", "-").replace(" ", "_")
    task |= {"flags": flags_of(job), "steps": steps, "work": str(work), "pretraining_data": data}
    task["answer"] = str(work / f"{name}.json")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("methods_run.py")), json.dumps(task)]
    start = time.monotonic()
    with (work / f"{name}.txt").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(f"{job} ended with exit code {code}: see {log.name}")
    took = round((time.monotonic() - start) / 60, 2)
    return json.loads(Path(task["answer"]).read_text()) | {"wall_minutes": took}


def study(
    plan: Plan, setting: dict[str, Any], options: argparse.Namespace
) -> tuple[dict[Job, Any], dict[Job, BaseException]]:
    """Run what is wanted and fits into the minutes. One line is written for each run.

    Returns:
        The results, and the jobs that failed. After five failures no further job starts.
    """
    path, end = options.work / "runs.jsonl", time.monotonic() + 60 * options.minutes
    done, failed = read(path, setting), dict[Job, BaseException]()
    running = dict[Future[dict[str, Any]], Job]()
    with ThreadPoolExecutor(options.processes) as pool:
        while True:
            waiting = [job for job in plan.wanted(done) if job not in {*running.values(), *failed}]
            while (
                waiting
                and len(running) < options.processes
                and time.monotonic() + 60 * longest(done, waiting[0].search) < end
                and len(failed) < 5
            ):
                job = waiting.pop(0)
                arguments = (job, setting, options.work, options.pretraining_data)
                running[pool.submit(run, *arguments)] = job
            if not running:
                return done, failed
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                if error := future.exception():
                    failed[job] = error
                    print(f"{job} failed: {error}", flush=True)
                    continue
                done[job] = result = future.result()
                row = {"job": asdict(job), "flags": flags_of(job), "setting": setting}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"result": result}) + "\n")
                print(f"{job}: loss {loss_of(result):.4f}", flush=True)


def collected(plan: Plan, done: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a method: its search, and the runs of all steps by rate and seed."""
    rows = []
    for method in plan.methods:
        losses = {rate: plan.loss(method, rate, done) for rate in plan.searched(method, done)}
        tried = [
            {"rate": rate, "loss": None if loss == float("inf") else loss}
            for rate, loss in losses.items()
        ]
        jobs = [Job(method, r, s, False) for r in plan.final(method, done) for s in plan.seeds]
        runs = [{"rate": j.rate, "seed": j.seed, **done[j]} for j in jobs if j in done]
        rows.append({"name": method, "flags": METHODS[method][0], "search": tried, "runs": runs})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=float("inf"), help="start no run that ends after these")
    add("--processes", type=int, default=2)
    add("--work", type=Path, default=Path.home() / ".cache" / "minilora" / "methods",
        help="folder of the finished runs")  # fmt: skip
    add("--pretraining-data", default=str(ROOT / "build" / "pocket-bart" / "data"),
        help="what pretraining/prepare.py wrote; '' leaves out what was forgotten")  # fmt: skip
    add("--data", default="minichat")
    add("--epochs", type=int, default=1)
    add("--steps", type=int, default=215, help="of all epochs: 215 batches of 8 in each")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rates", type=int, default=5, help="of each method, before further ones")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--limit", type=int, default=0, help="test dialogues and held-out texts; 0: all")
    add("--small", action="store_true", help="few steps: the result goes to results/small/")
    options = parser.parse_args()
    if len(options.seeds) > 10:
        parser.error("--seeds: at most ten")
    if options.small:
        options.steps, options.limit = min(options.steps, 9), 4
    if options.pretraining_data and not Path(options.pretraining_data, "chats.jsonl.xz").exists():
        parser.error(f"--pretraining-data {options.pretraining_data}: no chats.jsonl.xz is in it")
    options.work.mkdir(parents=True, exist_ok=True)
    names = ("data", "epochs", "steps", "limit")
    setting = {"weights": digest([WEIGHTS])} | {name: getattr(options, name) for name in names}
    setting["data_digest"] = digest(sorted((WEIGHTS.parents[1] / options.data).glob("*.jsonl")))
    setting["code"] = digest([Path(__file__).with_name("methods_run.py")], run_digest())
    held = [Path(options.pretraining_data, f"{name}.jsonl.xz") for name in ("chats", "prose")]
    scripts = ("examples", "model", "names", "noise", "vary")
    held += [ROOT / "pretraining" / f"{name}.py" for name in scripts]
    setting["forgotten"] = digest(held) if options.pretraining_data else ""
    plan = Plan(options.methods, options.seeds, options.rates, 0 if options.small else 3)
    done, failed = study(plan, setting, options)
    if (base := done.get(Job(BASE, None, options.seeds[0], False))) is None:
        parser.exit(1, "no run is done: there is no result\n")
    left = [asdict(job) for job in plan.wanted(done)]
    hours = round(sum(result["wall_minutes"] for result in done.values()) / 60, 1)
    content = {
        **setting, "core_hours": hours, "seeds": options.seeds, "search_steps": options.steps // 3,
        "base": base, "methods": collected(plan, done), "left_out": left,
    }  # fmt: skip
    print(f"{len(done)} runs are done, {len(left)} are left")
    print(write_result("methods", content, options.small))
    if failed:
        parser.exit(1, f"{len(failed)} runs failed: see the lines above\n")


if __name__ == "__main__":
    main()
