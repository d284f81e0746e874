"""How well LoRA, a prefix and a prompt learn 32 chats by heart, each at its own learning rate.

    python benchmarks/by_heart.py --method prefix --rate 0.1 --steps 100     one line of JSON
    python benchmarks/by_heart.py --lines FILE    all of GRID that FILE lacks; results/by_heart.json

A method that cannot learn its training data is implemented wrongly or trained at a wrong rate. The
loss is measured on the 32 chats themselves, before and after, with pocket-bart without dropout. A
line of other weights or code does not count.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import WEIGHTS, digest, read_lines, run_digest, write_result
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import minilora
from minilora.methods import PrefixConfig, PromptConfig

PLAIN = {"steps": 100, "length": 20, "hidden": None}
GRID: list[dict[str, Any]] = [
    *({**PLAIN, "method": "lora", "rate": rate} for rate in (5e-3, 7e-3, 1e-2, 2e-2)),
    *({**PLAIN, "method": "prefix", "rate": rate} for rate in (0.1, 0.2, 0.4)),
    *({**PLAIN, "method": "prefix", "rate": rate, "hidden": 512} for rate in (3e-3, 5e-3)),
    *({**PLAIN, "method": "prompt", "rate": r, "length": 50, "steps": 200} for r in (0.1, 0.3)),
]
ASSETS = Path(minilora.__file__).parent / "summarization" / "assets"


def batches(count: int = 32, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """The shortest chats of minichat's training set, tokenized and padded."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "pocket-bart")
    lines = (ASSETS / "minichat" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: len(row["dialogue"]))[:count]
    found = []
    for start in range(0, count, size):
        part = rows[start : start + size]
        batch = dict(
            tokenizer([row["dialogue"] for row in part], padding=True, return_tensors="pt")
        )
        batch.pop("token_type_ids", None)
        labels = tokenizer([row["summary"] for row in part], padding=True, return_tensors="pt")
        batch["labels"] = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
        found.append(batch)
    return found


def configuration(method: str, length: int, hidden: int | None) -> Any:
    """What `minilora.inject` takes."""
    lora = minilora.LoRAConfig(rank=8, alpha=32)
    prefix = PrefixConfig(length=length, reparametrize=hidden)
    return {
        "lora": lora, "prefix": prefix, "prompt": PromptConfig(length=length),
        "lora+prefix": [lora, prefix], "lora+prompt": [lora, PromptConfig(length=length)],
    }[method]  # fmt: skip


@torch.no_grad()
def loss_of(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    """The mean loss of a target token, without dropout."""
    tokens = [int((batch["labels"] >= 0).sum()) for batch in data]
    losses = [float(model(**batch).loss) * n for batch, n in zip(data, tokens, strict=True)]
    return sum(losses) / sum(tokens)


def risen(step: int, steps: int) -> float:
    """The share of the rate in a step: it rises over a tenth of the steps, then falls to zero."""
    return min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1.0)


def learn(
    method: str, rate: float, steps: int, length: int = 20, hidden: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Train on the chats with AdamW at a rate that falls linearly; the losses before and after."""
    model = AutoModelForSeq2SeqLM.from_pretrained(ASSETS / "pocket-bart", dtype=torch.float32)
    model.eval()  # no dropout in training either: nothing is held out
    torch.manual_seed(seed)
    data = batches()
    base = loss_of(model, data)
    report = minilora.inject(model, configuration(method, length, hidden), seed=seed)
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: risen(step, steps))
    start = loss_of(model, data)
    for step in range(steps):
        optimizer.zero_grad()
        model(**data[step % len(data)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(minilora.trainable_parameters(model)), 1.0)
        optimizer.step()
        schedule.step()
    return {
        "method": method, "rate": rate, "steps": steps, "length": length, "hidden": hidden,
        "trainable": report.trainable, "seed": seed, "base": round(base, 4),
        "start": round(start, 4), "end": round(loss_of(model, data), 4),
    }  # fmt: skip


def all_of(lines: Path) -> Path:
    """Every setting of GRID; a finished one is a line. The result has the best rate of each."""
    own = [Path(__file__), ASSETS / "minichat" / "train.jsonl"]
    kind, weights = digest(own, run_digest()), digest([WEIGHTS])
    rows = [row for row in read_lines(lines) if row.get("kind") == kind]
    with lines.open("a", encoding="utf-8") as file:
        for setting in GRID:
            if not any(setting.items() <= row.items() for row in rows):
                rows.append(learn(**setting) | {"kind": kind})
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    names = {*GRID[0], "trainable", "seed", "base", "start", "end"}
    rows = [{name: row[name] for name in row if name in names} for row in rows]
    chosen = [next(r for r in rows if setting.items() <= r.items()) for setting in GRID]
    best = {r["method"]: r for r in sorted(chosen, key=lambda r: r["end"], reverse=True)}
    return write_result("by_heart", {"weights": weights, "rows": chosen, "best": best})


def main() -> None:
    """Print one line of JSON, or write the result of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--hidden", type=int, help="width of a prefix's MLP; none without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=Path, help="run all of GRID; finished runs are read here")
    options = vars(parser.parse_args())
    lines = options.pop("lines")
    print(all_of(lines) if lines else json.dumps(learn(**options)), flush=True)


if __name__ == "__main__":
    main()
