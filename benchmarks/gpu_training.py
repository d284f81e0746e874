"""The step of each contestant of benchmarks/gpu.py: by turns, eager or compiled; its waits."""

import contextlib
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Run, allocated, release, timed
from gpu_contestants import CACHED, DECODER, Contestant, Group, builders, with_minilora
from gpu_models import ALPHA, DROPOUT, LARGE, PAD, RANK, TINY

OURS = "minilora"


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
    facts: dict[str, dict[str, Any]] = {}
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
                built: Any = build()
            built.held = contestant.held
            facts[name] = {
                "loss_at_the_start": start_loss(run, built.model, rows[:8]),
                "trainable": sum(p.numel() for p in built.model.parameters() if p.requires_grad),
                "cache_seconds": built.cache_seconds,
            }
            with own_memory(built) as peak:
                pace[name] = warm(run, built, longest, groups)
            ready[name], peaks[name] = built, peak[0]
        except Exception as error:  # also out of memory: the next may fit
            traceback.print_exc()
            notes.append(f"{name}: {type(error).__name__}: {error}"[:600])
        built = None  # of a failed one nothing may stay
        release()
    rounds = 3 if run.small else 5
    seconds = max(0.5, deadline - time.monotonic())
    steps = int(seconds / (rounds * sum(pace.values()))) if pace else 0
    steps = max(2, min(steps, 2 if run.small else 20))
    windows: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    results: dict[str, Any] = {}
    for i in range(rounds):
        if i > 1 and time.monotonic() > deadline:
            notes.append(f"{rounds - i} of {rounds} rounds left out, the time was over")
            break
        names, first = list(ready), i % max(1, len(ready))
        own = [groups[(i * steps + j) % len(groups)] for j in range(steps)]
        for name in names[first:] + names[:first]:
            try:
                spent, tokens, most = one_window(run, ready[name], own)
            except Exception as error:
                traceback.print_exc()
                notes.append(f"{name}, round {i + 1}: {type(error).__name__}: {error}"[:600])
                del ready[name]
                release()
                continue
            facts[name]["peak_bytes_with_the_longest_batch"] = (
                None if ready[name].window else max(peaks[name], most)  # the Trainer never got it
            )
            windows[name].append(
                {"seconds": spent, "tokens": tokens, "steps": steps, "peak_bytes": most}
            )
            peaks[name] = max(peaks[name], most)
        results = figures(windows, facts)
        run.partial = {"about": about, "results": results, "notes": notes}
    for name, row in results.items():
        print(
            f"batch {batch:3} {name:28} {row['tokens_per_second']:10,.0f} tokens/s "
            f"{1000 * row['seconds_per_step']:8.1f} ms a step, "
            f"peak {row['peak_bytes'] / 2**30:6.2f} GiB, minilora is "
            f"{row.get('minilora_times_as_fast', 0):5.2f} times as fast, cached "
            f"{row.get('cached_times_as_fast', 0):5.2f}"
        )
    notes += [f"no ratios: {name} is missing" for name in (OURS, CACHED) if name not in results]
    print(*notes, sep="\n")
    return {"about": about, "results": results, "notes": notes}


def one_window(run: Run, contestant: Contestant, groups: list[Group]) -> tuple[float, int, int]:
    """Seconds, real tokens and peak bytes of a turn."""
    with own_memory(contestant) as peak:
        if contestant.window is not None:
            spent, tokens = contestant.window(len(groups))
        else:
            assert contestant.step is not None
            step = contestant.step
            spent = timed(run.device, lambda: [step(group) for group in groups])
            tokens = tokens_of(groups)
    return spent, tokens, peak[0]


def figures(
    windows: Mapping[str, list[dict[str, float]]], facts: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Each contestant that has a window, with its ratios to minilora's."""
    results: dict[str, Any] = {
        name: {
            "tokens_per_second": statistics.median(w["tokens"] / w["seconds"] for w in found),
            "seconds_per_step": statistics.median(w["seconds"] / w["steps"] for w in found),
            "peak_bytes": max(w["peak_bytes"] for w in found),
            **facts[name],
            "windows": found,
        }
        for name, found in windows.items()
        if found
    }
    compare(results, OURS, "minilora")
    compare(results, CACHED, "cached")
    return results


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


def compare(results: dict[str, Any], ours: str, short: str) -> None:
    """Speed of ours over each: the median of the rounds' ratios; and of memory."""
    if ours not in results:
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
        if "called a synchronizing" not in str(message):  # also torch's notice of this mode
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
    makes = {
        OURS: lambda: with_minilora(run, base, rows, 8),
        "minilora, compiled": lambda: with_minilora(run, base, rows, 8, compile=True),
        f"{CACHED}, compiled": lambda: with_minilora(
            run, base, rows, 8, DECODER, "on", compile=True
        ),
    }
    ready: dict[str, Any] = {}
    results: dict[str, Any] = {}
    notes: list[str] = []
    run.partial = {"results": results, "notes": notes}
    for name, make in makes.items():
        if time.monotonic() > deadline:
            notes.append(f"{name}: left out, the time of this part was over")
            continue
        try:
            step: Any = make().step
            began = time.monotonic()
            for group in groups[:4]:
                step(group)
        except Exception as error:
            traceback.print_exc()
            notes.append(f"{name}: {type(error).__name__}: {error}"[:600])
            step = None
            release()
            continue
        ready[name] = step
        results[name] = {"windows": [], "first_four_steps": time.monotonic() - began}
    for i in range(5):
        own = groups[4 + 5 * i : 9 + 5 * i]
        for name, step in list(ready.items()):
            try:
                spent = timed(run.device, lambda step=step, own=own: [step(group) for group in own])
            except Exception as error:
                traceback.print_exc()
                notes.append(f"{name}, round {i + 1}: {type(error).__name__}: {error}"[:600])
                del ready[name]
                continue
            row = results[name]
            row["windows"].append({"seconds": spent, "tokens": tokens_of(own)})
            speeds = (w["tokens"] / w["seconds"] for w in row["windows"])
            row["tokens_per_second"] = statistics.median(speeds)
        if i and time.monotonic() > deadline:
            break
    for name, row in results.items():
        print(
            f"{name:24} {row.get('tokens_per_second', 0):10,.0f} tokens/s, "
            f"the first four steps took {row['first_four_steps']:.1f} s"
        )
    print(*notes, sep="\n")
    return run.partial
