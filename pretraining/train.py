"""Pre-train pocket-bart for a number of minutes or tokens, evaluate it, write its weights.

BART's denoising (Lewis et al. 2020, section 2) and retelling, by the stages of `examples.py`. The
learning rate warms up, is constant, and falls linearly to zero over the last part of the run
(warm-up, stable, decay; Hu et al. 2024, section 4).

    python pretraining/train.py --minutes 9 --device cuda --workers 14
    python pretraining/train.py --minutes 600 --workers 1                  # CPU
    torchrun --nproc-per-node 2 pretraining/train.py --tokens 201 ...      # a process for each core

It writes `log.jsonl` (held-out losses), `samples.txt`, and the weights in 16 bits in parts of at
most 15 MiB with the run's settings; `export.py` makes the shipped directory from them. SIGTERM and
Ctrl-C end the run early and write what there is. `--checkpoint FILE` keeps the whole state every
few minutes, and the same command goes on from it. Several processes read different texts and
average their gradients.
"""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint import read_checkpoint, write_checkpoint
from cpu import use_fast_attention
from model import evaluate, evaluation_batches, loss_of, new_model, new_optimizers, samples
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, distributed
from torch.utils.data import DataLoader, IterableDataset

from examples import ANNEAL, PAD, STAGES, Batch, Source

PART = 15 * 2**20  # bytes of a file of weights


class Stream(IterableDataset[Batch]):
    """Batches without end, of the stage that the shared number names."""

    def __init__(
        self, source: Source, stage: Tensor, seed: tuple[int, ...], rounds: int, size: float
    ) -> None:
        self.source, self.stage, self.seed, self.rounds = source, stage, seed, rounds
        self.size = size

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        if worker:  # a signal to all processes of the run is the loop's to answer
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        rng = np.random.default_rng([*self.seed, worker.id if worker else 0])
        while True:
            number = int(self.stage)
            stage = [*STAGES, ANNEAL][number]
            stage = replace(stage, budget=int(self.size * stage.budget))
            rounds = self.rounds if number >= len(STAGES) - 1 else 2
            for batch in self.source.batches(stage, rng, rounds):
                yield batch
                if int(self.stage) != number:
                    break


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="of training, evaluation not counted")
    add("--tokens", type=float, help="million tokens, --seen included, instead of --minutes")
    add("--wall", type=float, default=1e9, help="seconds from the start to the last step")
    add("--data", type=Path, default=Path("build/pocket-bart/data"))
    add("--tokenizer", type=Path, default=Path("build/pocket-bart/tokenizer.json"))
    add("--out", type=Path, default=Path("build/pocket-bart/run"))
    add("--checkpoint", type=Path, help="keep the whole state here and go on from it")
    add("--init", type=Path, help="begin with the weights of this directory (the shipped one)")
    add("--seen", type=float, default=0.0, help="million tokens that --init's weights have read")
    add("--decay", type=float, default=0.35, help="share of the run in which the rate falls")
    add("--optimizer", default="muon", choices=["adamw", "muon"])
    add("--rate", type=float, default=2e-3)
    add("--dropout", type=float, default=0.1, help="while the rate falls")
    add("--warmup", type=int, default=200, help="steps")
    add("--layers", type=int, default=5)
    add("--decoder-layers", type=int, default=3)
    add("--width", type=int, default=384)
    add("--heads", type=int, default=6)
    add("--init-std", type=float, default=0.05)
    add("--evaluate-every", type=float, default=50.0, help="million tokens")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--precision", default="bf16", choices=["bf16", "fp32"], help="fp32 on Intel without AMX")
    add("--batch", type=float, default=1.0, help="times the stages' tokens a batch (CPU: 0.1)")
    add("--accumulate", type=int, default=1, help="batches a step, to save memory")
    add("--workers", type=int, default=1, help="processes that make the batches")
    add("--rounds", type=int, default=32, help="batches that a worker sorts by length at a time")
    add("--compile", action="store_true", help="compile each kind of layer once")
    add("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    add("--seed", type=int, default=0)
    return parser.parse_args()


def write_weights(model: torch.nn.Module, out: Path, saved: dict[str, Any]) -> None:
    """The weights in float16, in parts that are small enough to be carried."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().half().cpu().contiguous()
        if size + tensor.nbytes > PART:
            parts.append({})
            size = 0
        parts[-1][name.replace("_orig_mod.", "")] = tensor
        size += tensor.nbytes
    for number, part in enumerate(parts, 1):
        name = f"weights-{number}-of-{len(parts)}.safetensors"
        save_file(part, out / name, metadata={"json": json.dumps(saved)})


def average(model: torch.nn.Module, counts: list[float]) -> list[float]:
    """Average the gradients of all processes; the sums of their counts."""
    if not distributed.is_initialized():
        return counts
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor(counts)])
    distributed.all_reduce(flat)
    *parts, sums = flat.split([*(g.numel() for g in gradients), len(counts)])
    for gradient, part in zip(gradients, parts, strict=True):
        torch.div(part.view_as(gradient), distributed.get_world_size(), out=gradient)
    return sums.tolist()


def require_finite(model: torch.nn.Module, step: int) -> None:
    """Refuse to write weights that are not finite over those of before."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise SystemExit(f"step {step}: the weights are not finite; nothing is written")


def main() -> None:
    began = time.monotonic()
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if "WORLD_SIZE" in os.environ:
        if arguments.device != "cpu":
            raise SystemExit("several processes need --device cpu: start one for a GPU")
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    torch.set_float32_matmul_precision("high")
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    held = Source(arguments.data, "heldout", tokenizer)
    sets = evaluation_batches(held)
    train = Source(arguments.data, "train", tokenizer)
    model = new_model(arguments).to(arguments.device)
    if arguments.device == "cpu" and arguments.precision == "bf16":
        use_fast_attention(model)
    optimizers = new_optimizers(model, arguments.optimizer, arguments.rate, arguments.precision)
    state = {"step": 0, "tokens": 0, "targets": 0, "seconds": 0.0}
    if arguments.checkpoint and arguments.checkpoint.exists():
        weights, moments, saved = read_checkpoint(arguments.checkpoint)
        model.load_state_dict(weights, strict=False)  # a tied weight is there under one name
        for optimizer, known in zip(optimizers, moments, strict=False):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
        state = saved["state"]
    elif arguments.init:
        missing, unexpected = model.load_state_dict(
            load_file(arguments.init / "model.safetensors"), strict=False
        )
        if unexpected or any("layers." in name for name in missing):
            raise SystemExit(f"{arguments.init} has other layers than --layers and --width say")
        state["tokens"] = int(arguments.seen * 1e6)
    counted, first, total = "seconds", 0.0, 60 * arguments.minutes
    if arguments.tokens:
        counted, first, total = "tokens", 1e6 * arguments.seen, 1e6 * arguments.tokens
    fall = total - (total - first) * arguments.decay  # where the rate begins to fall
    if state[counted] >= total:
        done = f"{state['seconds'] / 60:.1f} minutes, {state['tokens'] / 1e6:.1f} M tokens"
        raise SystemExit(f"{done} are done: give more --minutes or --tokens")
    # Other texts for each process and after each interruption.
    seed = (arguments.seed, state["tokens"], rank)
    stage = torch.zeros((), dtype=torch.int64).share_memory_()
    loader = DataLoader(
        Stream(train, stage, seed, arguments.rounds, arguments.batch), batch_size=None,
        num_workers=arguments.workers,
        prefetch_factor=2 if arguments.workers else None,
        multiprocessing_context="fork" if arguments.workers else None,
    )  # fmt: skip
    drawn = iter(loader)
    settings = {
        name: value if isinstance(value, int | float | str) else str(value)
        for name, value in vars(arguments).items()
    }
    saved = {"arguments": settings, "state": state}
    if arguments.compile:
        for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
            layer.compile(dynamic=True)
    if rank == 0:
        print(f"{model.num_parameters() / 1e6:.2f} M parameters, {state}, "
              f"{time.monotonic() - began:.0f} s to start", flush=True)  # fmt: skip

    asked = stopped = False  # by a signal to this process; any process was asked, or is late

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    def report(**more: Any) -> None:
        scores = evaluate(model, sets, arguments.device, arguments.precision)
        row = json.dumps({**state, **more, **scores})
        with (arguments.out / "log.jsonl").open("a") as file:
            file.write(row + "\n")
        print(row, flush=True)

    losses: list[Tensor] = []
    clock = shown = kept = time.monotonic()
    shown_tokens = state["tokens"]
    while state[counted] < total and not stopped:
        falling = state[counted] >= fall
        number = next(n for n, s in enumerate(STAGES) if state["tokens"] < s.until * 1e6)
        wanted = len(STAGES) if falling else number
        if int(stage) != wanted:
            stage.fill_(wanted)
            model.train()
            if falling:
                for module in model.modules():
                    if type(getattr(module, "dropout", None)) is float and not hasattr(
                        module, "k_proj"
                    ):  # in the layers, not in attention
                        module.dropout = arguments.dropout
        batches = [next(drawn) for _ in range(arguments.accumulate)]
        left = (total - state[counted]) / (total - fall) if falling else 1.0
        rate = arguments.rate * min(1.0, (state["step"] + 1) / arguments.warmup) * left
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = max(rate, 0.0)
        loss = torch.zeros((), device=arguments.device)
        for batch in batches:
            part = loss_of(model, batch, arguments.device, arguments.precision) / len(batches)
            part.backward()
            loss += part.detach()
        now = time.monotonic()
        late = now - began > arguments.wall
        own = [
            sum((batch["labels"] != PAD).sum() for batch in batches),
            sum(batch["attention_mask"].sum() for batch in batches),
            asked or late,
        ]
        # The first process's clock counts, so that all have the same rate.
        targets, read, stops, seconds = average(
            model, [*map(float, own), now - clock if rank == 0 else 0.0]
        )
        clock = now
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        before = state["tokens"]
        state["step"] += 1
        state["targets"] += int(targets)
        state["tokens"] += int(targets + read)
        state["seconds"] += seconds
        stopped = stops > 0
        if state["step"] % 50 == 0 and rank == 0:
            mean = float(torch.stack(losses).mean())  # waits for the device
            losses.clear()
            if not math.isfinite(mean):
                raise SystemExit(f"step {state['step']}: loss {mean}")
            speed = (state["tokens"] - shown_tokens) / (time.monotonic() - shown)
            shown, shown_tokens = time.monotonic(), state["tokens"]
            print(f"{state['step']} {state['tokens'] / 1e6:.1f}M stage {int(stage)} "
                  f"loss {mean:.3f} rate {rate:.1e} {speed:,.0f} tokens/s", flush=True)  # fmt: skip
        every = arguments.evaluate_every * 1e6
        if rank > 0:
            continue  # waits for the first process in the next step
        if state["tokens"] // every > before // every:
            report(rate=rate)
            clock = shown = time.monotonic()
            shown_tokens = state["tokens"]
        if arguments.checkpoint and clock - kept > 300:
            require_finite(model, state["step"])
            write_checkpoint(arguments.checkpoint, model, optimizers, saved)
            kept = clock = time.monotonic()
    if rank > 0:
        os._exit(0)
    require_finite(model, state["step"])
    write_weights(model, arguments.out, saved)
    if arguments.checkpoint:
        write_checkpoint(arguments.checkpoint, model, optimizers, saved)
    report(done=True)
    text = samples(model, held, arguments.device)
    (arguments.out / "samples.txt").write_text(text)
    print(text[:6000])
    print(f"{time.monotonic() - began:.0f} s in all", flush=True)
    os._exit(0)  # does not wait for the workers


if __name__ == "__main__":
    main()
