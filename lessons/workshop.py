"""Shared by the lessons: pocket-bart and bookings, a training loop, and the style of the plots."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import minilora
from minilora.summarization.data import batches, splits
from minilora.summarization.data.batches import Encoded
from minilora.summarization.model.loading import load_model, load_tokenizer
from minilora.summarization.presets import embedded
from minilora.summarization.settings import DataOptions
from minilora.summarization.training.loss import summed_loss

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

# The colours of Okabe and Ito, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip

plt.rcParams.update(
    {
        "figure.figsize": (9, 3.6),
        "figure.dpi": 80,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": 11,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, GREY]),
    }
)
# Without a screen (MPLBACKEND=Agg) plt.show() warns.
warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")


def pocket() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """pocket-bart in float32, and its tokenizer."""
    return load_model("pocket-bart", torch.device("cpu")), load_tokenizer("pocket-bart")


def weights() -> str:
    """The SHA-256 of pocket-bart's weights, which a stored result names too."""
    path = Path(embedded("pocket-bart")) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dialogues(tokenizer: PreTrainedTokenizerBase, split: str, count: int) -> list[Encoded]:
    """The shortest dialogues of a split of bookings, so that a lesson is quick."""
    options = DataOptions(data="bookings")
    examples, _ = splits.load(options, [split])
    encoded, _ = batches.encode(examples[split], tokenizer, options)
    return sorted(encoded, key=lambda row: (len(row.source) + len(row.target), row.id))[:count]


def loss_on(model: PreTrainedModel, rows: Sequence[Encoded]) -> float:
    """Cross-entropy in nats per target token, without dropout."""
    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), 16):
            summed, count = summed_loss(model, batches.collate(rows[start : start + 16], PAD))
            total, tokens = total + summed.item(), tokens + count
    return total / tokens


def train(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    learning_rate: float,
    steps: int,
    seed: int = 0,
    batch_size: int = 8,
) -> list[float]:
    """AdamW on the trainable parameters, without dropout. Returns the loss before each step."""
    lengths = [(len(row.source), len(row.target)) for row in rows]
    optimizer = torch.optim.AdamW(
        minilora.trainable_parameters(model), lr=learning_rate, weight_decay=0.0
    )
    model.eval()  # dropout would only add noise to so short a run
    losses: list[float] = []
    for epoch in range(1 + steps * batch_size // len(rows)):
        for chosen in batches.batches(lengths, batch_size, seed, epoch)[: steps - len(losses)]:
            summed, tokens = summed_loss(model, batches.collate([rows[i] for i in chosen], PAD))
            (summed / tokens).backward()
            nn.utils.clip_grad_norm_(minilora.trainable_parameters(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(summed.item() / tokens)
    return losses


def must_fail(claim: Callable[[], object], what: str) -> None:
    """Show that a claim can fail: it must fail on something that is broken on purpose."""
    try:
        claim()
    except AssertionError as error:
        print(f"Broken on purpose ({what}), the claim fails, as it should: {error}")
        return
    raise RuntimeError(f"the claim holds although {what}, so it says nothing")


PAD = 1  # <pad> of every BART
