# %% [markdown]
# # 6 · Four bits
#
# **Question.** The base is frozen: it must be precise enough to compute with, but need not be precise
# enough for small updates. Are four bits enough, and which sixteen numbers should they represent?
#
# ## The math
#
# Divide the weight into blocks of $n$ values. Each block has one scale, a float32: its largest absolute
# value $c = \max |w_i|$. The values divided by $c$ are in $[-1, 1]$, and are rounded to the nearest of sixteen
# levels $v_0 < \dots < v_{15}$:
#
# $$ \hat w_i = c \cdot v_{q_i}, \qquad q_i = \arg\min_j \left| \frac{w_i}{c} - v_j \right|
#    \qquad \text{bits per weight: } 4 + \frac{32}{n} $$
#
# - **int4** puts the levels at equal distances: $v = -1, -\frac{6}{7}, \dots, \frac{6}{7}, 1$ (15 levels:
#   symmetric with zero, one code is unused).
# - **NF4** follows the distribution of the weights. Trained weights are about normal, so it takes the
#   quantiles of a normal distribution (Dettmers et al. 2023,
#   [QLoRA](https://arxiv.org/abs/2305.14314), section 3). Each level would be used about equally often
#   if the largest value of a block were always at the outermost quantile, 1.85 standard deviations. In
#   a block of 64 it is at 2.6 on average. So on normal weights the outermost levels are used by less
#   than 2%, and the middle ones by 9% (Yoshida 2023,
#   [arXiv:2306.06965](https://arxiv.org/abs/2306.06965), on the dependence on the block size).
# - **Double quantization** also stores the scales in 8 bits, in blocks of 256 with one scale each:
#   $4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.127$ bits instead of $4.5$.
# - **LoftQ** (Li et al. 2023, [arXiv:2310.08659](https://arxiv.org/abs/2310.08659)): rounding changes
#   the base from $W$ to $Q$. Start the adapter at the best rank-$r$ matrix for $W - Q$ instead of at
#   zero. Then round $W - s B A$ again, and so on.

# %%
import itertools

import matplotlib.pyplot as plt
import torch
import workshop
from torch import Tensor, nn

import minilora
from minilora.nf4 import pack, unpack
from minilora.summarization.data import batches
from minilora.summarization.training.loss import decoder_inputs

torch.manual_seed(0)

# %% [markdown]
# ## Sixteen levels
#
# Eight quantiles of the positive half of a normal distribution, seven of the negative one, and an
# exact zero. The authors' outermost probability is 0.9677083, half a step below 1, since the quantile
# of 1 is infinite.


# %%
def quantiles(count: int) -> Tensor:
    """Quantiles of a normal distribution, from the outermost to the last one above zero."""
    return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count + 1)[:-1].double())


NF4 = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8)]).sort().values
NF4 = (NF4 / NF4.max()).float()  # (16,)
INT4 = torch.arange(-7, 8) / 7  # (15,): symmetric, so one of the sixteen is unused


def rounded(W: Tensor, levels: Tensor, block: int) -> Tensor:
    """W (out, in), rounded to four bits and dequantized."""
    blocks = W.reshape(-1, block)  # (out in / block, block)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    middles = (levels[1:] + levels[:-1]) / 2  # between two of them one level is the nearest
    return (levels[torch.bucketize(blocks / absmax, middles)] * absmax).view_as(W)


def relative_error(approximation: Tensor, W: Tensor) -> float:
    return ((approximation - W).norm() / W.norm()).item()


# %% [markdown]
# The library's NF4 equals that of bitsandbytes bit for bit. The few lines above agree with it:

# %%
base, tokenizer = workshop.pocket()
W = base.model.decoder.layers[0].fc1.weight.detach()  # (out, in), a trained weight
ours, library = rounded(W, NF4, 64), unpack(pack(W, double=False), W.shape)
print(f"largest difference from the library's NF4: {(ours - library).abs().max():.0e}")

# %% [markdown]
# ## The best levels depend on the weights
#
# The rounding error of a trained weight and of uniform random numbers, by the size of the blocks:

# %%
BLOCKS = [16, 32, 64, 128, 256, 1024]
uniform = 2 * torch.rand_like(W) - 1
errors = {
    (source, name): [relative_error(rounded(values, levels, n), values) for n in BLOCKS]
    for source, values in (("trained", W), ("uniform", uniform))
    for name, levels in (("NF4", NF4), ("int4", INT4))
}
single, double = (relative_error(unpack(pack(W, double=d), W.shape), W) for d in (False, True))
BITS = {"single": 4 + 32 / 64, "double": 4 + 8 / 64 + 32 / 64 / 256}
for (source, name), values in errors.items():
    print(f"{source:8} {name:5}" + "".join(f"{v:8.1%}" for v in values) + f"   blocks of {BLOCKS}")
print(f"double quantization: {BITS['single']:.3f} bits, error {single:.2%};", end=" ")
print(f"{BITS['double']:.3f} bits, error {double:.2%}")

# %% [markdown]
# ## The effect on the model
#
# All linear layers of pocket-bart in four bits. How far do its predictions $p$ move from those of
# float32, in mean Kullback–Leibler divergence? (The loss alone says little: the base is not tuned to
# these dialogues, so a small change may raise or lower it.)


# %%
@torch.no_grad()
def predictions(model: nn.Module) -> Tensor:
    """The log p of every token at every real target position of a held-out batch, (n, v)."""
    batch = batches.collate(workshop.dialogues(tokenizer, "validation", 24), workshop.PAD)
    labels = batch.pop("labels")  # (b, t)
    logits = model(**batch, decoder_input_ids=decoder_inputs(model, labels)).logits  # (b, t, v)
    return logits[labels != batches.IGNORED].log_softmax(dim=-1)


@torch.no_grad()
def in_four_bits(levels: Tensor, block: int) -> nn.Module:
    model, _ = workshop.pocket()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.copy_(rounded(module.weight, levels, block))
    return model


quantized, _ = workshop.pocket()
print(minilora.quantize(quantized))
exact = predictions(base)
moved = {
    name: (exact.exp() * (exact - predictions(model))).sum(dim=-1).mean().item()
    for name, model in {
        "NF4, blocks of 64": in_four_bits(NF4, 64),
        "NF4, blocks of 64, double": quantized,
        "int4, blocks of 64": in_four_bits(INT4, 64),
        "int4, blocks of 1,024": in_four_bits(INT4, 1024),
    }.items()
}
for name, divergence in moved.items():
    print(f"{name:26} predictions moved by {divergence:.4f} nats per token")

# %% [markdown]
# ## LoftQ: start the adapter at the rounding error


# %%
def loftq(W: Tensor, rank: int, steps: int) -> Tensor:
    """Q + B A (out, in) after alternating steps, s = 1; with 0 steps QLoRA's start, B = 0."""
    Q, BA = rounded(W, NF4, 64), torch.zeros_like(W)
    for step in range(steps):
        if step:
            Q = rounded(W - BA, NF4, 64)
        U, sigma, Vt = torch.linalg.svd(W - Q, full_matrices=False)
        BA = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]  # Eckart and Young, lesson 1
    return Q + BA


RANKS = [2, 4, 8, 16, 32, 64]
plain = relative_error(loftq(W, 1, 0), W)
repaired = {
    steps: [relative_error(loftq(W, rank, steps), W) / plain for rank in RANKS] for steps in (1, 5)
}
for steps, values in repaired.items():
    print(
        f"LoftQ, {steps} step(s): "
        + ", ".join(f"{v:.1%}" for v in values)
        + f" left, ranks {RANKS}"
    )

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6))
scaled = (W.reshape(-1, 64) / W.reshape(-1, 64).abs().amax(dim=1, keepdim=True)).flatten()
left.hist(scaled.numpy(), bins=80, density=True, color=workshop.GREY, alpha=0.5)
for levels, height, color, name in (
    (NF4, -0.12, workshop.BLUE, "NF4"),
    (INT4, -0.28, workshop.ORANGE, "int4"),
):
    left.plot(levels, [height] * len(levels), "|", markersize=11, color=color, label=name)
left.set(
    xlabel="weight / absmax of its block of 64", ylabel="density", title="Weights and levels"
)  # fmt: skip
left.set_yticks([0, 0.5, 1])
left.legend(fontsize=9)
for (source, name), values in errors.items():
    color = workshop.BLUE if name == "NF4" else workshop.ORANGE
    style = "o-" if source == "trained" else "s:"
    middle.plot(BLOCKS, [100 * v for v in values], style, color=color, label=f"{name}, {source}")
middle.set(
    xscale="log", ylim=(0, None), xlabel="block size", ylabel="relative error (%)",
    title="Rounding error",
)  # fmt: skip
middle.set_xticks(BLOCKS, map(str, BLOCKS))
middle.minorticks_off()
middle.legend(fontsize=8, loc="lower right")
for (steps, values), style in zip(repaired.items(), ("o--", "o-"), strict=True):
    label = f"LoftQ, {steps} step{'s' * (steps > 1)}"
    right.plot(RANKS, [100 * v for v in values], style, color=workshop.GREEN, label=label)
right.axhline(100, color="black", linewidth=1, linestyle=":", label="QLoRA's start")
right.set(
    xscale="log", ylim=(0, None), xlabel="rank r", ylabel="error left (% of NF4's)",
    title="Error after LoftQ's start",
)  # fmt: skip
right.set_xticks(RANKS, map(str, RANKS))
right.minorticks_off()
right.legend(fontsize=9, loc="lower left")
plt.show()

# %% [markdown]
# **What to see.** Left: NF4's levels are dense where most weights are; int4's are not. The bars at ±1
# are the largest value of each block, one of 64. Middle: on a trained weight NF4 (blue) has a smaller
# error than int4 (orange). The gap widens with the block size: a larger block has a larger largest
# value, which spreads all levels, and NF4 still has many near zero, where most weights are. On
# uniform numbers (dotted) the order is reversed: NF4 is better *for normal weights*, not in general.
# Smaller blocks are more accurate, but each halving doubles the memory of the scales. Right: LoftQ
# removes little of the error at the usual ranks. Rounding errors are nearly noise, and noise is not
# low-rank (the dashed line of lesson 1), so an adapter of rank 8 can represent only a small part of
# them.
#
# ## The claim
#
# On trained weights NF4 has a smaller error than int4 at blocks of 64 and above, on uniform numbers a
# larger one. Double quantization saves 0.37 bits per weight and raises the error by less than 1%. LoftQ
# is nearer to $W$ than plain NF4 at every rank, and more steps bring it nearer.


# %%
def claim(trained: str, better: list[list[float]], doubled: float) -> None:
    for i, block in enumerate(BLOCKS):
        ratio = errors[trained, "NF4"][i] / errors[trained, "int4"][i]
        assert block < 64 or ratio < 0.95, f"blocks of {block}: NF4 has {ratio:.2f} x int4's error"
    assert doubled < 1.01 * single, f"double quantization costs {doubled / single - 1:.1%}"
    for less, more in itertools.pairwise(better):
        assert all(a < b for a, b in zip(more, less, strict=True)), "LoftQ is no nearer"


starts = [[1.0] * len(RANKS), repaired[1], repaired[5]]
assert moved["NF4, blocks of 64"] < moved["int4, blocks of 64"] < moved["int4, blocks of 1,024"]
claim("trained", starts, double)
assert (ours - library).abs().max() < 1e-6
assert all(a > b for a, b in zip(errors["uniform", "NF4"], errors["uniform", "int4"], strict=True))

workshop.must_fail(lambda: claim("uniform", starts, double), "the weights are uniform")
workshop.must_fail(lambda: claim("trained", starts[::-1], double), "LoftQ goes backwards")
coarse = relative_error(rounded(W, NF4, 128), W)
workshop.must_fail(lambda: claim("trained", starts, coarse), "bits are saved by larger blocks")

# %% [markdown]
# ## Exercises
#
# Fill the gaps in [`exercises/lesson_6.py`](exercises/lesson_6.py), then run
# `python -m pytest lessons/exercises/test_lesson_6.py`:
#
# 1. `bits`: bits per weight, for any block sizes, with and without double quantization.
# 2. `pack_pairs`: sixteen levels need half a byte. Put two codes into one byte, the first in the high
#    half, as bitsandbytes does.
# 3. `best_levels`: Lloyd's algorithm finds levels with a smaller squared error than the quantiles:
#    assign each value to its nearest level, move each level to the mean of its values, repeat.
