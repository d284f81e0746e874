# %% [markdown]
# # 3 · Scale and rank
#
# **Question.** You double the rank. Is the same learning rate still right? It depends on the scale,
# $s = \alpha / r$ or $s = \alpha / \sqrt{r}$, and on the optimizer.
#
# ## The math
#
# Let $M = \partial L / \partial W = G^\top x$ (out, in) be the gradient with respect to the full
# weight. LoRA starts with $B = 0$, so only $B$ moves in the first step. For gradient descent with
# learning rate $\eta$:
#
# $$ B_1 = -\eta\, s\, M A^\top \qquad\Longrightarrow\qquad
#    \Delta W_1 = s B_1 A = -\eta\, s^2\, M A^\top A $$
#
# The entries of $A$ are uniform in $\pm 1/\sqrt{\text{in}}$, with variance $1/(3\,\text{in})$, so
# $\mathbb{E}[A^\top A] = \frac{r}{3\,\text{in}} I$. How much of the step follows the gradient?
# Project it onto the direction of steepest descent, in units of the full gradient:
#
# $$ p = -\frac{\langle \Delta W_1, M \rangle}{\lVert M \rVert^2}
#      = \eta\, s^2\, \frac{\lVert M A^\top \rVert^2}{\lVert M \rVert^2}
#      \approx \eta\, s^2\, \frac{r}{3\,\text{in}} $$
#
# So $p \propto 1/r$ with $s = \alpha/r$, and $p$ does not depend on $r$ with $s = \alpha/\sqrt r$. This
# is rsLoRA's argument (Kalajdzievski 2023, [arXiv:2312.03732](https://arxiv.org/abs/2312.03732)).
#
# Adam's first step does not depend on the size of the gradient:
# $B_1 = -\eta\, \mathrm{sign}(s\, M A^\top)$. One factor of $s$ disappears, and
#
# $$ p = \eta\, s\, \frac{\sum_{ik} |M A^\top|_{ik}}{\lVert M \rVert^2} \;\propto\; s\, r $$
#
# Now $p$ does not depend on $r$ with $s = \alpha/r$, and grows as $\sqrt r$ with $s = \alpha/\sqrt r$.
# The exponents of $r$ in $p$:
#
# | | $s = \alpha / r$ | $s = \alpha / \sqrt r$ |
# | --- | --- | --- |
# | gradient descent | $r^{-1}$ | $r^{0}$ |
# | Adam | $r^{0}$ | $r^{1/2}$ |

# %%
import copy

import matplotlib.pyplot as plt
import torch
import workshop
from torch import Tensor, nn

import minilora
from minilora import LoRAConfig, LoRALinear

torch.manual_seed(0)

# %% [markdown]
# ## The first step, measured
#
# One linear layer and a regression. Take a step, and measure p.

# %%
x, target = torch.randn(16, 256), torch.randn(16, 128)  # (n, in), (n, out)
linear = nn.Linear(256, 128, bias=False)
M = torch.autograd.grad((linear(x) - target).square().sum() / 2, linear.weight)[0]  # (out, in)


def updates(
    optimizer: str, rslora: bool, rank: int, steps: int, seed: int, rate: float = 1e-4
) -> list[Tensor]:
    """Delta W (out, in) after each step."""
    torch.manual_seed(seed)
    layer = LoRALinear(linear, rank=rank, alpha=16, rslora=rslora)
    optim = getattr(torch.optim, optimizer)([layer.lora_A, layer.lora_B], lr=rate)
    found = []
    for _ in range(steps):
        optim.zero_grad()
        ((layer(x) - target).square().sum() / 2).backward()
        optim.step()
        found.append(layer.delta())
    return found


def downhill(delta: Tensor) -> float:
    """The p of the equation above."""
    return (-(delta * M).sum() / M.square().sum()).item()


RANKS = [1, 2, 4, 8, 16, 32, 64, 128]
RULES = {"alpha / r": False, "alpha / sqrt(r)": True}
EXPECTED = {
    ("SGD", "alpha / r"): -1.0,
    ("SGD", "alpha / sqrt(r)"): 0.0,
    ("Adam", "alpha / r"): 0.0,
    ("Adam", "alpha / sqrt(r)"): 0.5,
}


def exponent(values: Tensor) -> float:
    """The slope of log(values) against log(rank), by least squares."""
    log_rank, log_value = torch.tensor(RANKS).double().log(), values.double().log()
    centred = log_rank - log_rank.mean()
    return ((centred * log_value).sum() / centred.square().sum()).item()


progress = {
    (optimizer, rule): torch.tensor(
        [[downhill(updates(optimizer, RULES[rule], r, 1, s)[0]) for s in range(6)] for r in RANKS]
    ).mean(dim=1)
    for optimizer, rule in EXPECTED
}
slopes = {case: exponent(values) for case, values in progress.items()}
for (optimizer, rule), slope in slopes.items():
    expected = EXPECTED[optimizer, rule]
    print(f"{optimizer:5} s = {rule:16} p ~ r^{slope:5.2f}   (derived: r^{expected:.1f})")

# %% [markdown]
# ## Several steps
#
# From the second step on $A$ moves too, and the derivation no longer holds. So measure the norm of
# $\Delta W$ over 40 steps of Adam, at a small and at a large rank.

# %%
norms = {
    (rule, rank): [d.norm().item() for d in updates("Adam", rslora, rank, 40, 0, 1e-3)]
    for rule, rslora in RULES.items()
    for rank in (4, 64)
}

# %% [markdown]
# ## Learning rates, on a real model
#
# pocket-bart, a few steps of AdamW on short dialogues: rank 8 with $\alpha = 32$ on every linear
# layer, and full fine-tuning. The loss is on held-out dialogues.

# %%
model, tokenizer = workshop.pocket()
rows = workshop.dialogues(tokenizer, "train", 48)
held_out = workshop.dialogues(tokenizer, "validation", 24)
before = workshop.loss_on(model, held_out)


def tried(method: str, rate: float) -> float:
    """Held-out loss after six steps."""
    tuned = copy.deepcopy(model)
    if method == "LoRA":
        torch.manual_seed(0)
        minilora.inject(tuned, LoRAConfig(rank=8, alpha=32, targets="all-linear"))
    workshop.train(tuned, rows, rate, steps=6)
    return workshop.loss_on(tuned, held_out)


RATES = {"full": [2.5e-5, 1e-4, 4e-4, 1.6e-3], "LoRA": [4e-4, 1.6e-3, 6.4e-3, 2.56e-2]}
losses = {method: [tried(method, rate) for rate in rates] for method, rates in RATES.items()}
best = {m: RATES[m][losses[m].index(min(losses[m]))] for m in RATES}
print({m: [round(v, 2) for v in losses[m]] for m in losses}, "best rates:", best)

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
for (optimizer, rule), values in progress.items():
    color = workshop.BLUE if optimizer == "SGD" else workshop.ORANGE
    style = "o-" if rule == "alpha / r" else "s--"
    axes[0].plot(RANKS, values / values[0], style, color=color, label=f"{optimizer}, {rule}")
axes[0].set(
    xscale="log", yscale="log", xlabel="rank r", ylabel="p, relative to r = 1",
    title="One step",
)  # fmt: skip
axes[0].set_xticks(RANKS, map(str, RANKS))
axes[0].minorticks_off()
axes[0].legend(fontsize=8)
for (rule, rank), values in norms.items():
    color = workshop.GREEN if rank == 4 else workshop.RED
    style = "-" if rule == "alpha / r" else "--"
    axes[1].plot(range(1, 41), values, style, color=color, label=f"r = {rank}, {rule}")
axes[1].set(xlabel="step of Adam", ylabel="norm of the update, ||ΔW||", title="Several steps")
axes[1].legend(fontsize=8)
for method, values in losses.items():
    axes[2].plot(RATES[method], values, "o-", label=method)
axes[2].axhline(before, color="black", linewidth=1, linestyle=":", label="before")
axes[2].set(
    xscale="log", ylim=(None, before + 1.0), xlabel="learning rate (AdamW)",
    ylabel="held-out loss (nats per token)", title="pocket-bart after six steps",
)  # fmt: skip
axes[2].legend(fontsize=8)
plt.show()

# %% [markdown]
# **What to see.** Left: straight lines with the four slopes derived above. Neither rule fits every
# optimizer; each makes one optimizer independent of the rank. Middle: over several steps of Adam, and
# in norm (which also counts what does not go downhill), rank 64 is below rank 4 with $\alpha/r$
# (solid) and above it with $\alpha/\sqrt r$ (dashed): here neither rule is neutral. Right: LoRA's
# best learning rate is higher than that of full fine-tuning, and would be much too high for full
# fine-tuning. So one common rate favours one of the two: compare the printed losses at 0.0004 and at
# 0.0016, which both have tried (the last two for full, the first two for LoRA).
#
# ## The claim
#
# The four exponents are as derived, and LoRA's best rate is at least four times that of full
# fine-tuning.


# %%
def claim(expected: dict[tuple[str, str], float], rates: dict[str, float]) -> None:
    for case, wanted in expected.items():
        assert abs(slopes[case] - wanted) < 0.1, f"{case}: {slopes[case]:.2f}, not {wanted}"
    ratio = rates["LoRA"] / rates["full"]
    assert ratio >= 3.9, f"LoRA's best rate is only {ratio:.1f} times that of full fine-tuning"


claim(EXPECTED, best)

as_for_sgd = {(o, rule): EXPECTED["SGD", rule] for o, rule in EXPECTED}
workshop.must_fail(lambda: claim(as_for_sgd, best), "SGD's exponents are expected of Adam")
workshop.must_fail(
    lambda: claim(EXPECTED, best | {"LoRA": best["full"]}), "full fine-tuning is called LoRA"
)

# %% [markdown]
# ## Exercises
#
# Fill the gaps in [`exercises/lesson_3.py`](exercises/lesson_3.py), then run
# `python -m pytest lessons/exercises/test_lesson_3.py`:
#
# 1. `alpha_for`: the alpha that keeps the scale when the rank changes, for each rule.
# 2. `step_ratio`: how many times as far downhill the first step goes at rank $r'$ as at rank $r$.
# 3. `folded`: move $s$ into the factors: $A' = c A$, $B' = c B$ with $B' A' = s B A$. Before you look at
#    the solution: is training $A'$ and $B'$ with $s = 1$ the same as before?
