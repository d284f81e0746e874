"""LoRA on a data set, beside the base, full fine-tuning, the first turns and the references.

    python benchmarks/grid.py --data NAME        # the learning rates, on the validation split
    python benchmarks/pocket.py --data NAME [--seeds 0 1 2] [--jobs 2] [--contestants NAME ...]
    python benchmarks/pocket.py --data ../shared/data/samsum [flags of train.py]

Writes ladder_NAME.json. Every contestant trains with the default preset in a process of its own, at
the learning rate of its method in grid_NAME.json, and summarizes the test split. The base is
decoded alike. With --jobs 2 two of them run side by side on one core each. Minutes are those of one
core, for the steps alone, without validation. Finished runs, with their texts, are stored in
--keep, so an interrupted benchmark continues; the scores are computed anew. evaluation_NAME.json in
--keep has the texts of the base and of the first run of LoRA r 8, for reading.py.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import (
    RESULTS,
    ROOT,
    WEIGHTS,
    digest,
    flags_of_data,
    read_split,
    refuse,
    run_beside,
    run_digest,
    write_result,
)
from grid import METHODS

if TYPE_CHECKING:
    from minilora.summarization.data.reading import Example

# By name: its method in grid.py, and flags of its own.
CONTESTANTS: dict[str, tuple[str, list[str]]] = {
    **{f"LoRA r {rank}": ("preset", ["--rank", str(rank)]) for rank in (1, 2, 4, 8, 16)},
    **{f"LoRA r 8, {name}": (name, []) for name in ("decoder", "q/v", "all-linear")},
    "full fine-tuning": ("full", []),
}
METRICS = ("rouge1", "rouge2", "rougeL")
TURNS = 3
Scores = dict[str, list[float]]
"""By measure one value a dialogue: ROUGE, or how many names, numbers, ... are nonsense."""


def rates_of(data: str, contestants: Sequence[str]) -> dict[str, float]:
    """The learning rate of each contestant's method, from the grid of this data and weights."""
    name, methods = Path(data).name, [CONTESTANTS[one][0] for one in contestants]
    path = RESULTS / f"grid_{name}.json"
    grid = json.loads(path.read_bytes()) if path.exists() else None
    chosen = grid["chosen"] if grid else {}
    stale = not grid or grid["settings"]["weights"] != digest([WEIGHTS])
    if stale or not set(methods) <= set(chosen):
        asked = " ".join(dict.fromkeys([*chosen, *methods]))
        refuse(
            f"{path.name} lacks rates of these weights: run "
            f"`python benchmarks/grid.py --data {data} --methods {asked}`"
        )
    return {one: chosen[method] for one, method in zip(contestants, methods, strict=True)}


def work(job: dict[str, Any]) -> None:
    """One run, in a process of its own: summaries of all test dialogues."""
    from minilora.summarization.evaluation.generate import summarize
    from minilora.summarization.flags import parse_run
    from minilora.summarization.training.session import open_session
    from minilora.summarization.training.trainer import fit

    directory = Path(job["directory"])
    output = directory / "run"
    session = open_session(parse_run([*job["flags"], "--output", str(output)]))
    result: dict[str, Any] = {"name": job["name"], "seed": job["seed"]}
    if job["name"] != "base":
        output.mkdir()
        outcome = fit(session, output)
        if not outcome.finished:  # by a signal
            raise SystemExit("stopped before the last step")
        records = [json.loads(line) for line in (output / "log.jsonl").read_bytes().splitlines()]
        result |= {
            "learning_rate": session.run.training.learning_rate,
            "trainable": session.report.trainable,
            "minutes": minutes(records),
            "peak_gib": outcome.progress.peak_bytes / 2**30,
            "validation": [record for record in records if record["kind"] == "validation"],
        }
        reload_best(session, output)
    summaries = summarize(
        session.model, session.tokenizer, session.splits["test"].encoded, session.run.generation,
        session.autocast_dtype,
    )  # fmt: skip
    result["summaries"] = [summary.text for summary in summaries]
    result["gen_len"] = statistics.mean(summary.tokens for summary in summaries)
    beside = directory / "result.json.new"
    beside.write_text(json.dumps(result))
    beside.rename(directory / "result.json")


def minutes(records: Sequence[dict[str, Any]]) -> float:
    """Of all steps, at the median time per token, so that other work does not count."""
    steps = [(r["seconds"], r["tokens"]) for r in records if r["kind"] == "step" and "tokens" in r]
    pace = statistics.median(seconds / tokens for seconds, tokens in steps)
    return pace * sum(tokens for _, tokens in steps) / 60


def reload_best(session: Any, output: Path) -> None:
    """The weights of the best epoch instead of the last."""
    import minilora
    from minilora.summarization.model.loading import load_model
    from minilora.summarization.training.session import trained_path

    path = trained_path(output, session.run)
    if session.run.model.method == "full":
        session.model = load_model(str(path.resolve()), session.device)
    else:
        minilora.load_adapter(session.model, path, inference=True)


def run(
    name: str, seed: int, rate: float | None, options: argparse.Namespace, more: Sequence[str]
) -> dict[str, Any]:
    """The result of one run: read if it is finished, otherwise computed."""
    flags = ["--seed", str(seed), *flags_of_data(options.data), *more]
    if rate is not None:
        method, own = CONTESTANTS[name]
        flags = [*METHODS[method], *own, "--learning-rate", str(rate), *flags]
    short = name.replace(" ", "_").replace("/", "-").replace(",", "")
    directory = options.keep / f"{short}-{seed}-{run_digest(flags)}"
    path = directory / "result.json"
    if not path.exists():
        shutil.rmtree(directory, ignore_errors=True)  # of a run that was stopped
        directory.mkdir(parents=True)
        job = {"name": name, "seed": seed, "flags": flags, "directory": str(directory)}
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        run_beside(command, directory / "output.txt", options.jobs)
    result: dict[str, Any] = json.loads(path.read_bytes())
    print(f"{name}, seed {seed}: {result.get('minutes', 0):.1f} min", flush=True)
    return result


def scored(texts: Sequence[str], test: "Sequence[Example]") -> Scores:
    """Every measure of every summary."""
    from minilora.summarization.evaluation import nonsense
    from minilora.summarization.evaluation.rouge import rouge

    rows = rouge(texts, [example.references for example in test])
    pairs = [(text, example.dialogue) for text, example in zip(texts, test, strict=True)]
    kinds = {name: getattr(nonsense, name) for name in nonsense.MEASURES}
    return {
        **{metric: [row[metric] for row in rows] for metric in METRICS},
        **{name: [float(len(kind(*pair))) for pair in pairs] for name, kind in kinds.items()},
    }


def each(runs: Sequence[Scores], measure: str) -> list[float]:
    """By dialogue the mean over the seeds: of ROUGE, or of 100 for a summary with nonsense."""
    rouge = measure in METRICS
    values = [[v if rouge else 100.0 * (v > 0) for v in run[measure]] for run in runs]
    return [statistics.mean(one) for one in zip(*values, strict=True)]


def less(runs: Sequence[Scores], other: Scores, metric: str) -> list[float]:
    """By dialogue how much higher the mean over the seeds is."""
    return [a - b for a, b in zip(each(runs, metric), other[metric], strict=True)]


def interval(values: Sequence[float]) -> list[float]:
    """Mean and bootstrap interval over the dialogues."""
    from minilora.summarization.evaluation.rouge import bootstrap

    return [round(value, 3) for value in bootstrap(values)]


def share(part: Sequence[float], whole: Sequence[float]) -> list[float] | None:
    """The ratio of two mean gains, paired by dialogue, with its 95% bootstrap interval.

    None where the whole may be zero: the ratio has no bounds then.
    """
    if interval(whole)[1] <= 0:
        return None
    pairs = torch.tensor([part, whole], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(part), (2000, len(part)), generator=generator)  # as `bootstrap`
    above, below = pairs[:, drawn].mean(-1)
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    mean = statistics.mean(part) / statistics.mean(whole)
    return [round(v, 3) for v in (mean, *torch.quantile(above / below, tails).tolist())]


def intervals(runs: Sequence[Scores], base: Scores | None = None) -> dict[str, Any]:
    """Each measure over the seeds with its interval, and the gain over the base."""
    found = {"intervals": {measure: interval(each(runs, measure)) for measure in runs[0]}}
    if base is not None:
        found["gain"] = {metric: interval(less(runs, base, metric)) for metric in METRICS}
    return found


def collected(results: Sequence[dict[str, Any]], test: "Sequence[Example]") -> dict[str, Any]:
    """The result of all runs, of which the first is the base's."""
    base, *others = results
    before = scored(base["summaries"], test)
    turns = scored([" ".join(e.dialogue.split("\n")[:TURNS]) for e in test], test)
    reference = scored([e.summary for e in test], test)
    names = list(dict.fromkeys(r["name"] for r in others))
    scores = {n: [scored(r["summaries"], test) for r in others if r["name"] == n] for n in names}
    rows = []
    for name in names:
        runs, found = [r for r in others if r["name"] == name], scores[name]
        row = {"name": name, "learning_rate": runs[0]["learning_rate"]}
        row |= {"trainable": runs[0]["trainable"], "seeds": [r["seed"] for r in runs]}
        row |= {k: [round(r[k], 3) for r in runs] for k in ("minutes", "peak_gib", "gen_len")}
        row |= {"rouge1": [round(statistics.mean(one["rouge1"]), 3) for one in found]}
        row |= intervals(found, before) | {"lead": interval(less(found, turns, "rouge1"))}
        if name.startswith("LoRA") and (full := scores.get("full fine-tuning")):
            gains = (less(side, before, "rouge1") for side in (found, full))
            row["share_of_full"] = share(*gains)
        for key in ("loss", "rouge1"):
            row[f"validation_{key}"] = [[round(v[key], 4) for v in r["validation"]] for r in runs]
        rows.append(row)
    shown = {"base": before} | {name: found[0] for name, found in scores.items()}
    kept = ("rouge1", "foreign_names")  # what lesson 8 reads
    return {
        "n": len(test),
        "base": intervals([before]) | {"gen_len": [round(base["gen_len"], 3)]},
        "turns": TURNS,
        "lead": intervals([turns], before),
        "reference": {"intervals": {m: interval(each([reference], m)) for m in reference
                                    if m not in METRICS}},
        "rows": rows,
        "per_dialogue": {"ids": [e.id for e in test]} | {
            name: {measure: [round(v, 2) for v in found[measure]] for measure in kept}
            for name, found in shown.items()
        },
    }  # fmt: skip


def to_read(
    data: str, test: "Sequence[Example]", base: Sequence[str], tuned: Sequence[str]
) -> dict[str, Any]:
    """What reading.py needs of an evaluation.json."""
    rows = [
        {"id": e.id, "dialogue": e.dialogue, "reference": e.summary, "base": b, "finetuned": f}
        for e, b, f in zip(test, base, tuned, strict=True)
    ]
    told = {"data": data, "split": "test", "weights": digest([WEIGHTS])}
    return told | {"examples": rows}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else "", allow_abbrev=False
    )
    parser.add_argument("--data", default="bookings", help="embedded, or a path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=["LoRA r 8", "full fine-tuning"]
    )
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "pocket")
    options, more = parser.parse_known_args()  # the other flags are for train.py
    test = read_split(options.data, "test")
    rates = rates_of(options.data, options.contestants)
    jobs: list[tuple[str, int, float | None]] = [("base", 0, None)]
    jobs += [(name, seed, rate) for seed in options.seeds for name, rate in rates.items()]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: run(*job, options, more), jobs))
    name = Path(options.data).name
    if tuned := next((found for found in results if found["name"] == "LoRA r 8"), None):
        texts = to_read(name, test, results[0]["summaries"], tuned["summaries"])
        (options.keep / f"evaluation_{name}.json").write_text(json.dumps(texts))
    told = {"data": name, "weights": digest([WEIGHTS]), "flags": more, "jobs": options.jobs}
    print(write_result(f"ladder_{name}", told | collected(results, test)))


if __name__ == "__main__":
    main()
