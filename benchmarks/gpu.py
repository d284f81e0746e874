"""Everything that needs a GPU, by one command and in the minutes that there are.

    python benchmarks/gpu.py --minutes 8 [--device cuda] [--out DIRECTORY]

In the order of their worth, each written as DIRECTORY/gpu_NAME.json as soon as it is known:

    tests            the tests that need CUDA, in a process of their own
    layer            benchmarks/layer.py's comparison of one q and v
    training_8, _64  a step of BART-large's dimensions at two batch sizes
    waits            lines of a step that wait for the GPU
    evaluation       summaries by the base, the adapter unmerged, and merged
    compiled         the step with compiled layers

Each part has a share of the minutes, and what one leaves over goes to the next. A part that does
not fit is left out and said to be; an error is written in its place and does not stop the next.

All models are in one process, since loading five would take the minutes. They run by turns over the
same batches (the Trainer makes its own), timed by CUDA events. A contestant's memory is the
allocator's peak in its turn less what the others hold. No data set and no network is needed: token
ids are random, their numbers distributed as SAMSum's, since time depends on nothing else.
"""

import contextlib
import copy
import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # an unpacked source tree
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import RESULTS, ROOT, parser, write_result

# Part: share of the time, and least seconds that it needs on a GPU.
SHARES = {
    "tests": (0.25, 12),
    "layer": (0.12, 6),
    "training_8": (0.24, 15),
    "training_64": (0.18, 12),
    "waits": (0.03, 2),
    "evaluation": (0.18, 8),
    "compiled": (0.40, 60),
}
RANK, ALPHA, DROPOUT, RATE = 8, 32, 0.05, 1e-3
TESTS = [
    "tests/test_layer.py::test_a_merged_layer_moved_to_a_device_and_back_unmerges_exactly",
    "tests/test_cuda.py",
]
# facebook/bart-large's config.json, what BartConfig does not have by itself included.
LARGE = {
    "vocab_size": 50265,
    "d_model": 1024,
    "max_position_embeddings": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "activation_function": "gelu",
    "init_std": 0.02,
    "scale_embedding": False,
    **{f"{side}_layers": 12 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 16 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 4096 for side in ("encoder", "decoder")},
}
TINY = LARGE | {
    "vocab_size": 1000,
    "d_model": 64,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
}
# SAMSum under BART's tokenizer: share of the examples, tokens. Between them linear.
SOURCE = [(0.0, 12), (0.5, 121), (0.9, 294), (0.99, 511), (1.0, 800)]
TARGET = [(0.0, 6), (0.5, 24), (0.9, 47), (0.99, 70), (1.0, 94)]
PAD, BOS, EOS = 1, 0, 2


# Time ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What all parts are told, and the clock."""

    device: str
    minutes: float
    out: Path
    small: bool
    start: float = field(default_factory=time.monotonic)
    left: list[str] = field(default_factory=lambda: list(SHARES))
    report: dict[str, str] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.start)

    def part(self, name: str, work: Callable[[float], dict[str, Any] | None]) -> None:
        """Give a part its share of what is left and write what it returns, or why it is absent."""
        left = self.seconds_left()
        whole = sum(SHARES[other][0] for other in self.left)
        # Nothing is kept back for a part that would not fit anyway.
        share, least = SHARES[name]
        fitting = [o for o in self.left if left * SHARES[o][0] / whole >= SHARES[o][1]]
        seconds = left * share / sum(SHARES[other][0] for other in {name, *fitting})
        self.left.remove(name)
        least = least if self.cuda else 1
        if seconds < least:
            why = f"skipped: needs {least} s, and its share of the {left:.0f} s left is"
            self.finish(name, {"skipped": f"{why} {max(0, seconds):.0f} s"}, 0.0)
            return
        began = time.monotonic()
        try:
            result = work(began + seconds) or {}
        except Exception as error:  # also out of memory: the next part is another matter
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
            result["traceback"] = traceback.format_exc()[-4000:]
        self.finish(name, result, time.monotonic() - began)
        release()

    def finish(self, name: str, result: dict[str, Any], seconds: float) -> None:
        state = result.get("skipped") or result.get("error") or "measured"
        self.report[name] = f"{state} ({seconds:.1f} s)"
        self.write(name, {**result, "seconds_of_part": round(seconds, 1)})
        print(f"== {name}: {self.report[name]}; {self.seconds_left():.0f} s left", flush=True)

    def write(self, name: str, result: dict[str, Any]) -> Path:
        told = {"device": self.device, "minutes": self.minutes, "small": self.small}
        content = {"settings": told, "driver": driver(), **result}
        return write_result(f"gpu_{name}", content, folder=self.out)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def driver() -> dict[str, Any]:
    """Of the GPU: card, driver, memory, and the CUDA that torch was built for."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        version = found.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        version = "unknown"
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": version,
        "cuda": torch.version.cuda,
    }


def timed(device: str, run: Callable[[], object]) -> float:
    """Seconds from the first kernel to the end of the last, waits between them included."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


# Tests --------------------------------------------------------------------------------------------


class Tests:
    """pytest in a process of its own; it runs while this one imports and makes its models."""

    def __init__(self) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*command, *TESTS],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def result(self, deadline: float) -> dict[str, Any]:
        ended = True
        try:
            self.process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            ended = False
            self.end()
        seconds = time.monotonic() - self.began
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        pattern = r"^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
        found = dict(re.findall(pattern, text, re.MULTILINE))
        counts = dict(Counter(found.values()))
        print(text[-3000:] if counts.keys() - {"PASSED", "SKIPPED"} else "", end="")
        print(f"tests: {counts}" + ("" if ended else ", stopped at the time limit"))
        return {
            "counts": counts,
            "ended": ended,
            "exit_code": self.process.returncode if ended else None,
            "seconds": round(seconds, 1),
            "tests": found,
            "output": text[-6000:],
        }

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# Layer --------------------------------------------------------------------------------------------


def layers(run: Run, deadline: float) -> dict[str, Any]:
    import layer

    options = SimpleNamespace(device=run.device, rounds=11, warmup=3, repeat=5)
    shapes = [(1024, 1024, 1024), (1024, 1024, 16384), (768, 3072, 1024), (768, 3072, 16384)]
    if run.small:
        options.rounds, options.repeat = 2, 1
        shapes = [(64, 64, 64), (64, 128, 64)]
    results: dict[str, Any] = {}
    notes: list[str] = []
    for width, out, tokens in shapes:
        for precision in ("bf16 autocast", "bf16"):
            name = f"{width} -> {out}, {tokens} tokens, {precision}"
            if time.monotonic() > deadline:
                notes.append(f"{name}: left out, the time of this part was over")
                continue
            rows, missing = layer.measure(width, tokens, precision, 2, options, out)
            results[name] = rows
            notes += [note for note in missing if note not in notes]
            for contestant in (
                "PEFT, dropout",
                "minilora, eager, dropout",
                "minilora, fused, dropout",
            ):
                row = rows[contestant]
                print(
                    f"{name:40} {contestant:24} "
                    f"{row['forward_backward']['ratio']:5.2f} x the frozen layer's time, "
                    f"saved {row['saved_bytes'] / 1e6:7.1f} MB, "
                    f"peak {row.get('peak_bytes', 0) / 1e6:7.1f} MB"
                )
            run.write("layer", {"results": results, "notes": notes})
    print(*notes, sep="\n")
    about = {"layers": "q and v, which read one input", "rank": RANK, "dropout": layer.DROPOUT}
    return {"about": about, "results": results, "notes": notes}


# Data and models ----------------------------------------------------------------------------------


def examples(count: int, vocabulary: int, scale: float = 1.0, seed: int = 0) -> list[Any]:
    """Random token ids; lengths distributed as SAMSum's, long dialogues with long summaries.

    Args:
        count: of examples.
        vocabulary: of ids.
        scale: of the lengths, 1 for SAMSum's.
        seed: of lengths and ids.
    """
    from minilora.summarization.data.batches import Encoded

    normal = statistics.NormalDist()
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 2, generator=generator)
    z[:, 1] = 0.6 * z[:, 0] + 0.8 * z[:, 1]  # correlation 0.6

    def length(share: float, quantiles: Sequence[tuple[float, int]]) -> int:
        (low, a), (high, b) = next(pair for pair in pairwise(quantiles) if share <= pair[1][0])
        return max(3, round(scale * (a + (b - a) * (share - low) / (high - low))))

    def ids(number: int) -> list[int]:
        inner = torch.randint(4, vocabulary, (number - 2,), generator=generator)
        return [BOS, *inner.tolist(), EOS]

    return [
        Encoded(
            str(i),
            ids(length(normal.cdf(a), SOURCE)),
            ids(length(normal.cdf(b), TARGET)),
        )
        for i, (a, b) in enumerate(z.tolist())
    ]


def make_bart(run: Run) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(**(TINY if run.small or not run.cuda else LARGE))
    with torch.device(run.device):  # 406 million random weights: a second on a GPU
        model = BartForConditionalGeneration(config)
    return model.to(run.device).eval()


class Ids:
    """What the step and `summarize` ask of a tokenizer; texts are ids."""

    pad_token_id = PAD
    all_special_ids = (PAD, EOS)

    def __call__(self, text_target: list[str], **_: Any) -> dict[str, Any]:
        """A target ends with EOS, and nothing begins it."""
        rows = [[EOS + 1, EOS] if text else [EOS] for text in text_target]
        return {"input_ids": rows, "special_tokens_mask": [[0] * len(row) for row in rows]}

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [" ".join(str(i) for i in row if i > EOS) for row in rows.tolist()]


# Training -----------------------------------------------------------------------------------------

Group = list[list[Any]]  # the batches of one optimizer step


@dataclass
class Contestant:
    """A model ready to train, by steps that it is given or by windows of its own making."""

    model: Any
    step: Callable[[Group], object] | None = None
    window: Callable[[int], tuple[float, int]] | None = None
    """Of so many steps: seconds, and real tokens."""
    held: int = 0
    """Bytes that are allocated for it between its turns."""


def with_minilora(run: Run, base: Any, rows: Any, batch: int, **settings: Any) -> Contestant:
    """train.py's loop: its Session, made by hand for want of files, and its Trainer's step."""
    import minilora
    from minilora import LoRAConfig
    from minilora.summarization.settings import RunConfig
    from minilora.summarization.training.session import Session, Split, prepare
    from minilora.summarization.training.trainer import Trainer

    flags = {
        "precision": "bf16",
        "device": run.device,
        "batch_size": batch,
        "learning_rate": RATE,
        "warmup": 0.0,
        "epochs": 10**6,
        "max_steps": 10**6,
        "checkpoint_minutes": 1e9,
        "evaluate": False,
        **settings,
    }
    config, device = RunConfig.from_dict(flags), torch.device(run.device)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    adapter = LoRAConfig(rank=RANK, alpha=ALPHA, dropout=DROPOUT, targets=("q_proj", "v_proj"))
    report = minilora.inject(model, adapter)
    prepare(model, config, torch.bfloat16)
    session = Session(
        run=config,
        device=device,
        autocast_dtype=torch.bfloat16,
        model=model,
        tokenizer=Ids(),  # type: ignore[arg-type]
        splits={"train": Split([], rows)},
        report=report,
        notices=[],
        origin={},
    )
    trainer = Trainer(session, Path(tempfile.mkdtemp()) / "run")
    return Contestant(model, trainer.step)


def peft_model(base: Any, dtype: torch.dtype | None = None) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=["q_proj", "v_proj"],
        task_type="SEQ_2_SEQ_LM",
    )
    model = copy.deepcopy(base)
    return peft.get_peft_model(model if dtype is None else model.to(dtype), config)


def in_a_loop(run: Run, model: Any, rate: float = RATE) -> Contestant:
    """A plain loop as one writes it: the model's own loss, clipping, fused AdamW."""
    from minilora.summarization.data.batches import collate

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)

    def step(group: Group) -> None:
        optimizer.zero_grad(set_to_none=True)
        for rows in group:
            batch = {key: t.to(run.device) for key, t in collate(rows, PAD).items()}
            with torch.autocast(torch.device(run.device).type, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return Contestant(model, step)


def with_trainer(run: Run, base: Any, rows: Any, batch: int) -> Contestant:
    """PEFT and Seq2SeqTrainer as people run it: shuffled, padded to the longest of the batch."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    from minilora.summarization.data.batches import collate

    model, device, warmup = peft_model(base), run.device, 2

    def window(steps: int) -> tuple[float, int]:
        """A short training of its own, of which the first two steps are not timed."""
        tokens: list[int] = []
        marks: list[Any] = []

        def pad(chosen: Any) -> dict[str, torch.Tensor]:
            tokens.append(sum(len(row.source) + len(row.target) for row in chosen))
            return collate(chosen, PAD)

        class Clock(TrainerCallback):
            def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                if state.global_step in (warmup, warmup + steps):
                    marks.append(mark(device))

        arguments = Seq2SeqTrainingArguments(
            output_dir=tempfile.mkdtemp(),
            use_cpu=not run.cuda,
            bf16=True,
            per_device_train_batch_size=batch,
            max_steps=warmup + steps,
            learning_rate=RATE,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=run.cuda,
            seed=window.turn,  # type: ignore[attr-defined]
        )
        window.turn += 1  # type: ignore[attr-defined]
        with contextlib.redirect_stdout(sys.stderr):
            Seq2SeqTrainer(
                model=model,
                args=arguments,
                train_dataset=rows,
                data_collator=pad,
                callbacks=[Clock()],
            ).train()
        for name in ("forward", "_original_forward"):  # autocast, which each training puts on top
            model.__dict__.pop(name, None)
        gc.collect()  # the Trainer's memory
        return between(*marks), sum(tokens[warmup : warmup + steps])

    window.turn = 0  # type: ignore[attr-defined]
    return Contestant(model, window=window)


def mark(device: str) -> Any:
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    event.record()
    return event


def between(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return float(last - first)
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def full(run: Run, base: Any) -> Contestant:
    return in_a_loop(run, copy.deepcopy(base).requires_grad_(True), RATE / 10)


def builders(run: Run, base: Any, rows: Any, batch: int) -> dict[str, Callable[[], Contestant]]:
    found = {
        "minilora": lambda: with_minilora(run, base, rows, batch),
        "PEFT + loop": lambda: in_a_loop(run, peft_model(base)),
        "PEFT + Seq2SeqTrainer": lambda: with_trainer(run, base, rows, batch),
        "PEFT + loop, bf16 weights": lambda: in_a_loop(run, peft_model(base, torch.bfloat16)),
        "full fine-tuning, loop": lambda: full(run, base),
    }
    if not run.cuda:  # all in bf16, LayerNorm raises under a CPU's autocast
        del found["PEFT + loop, bf16 weights"]
    return found


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
        "encoder cache: not built, and so not measured",
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
            "windows": found,
        }
        for name, found in windows.items()
    }
    compare(results, "minilora", notes)
    for name, row in results.items():
        print(
            f"batch {batch:3} {name:28} {row['tokens_per_second']:10,.0f} tokens/s "
            f"{1000 * row['seconds_per_step']:8.1f} ms a step, "
            f"peak {row['peak_bytes'] / 2**30:6.2f} GiB, minilora is "
            f"{row.get('minilora_times_as_fast', 0):5.2f} times as fast"
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
    """Kernels chosen, memory taken; seconds a step."""
    if contestant.window is not None:
        spent, _ = contestant.window(3)
        return spent / 3
    assert contestant.step is not None
    step = contestant.step
    for group in (longest, groups[0]):
        step(group)
    return timed(run.device, lambda: [step(group) for group in groups[1:4]]) / 3


def compare(results: dict[str, Any], ours: str, notes: list[str]) -> None:
    """Speed of ours over each: the median of the rounds' ratios; and of memory."""
    if ours not in results:
        notes.append(f"no ratios: {ours} is missing")
        return

    def speed(window: dict[str, float]) -> float:
        return window["tokens"] / window["seconds"]

    base = results[ours]
    for row in results.values():
        pairs = zip(base["windows"], row["windows"], strict=False)
        row["minilora_times_as_fast"] = statistics.median(speed(a) / speed(b) for a, b in pairs)
        if row["peak_bytes"]:
            row["minilora_share_of_peak"] = base["peak_bytes"] / row["peak_bytes"]


# Waits --------------------------------------------------------------------------------------------


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


# Evaluation ---------------------------------------------------------------------------------------


def first_logits(run: Run, model: Any, rows: Any) -> torch.Tensor:
    from minilora.summarization.data.batches import collate

    batch = {key: t.to(run.device) for key, t in collate(rows, PAD).items()}
    with torch.no_grad(), torch.autocast(torch.device(run.device).type, torch.bfloat16):
        return model(**batch).logits.float()


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def evaluation(run: Run, base: Any, rows: Any, deadline: float) -> dict[str, Any]:
    """The same beam search by the base, by the adapter unmerged and merged, and by PEFT."""
    import minilora
    from minilora import LoRAConfig
    from minilora.summarization.evaluation.generate import summarize
    from minilora.summarization.model.speed import hold_frozen_linears
    from minilora.summarization.settings import GenerationOptions

    began = time.monotonic()
    size, length = (4, 8) if run.small or not run.cuda else (32, 32)
    options = GenerationOptions(
        beams=4, min_length=length, max_length=length, evaluation_batch_size=size
    )
    adapter = LoRAConfig(rank=RANK, alpha=ALPHA, targets=("q_proj", "v_proj"))

    def start(model: Any) -> Any:
        """A and B are random, the same for all, so that the adapter says something."""
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                scale = 0.1 if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return model.requires_grad_(False).eval()

    notes: list[str] = []
    models: dict[str, Any] = {}

    def add(name: str, make: Callable[[], Any]) -> None:
        try:
            models[name] = make()
        except Exception as error:
            traceback.print_exc()
            notes.append(f"{name}: {type(error).__name__}: {error}"[:600])

    def ours(merged: bool) -> Any:
        model = copy.deepcopy(base)
        minilora.inject(model, adapter)
        start(model)
        if merged:
            minilora.unwrap(model)
        hold_frozen_linears(model, torch.bfloat16)
        return model

    def plain() -> Any:
        model = copy.deepcopy(base).requires_grad_(False)
        hold_frozen_linears(model, torch.bfloat16)
        return model

    add("base", plain)
    add("minilora, merged", lambda: ours(True))
    add("minilora, unmerged", lambda: ours(False))
    add("PEFT, unmerged", lambda: start(peft_model(base)))
    tokenizer: Any = Ids()
    chosen = sorted(rows, key=lambda row: len(row.source))[len(rows) // 2 :][:size]
    logits = {name: first_logits(run, model, chosen[:4]) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, list[str]] = {}
    rounds = 2 if run.small else 5
    for i in range(rounds + 1):
        if i > 2 and time.monotonic() + (time.monotonic() - began) / i > deadline:
            notes.append(f"{rounds + 1 - i} of {rounds} rounds left out, the time was over")
            break
        names = list(models)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            written: list[Any] = []

            def write(model: Any = models[name], written: list[Any] = written) -> None:
                written += summarize(model, tokenizer, chosen, options, torch.bfloat16)

            try:
                spent = timed(run.device, write)
            except Exception as error:
                traceback.print_exc()
                notes.append(f"{name}: {type(error).__name__}: {error}"[:600])
                del models[name]
                continue
            texts[name] = [summary.text for summary in written]
            if i:  # the first round is warm-up
                seconds[name].append(spent)
    results = {}
    for name in models:
        same = [a == b for a, b in zip(texts[name], texts["base"], strict=True)]
        median = statistics.median(seconds[name])
        results[name] = {
            "dialogues_per_second": size / median,
            "seconds": seconds[name],
            "times_the_base": statistics.median(
                a / b for a, b in zip(seconds[name], seconds["base"], strict=True)
            ),
            "same_texts_as_the_base": sum(same) / len(same),
            "logits_differ_from_the_base_by": apart(logits[name], logits["base"]),
            "logits_differ_from_merged_by": apart(logits[name], logits["minilora, merged"]),
        }
        print(
            f"{name:24} {size / median:8.2f} dialogues/s "
            f"{results[name]['times_the_base']:5.2f} x the base's time, "
            f"logits differ from the base's by "
            f"{results[name]['logits_differ_from_the_base_by']:.4f}, from the merged model's by "
            f"{results[name]['logits_differ_from_merged_by']:.4f}"
        )
    print(*notes, sep="\n")
    about = {
        "batch": size,
        "beams": 4,
        "tokens_of_a_summary": length,
        "precision": "bf16 autocast; minilora and the base hold linears in bf16, PEFT as people do",
        "logits": "largest difference, as a share of the largest logit; B is random",
    }
    return {"about": about, "results": results, "notes": [*notes, "encoder cache: not built"]}


# Compiled -----------------------------------------------------------------------------------------


def compiled(run: Run, base: Any, rows: Any, deadline: float) -> dict[str, Any]:
    """The step of minilora with compiled layers beside the eager one, batch 8."""
    if not run.cuda:
        return {"skipped": "skipped: needs CUDA"}
    groups = groups_of(rows, 8)
    pair = {
        "minilora": with_minilora(run, base, rows, 8),
        "minilora, compiled": with_minilora(run, base, rows, 8, compile=True),
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
    return {"results": results, "notes": ["encoder cache: not built"]}


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(device="cuda")
    flags.add_argument("--minutes", type=float, default=8.0, help="in all")
    flags.add_argument("--out", type=Path, default=None, help="directory; benchmarks/results")
    flags.add_argument("--parts", nargs="+", default=list(SHARES), choices=SHARES)
    options = flags.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "--device cuda: torch finds no GPU here; --device cpu tries the script", file=sys.stderr
        )
        sys.exit(2)
    small = options.small or not options.device.startswith("cuda")  # a CPU's figures say nothing
    out = options.out or (RESULTS / "small" if small else RESULTS)
    run = Run(options.device, options.minutes, out, small)
    run.left = [name for name in SHARES if name in options.parts]
    tests = Tests() if "tests" in run.left else None
    try:
        works = {"layer": lambda deadline: layers(run, deadline)}
        base = rows = None
        try:
            base = make_bart(run)
            rows = (
                examples(128, base.config.vocab_size, 0.25)
                if small
                else examples(4096, base.config.vocab_size)
            )
        except Exception:  # then each part that needs them says so
            traceback.print_exc()
        works |= {
            "training_8": lambda deadline: training(run, base, rows, 8, deadline),
            "training_64": lambda deadline: training(
                run, base, rows, 16 if small else 64, deadline
            ),
            "waits": lambda deadline: waits(run, base, rows, deadline),
            "evaluation": lambda deadline: evaluation(run, base, rows, deadline),
            "compiled": lambda deadline: compiled(run, base, rows, deadline),
        }
        print(f"ready after {time.monotonic() - run.start:.1f} s", flush=True)
        for name in list(run.left):
            run.part(name, tests.result if tests and name == "tests" else works[name])
    finally:
        if tests is not None:
            tests.end()
    print(*(f"{name}: {state}" for name, state in run.report.items()), sep="\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
