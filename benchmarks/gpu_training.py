"""The step of each contestant of benchmarks/gpu.py: by turns, eager or compiled; its waits."""

import contextlib
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Run, allocated, release, timed
from gpu_contestants import CACHED, DECODER, Contestant, Group, builders, with_minilora
from gpu_models import ALPHA, DROPOUT, LARGE, PAD, RANK, TINY


@contextlib.contextmanager
def own_memory(contestant: Contestant) -> Iterator[list[int]]:
    """The peak inside the block, of this contestant alone; what it holds afterwards is noted."""
    others, peak = allocated() - contestant.held, [0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak[0] = torch.cuda.max_memory_allocated() - others
    contestant.held = allocated() - others


def groups_of(rows: Any, batch: int) -> list[Group]:
    """One epoch in minilora's batches of like length, one batch a step."""
    from minilora.summarization.data.batches import batches

    lengths = [(len(row.source), len(row.target)) for row in rows]
    return [[[rows[i] for i in chosen]] for chosen in batches(lengths, batch, 0, 0)]


def tokens_of(groups: Sequence[Group]) -> int:
    return sum(len(r.source) + len(r.target) for group in groups for b in group for r in b)


def start_loss(run: Run, model: Any, rows: Any) -> float:
    """Nats a target token without dropout: all start as the same function."""
    from minilora.summarization.data.batches import collate

    batch = {key: t.to(run.device) for key, t in collate(rows, PAD).items()}
    mode = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(torch.device(run.device).type, torch.bfloat16):
        loss = float(model(**batch).loss)
    model.train(mode)
    return loss


def training(run: Run, base: Any, rows: Any, batch: int, deadline: float) -> dict[str, Any]:
    """Each contestant by turns, in windows of as many steps as the time allows."""
    began = time.monotonic()
    groups = groups_of(rows, batch)
    longest = max(groups, key=lambda group: max(len(row.source) for row in group[0]))
    ready: dict[str, Contestant] = {}
    pace: dict[str, float] = {}
    peaks: dict[str, int] = {}
    losses: dict[str, float] = {}
    notes = [
        "a ratio to contestants with other targets is not one at equal targets",
        "eager; compiled layers are measured in gpu_compiled.json",
        "PEFT + Seq2SeqTrainer sees the same examples in batches of its own",
    ]
    for name, build in builders(run, base, rows, batch).items():
        if time.monotonic() > began + 0.6 * (deadline - began):
            notes.append(f"{name}: left out, the time of this part was over")
            continue
        try:
            contestant = Contestant(None)
            with own_memory(contestant):
                built = build()
            built.held = contestant.held
            losses[name] = start_loss(run, built.model, rows[:8])
            with own_memory(built) as peak:
                pace[name] = warm(run, built, longest, groups)
            ready[name], peaks[name] = built, peak[0]
        except torch.cuda.OutOfMemoryError as error:
            notes.append(f"{name}: out of memory: {str(error)[:200]}")
        except Exception as error:
            traceback.print_exc()
            notes.append(f"{name}: {type(error).__name__}: {error}"[:600])
        release()
    rounds = 3 if run.small else 5
    seconds = max(0.5, deadline - time.monotonic())
    steps = int(seconds / (rounds * sum(pace.values()))) if pace else 0
    steps = max(2, min(steps, 2 if run.small else 20))
    windows: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    names = list(ready)
    for i in range(rounds):
        if i > 1 and time.monotonic() > deadline:
            notes.append(f"{rounds - i} of {rounds} rounds left out, the time was over")
            break
        own = [groups[(i * steps + j) % len(groups)] for j in range(steps)]
        for name in names[i % len(names) :] + names[: i % len(names)]:
            contestant = ready[name]
            with own_memory(contestant) as peak:
                if contestant.window is not None:
                    spent, tokens = contestant.window(steps)
                else:
                    assert contestant.step is not None
                    step = contestant.step
                    spent = timed(run.device, lambda step=step, own=own: [step(g) for g in own])
                    tokens = tokens_of(own)
            peaks[name] = max(peaks[name], peak[0])
            windows[name].append(
                {"seconds": spent, "tokens": tokens, "steps": steps, "peak_bytes": peak[0]}
            )
    results = {
        name: {
            "tokens_per_second": statistics.median(w["tokens"] / w["seconds"] for w in found),
            "seconds_per_step": statistics.median(w["seconds"] / w["steps"] for w in found),
            "peak_bytes": max(w["peak_bytes"] for w in found),
            "peak_bytes_with_the_longest_batch": peaks[name],
            "loss_at_the_start": losses[name],
            "trainable": sum(p.numel() for p in ready[name].model.parameters() if p.requires_grad),
            "cache_seconds": ready[name].cache_seconds,
            "windows": found,
        }
        for name, found in windows.items()
    }
    compare(results, "minilora", "minilora", notes)
    compare(results, CACHED, "cached", notes)
    for name, row in results.items():
        print(
            f"batch {batch:3} {name:28} {row['tokens_per_second']:10,.0f} tokens/s "
            f"{1000 * row['seconds_per_step']:8.1f} ms a step, "
            f"peak {row['peak_bytes'] / 2**30:6.2f} GiB, minilora is "
            f"{row.get('minilora_times_as_fast', 0):5.2f} times as fast, cached "
            f"{row.get('cached_times_as_fast', 0):5.2f}"
        )
    print(*notes, sep="\n")
    about = {
        "model": "BART of random weights",
        "config": TINY if run.small or not run.cuda else LARGE,
        "adapter": f"rank {RANK}, alpha {ALPHA}, dropout {DROPOUT} on q_proj and v_proj",
        "precision": "bf16 autocast",
        "batch": batch,
        "examples": len(rows),
        "tokens": "real ones of source and target; padding is not counted",
        "timing": "medians of windows that take turns; ratios within a round",
    }
    return {"about": about, "results": results, "notes": notes}


def warm(run: Run, contestant: Contestant, longest: Group, groups: list[Group]) -> float:
    """Kernels chosen, memory taken; seconds per step."""
    if contestant.window is not None:
        spent, _ = contestant.window(3)
        return spent / 3
    assert contestant.step is not None
    step = contestant.step
    for group in (longest, groups[0]):
        step(group)
    return timed(run.device, lambda: [step(group) for group in groups[1:4]]) / 3


def compare(results: dict[str, Any], ours: str, short: str, notes: list[str]) -> None:
    """Speed of ours over each: the median of the rounds' ratios; and of memory."""
    if ours not in results:
        notes.append(f"no ratios: {ours} is missing")
        return

    def speed(window: dict[str, float]) -> float:
        return window["tokens"] / window["seconds"]

    base = results[ours]
    for row in results.values():
        pairs = zip(base["windows"], row["windows"], strict=False)
        row[f"{short}_times_as_fast"] = statistics.median(speed(a) / speed(b) for a, b in pairs)
        if row["peak_bytes"]:
            row[f"{short}_share_of_peak"] = base["peak_bytes"] / row["peak_bytes"]


def waits(run: Run, base: Any, rows: Any, _: float) -> dict[str, Any]:
    """Where a step of minilora waits for the GPU: our innermost line | the line that it calls."""
    if not run.cuda:
        return {"skipped": "skipped: needs CUDA"}
    groups = groups_of(rows, 8)
    contestant = with_minilora(run, base, rows, 8)
    assert contestant.step is not None
    for group in groups[:2]:
        contestant.step(group)
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        own = [f for f in stack if "/minilora/" in f.filename] or stack[-1:]
        inner = next((f for f in reversed(stack) if "/torch/" not in f.filename), stack[-1])
        lines = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in (own[-1], inner)]
        found[" | ".join(dict.fromkeys(lines))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            contestant.step(groups[2])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for line, count in found.most_common():
        print(f"waits {count:3} x {line}")
    return {"in_one_step": dict(found.most_common()), "total": sum(found.values())}


def compiled(run: Run, base: Any, rows: Any, deadline: float) -> dict[str, Any]:
    """The step of minilora with compiled layers beside the eager one, batch 8."""
    if not run.cuda:
        return {"skipped": "skipped: needs CUDA"}
    groups = groups_of(rows, 8)
    pair = {
        "minilora": with_minilora(run, base, rows, 8),
        "minilora, compiled": with_minilora(run, base, rows, 8, compile=True),
        f"{CACHED}, compiled": with_minilora(run, base, rows, 8, DECODER, "on", compile=True),
    }
    first: dict[str, float] = {}
    for name, contestant in pair.items():
        assert contestant.step is not None
        began = time.monotonic()
        for group in groups[:4]:
            contestant.step(group)
        first[name] = time.monotonic() - began
    results: dict[str, Any] = {
        name: {"windows": [], "first_four_steps": first[name]} for name in pair
    }
    for i in range(5):
        own = groups[4 + 5 * i : 9 + 5 * i]
        for name, contestant in pair.items():
            step: Any = contestant.step
            spent = timed(run.device, lambda step=step, own=own: [step(group) for group in own])
            results[name]["windows"].append({"seconds": spent, "tokens": tokens_of(own)})
        if i and time.monotonic() > deadline:
            break
    for name, row in results.items():
        row["tokens_per_second"] = statistics.median(
            w["tokens"] / w["seconds"] for w in row["windows"]
        )
        print(
            f"{name:24} {row['tokens_per_second']:10,.0f} tokens/s, "
            f"the first four steps took {row['first_four_steps']:.1f} s"
        )
    return {"results": results}
