"""Pre-train pocket-bart: copying first, then infilling, then summaries, by a curriculum of lengths.

BART's denoising (Lewis et al. 2020, section 2) and dialogue summaries with one loss; the curriculum
is `curriculum.py`. Progress is counted in tokens read and written (source + target), never in
hours, so that a run can be stopped, continued and repeated. The learning rate is constant and then
falls to zero over the last part (warm-up, stable, decay; Hu et al. 2024, section 4).

    python pretraining/train.py --data build/pocket-bart/data --out build/pocket-bart/run

Run the same command again to go on from the last checkpoint. SIGTERM and Ctrl-C save first. Started
by `torchrun --nproc-per-node 2 pretraining/train.py --threads 1`, each process draws batches of its
own and all sum their gradients.
"""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from curriculum import PAD, STAGES, Batch, Source
from model import SHAPE, evaluate, evaluation_batches, loss_of, new_model, new_optimizers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

COUNTS = 5  # targets, tokens, CPU seconds, whether to stop, whether to save
START = {"step": 0, "tokens": 0, "targets": 0, "cpu_seconds": 0.0}  # what is counted of a run


def world() -> tuple[int, int]:
    """This process's rank and their number; several if `torchrun` started us."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def share_gradients(parameters: list[nn.Parameter], device: str) -> tuple[Tensor, Tensor]:
    """One buffer of which every gradient is a view, and COUNTS numbers at its end.

    All that the processes tell each other in a step is the sum of this buffer.
    """
    buffer = torch.zeros(sum(p.numel() for p in parameters) + COUNTS, device=device)
    pieces = buffer.split([*(p.numel() for p in parameters), COUNTS])
    for parameter, piece in zip(parameters, pieces, strict=False):
        parameter.grad = piece.view_as(parameter)
    return buffer, pieces[-1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("build/pocket-bart/data"))
    add("--tokenizer", type=Path, default=Path("build/pocket-bart/tokenizer.json"))
    add("--out", type=Path, default=Path("build/pocket-bart/run"))
    add("--init", type=Path, help="begin with the weights of this directory (the shipped one)")
    add("--history", type=Path, help="losses.jsonl of --init's weights; counting goes on from it")
    add("--total", type=float, default=18.8, help="million tokens, source + target")
    add("--decay", type=float, default=7.7, help="million tokens over which the rate falls to zero")
    add("--optimizer", default="adamw", choices=["adamw", "muon"])
    add("--rate", type=float, default=1e-3)
    add("--warmup", type=int, default=100, help="steps")
    add("--budget", type=int, default=3000, help="padded tokens a batch, in every process")
    add("--layers", type=int, default=3)
    add("--decoder-layers", type=int, default=3)
    add("--width", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--init-std", type=float, default=0.06)
    add("--evaluate-every", type=float, default=1.0, help="million tokens")
    add("--save-every", type=float, default=120.0, help="seconds")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--precision", default="bf16", choices=["bf16", "fp32"], help="fp32 on Intel without AMX")
    add("--threads", type=int, default=2, help="of every process")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.init is None) != (arguments.history is None):
        parser.error("--init and --history go together")
    if arguments.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        parser.error("--optimizer muon needs a newer torch than " + torch.__version__)
    if arguments.device == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("several processes are for CPU cores; a GPU takes one")
    return arguments


def go_on(
    checkpoint: Path,
    arguments: argparse.Namespace,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[dict[str, Any], int, list[dict[str, Any]]]:
    """Fill model and optimizers. What was done, the first step of the warm-up, each rank's rng."""
    weights, moments, saved = read_checkpoint(checkpoint)
    if (used := saved["arguments"]["optimizer"]) != arguments.optimizer:
        raise SystemExit(f"{checkpoint} is of a run with {used}: name another --out")
    model.load_state_dict(weights, strict=False)  # a tied weight is there under one name
    for optimizer, known in zip(optimizers, moments, strict=False):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
    return saved["state"], saved.get("first_step", saved["state"]["step"]), saved["rngs"]


def warm_start(arguments: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Fill the model with the weights of --init. What had been done by the end of --history."""
    weights = load_file(arguments.init / "model.safetensors")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    given = {name: weight.shape for name, weight in weights.items()}
    if shapes.items() - given.items() or given.keys() - model.state_dict().keys():
        raise SystemExit(f"{arguments.init} has other layers than --layers and --width say")
    model.load_state_dict(weights, strict=False)  # a tied weight is there under one name
    last = json.loads(arguments.history.read_text().splitlines()[-1])
    return {key: last[key] for key in START}


def main() -> None:
    arguments = parse()
    rank, processes = world()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng([arguments.seed, rank] if rank else arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    train = Source.load(arguments.data, "train", tokenizer)
    sets = evaluation_batches(Source.load(arguments.data, "heldout", tokenizer))

    model = new_model(arguments).to(arguments.device)
    optimizers = new_optimizers(model, arguments.optimizer, arguments.rate)
    checkpoint = arguments.out / CHECKPOINT
    if checkpoint.exists():
        state, first, rngs = go_on(checkpoint, arguments, model, optimizers)
        if rank < len(rngs):
            rng.bit_generator.state = rngs[rank]
    elif arguments.init:
        state = warm_start(arguments, model)
        first = state["step"]
    else:
        state, first = dict(START), 0
    if state["tokens"] >= arguments.total * 1e6:
        raise SystemExit(f"{state['tokens'] / 1e6:.1f} M tokens are done: give a larger --total")
    if rank == 0:
        print(f"{model.num_parameters() / 1e6:.2f} M parameters, {state}", flush=True)
    buffer, counts = share_gradients(list(model.parameters()), arguments.device)

    asked = False  # this process, to stop; all of them stop after the same step

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    def save() -> None:
        rngs: list[Any] = [rng.bit_generator.state] * processes
        if processes > 1:
            dist.all_gather_object(rngs, rng.bit_generator.state)
        settings = {name: str(value) for name, value in vars(arguments).items()}
        numbers = {name: vars(arguments)[name] for name in SHAPE}
        if rank == 0:
            now = {"state": state, "first_step": first, "rngs": rngs}
            write_checkpoint(
                checkpoint, model, optimizers, {**now, "arguments": {**settings, **numbers}}
            )

    def report(**more: Any) -> None:
        if rank > 0:  # the others wait for the next sum
            return
        wanted = evaluate(model, sets, arguments.device, arguments.precision)
        row = json.dumps({**state, **more, **wanted})
        with (arguments.out / "log.jsonl").open("a") as file:
            file.write(row + "\n")
        print(row, flush=True)

    def batches() -> Iterator[tuple[str, Batch]]:
        while True:
            stage = next(stage for stage in STAGES if state["tokens"] < stage.until * 1e6)
            yield from train.batches(stage, arguments.budget, rng)

    total, decay = arguments.total * 1e6, arguments.decay * 1e6
    losses: dict[str, float] = {}
    worked, saved_at = time.process_time(), time.monotonic()
    spoke, spoke_tokens = time.monotonic(), state["tokens"]
    drawn = batches()
    stopping = 0.0
    while state["tokens"] < total and not stopping:
        task, batch = next(drawn)
        fall = min(1.0, (total - state["tokens"]) / decay)
        rate = arguments.rate * min(1.0, (state["step"] - first + 1) / arguments.warmup) * fall
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = max(rate, 0.0)
        targets = int((batch["labels"] != PAD).sum())
        buffer.zero_()
        loss = loss_of(model, batch, arguments.device, arguments.precision)
        (loss * targets).backward()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"step {state['step']}: loss {loss.item()} in a {task} batch")
        late = rank == 0 and time.monotonic() - saved_at > arguments.save_every
        seconds, worked = time.process_time() - worked, time.process_time()
        read = int(batch["attention_mask"].sum())
        counts.copy_(torch.tensor([targets, targets + read, seconds, asked, late]))
        if processes > 1:
            dist.all_reduce(buffer)
        all_targets, tokens, seconds, stopping, saving = counts.tolist()
        buffer[:-COUNTS] /= all_targets  # the mean over every process's targets
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        before = state["tokens"]
        state["step"] += 1
        state["targets"] += int(all_targets)
        state["tokens"] += int(tokens)
        state["cpu_seconds"] += seconds
        losses[task] = 0.95 * losses.get(task, loss.item()) + 0.05 * loss.item()
        if state["step"] % 50 == 0 and rank == 0:
            speed = (state["tokens"] - spoke_tokens) / (time.monotonic() - spoke)
            spoke, spoke_tokens = time.monotonic(), state["tokens"]
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"{state['step']} {state['tokens'] / 1e6:.2f}M {shown} lr {rate:.1e} "
                  f"{speed:.0f} tokens/s", flush=True)  # fmt: skip
        every = arguments.evaluate_every * 1e6
        if state["tokens"] // every > before // every:
            report(lr=rate)
        if saving:
            save()
            saved_at = time.monotonic()
    save()
    if not stopping:  # `torchrun` ends a process that takes long to stop
        report(done=True)


if __name__ == "__main__":
    main()
