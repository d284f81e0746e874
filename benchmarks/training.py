"""Speed, memory and loss of fine-tuning a BART on SAMSum.

    python benchmarks/training.py [--size base|large] [--device cuda] [--examples 512]
    python benchmarks/training.py --pieces 4 --most 1      a fourth of it; call it again for more

Contestants: minilora; PEFT + Seq2SeqTrainer as people run it (shuffled, padded to the longest of
the batch); the same at its best (batches of like length, an fp32 or a bf16 base); with
the fixed-length preprocessing of many notebooks (every example 1,024 + 128 tokens); and full
fine-tuning with the Trainer at its best; and minilora and PEFT with adapters in the decoder only,
minilora with the encoder's states computed once before. All run in one precision with the same
weights (random, of BART's dimensions) and, for the same targets, the same start of the adapter, for
one epoch over the same examples. The slowest get fewer batches (column `steps`).

Each contestant has a process of its own. They are loaded one after the other and train in turns,
window by window; the first window is warm-up. Between windows the machine multiplies matrices. The
share of that rate which a step reaches counts real tokens only (benchmarks/flops.py has the
formula).

A measurement in pieces can be interrupted between them. Each piece has other examples of the same
lengths and trains from the start; the windows of all pieces are taken together, the peak is the
highest, and the validation loss is the mean. A call measures the pieces that the file lacks.

Figures: examples per second over all windows, and the median of the windows; real source and target
tokens per second; peak memory of the process after loading; loss per target token on validation
dialogues before and after. Speeds are compared by real tokens, because the examples of the warm-up
differ. Over the same examples both measures agree.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser, write_result
from fine_tuning import BUILDERS, CACHED, DTYPES, Setting, fine_tune, with_windows
from flops import matrix_rate
from turns import Contestant, contestants, rounds
from workplace import DIMENSIONS, require_samsum, samsum_workplace

BASE, PLAIN = "minilora", "minilora, decoder only"
MATRICES = "matrix products"
# The share of the steps that the slowest train for: all their batches have one size.
SHARE = {"PEFT + Trainer, fixed length": 1 / 8, "full fine-tuning, Trainer": 1 / 2}
APART = ("minilora, eager", "minilora, compiled", "minilora, checkpointed")
DEFAULT = [name for name in BUILDERS if name not in APART]


def measure(folder: Path, options: Any, names: list[str], piece: int = 0) -> dict[str, Any]:
    """One piece: the answers of each contestant (start, windows, end), matrix rates, the data."""
    steps = options.examples // options.pieces // options.batch_size
    examples = (steps + options.warmup) * options.batch_size
    sizes = (options.size, examples, options.validation, options.rank, options.dropout, 0)
    data = samsum_workplace(folder, *sizes, (piece + 0.5) / options.pieces)
    setting = Setting(
        folder=folder,
        windows=(),
        device=options.device,
        precision=options.precision,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        rank=options.rank,
        dropout=options.dropout,
        threads=options.threads,
        profile=options.profile,
    )
    works: dict[str, Any] = {}
    for name in names:
        own = max(options.windows, round(steps * SHARE.get(name, 1)))
        told = with_windows(setting, own, options.windows, options.warmup)
        works[name] = (fine_tune, (name, told))
    works[MATRICES] = (matrix_rate, (options.device, DTYPES[options.precision], options.pause))
    with contestants(works) as started:
        check_start(started, data)
        answers = rounds(started, options.windows + 1)
        ends = {name: started[name].turn() for name in names}
    # the first window is warm-up
    rows = {
        name: {"start": started[name].facts, "windows": answers[name][1:], "end": ends[name]}
        for name in names
    }
    return {"rows": rows, "matrix_rates": answers[MATRICES], "data": data}


def together(pieces: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The answers of each contestant in all pieces as one."""
    tokens = sum(
        sum(piece["data"][f"{side}_tokens"].values())
        for piece in pieces
        for side in ("source", "target")
    )
    found = {}
    for name in pieces[0]["rows"]:
        rows = [piece["rows"][name] for piece in pieces]
        cache = sum(row["start"]["cache_seconds"] for row in rows)
        ends = [row["end"] for row in rows]
        peak = max(end["peak_bytes"] for end in ends)
        loss = statistics.mean(end["validation_loss"] for end in ends)
        found[name] = {
            "start": rows[0]["start"] | {"cache_seconds_per_token": cache / tokens},
            "windows": [window for row in rows for window in row["windows"]],
            "end": ends[0] | {"peak_bytes": peak, "validation_loss": loss},
        }
    return found


def check_start(started: Mapping[str, Contestant], data: Mapping[str, Any]) -> None:
    """Check the sizes of the adapters, and that the loss before the first step is equal."""
    losses = {}
    for name, contestant in started.items():
        if name == MATRICES:
            continue
        facts = contestant.facts
        losses[name] = facts["validation_loss"]
        if not name.startswith("full"):
            trainable = data["trainable_decoder" if "decoder only" in name else "trainable"]
            assert facts["trainable"] == trainable, (name, facts["trainable"], trainable)
    first = next(iter(losses.values()))
    # A bf16 base rounds its weights once; autocast rounds those of an fp32 base at each call.
    assert all(abs(loss / first - 1) < 0.002 for loss in losses.values()), losses


def figures(row: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """One contestant in figures."""
    windows, end, start = row["windows"], row["end"], row["start"]
    total = {key: sum(w[key] for w in windows) for key in windows[0] if key != "profile"}
    tokens = total["source_tokens"] + total["target_tokens"]

    def median(*keys: str) -> float:
        return statistics.median(sum(w[key] for key in keys) / w["seconds"] for w in windows)

    return {
        "examples_per_second": total["examples"] / total["seconds"],
        "examples_per_second_median": median("examples"),
        "tokens_per_second": tokens / total["seconds"],
        "tokens_per_second_median": median("source_tokens", "target_tokens"),
        "target_tokens_per_second_median": median("target_tokens"),
        "padding": total["positions"] / tokens,
        "flops_per_example": total["flops"] / total["examples"],
        "share_of_matrix_rate": median("flops") / rate,
        "peak_bytes": end["peak_bytes"],
        "loaded_bytes": start["resident_bytes"],
        "validation_loss_before": start["validation_loss"],
        "validation_loss": end["validation_loss"],
        "adapters_moved": f"{end['adapters_moved']} of {end['adapters']}",
        "trainable": start["trainable"],
        "cache_seconds_per_token": start.get("cache_seconds_per_token", 0.0),
        "steps": total["steps"],
        "examples": total["examples"],
        "target_tokens": total["target_tokens"],
        "threads": start["threads"],
        **({"profile": windows[-1]["profile"]} if "profile" in windows[-1] else {}),
        "windows": [
            {k: round(w[k], 4) for k in ("seconds", "examples", "source_tokens", "target_tokens")}
            for w in windows
        ],
    }


def compare(results: Mapping[str, dict[str, Any]], base: str = BASE) -> dict[str, dict[str, float]]:
    """Ratios of minilora to each contestant; `median` is the median over the rounds.

    `speed_of_three_epochs` counts the time in which the encoder's states are computed once.
    """
    ours = results.get(base)
    if ours is None:
        return {}

    def three_epochs(row: Mapping[str, Any]) -> float:
        """Seconds a token."""
        return float(row["cache_seconds_per_token"] + 3 / row["tokens_per_second"])

    def speed(window: Mapping[str, float]) -> float:
        return (window["source_tokens"] + window["target_tokens"]) / window["seconds"]

    return {
        name: {
            "speed": ours["tokens_per_second"] / other["tokens_per_second"],
            "tokens_per_second_median_of_rounds": statistics.median(
                speed(a) / speed(b) for a, b in zip(ours["windows"], other["windows"], strict=False)
            ),
            "speed_of_three_epochs": three_epochs(other) / three_epochs(ours),
            "memory": ours["peak_bytes"] / max(1, other["peak_bytes"]),
            "validation_loss": ours["validation_loss"] / other["validation_loss"],
        }
        for name, other in results.items()
        if name != base
    }


def finished(path: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """The pieces of an interrupted measurement with the same settings, by number."""
    content = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Any] = content.get("pieces", {})
    if told["pieces"] == 1:
        return {}
    before = content.get("settings", {})
    changed = [key for key, value in told.items() if before.get(key) != value]
    if found and changed:
        print(
            f"{path} has pieces of other {', '.join(changed)}: remove it, or use --name",
            file=sys.stderr,
        )
        sys.exit(2)
    return found


def report(results: Mapping[str, dict[str, Any]]) -> None:
    for name, row in results.items():
        for operation, seconds in list(row.get("profile", {}).items())[:8]:
            print(f"{'':32} {seconds:8.3f} s {operation}")
        print(
            f"{name:45} {row['examples_per_second']:8.2f} examples/s "
            f"{row['tokens_per_second_median']:8,.0f} tokens/s "
            f"{row['peak_bytes'] / 2**30:6.2f} GiB "
            f"loss {row['validation_loss_before']:.3f} -> {row['validation_loss']:.3f} "
            f"{row['share_of_matrix_rate']:6.1%} of the matrix rate"
        )


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--size", default="base", choices=DIMENSIONS, help="BART's dimensions")
    flags.add_argument("--precision", default="bf16", choices=DTYPES)
    flags.add_argument("--examples", type=int, default=512, help="timed, for each contestant")
    flags.add_argument("--pieces", type=int, default=1, help="that share the examples")
    flags.add_argument("--most", type=int, default=0, help="pieces in this call; 0: all")
    flags.add_argument("--validation", type=int, default=128, help="dialogues; 0: all")
    flags.add_argument("--windows", type=int, default=8, help="in each piece")
    flags.add_argument("--warmup", type=int, default=4, help="steps")
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--learning-rate", type=float, default=1e-3)
    flags.add_argument("--rank", type=int, default=8)
    flags.add_argument("--dropout", type=float, default=0.05)
    flags.add_argument("--threads", type=int, default=0, help="of each process; 0: torch's choice")
    flags.add_argument(
        "--contestants", nargs="+", default=DEFAULT, choices=BUILDERS, metavar="NAME"
    )
    flags.add_argument("--pause", type=float, default=1.0, help="seconds for a matrix shape")
    flags.add_argument(
        "--profile", action="store_true", help="seconds by operation; goes to NAME_profile.json"
    )
    flags.add_argument("--name", default=None, help="of the result; training_SIZE_DEVICE")
    options = flags.parse_args()
    require_samsum()
    if options.precision == "fp32":  # without autocast a bf16 linear refuses its input
        options.contestants = [name for name in options.contestants if "bf16" not in name]
    device = "" if options.device == "cpu" else f"_{torch.device(options.device).type}"
    profile = "_profile" if options.profile else ""
    name = options.name or f"training_{options.size}{device}{profile}"
    if options.small:
        options.examples, options.validation, options.windows = 40 * options.pieces, 16, 5
        options.size, options.warmup, options.pause, name = "tiny", 1, 0.05, "training"
    told = {k: v for k, v in vars(options).items() if k not in ("small", "name", "most")}
    pieces = finished((RESULTS / "small" if options.small else RESULTS) / f"{name}.json", told)
    left = [piece for piece in range(options.pieces) if str(piece) not in pieces]
    if not left:
        print("all pieces are measured: remove the file to measure them anew")
    for piece in left[: options.most or None]:
        with tempfile.TemporaryDirectory() as folder:
            pieces[str(piece)] = measure(Path(folder), options, options.contestants, piece)
        write(name, options, told, pieces)


def write(name: str, options: Any, told: Mapping[str, Any], pieces: dict[str, Any]) -> None:
    """The figures of the pieces that are measured."""
    measured = list(pieces.values())
    rates = [answer for piece in measured for answer in piece["matrix_rates"]]
    rate = statistics.median(answer["best"] for answer in rates)
    results = {name: figures(row, rate) for name, row in together(measured).items()}
    report(results)
    settings = {
        **told,
        "model": f"BART-{options.size} dimensions, random weights of seed 0",
        "data": {"name": "SAMSum, stratified by length, seed 0", **measured[0]["data"]},
        "adapter": f"rank {options.rank} on q_proj and v_proj, one start for all",
        "learning_rate_full": options.learning_rate * 0.1,
        "schedule": "linear to 0, one step of warm-up; gradient clipped to 1; AdamW",
        "label_padding": "-100 for all",
        "peak_bytes": "torch's allocator"
        if options.device.startswith("cuda")
        else "resident memory of the process, loading left out",
        "flops": "model FLOPs over real tokens: see benchmarks/flops.py",
    }
    result = {
        "settings": settings,
        "matrix_products": {"median_flops_per_second": rate, "shapes": rates[-1]},
        "results": results,
        "minilora_to_others": compare(results),
        "decoder_only_to_others": compare(results, PLAIN),
        "cached_to_others": compare(results, CACHED),
        "pieces": pieces,
    }
    said = f" ({len(pieces)} of {options.pieces} pieces)" if options.pieces > 1 else ""
    print(f"{write_result(name, result, options.small)}{said}")


if __name__ == "__main__":
    main()
