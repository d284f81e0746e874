"""Write the figures of README.md and of pages in docs/ from benchmarks/results/*.json.

    python benchmarks/tables.py            write them
    python benchmarks/tables.py --check    exit code 1 if a page and the results differ

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, a figure within a sentence between
`<!-- figure: NAME -->` and `<!-- end -->`. No figure is typed by hand. A table without a result
names the command that measures it.
"""

import json
import os
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ladder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{n}.md" for n in ("benchmarks", "pocket-bart"))]
Rows = list[list[str]]
MEDIAN = "tokens_per_second_median_of_rounds"  # of the ratios of speed


def merge_latency(result: dict[str, Any]) -> Rows:
    """One row a contestant: the time of a forward pass and of greedy decoding."""
    tasks = result["results"]
    rows = [["BART-base's dimensions, fp32", "one forward", "", "64 tokens, greedy", ""]]
    for name in tasks["forward"]:
        row = [name]
        for task in ("forward", "decode"):
            figures = tasks[task][name]
            row += [f"{1000 * figures['median_seconds']:,.0f} ms", f"{figures['ratio']:.3f}"]
        rows.append(row)
    return rows


def exactness(result: dict[str, Any]) -> Rows:
    """One row a library: the errors of merged and of unmerged weights."""
    rows = [["", "bf16", "fp16", "1 cycle", "10 cycles", "100 cycles"]]
    for name, figures in result["results"].items():
        wrong = [f"{figures[dtype]['not_nearest']:.3%}" for dtype in ("bf16", "fp16")]
        drift = figures["bf16"]["drift_other_adapters"]
        rows.append([name, *wrong, *(f"{drift[n]['changed']:.1%}" for n in ("1", "10", "100"))])
    return rows


def default_run(result: dict[str, Any]) -> Rows:
    """The scores of `python train.py --rank 8`, before and after."""
    rows = [["", "ROUGE-1", "ROUGE-2", "ROUGE-L", "tokens"]]
    scores = {key: result[key] for key in ("base", "finetuned")}
    names = {"base": "pocket-bart as it ships", "finetuned": "with LoRA, rank 8"}
    measures = ("rouge1", "rouge2", "rougeL", "gen_len")
    rows += [[names[key], *(f"{scores[key][m]:.1f}" for m in measures)] for key in names]
    difference = result["intervals"]["difference"]
    cells = [f"{d[0]:+.1f} [{d[1]:+.1f}, {d[2]:+.1f}]" for d in map(difference.get, measures)]
    return [*rows, ["difference, 95% interval", *cells]]


def layer(result: dict[str, Any]) -> Rows:
    """One row a contestant: forward and backward relative to the frozen layer's, and memory."""
    settings, widths = result["settings"], result["results"]
    width = next(iter(widths))
    precisions = [name for name in widths[width] if name != "bf16"] or list(widths[width])
    head = [f"{width} x {width}, {settings['tokens']:,} tokens"]
    for precision in precisions:
        head += [f"{precision}: forward", "and backward", "saved, q and v"]
    rows = [head]
    for name in widths[width][precisions[0]]["one layer"]:
        cells = [name]
        for precision in precisions:
            one, both = widths[width][precision]["one layer"], widths[width][precision]["q and v"]
            cells += [f"{one[name][task]['ratio']:.2f}" for task in ("forward", "forward_backward")]
            cells.append(f"{both[name]['saved_bytes'] / 1e6:.1f} MB")
        rows.append(cells)
    return rows


def training(result: dict[str, Any]) -> Rows:
    """One row a contestant with the adapter in all layers: speed, memory and loss."""
    settings = result["settings"]
    head = [f"{settings['model'].split(',')[0]}, {settings['precision']}", "real tokens/s"]
    head.append("minilora is")
    head += ["of matrix rate", "peak memory", "validation loss"]
    rows = [head]
    for name, row in result["results"].items():
        if "decoder only" in name:  # `cached` has these
            continue
        other = result["minilora_to_others"].get(name)
        cells = [
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{other['tokens_per_second_median_of_rounds']:.2f}x as fast" if other else "",
            f"{row['share_of_matrix_rate']:.0%}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            f"{row['validation_loss']:.3f}",
        ]
        rows.append(cells)
    return rows


def cached(result: dict[str, Any]) -> Rows:
    """The encoder computed once: the ratio to adapters on all q and v, and at equal targets."""
    ratios = result.get("cached_to_others")
    if not ratios:
        return []
    measures = {
        MEDIAN: ("speed after the first epoch", "{:.2f}x"),
        "speed_of_three_epochs": ("of three epochs", "{:.2f}x"),
        "memory": ("peak memory", "{:.2f}"),
        "validation_loss": ("validation loss", "{:.3f}"),
    }
    rows = [[f"relative to, {result['settings']['precision']}"]]
    for title, _ in measures.values():
        rows[0] += [f"{title}: all q and v", "decoder only"]
    for name in ratios:
        equal = with_equal_targets(name)
        if equal != name and equal in ratios:
            found = [
                (ratios[n][key], form) for key, (_, form) in measures.items() for n in (name, equal)
            ]
            rows.append([name, *(form.format(ratio) for ratio, form in found)])
    return rows


def with_equal_targets(name: str) -> str:
    """The contestant with adapters in the decoder only; a name without one is unchanged."""
    if name == "minilora":
        return "minilora, decoder only"
    return name.replace("PEFT + ", "PEFT, decoder only + ")


def times(row: dict[str, Any], other: dict[str, Any]) -> float:
    """The median over the parts of the dialogues: the time of one, of the other's."""
    pairs = zip(row["seconds_of_parts"], other["seconds_of_parts"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def evaluation(result: dict[str, Any]) -> Rows:
    """One row a model, precision and contestant."""
    once = "minilora, base and fine-tuned model, encoder computed once"
    rows = [["", "dialogues/s", "time / minilora's", "time / one encoder for both models"]]
    rows[0] += ["the same summaries", "peak memory"]
    for model, precisions in result["results"].items():
        for precision, contestants in precisions.items():
            for name, row in contestants.items():
                cells = [f"{model}, {precision}: {name}", f"{row['dialogues_per_second']:.2f}"]
                cells.append(f"{row['times_minilora_median']:.2f}")
                both = contestants.get(once)
                cells.append(f"{times(row, both):.2f}" if both else "")
                cells.append(f"{row['same_texts_as_minilora']:.1%}")
                rows.append([*cells, f"{row['peak_bytes'] / 2**30:.2f} GiB"])
    return rows


def gpu_training(result: dict[str, Any]) -> Rows:
    """One row a contestant of benchmarks/gpu.py: speed, ratios of the rounds, and memory."""
    if not result.get("results"):  # skipped, or failed before the first round
        return []
    about = result["about"]
    head = [f"BART-large's dimensions, {about['precision']}, batch {about['batch']}"]
    head += ["real tokens/s", "minilora is", "cached, decoder only, is", "peak memory"]
    rows = [head]
    for name, row in result["results"].items():
        cells = [name, f"{row['tokens_per_second']:,.0f}"]
        for ours in ("minilora", "cached"):
            ratio = row.get(f"{ours}_times_as_fast")
            cells.append(f"{ratio:.2f}x as fast" if ratio else "")
        rows.append([*cells, f"{row['peak_bytes'] / 2**30:.2f} GiB"])
    return rows


def quality(result: dict[str, Any]) -> Rows:
    """One row a contestant: final loss and time."""
    settings = result["settings"]
    head = [f"pocket-bart on {settings['data']['name']}, rate {settings['learning_rate']:g}"]
    head += ["validation loss", "training", "time to an equal loss"]
    rows = [[*head, "relative to the encoder computed once"]]
    for name, row in result["results"].items():
        once = result.get("beside_cached", {}).get(name, {})
        ratios = [found.get("times_minilora_to_equal_loss") for found in (row, once)]
        cells = [name, f"{row['final_loss']:.3f}", f"{row['seconds']:.0f} s"]
        rows.append([*cells, *(f"{ratio:.2f} x minilora's" if ratio else "" for ratio in ratios)])
    return rows


def qlora_speed(result: dict[str, Any]) -> Rows:
    """Quantizing and dequantizing compared with bitsandbytes, one row a dtype."""
    rows = [["a base in NF4, double quantization", "", "relative to"]]
    for task in ("quantize", "dequantize"):
        for dtype in ("fp32", "bf16"):
            found = [f for name, f in result["conversion"].items() if dtype in name]
            ratios = [figures[task]["minilora"]["ratio"] for figures in found]
            cell = f"{min(ratios):.2f} to {max(ratios):.2f}"
            rows.append([f"time to {task}, {dtype}", cell, "bitsandbytes, BART-large's shapes"])
    return rows


def qlora(result: dict[str, Any]) -> Rows:
    """Speed, size and error of a base in four bits, one figure a row."""
    rows = qlora_speed(result)
    ratios = [figures["QLoRA"]["ratio"] for figures in result["step"].values()]
    tokens = f"LoRA on a bf16 base, {result['settings']['tokens']:,} tokens"
    rows.append(["training step of a layer", f"{min(ratios):.3f} to {max(ratios):.3f}", tokens])
    rows.append(["bits per weight", f"{result['bits']['double']:.3f}", "32"])
    mean = result["error"]["mean"]
    others = f"int4 {mean['int4']:.3f}, int8 {mean['int8']:.4f}"
    rows.append(["error, of a weight's norm", f"{mean['NF4, double quantization']:.3f}", others])
    if loading := result.get("loading"):
        read, whole = loading["layer by layer"], loading["whole"]
        sizes = [f"{read[key] / 1e6:,.0f} MB" for key in ("after", "tensor_bytes", "peak_bytes")]
        rows.append(["BART-large's linears", sizes[0], f"{read['before'] / 1e6:,.0f} MB in fp32"])
        rows.append(["the whole model", sizes[1], f"{whole['tensor_bytes'] / 1e6:,.0f} MB in fp32"])
        rows.append(["peak while it is read", sizes[2], f"{whole['peak_bytes'] / 1e6:,.0f} MB"])
    return rows


def qlora_quality(result: dict[str, Any]) -> Rows:
    """One row a method: test scores over the seeds."""
    count = len(result["seeds"])
    minutes = "minutes" if result["jobs"] == 1 else "minutes, side by side"
    head = [f"mean of {count} seeds", "ROUGE-1", "±", "minus QLoRA's", "ROUGE-2", "ROUGE-L"]
    rows = [[*head, minutes, "peak"]]
    for name, figures in result["means"].items():
        scores = figures["finetuned"]
        row = [name, f"{scores['rouge1']:.2f}", f"{figures['rouge1_deviation']:.2f}"]
        change, low, high = figures["less_qlora"]
        row.append("" if name == "QLoRA" else f"{change:+.2f} [{low:+.2f}, {high:+.2f}]")
        row += [f"{scores['rouge2']:.2f}", f"{scores['rougeL']:.2f}"]
        rows.append([*row, f"{figures['minutes']:.1f}", f"{figures['peak_bytes'] / 1e6:,.0f} MB"])
    return rows


def nf4_parity(result: dict[str, Any]) -> Rows:
    """One row a dtype: how many values are compared, and how many differ."""
    names = ["codes", "absmax", "scales", "offset", "dequantized", "forward", "input_gradient"]
    other = f"differing from bitsandbytes {result['bitsandbytes']}"
    rows = [[f"{other}, BART-large's shapes", "values", *(n.replace("_", " ") for n in names)]]
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["dtype"] == dtype]
        counts = (sum(row["differing"].get(name, 0) for row in found) for name in names)
        values = sum(row["values"] for row in found if row["double"])  # each counts once
        rows.append([dtype, f"{values:,}", *(f"{count:,}" for count in counts)])
    return rows


def by_heart(result: dict[str, Any]) -> Rows:
    """One row a method and rate: the loss of 32 chats before and after training on them."""
    rows = [["", "trained parameters", "learning rate", "steps", "loss before", "after"]]
    for row in result["rows"]:
        mlp = f", MLP of {row['hidden']}" if row["hidden"] else ""
        size = "" if row["method"] == "lora" else f" of {row['length']}{mlp}"
        name = "LoRA r 8, q/v" if row["method"] == "lora" else row["method"]
        losses = f"{row['start']:.3f}", f"{row['end']:.4f}"
        rate, steps = f"{row['rate']:g}", str(row["steps"])
        rows.append([name + size, f"{row['trainable']:,}", rate, steps, *losses])
    return rows


def startup(result: dict[str, Any]) -> Rows:
    """One row a command: until the process ends; after Ctrl-C, from the signal on."""
    bound = result["settings"]["bound"]
    rows = [["", "seconds", f"at most {bound:.2f}"]]
    for name, figures in result["results"].items():
        seconds = figures["median_seconds"]
        rows.append([name, f"{seconds:.2f}", "yes" if seconds <= bound else "no"])
    return rows


def at_its_best(training: dict[str, Any]) -> str:
    """The faster of the two ways to run PEFT with the Trainer as well as it can be run."""
    rows = training["results"]
    names = [name for name in rows if name.startswith("PEFT + Trainer, best")]
    return max(names, key=lambda name: float(rows[name]["tokens_per_second"]))


def beside_peft(
    training: dict[str, Any], evaluation: dict[str, Any], exactness: dict[str, Any]
) -> Rows:
    """One row a measure: minilora, PEFT with the Trainer as people run them, and at their best."""
    best = at_its_best(training)
    names = ("minilora", "PEFT + Trainer", best)
    trained = [training["results"][name] for name in names]
    decoder = ["minilora, decoder only, cached"]
    decoder += [with_equal_targets(name) for name in (names[1], best)]
    once = [f"{training['results'][name]['tokens_per_second']:,.0f}" for name in decoder]
    summarized = evaluation["results"]["pocket"]["fp32"]
    rates = {name: row["dialogues_per_second"] for name, row in summarized.items()}
    default = next(rate for name, rate in rates.items() if name.startswith("PEFT"))
    tuned = [rate for name, rate in rates.items() if "sorted by length" in name]
    speeds = (rates["minilora"], default, max(tuned, default=None))
    changed = {
        name: row["bf16"]["drift_other_adapters"]["100"]["changed"]
        for name, row in exactness["results"].items()
    }
    least = min(share for name, share in changed.items() if name.startswith("PEFT"))
    shares = (changed["minilora"], changed["PEFT"], least)
    return [
        ["", "minilora", "PEFT + Trainer", "PEFT + Trainer, tuned"],
        [
            "training, BART-base's size, random weights, tokens per second",
            *(f"{row['tokens_per_second']:,.0f}" for row in trained),
        ],
        ["the same with adapters in the decoder only, after the first epoch", *once],
        ["peak memory of training", *(f"{row['peak_bytes'] / 2**30:.2f} GiB" for row in trained)],
        ["validation loss after training", *(f"{row['validation_loss']:.3f}" for row in trained)],
        [
            "summarizing with pocket-bart, dialogues per second (Trainer: with the loss)",
            *("–" if speed is None else f"{speed:.1f}" for speed in speeds),
        ],
        [
            "bf16 weights changed by 100 merges and unmerges, each of another adapter",
            *(f"{s:.1%}" for s in shares),
        ],
    ]


# What a table reads, where that is not the one result of its name.
READS = {
    "beside_peft": ("training_base", "evaluation", "exactness"),
    "cached": ("training_base",),
}

TABLES: dict[str, Callable[..., Rows]] = {
    "beside_peft": beside_peft,
    "merge_latency": merge_latency,
    "exactness": exactness,
    "default_run": default_run,
    **{f"ladder_{name}": ladder.table for name in ladder.DATA},
    "layer": layer,
    "layer_cuda": layer,
    "training_base": training,
    "cached": cached,
    "training_large": training,
    "training_base_cuda": training,
    "training_large_cuda": training,
    "gpu_training_8": gpu_training,
    "gpu_training_64": gpu_training,
    "evaluation": evaluation,
    "evaluation_cuda": evaluation,
    "quality": quality,
    "nf4_parity": nf4_parity,
    "nf4_parity_avx2": nf4_parity,
    "qlora": qlora,
    "qlora_avx2": qlora_speed,
    "qlora_quality": qlora_quality,
    "startup": startup,
    "by_heart": by_heart,
}


def beside_the_trainer(
    key: str, form: str, ours: str = "minilora", theirs: Callable[[str], str] = str
) -> str:
    """A ratio to PEFT with the Trainer, as people run it."""
    ratio = load("training_base")[f"{ours}_to_others"][theirs("PEFT + Trainer")][key]
    return f"{ratio:{form}}"


def loss_above() -> str:
    """By how much minilora's loss on real weights is above PEFT's, at equal examples."""
    return f"{load('quality')['results']['PEFT + Trainer']['minilora_loss_relative']:.0%}"


def on_pocket_bart(key: str) -> str:
    """Time of PEFT with the Trainer, of minilora's: of an epoch, or to an equal loss."""
    return f"{load('quality')['results']['PEFT + Trainer'][key]:.1f}"


def drift(key: str) -> str:
    """The share of bf16 weights that 100 merges and unmerges with PEFT change."""
    return f"{load('exactness')['results']['PEFT']['bf16'][key]['100']['changed']:.0%}"


def rouge(key: str) -> str:
    """ROUGE-1 of the default run, before or after."""
    return f"{load('default_run')[key]['rouge1']:.1f}"


def kills() -> str:
    """How many runs were killed, and how often."""
    faults = load("faults")
    if {faults["identical_adapters"], faults["identical_logs"]} != {faults["runs"]}:
        raise SystemExit("results/faults.json: not every run ended like the whole one")
    return f"{faults['runs']} training runs, killed {faults['kills']} times"


FIGURES: dict[str, Callable[[], str]] = {
    "speed": lambda: beside_the_trainer(MEDIAN, ".1f"),
    "speed_cached_equal": lambda: beside_the_trainer(MEDIAN, ".1f", "cached", with_equal_targets),
    "speed_pocket": lambda: on_pocket_bart("times_minilora"),
    "loss_above": loss_above,
    "memory": lambda: beside_the_trainer("memory", ".0%"),
    "drift": lambda: drift("drift_other_adapters"),
    "drift_same": lambda: drift("drift"),
    "kills": kills,
    "minutes": lambda: f"{load('default_run')['whole_process_seconds'] / 60:.0f} minutes",
    "before": lambda: rouge("base"),
    "after": lambda: rouge("finetuned"),
}


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def markdown(rows: Rows) -> str:
    """A table in Markdown: the first row is the head, numbers are aligned to the right."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    rule = f"| --- |{' ---: |' * (len(rows[0]) - 1)}"
    return "\n".join([head, rule, *body])


def source(name: str, result: dict[str, Any], path: str) -> str:
    """The caption: date, hardware, versions and file of the figures."""
    machine = result["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    hardware = machine["gpu"] or f"{machine['processor']}, {threads}"
    return (
        f"Measured {result['date']} on {hardware}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}: [results/{name}.json]({path}/{name}.json)."
    )


def waiting(name: str) -> str:
    """The line in place of a table that is not measured yet."""
    if name.startswith("ladder_"):
        data = name.removeprefix("ladder_").replace("samsum", "../shared/data/samsum")
        runs = (f"`python benchmarks/{script}.py --data {data}`" for script in ("grid", "pocket"))
        return f"Not measured yet: {', then '.join(runs)}."
    if name.endswith("_avx2"):
        script = name.removesuffix("_avx2")
        return f"Not measured yet: `benchmarks/{script}.py` on a processor without AVX-512."
    if name.startswith("gpu_"):
        return "Not measured yet: `python benchmarks/gpu.py --minutes 8`."
    if (Path(__file__).parent / f"{name}.py").exists():
        return f"Not measured yet: `python benchmarks/{name}.py`."
    script, *flags = name.split("_")
    size = "".join(f" --size {flag}" for flag in flags if flag != "cuda")
    device = " --device cuda" if "cuda" in flags else ""
    return f"Not measured yet: `python benchmarks/{script}.py{size}{device}`."


def render(text: str, folder: Path = ROOT) -> str:
    """A page in `folder` with every table and figure as the results say."""
    path = os.path.relpath(RESULTS, folder)  # links lead there from the page

    def table(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- table: {name} -->\n{body(name)}\n<!-- end -->"

    def body(name: str) -> str:
        names = READS.get(name, (name,))
        if not all((RESULTS / f"{name}.json").exists() for name in names):
            return waiting(names[0])
        results: list[Any] = [load(name) for name in names]
        if name.startswith("ladder_"):
            reading = name.replace("ladder", "reading")
            results.append(load(reading) if (RESULTS / f"{reading}.json").exists() else None)
        rows = TABLES[name](*results)
        if not rows:  # a result of an earlier version, without these contestants
            return waiting(names[0])
        text = f"{markdown(rows)}\n\n"
        if len(names) > 1:
            links = ", ".join(f"[{name}]({path}/{name}.json)" for name in names)
            return f"{text}From {links}; [all tables](docs/benchmarks.md) with dates and machines."
        if name.startswith("ladder_"):
            text += f"{ladder.note(*results)}\n\n"
        text += source(names[0], results[0], path)
        if (RESULTS / f"{name}.svg").exists():
            text += f"\n\n![The same as curves]({path}/{name}.svg)"
        return text

    def figure(found: re.Match[str]) -> str:
        return f"<!-- figure: {found.group(1)} -->{FIGURES[found.group(1)]()}<!-- end -->"

    text = re.sub(r"<!-- figure: (\w+) -->.*?<!-- end -->", figure, text, flags=re.DOTALL)
    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wanted = render(text, page.parent)
        if wanted != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in sys.argv:
                page.write_text(wanted, encoding="utf-8")
    if "--check" in sys.argv:
        for page in stale:
            print(f"{page} and benchmarks/results differ: run `make docs`")
        return int(bool(stale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
