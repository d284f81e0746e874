"""LoRA's gain on pocket-bart, beside the base, full fine-tuning and the first turns.

    python benchmarks/pocket.py [--seeds 0 1 2] [--jobs 2] [--contestants NAME ...]
    python benchmarks/pocket.py --data ../shared/data/samsum --name samsum [flags of train.py]

Every contestant trains with the default preset in a process of its own, at the learning rate that
the validation split chose for its method (benchmarks/grid.py), and summarizes the test split. With
--jobs 2 two of them run side by side on one core each. Minutes are those of one core, for the steps
alone, without validation. Finished runs are stored in --keep, so an interrupted benchmark
continues.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT, WEIGHTS, digest, write_result

# From results/grid.json, of the earlier weights.
RATES = {"q/v": 4e-3, "decoder": 4e-3, "all-linear": 1e-3, "full": 5e-4}
CONTESTANTS: dict[str, list[str]] = {
    **{
        f"LoRA r {rank}, q/v": ["--rank", str(rank), "--targets", "q_proj", "v_proj"]
        for rank in (1, 2, 4, 8, 16)
    },
    "LoRA r 8, decoder": ["--rank", "8", "--targets", "decoder"],  # the encoder is computed once
    "LoRA r 8, all-linear": ["--rank", "8", "--targets", "all-linear"],
    "full fine-tuning": ["--method", "full"],
}
METRICS = ("rouge1", "rouge2", "rougeL")


def rate(name: str) -> float:
    """The learning rate of a contestant's method."""
    return RATES["full" if name.startswith("full") else name.split(", ")[-1]]


def flags_of(name: str, seed: int, more: Sequence[str]) -> list[str]:
    """What train.py is told."""
    own = [] if name == "base" else [*CONTESTANTS[name], "--learning-rate", str(rate(name))]
    return ["--seed", str(seed), *own, *more]


def work(name: str, seed: int, more: Sequence[str], directory: Path) -> None:
    """One run, in a process of its own; base's and fine-tuned scores of every test dialogue."""
    from minilora.summarization.evaluation.generate import summarize
    from minilora.summarization.evaluation.rouge import rouge
    from minilora.summarization.flags import parse_run
    from minilora.summarization.training.session import open_session
    from minilora.summarization.training.trainer import fit

    base, flags = name == "base", flags_of(name, seed, more)
    session = open_session(parse_run([*flags, "--output", str(directory / "run")]))
    result: dict[str, Any] = {"name": name, "seed": seed, "flags": flags}
    if not base:
        (directory / "run").mkdir(parents=True, exist_ok=True)
        outcome = fit(session, directory / "run")
        result |= {
            "learning_rate": session.run.training.learning_rate,
            "trainable": session.report.trainable,
            "peak_gib": outcome.progress.peak_bytes / 2**30,
        }
        reload_best(session, directory / "run")
    test = session.splits["test"]
    summaries = summarize(
        session.model, session.tokenizer, test.encoded, session.run.generation,
        session.autocast_dtype,
    )  # fmt: skip
    rows = rouge([s.text for s in summaries], [example.summary for example in test.examples])
    result["ids"] = [example.id for example in test.examples]
    result["scores"] = {m: [round(row[m], 3) for row in rows] for m in METRICS}
    result["gen_len"] = statistics.mean(s.tokens for s in summaries)
    result["invented"] = [
        invented_names(summary.text, example.dialogue)
        for summary, example in zip(summaries, test.examples, strict=True)
    ]
    if session.run.data.data == "minichat":  # its licence allows texts in the repository
        result["summaries"] = [summary.text for summary in summaries]
    log = directory / "run" / "log.jsonl"
    if log.exists():
        records = [json.loads(line) for line in log.read_text().splitlines()]
        result["validation"] = [record for record in records if record["kind"] == "validation"]
        result["minutes"] = minutes(records)
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


def invented_names(summary: str, dialogue: str) -> int:
    """Capitalized words within sentences of the summary that are not in the dialogue."""
    said = dialogue.lower()
    pairs = itertools.pairwise(summary.split())  # the first word of a sentence is no evidence
    inside = [word for before, word in pairs if not before.endswith((".", "!", "?"))]
    names = [w.strip(".,!?;:'\"()").removesuffix("'s") for w in inside if w[:1].isupper()]
    return sum(len(name) > 1 and name.lower() not in said for name in names)


def lead(data: str, turns: int = 3) -> dict[str, Any]:
    """The first turns of every test dialogue, copied, without a model."""
    from minilora.summarization.data.splits import load
    from minilora.summarization.evaluation.rouge import rouge
    from minilora.summarization.settings import DataOptions

    examples = load(DataOptions(data=data), ("test",))[0]["test"]
    copied = [" ".join(example.dialogue.split("\n")[:turns]) for example in examples]
    rows = rouge(copied, [example.summary for example in examples])
    return {"turns": turns, "scores": {m: [round(row[m], 3) for row in rows] for m in METRICS}}


def run(job: tuple[str, int], options: argparse.Namespace, more: Sequence[str]) -> dict[str, Any]:
    """The result of one run: read if it exists, otherwise computed."""
    name, seed = job
    short = name.replace(" ", "_").replace("/", "-").replace(",", "")
    kind = digest([WEIGHTS], *flags_of(name, seed, ["--data", options.data, *more]))[:8]
    directory = options.keep / f"{short}-{seed}-{kind}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "result.json"
    if not path.exists():
        command = [sys.executable, __file__, "--worker", name, "--seeds", str(seed)]
        command += ["--data", options.data, "--keep", str(directory), *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if options.jobs > 1:
            environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with (directory / "output.txt").open("w") as log:
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    result: dict[str, Any] = json.loads(path.read_text())
    mean = statistics.mean(result["scores"]["rouge1"])
    print(f"{name}, seed {seed}: {mean:.1f}, {result.get('minutes', 0):.1f} min", flush=True)
    return result


def summarized(runs: list[dict[str, Any]], base: dict[str, Any] | None) -> dict[str, Any]:
    """One contestant: mean over seeds, with the bootstrap interval over the dialogues."""
    from minilora.summarization.evaluation.rouge import bootstrap

    row: dict[str, Any] = {"seeds": [r["seed"] for r in runs]}
    for key in ("trainable", "minutes", "peak_gib", "gen_len"):
        if key in runs[0]:
            row[key] = [round(r[key], 3) for r in runs]
    row["trainable"] = runs[0].get("trainable", 0)
    row["scores"], row["intervals"], row["gain"] = {}, {}, {}
    for metric in METRICS:
        row["scores"][metric] = [statistics.mean(r["scores"][metric]) for r in runs]
        each = [statistics.mean(v) for v in zip(*(r["scores"][metric] for r in runs), strict=True)]
        found = bootstrap(each)
        row["intervals"][metric] = [found.mean, found.low, found.high]
        if base is not None:
            change = bootstrap([a - b for a, b in zip(each, base["scores"][metric], strict=True)])
            row["gain"][metric] = [change.mean, change.low, change.high]
    if "invented" in runs[0]:
        row["invented_per_summary"] = [statistics.mean(r["invented"]) for r in runs]
    if "validation" in runs[0]:
        row["validation_loss"] = [[v["loss"] for v in r["validation"]] for r in runs]
        row["validation_rouge1"] = [[v["rouge1"] for v in r["validation"]] for r in runs]
    return row


def examples(data: str, base: dict[str, Any], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first twenty test dialogues with every contestant's summary, first seed."""
    from minilora.summarization.data.splits import load
    from minilora.summarization.settings import DataOptions

    found = load(DataOptions(data=data), ("test",))[0]["test"][:20]
    return [
        {
            "id": example.id,
            "reference": example.summary,
            "base": base["summaries"][place],
            **{run["name"]: run["summaries"][place] for run in reversed(others)},
        }
        for place, example in enumerate(found)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", default="minichat")
    parser.add_argument("--name", default="pocket", help="benchmarks/results/NAME.json")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--keep", type=Path, help="finished runs; build/NAME if not given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options, more = parser.parse_known_args()  # the other flags are for train.py
    options.keep = options.keep or ROOT / "build" / options.name
    if options.worker:
        work(options.worker, options.seeds[0], ["--data", options.data, *more], options.keep)
        return
    jobs = [("base", 0)] + [(name, seed) for seed in options.seeds for name in options.contestants]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: run(job, options, more), jobs))
    base, *others = results
    rows = []
    for name in options.contestants:
        runs = [r for r in others if r["name"] == name]
        rows.append(
            {"name": name, "learning_rate": runs[0]["learning_rate"], **summarized(runs, base)}
        )
    content: dict[str, Any] = {
        "data": "samsum" if "samsum" in options.data else options.data,
        "flags": more,
        "jobs": options.jobs,
        "lead": summarized([lead(options.data) | {"seed": 0}], base),
        "base": summarized([base], None),
        "rows": rows,
        "per_dialogue": {
            "ids": base["ids"],
            "base": base["scores"] | {"invented": base["invented"]},
            **{r["name"]: r["scores"] | {"invented": r["invented"]} for r in reversed(others)},
        },
    }
    if "summaries" in base:
        content["examples"] = examples(options.data, base, others)
    print(write_result(options.name, content))


if __name__ == "__main__":
    main()
