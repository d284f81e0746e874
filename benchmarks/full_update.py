"""How low is the rank of the update of a whole full fine-tune of pocket-bart? For lesson 1.

    python benchmarks/full_update.py [--data minichat] [flags of train.py]

Runs `train.py --method full`, decomposes the update of every linear layer, and measures the
validation loss on the same data with each update cut to its first r singular pieces. Embeddings,
biases and norms stay fine-tuned.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, WEIGHTS, digest, write_result
from torch import nn
from transformers import PreTrainedModel

from minilora.summarization.data.batches import IGNORED, Encoded, collate, encode
from minilora.summarization.data.splits import load
from minilora.summarization.model.loading import load_model, load_tokenizer
from minilora.summarization.settings import DataOptions
from minilora.summarization.training.loss import summed_loss

RANKS = (0, 1, 2, 4, 8, 16, 32, 64)
CPU = torch.device("cpu")


@torch.no_grad()
def loss_on(model: PreTrainedModel, rows: list[Encoded], pad: int) -> float:
    """Nats per target token."""
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 16):
        batch = collate(rows[start : start + 16], pad)
        total += summed_loss(model, batch)[0].item()
        tokens += int((batch["labels"] != IGNORED).sum())
    return total / tokens


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", default="minichat")
    given, more = parser.parse_known_args()
    weights_digest = digest([WEIGHTS])
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        flags = ["--method", "full", "--no-evaluate", "--no-report", "--data", given.data, *more]
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--output", str(output)]
        subprocess.run(command, check=True)
        tuned = load_model(str(output / "model"), CPU)
    base, tokenizer = load_model("pocket-bart", CPU), load_tokenizer("pocket-bart")
    options = DataOptions(data=given.data)
    examples = load(options, ["validation"])[0]["validation"]
    rows = sorted(encode(examples, tokenizer, options)[0], key=lambda row: len(row.source))

    weights, pieces = {}, {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weights[name] = module.weight
            update = tuned.get_submodule(name).weight - module.weight
            pieces[name] = torch.linalg.svd(update, full_matrices=False)
    square = [name for name, weight in weights.items() if weight.shape[0] == weight.shape[1]]
    energy = torch.stack([pieces[name].S.square().cumsum(0) for name in square])
    energy /= energy[:, -1:].clone()

    pad = int(tokenizer.pad_token_id)
    losses = {"base": loss_on(base, rows, pad), "tuned": loss_on(tuned, rows, pad)}
    for rank in RANKS:
        for name, (U, sigma, Vt) in pieces.items():
            cut = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]  # (out, in)
            tuned.get_submodule(name).weight.copy_(weights[name] + cut)
        losses[str(rank)] = loss_on(tuned, rows, pad)
    whole = losses["0"] - losses["tuned"]
    print(
        write_result(
            "full_update",
            {
                "weights": weights_digest,
                "data": given.data,
                "command": f"python benchmarks/full_update.py {' '.join(sys.argv[1:])}".strip(),
                "matrices": len(square),
                "ranks": list(range(1, energy.shape[1] + 1)),
                "energy_mean": [round(value, 5) for value in energy.mean(0).tolist()],
                "losses": {name: round(value, 5) for name, value in losses.items()},
                "gain_ranks": list(RANKS[1:]),
                "gain": [round((losses["0"] - losses[str(r)]) / whole, 5) for r in RANKS[1:]],
            },
        )
    )


if __name__ == "__main__":
    main()
