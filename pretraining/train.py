"""Pre-train pocket-bart: copying first, then infilling, then summaries, by a curriculum of lengths.

BART's denoising (Lewis et al. 2020, section 2) and dialogue summaries with one loss. A small model
learns to read its source only if it begins with short, easy sequences (see STAGES); `docs/log.md`
has the measurements. Progress is counted in tokens read and written (source + target), never in
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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from names import GENDERS, SLOTS, invent
from noise import infill, mask_tokens, permute_sentences
from prepare import FIRST
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BartConfig, BartForConditionalGeneration

BOS, PAD, EOS = 0, 1, 2
CHECKPOINT = "checkpoint.safetensors"
COUNTS = 5  # targets, tokens, CPU seconds, whether to stop, whether to save
SHAPE = ("layers", "decoder_layers", "width", "heads", "init_std")  # what the model is made from
Example = tuple[np.ndarray, np.ndarray]
Batch = dict[str, Tensor]
Moments = dict[int, dict[str, Tensor]]  # by a parameter's place in its optimizer


@dataclass(frozen=True)
class Stage:
    """Until `until` million tokens: tasks by their share of the tokens, and the longest texts."""

    until: float
    tasks: dict[str, float]
    segment: int  # longest segment to denoise
    source: int  # longest dialogue to summarize


STAGES = [
    Stage(0.9, {"mask": 1.0}, 24, 0),
    Stage(1.4, {"mask": 0.7, "infill": 0.3}, 48, 0),
    Stage(2.2, {"infill": 0.6, "pseudo": 0.4}, 64, 110),
    Stage(5.0, {"infill": 0.35, "pseudo": 0.45, "pairs": 0.20}, 100, 180),
    Stage(11.1, {"infill": 0.25, "pseudo": 0.50, "pairs": 0.25}, 140, 320),
    Stage(18.8, {"infill": 0.15, "pseudo": 0.50, "pairs": 0.35}, 140, 320),
    Stage(math.inf, {"infill": 0.40, "pseudo": 0.42, "pairs": 0.18}, 140, 320),
]


@dataclass
class Texts:
    """One split's packed arrays."""

    columns: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Texts":
        with np.load(path) as arrays:
            return cls(dict(arrays))

    def __len__(self) -> int:
        return len(self.columns["text_offsets"]) - 1

    def get(self, column: str, place: int) -> np.ndarray:
        start, end = self.columns[f"{column}_offsets"][place : place + 2]
        return self.columns[f"{column}_tokens"][start:end].astype(np.int64)

    def stretch(self, start: int, length: int) -> np.ndarray:
        return self.columns["text_tokens"][start : start + length].astype(np.int64)


class Names:
    """Fill slots with names, the same one for every mention in an example."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        pool = json.loads(path.read_text())
        rng = np.random.default_rng(0)
        for gender in GENDERS:  # four in ten names are invented
            pool[gender] += invent(gender, 2 * len(pool[gender]) // 3, rng)
        self.encoded = {
            gender: [
                (tokenizer.encode(name, add_special_tokens=False).ids,
                 tokenizer.encode(" " + name, add_special_tokens=False).ids)
                for name in pool[gender]
            ]
            for gender in GENDERS
        }  # fmt: skip

    def draw(self, rng: np.random.Generator) -> dict[int, list[int]]:
        """Tokens of every slot number, drawn without repeating a name within a gender."""
        table: dict[int, list[int]] = {}
        for index, gender in enumerate(GENDERS):
            names = self.encoded[gender]
            for person, choice in enumerate(rng.choice(len(names), SLOTS, replace=False)):
                number = FIRST + 2 * (index * SLOTS + person)
                table[number], table[number + 1] = names[choice]
        return table

    @staticmethod
    def fill(tokens: np.ndarray, table: dict[int, list[int]]) -> np.ndarray:
        if not (tokens >= FIRST).any():
            return tokens
        out: list[int] = []
        for token in tokens.tolist():
            out.extend(table[token]) if token >= FIRST else out.append(token)
        return np.array(out, dtype=np.int64)


@dataclass
class Source:
    """Draws examples of each task from one split."""

    texts: dict[str, Texts]
    names: Names
    mask: int
    newline: int
    ends: frozenset[int]
    cursors: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def load(cls, data: Path, split: str, tokenizer: Tokenizer) -> "Source":
        texts = {
            name: Texts.load(data / f"{split}-{name}.npz")
            for name in ("prose", "chat", "pseudo", "pairs")
        }
        mask, newline = (tokenizer.token_to_id(token) for token in ("<mask>", "Ċ"))
        if mask is None or newline is None:
            raise ValueError("the tokenizer lacks <mask> or the newline")
        ends = {tokenizer.token_to_id(end) for end in (".", "?", "!", '."', '?"', '!"', "Ċ")}
        return cls(
            texts, Names(data / "names.json", tokenizer), mask, newline,
            frozenset(end for end in ends if end is not None),
        )  # fmt: skip

    def segment(self, longest: int, rng: np.random.Generator) -> np.ndarray:
        """A stretch of a chat (whole turns) or of prose."""
        if rng.random() < 0.3:
            prose = self.texts["prose"]
            size = len(prose.columns["text_tokens"])
            return prose.stretch(int(rng.integers(size - longest)), longest)
        chat = self.texts["chat"]
        tokens = chat.get("text", int(rng.integers(len(chat))))
        tokens = self.names.fill(tokens, self.names.draw(rng))
        if len(tokens) > longest:
            starts = np.flatnonzero(tokens[: len(tokens) - longest] == self.newline) + 1
            start = int(rng.choice(np.concatenate([[0], starts])))
            tokens = tokens[start : start + longest]
        return tokens

    def example(self, task: str, stage: Stage, rng: np.random.Generator) -> Example:
        if task == "mask":
            target = self.segment(stage.segment, rng)
            return mask_tokens(target, 0.15, self.mask, rng), target
        if task == "infill":
            longest = int(stage.segment * (0.4 + 0.6 * rng.random()))
            target = self.segment(longest, rng)
            source = target
            if rng.random() < 0.25:
                source = permute_sentences(source, self.ends, rng)
            return infill(source, 0.25, self.mask, rng), target
        texts = self.texts[task]
        while True:
            place = int(rng.integers(len(texts)))
            table = self.names.draw(rng)
            source = self.names.fill(texts.get("text", place), table)
            target = self.names.fill(texts.get("summary", place), table)
            if len(source) <= stage.source and len(target) <= 80:
                return source, target

    def batches(
        self, stage: Stage, budget: int, rng: np.random.Generator, rounds: int = 12
    ) -> list[tuple[str, Batch]]:
        """About `rounds` batches of like length, tasks in the stage's shares, shuffled."""
        found: list[tuple[str, Batch]] = []
        for task, share in stage.tasks.items():
            wanted = rng.poisson(share * rounds)
            examples: list[Example] = []
            total = 0
            while total < wanted * budget:
                example = self.example(task, stage, rng)
                examples.append(example)
                total += len(example[0]) + len(example[1]) + 4
            found += [(task, collate(part)) for part in chunks(examples, budget)]
        return [found[place] for place in rng.permutation(len(found))]


def chunks(examples: list[Example], budget: int) -> list[list[Example]]:
    """Sort by length and cut into parts of at most `budget` padded positions."""
    examples = sorted(examples, key=lambda pair: (len(pair[0]), len(pair[1])))
    parts: list[list[Example]] = [[]]
    source = target = 0
    for pair in examples:
        source, target = max(source, len(pair[0]) + 2), max(target, len(pair[1]) + 2)
        if parts[-1] and (source + target) * (len(parts[-1]) + 1) > budget:
            parts.append([])
            source, target = len(pair[0]) + 2, len(pair[1]) + 2
        parts[-1].append(pair)
    return [part for part in parts if part]


def collate(examples: list[Example]) -> Batch:
    """`<s> ... </s>` on both sides, padded; the decoder reads `</s> <s> ...` as BART does."""
    sources = [[BOS, *source.tolist(), EOS] for source, _ in examples]
    targets = [[BOS, *target.tolist(), EOS] for _, target in examples]

    def pad(rows: list[list[int]]) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    labels = pad(targets)
    start = torch.full((len(rows := labels), 1), EOS)
    source = pad(sources)
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "decoder_input_ids": torch.cat([start, rows[:, :-1]], 1),
        "labels": labels,
    }


def loss_of(
    model: BartForConditionalGeneration, batch: Batch, device: str, precision: str = "bf16"
) -> Tensor:
    """Mean cross-entropy over real positions; padding never meets the vocabulary."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    labels = batch.pop("labels")
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        real = labels != PAD
        logits = functional.linear(hidden[real], model.lm_head.weight)
    return functional.cross_entropy(logits.float(), labels[real])


def shuffled(batch: Batch) -> Batch:
    """The same targets with the next example's source."""
    return {
        key: value.roll(1, 0) if key in {"input_ids", "attention_mask"} else value
        for key, value in batch.items()
    }


def evaluation_batches(held: Source) -> dict[str, list[Batch]]:
    """A fixed sample of held-out examples of every task."""
    stage = Stage(0, {}, 100, 300)
    sets: dict[str, list[Batch]] = {}
    for task, count in (("infill", 64), ("pseudo", 64), ("pairs", 96)):
        rng = np.random.default_rng(1)
        examples = [held.example(task, stage, rng) for _ in range(count)]
        sets[task] = [collate(part) for part in chunks(examples, 4000) if len(part) > 1]
    return sets


@torch.no_grad()
def evaluate(
    model: BartForConditionalGeneration,
    sets: dict[str, list[Batch]],
    device: str,
    precision: str = "bf16",
    wrong: bool = True,
) -> dict[str, float]:
    """Held-out loss by task with the right source and with another example's."""
    model.eval()
    scores: dict[str, float] = {}
    for task, batches in sets.items():
        for kind in ("right", "wrong")[: 1 + wrong]:
            total = count = 0.0
            for batch in batches:
                real = float((batch["labels"] != PAD).sum())
                given = batch if kind == "right" else shuffled(batch)
                total += float(loss_of(model, given, device, precision)) * real
                count += real
            scores[f"{task}_{kind}"] = round(total / count, 4)
    model.train()
    return scores


def new_model(arguments: argparse.Namespace) -> BartForConditionalGeneration:
    """A BART with random weights; dropout is off, since no text is read twice for long."""
    config = BartConfig(
        vocab_size=8192, d_model=arguments.width, max_position_embeddings=512,
        encoder_layers=arguments.layers, decoder_layers=arguments.decoder_layers,
        encoder_attention_heads=arguments.heads, decoder_attention_heads=arguments.heads,
        encoder_ffn_dim=4 * arguments.width, decoder_ffn_dim=4 * arguments.width,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, init_std=arguments.init_std,
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def new_optimizers(
    model: BartForConditionalGeneration, kind: str, rate: float
) -> list[torch.optim.Optimizer]:
    """AdamW, and for the layers' matrices Muon if `kind` says so.

    Muon (Jordan 2024) steps along the orthogonal matrix nearest to the momentum, so that no
    direction learns slower than the rest; with AdamW's size of step (Liu et al. 2025, section 2.2)
    one rate does for both. Embeddings are rows that are looked up, no maps: AdamW.
    """
    parameters = dict(model.named_parameters())
    hidden = {
        n: p for n, p in parameters.items() if kind == "muon" and p.dim() == 2 and "layers." in n
    }
    rest = [p for name, p in parameters.items() if name not in hidden]
    adamw = torch.optim.AdamW(
        [{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.01},
         {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    if not hidden:
        return [adamw]
    muon = torch.optim.Muon(
        hidden.values(), lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def write_checkpoint(
    path: Path,
    model: BartForConditionalGeneration,
    optimizers: Sequence[torch.optim.Optimizer],
    saved: dict[str, Any],
) -> None:
    """One safetensors file, written beside and renamed; what is no tensor is JSON in its header."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for which, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"optimizer.{which}.{index}.{name}"] = value
    beside = path.with_suffix(".new")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, beside, metadata={"json": json.dumps(saved)})
    beside.rename(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[Moments], dict[str, Any]]:
    """The weights, each optimizer's moments by parameter, and what was saved beside them."""
    weights: dict[str, Tensor] = {}
    moments: list[Moments] = [{}, {}]
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            kind, _, name = key.partition(".")
            if kind == "model":
                weights[name] = file.get_tensor(key)
            else:
                which, index, moment = name.split(".")
                moments[int(which)].setdefault(int(index), {})[moment] = file.get_tensor(key)
        saved: dict[str, Any] = json.loads(file.metadata()["json"])
    return weights, moments, saved


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
    state: dict[str, Any] = {"step": 0, "tokens": 0, "targets": 0, "cpu_seconds": 0.0}
    checkpoint, saved = arguments.out / CHECKPOINT, dict[str, Any]()
    if checkpoint.exists():
        weights, moments, saved = read_checkpoint(checkpoint)
        if saved["arguments"]["optimizer"] != arguments.optimizer:
            used = saved["arguments"]["optimizer"]
            raise SystemExit(f"{checkpoint} is of a run with {used}: name another --out")
        model.load_state_dict(weights, strict=False)  # a tied weight is there under one name
        for optimizer, known in zip(optimizers, moments, strict=False):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
        state = saved["state"]
        if rank < len(saved["rngs"]):
            rng.bit_generator.state = saved["rngs"][rank]
    elif arguments.init:
        weights = load_file(arguments.init / "model.safetensors")
        shapes = {name: p.shape for name, p in model.named_parameters()}
        given = {name: weight.shape for name, weight in weights.items()}
        if shapes.items() - given.items() or given.keys() - model.state_dict().keys():
            raise SystemExit(f"{arguments.init} has other layers than --layers and --width say")
        model.load_state_dict(weights, strict=False)  # a tied weight is there under one name
        last = json.loads(arguments.history.read_text().splitlines()[-1])
        state = {key: last[key] for key in state}
    first = saved.get("first_step", state["step"])  # the rate warms up from here
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
