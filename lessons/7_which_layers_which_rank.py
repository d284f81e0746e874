# %% [markdown]
# # 7 · Which layers, which rank
#
# **Question.** The number of trainable parameters is fixed. Should they adapt few matrices at a
# high rank, or many at a low rank? And how much better is full fine-tuning?
#
# ## The math
#
# An adapted matrix has $r\,(\text{in} + \text{out})$ trainable numbers. A transformer layer of width
# $d$ has four matrices of $d \times d$ in each attention block and two of $d \times 4d$ in the
# feed-forward block. At the same rank the numbers of a layer are
#
# $$ T_{\text{q/v}} = 2 \cdot 2rd \qquad
#    T_{\text{attention}} = 4 \cdot 2rd \qquad
#    T_{\text{all linear}} = 4 \cdot 2rd + 2 \cdot 5rd $$
#
# (a decoder layer of BART has two attention blocks). The original paper adapted only q and v (Hu et
# al. 2021, section 7.1). QLoRA found that adapting all linear layers matters more than the rank
# (Dettmers et al. 2023, figure 2). One model and one small data set prove nothing general. This lesson
# measures what holds *here*, with several seeds, so that noise is not mistaken for an effect.

# %%
import copy
import json
import statistics

import matplotlib.pyplot as plt
import torch
import workshop

import minilora
from minilora import LoRAConfig

# %% [markdown]
# ## A quick version
#
# pocket-bart, five steps of AdamW on short dialogues, three seeds (of the start of $A$ and of the order
# of the dialogues), loss on held-out dialogues. All LoRA runs share one learning rate; full fine-tuning
# has its own (lesson 3).

# %%
base, tokenizer = workshop.pocket()
rows = workshop.dialogues(tokenizer, "train", 40)
held_out = workshop.dialogues(tokenizer, "validation", 20)
before = workshop.loss_on(base, held_out)
SEEDS, STEPS = (0, 1, 2), 5

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TARGETS = {"q/v": ("q_proj", "v_proj"), "attention": ATTENTION, "all linear": "all-linear"}
RATES = {"q/v": 4e-3, "attention": 4e-3, "all linear": 4e-3, "full": 5e-4}


def run(method: str, rank: int, seed: int) -> tuple[int, float]:
    """How many parameters trained, and the held-out loss."""
    model = copy.deepcopy(base)
    if method == "full":
        model.requires_grad_(True)
    else:
        torch.manual_seed(seed)
        minilora.inject(model, LoRAConfig(rank=rank, alpha=32, targets=TARGETS[method]))
    workshop.train(model, rows, RATES[method], STEPS, seed=seed)
    trained = sum(p.numel() for p in minilora.trainable_parameters(model))
    return trained, workshop.loss_on(model, held_out)


CASES = [(method, rank) for method in TARGETS for rank in (1, 8)] + [("full", 0)]
found = {case: [run(*case, seed) for seed in SEEDS] for case in CASES}
trained = {case: results[0][0] for case, results in found.items()}
losses = {case: [loss for _, loss in results] for case, results in found.items()}

print(f"before{'':22} loss {before:.3f}")
for (method, rank), values in losses.items():
    name = method if method == "full" else f"{method}, rank {rank}"
    spread = f"{min(values):.3f} to {max(values):.3f}"
    count = trained[method, rank]
    print(f"{name:18} {count:9,} loss {statistics.mean(values):.3f} ({spread})")
few, many = losses["all linear", 1], losses["q/v", 8]
print(
    f"all linear at rank 1 beside q/v at rank 8: {statistics.mean(few) - statistics.mean(many):+.3f}"
    f" nats with {trained['all linear', 1] / trained['q/v', 8]:.0%} of the parameters"
)

# %% [markdown]
# ## The whole comparison
#
# Five steps are not a whole run. [`benchmarks/pocket.py`](../benchmarks/pocket.py) trains with the
# default preset, chooses the epoch by validation, and scores the summaries of all test dialogues. Its
# committed results on `bookings` are shown here. The score is ROUGE-1: how many words a summary shares
# with its reference (lesson 8). The intervals are *bootstrap* intervals: draw as many test dialogues as
# there are, with replacement, take the mean, repeat, and keep the middle 95% of the means.

# %%
table = json.loads((workshop.RESULTS / "ladder_bookings.json").read_text())
print(f"{'':24} {'trained':>10} {'minutes':>8} {'ROUGE-1':>8}  95% interval")
for row in [{"name": "base", **table["base"]}, *table["rows"]]:
    mean, low, high = row["intervals"]["rouge1"]
    minutes = f"{statistics.mean(row['minutes']):.1f}" if "minutes" in row else ""
    count = row.get("trainable") or 0
    print(f"{row['name']:24} {count:10,} {minutes:>8} {mean:8.1f}  {low:.1f} to {high:.1f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[1, 1.1])
for method, style in zip(TARGETS, ["o-", "s-", "^-"], strict=True):
    cases = [case for case in CASES if case[0] == method]
    counts = [trained[case] for case in cases]
    left.plot(counts, [statistics.mean(losses[case]) for case in cases], style, label=method)
    left.fill_between(
        counts, [min(losses[c]) for c in cases], [max(losses[c]) for c in cases], alpha=0.2
    )
full = losses["full", 0]
left.errorbar(
    [trained["full", 0]], [statistics.mean(full)], fmt="D", color="black", capsize=4, label="full",
    yerr=[[statistics.mean(full) - min(full)], [max(full) - statistics.mean(full)]],
)  # fmt: skip
left.axhline(before, color=workshop.GREY, linewidth=1, linestyle=":", label="before")
left.set(
    xscale="log", xlabel="trainable parameters", ylabel="held-out loss (nats per token)",
    title="After five steps: mean and range of three seeds",
)  # fmt: skip
left.legend(fontsize=9)
shown = [{"name": "base", **table["base"]}, *table["rows"]]
middle = [row["intervals"]["rouge1"][0] for row in shown]
low, high = (
    [abs(row["intervals"]["rouge1"][i] - m) for row, m in zip(shown, middle, strict=True)]
    for i in (1, 2)
)
names = [row["name"] for row in shown]
right.errorbar(middle, range(len(shown)), xerr=[low, high], fmt="o", capsize=3)
right.set_yticks(range(len(shown)), names, fontsize=8)
right.invert_yaxis()
right.set(
    xlabel="ROUGE-1 on the test split (95% interval)", ylabel="method", title="The whole fine-tune"
)
plt.show()

# %% [markdown]
# **What to see.** Left: every method gains. The bands (three seeds) are narrow compared with the
# gain, but not compared with the differences between methods. At the same number of trained
# parameters no choice of layers is clearly better than another. (On large models with long
# training, adapting more matrices is better than a higher rank on a few: Dettmers et al. 2023,
# figure 2. Five steps of a small model do not show this.) Full fine-tuning, at the far right,
# trains at least 37 times as many parameters. After five steps its loss is lower than that of
# `q_proj` and `v_proj` at rank 8, but not lower than that of all linear layers at rank 8. All LoRA
# runs use $\alpha = 32$; with Adam and $s = \alpha / r$ the first step then has the same size at every rank
# (lesson 3), so one learning rate is used for all. Right: compare intervals, not points. A better
# loss is not always a better ROUGE.
#
# ## The claim
#
# Every LoRA variant, with every seed, ends below the base's loss with less than a tenth of the
# parameters. All linear layers at rank 8 reach at least two thirds of full fine-tuning's gain. There is
# no claim about which of two similar methods is better: three seeds are too few.


# %%
def claim(results: dict[tuple[str, int], list[float]]) -> None:
    for case, values in results.items():
        assert max(values) < before, f"{case} does not gain: {max(values):.3f}"
        if case[0] != "full":
            assert trained[case] < trained["full", 0] / 10, f"{case} trains too much"
    gain, most = (before - statistics.mean(results[c]) for c in (("all linear", 8), ("full", 0)))
    assert gain > 2 / 3 * most, f"all linear layers reach only {gain / most:.0%} of the gain"


claim(losses)
assert all(row["gain"]["rouge1"][0] > 0 for row in table["rows"])

untrained = losses | {("all linear", 8): [before] * 3}
workshop.must_fail(lambda: claim(untrained), "one variant was never trained")
barely = losses | {("all linear", 8): [0.9 * before + 0.1 * statistics.mean(full)] * 3}
workshop.must_fail(lambda: claim(barely), "all linear layers gain a tenth of what full does")

# %% [markdown]
# ## Exercises
#
# Fill the gaps in [`exercises/lesson_7.py`](exercises/lesson_7.py), then run
# `python -m pytest lessons/exercises/test_lesson_7.py`:
#
# 1. `trained_numbers`: how many numbers an adapter trains, from the shapes of the wrapped weights.
# 2. `rank_within`: the largest rank, the same for all weights, that a budget allows.
# 3. `paired_interval`: is method 1 better than method 2? The bootstrap interval of the mean
#    difference, paired by dialogue: both scores of each drawn dialogue are used.
