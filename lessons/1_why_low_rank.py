# %% [markdown]
# # 1 · Why low rank
#
# **Question.** Fine-tuning changes every entry of a weight. Why can the product of two thin matrices
# replace that change?
#
# ## The math
#
# Full fine-tuning turns a weight $W$ (out, in) into $W + \Delta W$. The singular value decomposition
# writes any such update as a sum of rank-one pieces, the largest first:
#
# $$ \Delta W = \sum_i \sigma_i\, u_i v_i^\top, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0 $$
#
# Keep the first $r$ pieces. No matrix of rank $r$ is nearer to $\Delta W$ (Eckart and Young 1936), and
# the error is known exactly:
#
# $$ \min_{\operatorname{rank} X \le r} \lVert \Delta W - X \rVert_F
#    = \sqrt{\textstyle\sum_{i > r} \sigma_i^2} $$
#
# LoRA trains $\Delta W = s B A$, with a constant $s$, $A$ (r, in) and $B$ (out, r): a matrix of rank at
# most $r$, with $r\,(\text{in} + \text{out})$ numbers instead of $\text{in} \cdot \text{out}$. This
# works well only if the $\sigma_i$ fall quickly. Do they? (Hu et al. 2021, section 4, assumed it;
# Aghajanyan et al. 2020, [arXiv:2012.13255](https://arxiv.org/abs/2012.13255), had measured something
# similar.)

# %%
import copy
import json

import matplotlib.pyplot as plt
import torch
import workshop
from torch import Tensor, nn

from minilora import LoRALinear

torch.manual_seed(0)

# %% [markdown]
# ## A real update
#
# Fine-tune all of pocket-bart, a small BART of width 384 that comes with the library, for a few steps
# on short dialogues, and decompose the update of every linear layer. This run is short, on `bookings`,
# chats with a service. The plot below adds a complete fine-tuning run on `minichat`, everyday chats, a
# stored result of [`benchmarks/full_update.py`](../benchmarks/full_update.py). The *energy* of an
# update is its squared Frobenius norm.

# %%
base, tokenizer = workshop.pocket()
held_out = workshop.dialogues(tokenizer, "validation", 24)
tuned = copy.deepcopy(base)
workshop.train(tuned, workshop.dialogues(tokenizer, "train", 96), learning_rate=5e-4, steps=20)

linears = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
weights = {name: base.get_submodule(name).weight.detach() for name in linears}
pieces = {
    name: torch.linalg.svd(tuned.get_submodule(name).weight.detach() - W, full_matrices=False)
    for name, W in weights.items()
}  # name -> U (out, k), sigma (k,), V^T (k, in)


def energy(sigma: Tensor) -> Tensor:
    """The share of the squared norm in the first r pieces, for r = 1, 2, ..."""
    return sigma.square().cumsum(0) / sigma.square().sum()


square = [name for name, W in weights.items() if W.shape[0] == W.shape[1]]  # attention's
shares = torch.stack([energy(pieces[name].S) for name in square])  # (matrices, k)
noise = energy(torch.linalg.svdvals(torch.randn_like(weights[square[0]])))  # a random matrix
for r in (1, 8, 32):
    print(
        f"rank {r:2} has {shares[:, r - 1].mean():4.0%} of an update's energy "
        f"({shares[:, r - 1].min():.0%} to {shares[:, r - 1].max():.0%}), "
        f"{noise[r - 1]:.0%} of a random matrix's"
    )

# %% [markdown]
# Energy is not the goal of fine-tuning. So put the truncated updates into the model, and measure how
# much of the *gain* each rank keeps. (Embeddings, biases and norms stay fine-tuned; rank 0 shows
# their effect alone.)


# %%
@torch.no_grad()
def loss_at(rank: int) -> float:
    """Held-out loss of the fine-tuned model, every linear's update cut to its first pieces."""
    for name, (U, sigma, Vt) in pieces.items():
        kept = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]  # (out, in)
        tuned.get_submodule(name).weight.copy_(weights[name] + kept)
    return workshop.loss_on(tuned, held_out)


full_rank = shares.shape[1]
KEPT = [0, 1, 2, 4, 8, 16, 32, full_rank]
by_rank = {rank: loss_at(rank) for rank in KEPT}
before, after = workshop.loss_on(base, held_out), by_rank[full_rank]
gain = {rank: (by_rank[0] - loss) / (by_rank[0] - after) for rank, loss in by_rank.items()}
print(f"held-out loss {before:.3f} before, {after:.3f} after;", end=" ")
print("of what the linear layers gain,", ", ".join(f"rank {r}: {gain[r]:.0%}" for r in KEPT[1:-1]))

# %% [markdown]
# ## A planted update, learned
#
# The SVD needs $\Delta W$. LoRA does not: it sees inputs and target outputs, and follows the
# gradients of $A$ and $B$. Does it find the best matrix of its rank? Choose an update whose
# singular values are each a fifth smaller than the one before, let LoRA learn it from examples at
# ranks 1 to 16, and compare with the bound. The inputs are standard normal, so the loss is the
# squared error of the bound: $\mathbb{E} \lVert (\Delta W - P)\, x \rVert^2 = \lVert \Delta W - P \rVert_F^2$ for
# the planted $P$. For other inputs the matrix with the lowest loss is not the truncated SVD.

# %%
torch.manual_seed(1)
sigma = 0.8 ** torch.arange(24)  # (k,)
U, V = (torch.linalg.qr(torch.randn(size, 24)).Q for size in (32, 48))
planted = (U * sigma) @ V.T  # (out, in)
linear = nn.Linear(48, 32, bias=False)


def learned(rank: int, train_A: bool = True) -> Tensor:
    """Delta W (out, in) after fitting y = (W + planted) x on fresh random inputs."""
    torch.manual_seed(rank)
    layer = LoRALinear(linear, rank=rank, alpha=rank)  # s = 1
    trained = [layer.lora_A, layer.lora_B] if train_A else [layer.lora_B]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        x = torch.randn(256, 48)  # (n, in)
        loss = (layer(x) - x @ (linear.weight + planted).T).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer.delta()  # s B A, (out, in)


RANKS = [1, 2, 4, 8, 16]
error = {rank: (planted - learned(rank)).norm().item() for rank in RANKS}
bound = {rank: sigma[rank:].norm().item() for rank in RANKS}
for rank in RANKS:
    print(f"rank {rank:2}: error {error[rank]:.4f}, bound {bound[rank]:.4f}")

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6))
ranks = torch.arange(1, full_rank + 1)
left.plot(ranks, shares.mean(0), label="updates, this run (mean)")
left.fill_between(ranks, shares.amin(0), shares.amax(0), alpha=0.2, label="least and most")
left.plot(ranks, noise, color=workshop.GREY, linestyle="--", label="a random matrix")
stored = workshop.RESULTS / "full_update.json"
if stored.exists():  # the same for a whole fine-tune, by benchmarks/full_update.py
    whole = json.loads(stored.read_text())
    earlier = ", earlier weights" * (whole.get("weights") != workshop.weights())
    line = {"color": workshop.GREEN, "label": f"whole fine-tune{earlier}"}
    left.plot(whole["ranks"], whole["energy_mean"], **line)
    middle.plot(whole["gain_ranks"], whole["gain"], "s--", **line)
left.set(
    xlabel="pieces kept, r", ylabel="share of the squared norm", xscale="log", ylim=(0, 1.4),
    title="The energy of real updates",
)  # fmt: skip
left.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
left.legend(fontsize=8, loc="upper left")
middle.plot(KEPT[1:], [gain[r] for r in KEPT[1:]], "o-", label="this run")
middle.axhline(1, color="black", linewidth=1, linestyle=":")
middle.set(
    xlabel="pieces kept, r", ylabel="share of the gain in held-out loss", xscale="log",
    ylim=(0, None), title="Their share of the gain",
)  # fmt: skip
middle.legend(fontsize=8, loc="lower right")
for axis in (left, middle):
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 256][: full_rank.bit_length()])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
right.plot(RANKS, list(bound.values()), color="black", label="Eckart–Young bound")
right.plot(RANKS, list(error.values()), "o", color=workshop.ORANGE, label="LoRA, learned")
right.set(xlabel="rank r", ylabel="||planted − ΔW||", title="A planted update, learned")
right.set_xticks(RANKS)
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# **What to see.** Left: the curves of the real updates are far above that of a random matrix
# (dashed). A few pieces have much of the energy, but not all of it. (These are the square matrices,
# of attention. The gain is measured with all linear layers.) Middle: the gain is even more
# concentrated. A few pieces give most of it, and the many small ones give little. Where a printed
# share is above 100%, the cut even helps: after so short a run, on few dialogues, the small pieces
# are noise or overfitting. Right: the dots are on the line. Adam, on $A$ and $B$, finds nearly the
# best matrix of its rank, although it never sees the update.
#
# Two warnings. The *energy* is spread over many pieces, partly because Adam's steps have nearly the
# same size in every entry. And a truncated full update that works does not prove that training at a
# low rank finds an equally good one; lesson 7 measures that.
#
# ## The claim
#
# At rank 8 of at most 384, a real update keeps more than twice the energy of a random matrix, and
# most of the gain. LoRA's error is never below the Eckart–Young bound, and at most 5% above it.


# %%
def claim(share: Tensor, kept: float, errors: dict[int, float]) -> None:
    times = (share[7] / noise[7]).item()
    assert times > 2, f"8 pieces have only {times:.1f} times the energy of a random matrix's"
    assert kept > 0.6, f"8 pieces keep only {kept:.0%} of the gain"
    for rank, found in errors.items():
        ratio = found / bound[rank]
        assert 1 - 1e-4 <= ratio < 1.05, f"rank {rank}: {ratio:.2f} times the bound"


claim(shares.mean(0), gain[8], error)

workshop.must_fail(lambda: claim(noise, gain[8], error), "the update is a random matrix")
one_rank = dict.fromkeys(RANKS, error[4])
workshop.must_fail(lambda: claim(shares.mean(0), gain[8], one_rank), "every rank learns as rank 4")
only_B = {8: (planted - learned(8, train_A=False)).norm().item()}
workshop.must_fail(lambda: claim(shares.mean(0), gain[8], only_B), "A does not train")
workshop.must_fail(lambda: claim(shares.mean(0), gain[0], error), "no piece is kept")

# %% [markdown]
# ## Exercises
#
# Fill the gaps in [`exercises/lesson_1.py`](exercises/lesson_1.py), then run
# `python -m pytest lessons/exercises/test_lesson_1.py`:
#
# 1. `best_factors`: $A$ and $B$ of rank $r$ whose product is the best approximation of an update.
# 2. `rank_for`: the smallest rank that keeps a given share of an update's energy.
# 3. `break_even`: the rank from which LoRA trains at least as many numbers as full fine-tuning.
