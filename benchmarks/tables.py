"""Write the tables of README.md anew from benchmarks/results/*.json.

    python benchmarks/tables.py            write them
    python benchmarks/tables.py --check    exit code 1 if one is not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Figures are never typed by hand.
Where there is no result yet, a line says what would measure it.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Rows = list[list[str]]


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
    """One row a library: how far merged weights and unmerged ones are from what they should be."""
    rows = [["", "bf16", "fp16", "1 cycle", "10 cycles", "100 cycles"]]
    for name, figures in result["results"].items():
        wrong = [f"{figures[dtype]['not_nearest']:.3%}" for dtype in ("bf16", "fp16")]
        drift = figures["bf16"]["drift_other_adapters"]
        rows.append([name, *wrong, *(f"{drift[n]['changed']:.1%}" for n in ("1", "10", "100"))])
    return rows


def default_run(result: dict[str, Any]) -> Rows:
    """One row: what `python train.py --rank 8` gained."""
    rows = [["", "ROUGE-1", "ROUGE-2", "ROUGE-L", "tokens"]]
    scores = {key: result[key] for key in ("base", "finetuned")}
    names = {"base": "pocket-bart as it ships", "finetuned": "with LoRA, rank 8"}
    measures = ("rouge1", "rouge2", "rougeL", "gen_len")
    rows += [[names[key], *(f"{scores[key][m]:.1f}" for m in measures)] for key in names]
    difference = result["intervals"]["difference"]
    cells = [f"{d[0]:+.1f} [{d[1]:+.1f}, {d[2]:+.1f}]" for d in map(difference.get, measures)]
    return [*rows, ["difference, 95% interval", *cells]]


def pocket(result: dict[str, Any]) -> Rows:
    """One row a method: test scores over the seeds, and what training took."""
    measures = ("rouge1", "rouge2", "rougeL")
    count = len(result["per_dialogue"]["ids"])
    head = [f"{count} test dialogues of {result['data']}", "trainable"]
    head += ["ROUGE-1", "ROUGE-2", "ROUGE-L", "gain, 95% interval", "minutes, one core"]
    rows = [head]
    for name in ("lead", "base"):
        title = {"lead": "the first three turns, copied", "base": "pocket-bart as it ships"}[name]
        means = [f"{result[name]['intervals'][m][0]:.1f}" for m in measures]
        rows.append([title, "", *means, "", ""])
    for row in result["rows"]:
        means = [f"{row['intervals'][m][0]:.1f}" for m in measures]
        gain, low, high = row["gain"]["rouge1"]
        minutes = sum(row["minutes"]) / len(row["minutes"])
        cells = [row["name"], f"{row['trainable']:,}", *means]
        rows.append([*cells, f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]", f"{minutes:.1f}"])
    return rows


def layer(result: dict[str, Any]) -> Rows:
    """One row a contestant: forward and backward beside the frozen layer's, and what is kept."""
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
    """One row a contestant: speed, memory and loss over the same examples."""
    head = [result["settings"]["model"].split(",")[0], "real tokens/s", "minilora is"]
    head += ["of matrix rate", "peak memory", "validation loss"]
    rows = [head]
    for name, row in result["results"].items():
        other = result["minilora_to_others"].get(name)
        cells = [
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{other['speed']:.2f}x as fast" if other else "",
            f"{row['share_of_matrix_rate']:.0%}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            f"{row['validation_loss']:.3f}",
        ]
        rows.append(cells)
    return rows


def evaluation(result: dict[str, Any]) -> Rows:
    """One row a model, precision and contestant."""
    rows = [["", "dialogues/s", "time beside minilora's", "the same summaries", "peak memory"]]
    for model, precisions in result["results"].items():
        for precision, contestants in precisions.items():
            for name, row in contestants.items():
                cells = [f"{model}, {precision}: {name}", f"{row['dialogues_per_second']:.2f}"]
                cells += [f"{row['times_minilora']:.2f}", f"{row['same_texts_as_minilora']:.1%}"]
                rows.append([*cells, f"{row['peak_bytes'] / 2**30:.2f} GiB"])
    return rows


def quality(result: dict[str, Any]) -> Rows:
    """One row a contestant: where it ended, and how long it took."""
    rows = [["pocket-bart on minichat", "validation loss", "training", "time to an equal loss"]]
    for name, row in result["results"].items():
        equal = row["times_minilora_to_equal_loss"]
        cells = [name, f"{row['final_loss']:.3f}", f"{row['seconds']:.0f} s"]
        rows.append([*cells, f"{equal:.2f} x minilora's" if equal else ""])
    return rows


def qlora_speed(result: dict[str, Any]) -> Rows:
    """Quantizing and dequantizing beside bitsandbytes, a dtype a row."""
    rows = [["a base in NF4, double quantization", "", "beside"]]
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
    rows.append(["bits a weight", f"{result['bits']['double']:.3f}", "32"])
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
    head = [f"mean of {count} seeds", "ROUGE-1", "±", "less QLoRA's", "ROUGE-2", "ROUGE-L"]
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
    """One row a dtype: how many values were compared, and how many numbers differ."""
    names = ["codes", "absmax", "scales", "offset", "dequantized", "forward", "input_gradient"]
    other = f"differing from bitsandbytes {result['bitsandbytes']}"
    rows = [[f"{other}, BART-large's shapes", "values", *(n.replace("_", " ") for n in names)]]
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["dtype"] == dtype]
        counts = (sum(row["differing"].get(name, 0) for row in found) for name in names)
        values = sum(row["values"] for row in found if row["double"])  # each counts once
        rows.append([dtype, f"{values:,}", *(f"{count:,}" for count in counts)])
    return rows


TABLES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "merge_latency": merge_latency,
    "exactness": exactness,
    "default_run": default_run,
    "pocket": pocket,
    "samsum": pocket,
    "layer": layer,
    "layer_cuda": layer,
    "training_base": training,
    "training_large": training,
    "training_base_cuda": training,
    "training_large_cuda": training,
    "evaluation": evaluation,
    "evaluation_cuda": evaluation,
    "quality": quality,
    "nf4_parity": nf4_parity,
    "nf4_parity_avx2": nf4_parity,
    "qlora": qlora,
    "qlora_avx2": qlora_speed,
    "qlora_quality": qlora_quality,
}


def markdown(rows: Rows) -> str:
    """The first row is the head; numbers to the right."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    rule = f"| --- |{' ---: |' * (len(rows[0]) - 1)}"
    return "\n".join([head, rule, *body])


def source(name: str, result: dict[str, Any]) -> str:
    """Where the figures come from."""
    machine = result["machine"]
    hardware = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    return (
        f"Measured {result['date']} on {hardware}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}: [results/{name}.json](benchmarks/results/{name}.json)."
    )


def waiting(name: str) -> str:
    """What stands where a table will be."""
    if name == "samsum":
        return "Not measured yet: `benchmarks/pocket.py` with `--data` and `--name samsum`."
    if name.endswith("_avx2"):
        script = name.removesuffix("_avx2")
        return f"Not measured yet: `benchmarks/{script}.py` on a processor without AVX-512."
    if (Path(__file__).parent / f"{name}.py").exists():
        return f"Not measured yet: `python benchmarks/{name}.py`."
    script, *flags = name.split("_")
    size = "".join(f" --size {flag}" for flag in flags if flag != "cuda")
    device = " --device cuda" if "cuda" in flags else ""
    return f"Not measured yet: `python benchmarks/{script}.py{size}{device}`."


def render(text: str) -> str:
    """The README with every table as the results say."""

    def table(found: re.Match[str]) -> str:
        name = found.group(1)
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        if not path.exists():
            return f"<!-- table: {name} -->\n{waiting(name)}\n<!-- end -->"
        result = json.loads(path.read_text())
        body = f"{markdown(TABLES[name](result))}\n\n{source(name, result)}"
        if path.with_suffix(".svg").exists():
            body += f"\n\n![The same as curves](benchmarks/results/{name}.svg)"
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    wanted = render(text)
    if "--check" in sys.argv:
        print(
            "README.md is up to date" if wanted == text else "README.md: run this without --check"
        )
        return int(wanted != text)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
