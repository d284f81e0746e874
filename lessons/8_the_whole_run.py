# %% [markdown]
# # 8 · The whole run
#
# **Question.** The loss fell. Are the summaries better, how sure is that, and what is still wrong?
#
# ## The math
#
# ROUGE-1 counts the words that a summary shares with a reference summary (in `bookings`, rules
# wrote the references from annotations). With $m$ shared words, a summary of $p$ words and a
# reference of $q$ words:
#
# $$ P = \frac{m}{p} \qquad R = \frac{m}{q} \qquad F_1 = \frac{2 P R}{P + R} = \frac{2m}{p + q} $$
#
# With no shared word all three are 0. The library's score also ignores punctuation, and counts words
# with the same stem, such as "booked" and "booking", as shared; exercise 1 does not.
#
# A test split is a sample of all dialogues, so a mean score is uncertain. The *bootstrap* draws
# dialogues from it with replacement, many times, and measures how much the mean varies. We want the
# difference of two models, and both tend to score low on the same dialogues:
#
# $$ \operatorname{Var}(a - b) = \operatorname{Var}(a) + \operatorname{Var}(b)
#    - 2 \operatorname{Cov}(a, b) $$
#
# With a positive covariance the *paired* difference varies less than the difference of two
# independent samples, and with a large one less than either score. So draw dialogues, and use the
# scores of both models on each drawn dialogue (Koehn 2004).
#
# ROUGE does not measure whether a summary is true. One kind of error can be counted without a judge: a
# name that does not occur in the dialogue.

# %%
import json
import math
import re
import statistics

import matplotlib.pyplot as plt
import torch
import workshop

import minilora
from minilora import LoRAConfig
from minilora.summarization.data import splits
from minilora.summarization.evaluation.generate import summarize
from minilora.summarization.evaluation.rouge import bootstrap, rouge
from minilora.summarization.settings import DataOptions, GenerationOptions

# %% [markdown]
# ## A short run on bookings
#
# Fine-tune pocket-bart for 30 steps. Both models summarize the same test dialogues with the same
# decoding.

# %%
model, tokenizer = workshop.pocket()
examples = {e.id: e for e in splits.load(DataOptions(data="bookings"), ["test"])[0]["test"]}
rows = workshop.dialogues(tokenizer, "test", 32)
torch.manual_seed(0)
minilora.inject(model, LoRAConfig(rank=8, alpha=32, targets="all-linear"))
short = workshop.dialogues(tokenizer, "train", 160)
for seed, rate in enumerate([3e-3, 1.5e-3, 5e-4]):  # the rate falls
    workshop.train(model, short, rate, steps=10, seed=seed)

greedy = GenerationOptions(beams=1, min_length=16, max_length=48)
tuned = summarize(model, tokenizer, rows, greedy)
losses = {"finetuned": [workshop.loss_on(model, [row]) for row in rows]}
with minilora.disabled(model):  # the base, without a copy of it
    base = summarize(model, tokenizer, rows, greedy)
    losses["base"] = [workshop.loss_on(model, [row]) for row in rows]

references = [examples[row.id].summary for row in rows]
scores = {
    "base": [s["rouge1"] for s in rouge([s.text for s in base], references)],
    "finetuned": [s["rouge1"] for s in rouge([s.text for s in tuned], references)],
}

# %% [markdown]
# ## Invented names
#
# A word with a capital letter counts as a name if bookings never writes it in lower case. It is
# invented if the dialogue does not contain it, not even inside a longer word.

# %%
dialogues = [e.dialogue for e in splits.load(DataOptions(data="bookings"), ["train"])[0]["train"]]
ordinary = {word for text in dialogues for word in re.findall(r"\b[a-z]+\b", text)}


def invented(summary: str, dialogue: str) -> list[str]:
    names = (word for word in re.findall(r"\b[A-Z]\w+\b", summary))
    return [n for n in names if n.lower() not in ordinary and n.lower() not in dialogue.lower()]


names = {
    side: [invented(s.text, examples[row.id].dialogue) for s, row in zip(texts, rows, strict=True)]
    for side, texts in (("base", base), ("finetuned", tuned))
}
for i in sorted(range(len(rows)), key=lambda i: scores["finetuned"][i] - scores["base"][i])[::15]:
    print(f"{examples[rows[i].id].dialogue}\n")
    print(f"  reference    {references[i]}")
    for side, texts in (("base", base), ("finetuned", tuned)):
        wrong = f"   invented: {', '.join(names[side][i])}" if names[side][i] else ""
        print(f"  {side:11}  {texts[i].text}   [{scores[side][i]:.0f}]{wrong}")
    print("-" * 80)

# %% [markdown]
# ## A whole run, from committed results
#
# Now a whole fine-tune on SAMSum. The scores of each dialogue are in `ladder_samsum.json`, without
# texts, because of SAMSum's licence.


# %%
def committed() -> tuple[str, dict[str, dict[str, list[float]]]]:
    """A title, and ROUGE-1 and invented names of base and fine-tuned model, by dialogue."""
    result = json.loads((workshop.RESULTS / "ladder_samsum.json").read_text())
    method = next(row["name"] for row in result["rows"] if row["name"].startswith("LoRA r 8"))
    sides = {"base": "base", "finetuned": method}
    return f"SAMSum, {method}", {k: result["per_dialogue"][v] for k, v in sides.items()}


gain = bootstrap([b - a for a, b in zip(scores["base"], scores["finetuned"], strict=True)])
print(
    f"short run: ROUGE-1 {gain:+.1f}: "
    + ("the interval excludes 0" if gain.low > 0 else "the interval includes 0")
)
title, result = committed()
before, after = (result[side]["rouge1"] for side in ("base", "finetuned"))
gains = [b - a for a, b in zip(before, after, strict=True)]
interval = bootstrap(gains)
print(f"{title}: {len(gains)} dialogues")
print(
    f"ROUGE-1 {statistics.mean(before):.1f} before, {statistics.mean(after):.1f} after: {interval:+.1f}"
)
print(f"better in {sum(g > 0 for g in gains) / len(gains):.0%} of the dialogues")
per_summary = {side: parts["foreign_names"] for side, parts in result.items()}
for side, counts in per_summary.items():
    found = bootstrap(counts)
    share = sum(count > 0 for count in counts) / len(counts)
    print(f"invented names a summary, {side}: {found:.2f}; {share:.0%} of the summaries have one")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
axes[0].scatter(losses["base"], losses["finetuned"], s=18)
ends = [min(losses["finetuned"]) - 0.2, max(losses["base"]) + 0.2]
axes[0].plot(ends, ends, color="black", linewidth=1, linestyle=":")
axes[0].set(
    xlabel="base: loss (nats per token)", ylabel="fine-tuned: loss (nats per token)",
    title="The short run, dialogue by dialogue",
)  # fmt: skip
ranked = sorted(gains)
colors = [workshop.BLUE if gain > 0 else workshop.RED for gain in ranked]
axes[1].bar(range(len(ranked)), ranked, width=1.0, color=colors)
axes[1].axhline(interval.mean, color="black", linewidth=1)
axes[1].axhspan(interval.low, interval.high, color=workshop.GREY, alpha=0.3)
axes[1].set(xlabel="dialogues, by gain", ylabel="gain in ROUGE-1 (points)", title=title)
for offset, (side, counts) in zip((-0.2, 0.2), per_summary.items(), strict=True):
    shares = [sum(min(count, 3) == n for count in counts) / len(counts) for n in range(4)]
    axes[2].bar([n + offset for n in range(4)], shares, 0.4, label=side)
axes[2].set_xticks(range(4), ["0", "1", "2", "3 or more"])
axes[2].set(
    xlabel="invented names in a summary", ylabel="share of summaries", title="Still invented"
)
axes[2].legend(fontsize=9)
plt.show()

# %% [markdown]
# **What to see.** Left: a point below the dotted line is a dialogue whose reference became more
# likely. Nearly all are. The printed interval of ROUGE says whether the summaries are better.
# Middle: the mean gain (line, with its 95% interval in grey) is small compared with the spread.
# Many summaries got *worse* (red): a mean gain promises nothing for a single dialogue. Right:
# invented names are rarer after fine-tuning, but they still occur. They are only the errors that
# are easy to count. Read the summaries above, too: a summary with a wrong name can have a high score.
#
# ## The claim
#
# The gain in loss over these dialogues is significant: its paired 95% interval excludes zero, and
# is narrower than that of independent samples. So is the gain in ROUGE-1 of the default run, by its
# committed interval.


# %%
def interval_width(values: list[float]) -> float:
    found = bootstrap(values)
    return found.high - found.low


def claim(base: list[float], finetuned: list[float], stored: list[float]) -> None:
    paired = [a - b for a, b in zip(base, finetuned, strict=True)]
    low = bootstrap(paired).low
    assert low > 0, f"the gain in loss may be {low:.2f}"
    independent = math.hypot(interval_width(base), interval_width(finetuned))
    assert interval_width(paired) < independent, "pairing narrows nothing"
    assert stored[1] > 0, f"the default run's gain in ROUGE-1 may be {stored[1]:.1f}"


default_run = json.loads((workshop.RESULTS / "default_run.json").read_text())
difference = default_run["intervals"]["difference"]["rouge1"]  # mean, low, high
print(f"default run: ROUGE-1 {difference[0]:+.1f} [{difference[1]:+.1f}, {difference[2]:+.1f}]")
claim(losses["base"], losses["finetuned"], difference)

workshop.must_fail(
    lambda: claim(losses["finetuned"], losses["base"], difference), "the two models are swapped"
)
unpaired = losses["finetuned"][16:] + losses["finetuned"][:16]
workshop.must_fail(
    lambda: claim(sorted(losses["base"]), sorted(unpaired, reverse=True), difference),
    "the pairs are of different dialogues",
)

# %% [markdown]
# ## Exercises
#
# Fill the gaps in [`exercises/lesson_8.py`](exercises/lesson_8.py), then run
# `python -m pytest lessons/exercises/test_lesson_8.py`:
#
# 1. `rouge1`: precision, recall and $F_1$ of two texts, each shared word counted as often as both have
#    it.
# 2. `lead`: a baseline without a model, the first turns of a dialogue. Always report it.
# 3. `invented_numbers`: numbers in a summary that are not in the dialogue, as words or in digits.
