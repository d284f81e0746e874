# %% [markdown]
# # 2 · The layer
#
# **Question.** What does a LoRA layer compute, what are its gradients, and why does $B$ start at
# zero?
#
# ## The math
#
# A branch is added to a frozen weight $W$ (out, in): $A$ (r, in) projects the input down to $r$
# numbers, $B$ (out, r) projects them up again, and $s = \alpha / r$ scales the result. For a batch
# $x$ (n, in):
#
# $$ h = x A^\top \quad (n, r) \qquad\qquad y = x W^\top + s\, h B^\top \quad (n, \text{out}) $$
#
# Let $G = \partial L / \partial y$ (n, out) be the gradient of the loss with respect to the output. The
# chain rule gives the gradients of the two factors and of the input:
#
# $$ \frac{\partial L}{\partial B} = s\, G^\top h \qquad
#    \frac{\partial L}{\partial A} = s\, (G B)^\top x \qquad
#    \frac{\partial L}{\partial x} = G W + s\, (G B) A $$
#
# For a given $G$, $\partial L / \partial B$ contains $A$ (through $h$) but not $B$, and
# $\partial L / \partial A$ contains $B$ but not $A$. So at the start:
#
# | start | output | $\partial L / \partial A$ | $\partial L / \partial B$ |
# | --- | --- | --- | --- |
# | $A$ random, $B = 0$ (LoRA) | the base's | 0 | not 0: $B$ moves first, then $A$ too |
# | $A = 0$, $B$ random | the base's | not 0 | 0: $A$ moves first, then $B$ too |
# | both zero | the base's | 0 | 0: a saddle point, neither ever moves |
# | both random | **changed** | not 0 | not 0 |

# %%
import matplotlib.pyplot as plt
import torch
import workshop
from torch import Tensor, nn

from minilora import LoRALinear, conformance

torch.manual_seed(0)

# %% [markdown]
# ## The layer, by hand
#
# Forward and backward in a dozen lines, with shapes.


# %%
class ByHand(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T, and its backward as derived above."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        h = x @ A.T  # (n, r)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.s = s
        return x @ W.T + s * (h @ B.T)  # (n, out)

    @staticmethod
    def backward(ctx, G: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        GB = ctx.s * (G @ B)  # (n, r): needed twice
        dx = G @ W + GB @ A  # (n, in)
        dA = GB.T @ x  # (r, in)
        dB = ctx.s * (G.T @ h)  # (out, r)
        return dx, None, dA, dB, None  # W is frozen: no gradient is even computed


# %% [markdown]
# Three ways to get the same gradients: by hand, as above; by autograd; and by the library, which
# also uses these equations in training, to save memory, and adds dropout and mixed precision.
# Compare them in float64, with random numbers in $B$: at $B = 0$ a wrong $\partial L / \partial A$
# would not be noticed.

# %%
layer = LoRALinear(nn.Linear(48, 32, bias=False).double(), rank=4, alpha=10)  # s = 2.5
nn.init.normal_(layer.lora_B)
W, A, B = layer.base.weight, layer.lora_A, layer.lora_B
x = torch.randn(16, 48, dtype=torch.float64, requires_grad=True)
G = torch.randn(16, 32, dtype=torch.float64)


def with_gradients(y: Tensor) -> list[Tensor]:
    """Y (n, out), dL/dx (n, in), dL/dA (r, in), dL/dB (out, r)."""
    return [y, *torch.autograd.grad(y, [x, A, B], G)]


by_hand = with_gradients(ByHand.apply(x, W, A, B, layer.scale))
by_autograd = with_gradients(x @ W.T + layer.scale * ((x @ A.T) @ B.T))
by_library = with_gradients(layer(x))

for name, *results in zip(
    ["y", "dL/dx", "dL/dA", "dL/dB"], by_hand, by_autograd, by_library, strict=True
):
    worst = max((result - results[1]).abs().max().item() for result in results)
    print(f"{name:6} {tuple(results[0].shape)!s:9} largest difference {worst:.0e}")

# %% [markdown]
# ## Four starts, one task
#
# The base $W$ is frozen. The task needs $W + \Delta$ with a $\Delta$ of rank 2. All four runs train
# alike; only the first values of $A$ and $B$ differ.

# %%
torch.manual_seed(1)
base = nn.Linear(48, 32, bias=False)
planted = torch.randn(32, 2) @ torch.randn(2, 48) / 10  # (out, in), rank 2
x = torch.randn(256, 48)  # (n, in)
target = x @ (base.weight + planted).T.detach()  # (n, out)


def learn(A_zero: bool, B_zero: bool, steps: int = 150) -> tuple[list[float], LoRALinear]:
    """The loss before each step of Adam, and the layer afterwards."""
    torch.manual_seed(2)
    layer = LoRALinear(base, rank=4, alpha=8, init="random")
    with torch.no_grad():  # both are random; set those to zero that are asked for
        layer.lora_A.mul_(not A_zero)
        layer.lora_B.mul_(not B_zero)
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, layer


STARTS = {
    "A random, B = 0 (LoRA)": (False, True),
    "A = 0, B random": (True, False),
    "both random": (False, False),
    "both zero": (True, True),
}
curves = {name: learn(*start) for name, start in STARTS.items()}
base_loss = (base(x) - target).square().mean().item()

# %%
figure, (left, right) = plt.subplots(1, 2)
for (name, (losses, _)), style in zip(curves.items(), ["-", "--", "-.", "-"], strict=True):
    left.plot(losses[:16], style, linewidth=2)
    right.plot(losses, style, label=name, linewidth=2)
for axis in (left, right):
    axis.axhline(base_loss, color="black", linewidth=1, linestyle=":", label="the base alone")
    axis.set(xlabel="step of Adam", ylabel="mean squared error")
left.set(title="The first steps", ylim=(0, None))
right.set(title="All steps", ylabel="mean squared error (log scale)", yscale="log")
right.legend(loc="lower left", fontsize=9)
plt.show()

# %% [markdown]
# **What to see.** With one factor at zero, the loss starts exactly at the base's (dotted) and falls.
# With both at zero it stays there: both gradients are zero. With both random, training works too, but
# the first loss is *above* the base's: the start has made the model worse, and training has to undo
# that first.
#
# So one factor must be zero. For the first output it does not matter which. LoRA chose $B$ (Hu et al.
# 2021, section 4.1). Later the two choices differ: training from a random $A$ stays stable at larger
# learning rates
# (Hayou et al. 2024, [The Impact of Initialization on LoRA](https://arxiv.org/abs/2406.08447)).
#
# ## The claim
#
# The equations above are the gradients. LoRA's start does not change the base's output, bit for bit,
# and it trains. Two factors at zero never train.


# %%
def claim(gradients: list[Tensor], start: str) -> None:
    for ours, theirs in zip(gradients, by_autograd, strict=True):
        worst = (ours - theirs).abs().max().item()
        assert worst < 1e-12, f"a gradient is off by {worst:.1e}"
    first, last = (curves[start][0][i] / base_loss for i in (0, -1))
    assert first == 1, f"{start}: the first loss is {first:.2f} times the base's"
    assert last < 0.01, f"{start}: the last loss is {last:.2f} times the base's"


claim(by_hand, "A random, B = 0 (LoRA)")
claim(by_library, "A random, B = 0 (LoRA)")
assert torch.equal(LoRALinear(base, rank=4, alpha=8)(x), base(x))  # bit for bit
stuck = curves["both zero"][1]
assert not stuck.lora_A.any() and not stuck.lora_B.any()  # exactly zero after 150 steps

workshop.must_fail(lambda: claim(by_hand, "both zero"), "both start at zero")
workshop.must_fail(lambda: claim(by_hand, "both random"), "both start at random")
without_s = [*by_hand[:3], by_hand[3] / layer.scale]
workshop.must_fail(lambda: claim(without_s, "A random, B = 0 (LoRA)"), "dL/dB without s")

# %% [markdown]
# ## Your own layer, checked in one line
#
# Write a layer as you like. `conformance.check` makes small linear layers, wraps each in your layer,
# and checks what every LoRA layer must satisfy: the start, what trains, the gradients against finite
# differences, the scale, the rank, dropout, merging ([all of it](../docs/conformance.md)). What the
# layer does not do, such as merging, is reported as not applicable.


# %%
class MyLoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.s, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.base(x) + self.s * (self.dropout(x) @ self.A.T @ self.B.T)


print(conformance.check(MyLoRA))

# %% [markdown]
# Every number in the table is measured. If the layer ignores $\alpha$, one line of the table shows it:


# %%
class Forgetful(MyLoRA):
    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base, rank, 1, dropout)


def right(make: type[nn.Module]) -> None:
    failed = [result for result in conformance.check(make) if result.outcome == "failed"]
    assert not failed, "; ".join(f"{name}, {detail}" for name, _, detail in failed)


right(MyLoRA)
workshop.must_fail(lambda: right(Forgetful), "alpha is forgotten")

# %% [markdown]
# ## Exercises
#
# Fill the gaps in [`exercises/lesson_2.py`](exercises/lesson_2.py), then run
# `python -m pytest lessons/exercises/test_lesson_2.py`:
#
# 1. `lora_forward`: the layer's output with dropout on the branch's input, but not on the base's.
#    `conformance.check` then checks the layer made of it, as above.
# 2. `lora_gradients`: $\partial L/\partial A$ and $\partial L/\partial B$ with that dropout.
# 3. `first_step`: $\Delta W = s B A$ after one step of gradient descent from LoRA's start, in closed
#    form, without a layer.
