# %% [markdown]
# # 4 · Merging
#
# **Question.** What does a fine-tuned model cost at inference, and what does merging the adapter do
# to the weights?
#
# ## The math
#
# The branch can be added to the weight, because a sum of linear maps is a linear map:
#
# $$ x W^\top + s\,(x A^\top) B^\top = x\,(W + s B A)^\top $$
#
# In exact arithmetic the two sides are equal. But $W$ is stored in bfloat16, with 8 significant
# bits, and the sum has to be rounded to them. Neighbouring bfloat16 numbers around $w$ are one
# *ulp* (unit in the last place) apart: $\mathrm{ulp}(w) = 2^{\lfloor \log_2 |w| \rfloor - 7}$.
# Rounding once, to the nearest, has an error of at most half an ulp. Two questions follow:
#
# - How large is the rounding error compared with a small $\Delta W$?
# - Can the base be restored? Subtracting does not restore it: with $\mathrm{fl}$ for rounding,
#   $\mathrm{fl}(\mathrm{fl}(W + \Delta W) - \Delta W)$ is not always $W$.

# %%
import copy
import json

import matplotlib.pyplot as plt
import torch
import workshop
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import minilora
from minilora import LoRAConfig, LoRALinear

torch.manual_seed(0)

# %% [markdown]
# ## The cost: count the operations
#
# One model in four states. Count the floating-point operations of its matrix products in a forward
# pass, and compare the modules: after `unwrap` the model has the modules it had before `inject`.

# %%
base, tokenizer = workshop.pocket()
adapted = copy.deepcopy(base)
minilora.inject(adapted, LoRAConfig(rank=8, alpha=32, targets="all-linear"))
for name, parameter in adapted.named_parameters():
    if name.endswith("lora_B"):
        nn.init.normal_(parameter, std=0.01)  # as if it had been trained

ids = torch.randint(10, 1000, (2, 40))


def flops(model: nn.Module) -> int:
    """Floating-point operations of the matrix products of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids[:, :20])
    return counter.get_total_flops()


def modules(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


merged = copy.deepcopy(adapted)
minilora.merge(merged)
unwrapped = minilora.unwrap(copy.deepcopy(adapted))
states = {"base": base, "adapter active": adapted, "merged": merged, "unwrapped": unwrapped}
cost = {name: flops(model) for name, model in states.items()}
for name, count in cost.items():
    print(f"{name:15} {count / 1e6:8.1f} MFLOP   {count / cost['base']:.3f} of the base's")

# %% [markdown]
# ## The rounding: merge and unmerge, in ulps
#
# A real weight of pocket-bart in bfloat16, and adapters whose update is about 2% of it. A server
# that switches between tasks merges one adapter, unmerges it, and merges the next. `by_subtraction`
# unmerges as PEFT and loralib do; minilora keeps the original weight while merged.


# %%
def ulp(w: Tensor) -> Tensor:
    """The distance between neighbouring bfloat16 numbers around w."""
    return 2.0 ** (w.double().abs().log2().floor() - 7)


W = base.model.decoder.layers[0].encoder_attn.q_proj.weight.detach().bfloat16()  # (out, in)
CYCLES = 60
by_subtraction = W.clone()
exact = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=torch.bfloat16)
exact.weight.data.copy_(W)

drift: dict[str, list[float]] = {"subtract": [], "minilora": []}
rounding = twice = torch.tensor(0.0)
for cycle in range(CYCLES):
    layer = LoRALinear(exact, rank=8, alpha=8, init="random")  # another task's adapter
    with torch.no_grad():
        layer.lora_B.mul_(0.02 * W.float().norm() / layer.delta().norm())
    delta = layer.delta()  # (out, in), float32

    if cycle == 0:
        wanted = W.double() + delta.double()
        layer.merge()
        rounding = (exact.weight.double() - wanted).abs() / ulp(wanted)  # (out, in), in ulps
        lost = (exact.weight.double() - wanted).norm() / delta.norm()
        # W + fl(delta W): the update is rounded before the sum, and the sum again
        twice = ((W + delta.bfloat16()).double() - wanted).abs() / ulp(wanted)
    layer.merge()  # in cycle 0 it is merged already: this does nothing
    layer.unmerge()
    by_subtraction = (by_subtraction.float() + delta).bfloat16()  # merge
    by_subtraction = (by_subtraction.float() - delta).bfloat16()  # unmerge
    drift["subtract"].append(((by_subtraction - W).double().abs() / ulp(W)).mean().item())
    drift["minilora"].append(((exact.weight - W).double().abs() / ulp(W)).mean().item())

changed = (by_subtraction != W).double().mean().item()
print(f"merged once: error {rounding.mean():.2f} ulp on average, {rounding.max():.2f} at most")
print(f"the rounding error has {lost:.1%} of the update's norm")
print(
    f"after {CYCLES} cycles with subtraction, {changed:.0%} of the weights differ from the base's"
)
print(f"with minilora, {(exact.weight != W).double().mean():.0%}")
latency = json.loads((workshop.RESULTS / "merge_latency.json").read_text())["results"]["forward"]
print(f"a second copy of the base takes {latency['base again']['ratio']:.3f} of the base's time")

# %%
figure, (left, right) = plt.subplots(1, 2)
names = list(cost)
positions = torch.arange(len(names))
left.plot(
    positions - 0.1, [cost[n] / cost["base"] for n in names], "o", label="operations, counted"
)
left.plot(positions + 0.1, [latency[n]["ratio"] for n in names], "s", label="time, measured")
left.axhline(1, color="black", linewidth=1, linestyle=":")
left.set_xticks(positions, names, fontsize=9)
left.set(
    ylim=(0.95, 1.05),
    xlabel="state of the model",
    ylabel="one forward pass (base = 1)",
    title="What an adapter costs",
)
left.legend(fontsize=9)
right.plot(range(1, CYCLES + 1), drift["subtract"], label="unmerge by subtracting")
right.plot(range(1, CYCLES + 1), drift["minilora"], label="minilora: restore the original weight")
right.set(
    xlabel="cycles of merging and unmerging",
    ylabel="mean distance from the base (ulp)",
    title="Is the base still the base? (bfloat16)",
)
right.legend(fontsize=9)
plt.show()

# %% [markdown]
# **What to see.** Left: an active adapter on every linear layer adds operations. Merged or unwrapped,
# the count equals the base's. The measured times come from
# [`benchmarks/merge_latency.py`](../benchmarks/merge_latency.py), with a larger model and an adapter
# on `q_proj` and `v_proj` only. The printed ratio of a second copy of the base would be 1 without
# noise: its distance from 1 shows the noise. Right: with subtraction the distance from the base grows
# over the cycles, although not in each. Most of the weights that differ are small. On average they
# differ by several of their own ulps. The flat line is exactly zero.
#
# Look at the printed share of the rounding error: its norm divided by that of the update. bfloat16 is
# coarse: an update of 2% of $W$ is only a few ulps wide. This is the cost of 8 bits for every
# library; in float32 the share is $2^{16}$ times smaller.
#
# ## The claim
#
# After `unwrap` the model has the base's modules and operations. Merging rounds once: the error is at
# most half an ulp. Unmerging restores the base bit for bit, and subtracting does not.


# %%
def claim(model: nn.Module, after: Tensor, rounding: Tensor) -> None:
    assert modules(model) == modules(base), "the modules differ from the base's"
    assert flops(model) == cost["base"], "more operations than the base's"
    assert rounding.max() <= 0.5 + 1e-4, "rounded more than once"  # 1e-4: the float32 sum's share
    moved = (after != W).double().mean().item()
    assert moved == 0, f"{moved:.0%} of the weights differ from the base's"


claim(unwrapped, exact.weight, rounding)
assert cost["adapter active"] > cost["base"] == cost["merged"]

workshop.must_fail(lambda: claim(unwrapped, by_subtraction, rounding), "unmerged by subtracting")
workshop.must_fail(lambda: claim(adapted, exact.weight, rounding), "the adapter is still active")
workshop.must_fail(lambda: claim(unwrapped, exact.weight, twice), "the update is rounded first")

# %% [markdown]
# ## Exercises
#
# Fill the gaps in [`exercises/lesson_4.py`](exercises/lesson_4.py), then run
# `python -m pytest lessons/exercises/test_lesson_4.py`:
#
# 1. `merge`: $W + s B A$ rounded once to the dtype of $W$. In which dtype must the sum be computed?
# 2. `branch_flops`: the operations of the two matrix products that an active adapter adds for one
#    token.
# 3. `stays`: the entries of a bfloat16 weight that an update does not change.
