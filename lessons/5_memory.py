# %% [markdown]
# # 5 · Memory
#
# **Question.** What does fine-tuning need memory for, and which part of it does LoRA save?
#
# ## The math
#
# A training step needs memory for four things. For a base of $P$ parameters and $T$ trained numbers
# ($T = P$ in full fine-tuning; LoRA adds $T \ll P$), in float32 with AdamW:
#
# | | bytes | LoRA ($T \ll P$) | QLoRA |
# | --- | --- | --- | --- |
# | weights | $4P$ | $4(P + T)$ | about $\tfrac{1}{2}$ byte for each weight of a linear layer |
# | gradients | $4T$ | almost nothing | as LoRA |
# | optimizer: two moments | $8T$ | almost nothing | as LoRA |
# | activations | what the backward pass needs | **about a quarter less** | as LoRA |
#
# Why do the activations not shrink more? A trained linear layer keeps its input $x$ for $\partial L / \partial W =
# G^\top x$. A frozen one does not, unless it has an adapter, which needs $x$ for
# $\partial L / \partial A$. But the gradient passes *through* the frozen layers to the adapters below,
# so every GELU, LayerNorm and softmax keeps as much as before.
#
# (The sum of the four is not the peak. Temporary buffers, and gradients of activations during the
# backward pass, are not counted: `nvidia-smi` shows more.)

# %%
import copy
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import workshop
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import BartConfig, BartForConditionalGeneration

import minilora
from minilora import LoRAConfig, LoRALinear

torch.manual_seed(0)

# %% [markdown]
# ## Count the bytes
#
# PyTorch calls `saved_tensors_hooks` with every tensor that it keeps for the backward pass. Weights
# are among them, and several operations may keep one storage. So count each storage once, and leave
# out the model's own. (A storage is the memory behind one or more tensors, and `_cdata` its number. The
# address of a tensor, `data_ptr()`, differs between a tensor and a slice of it.)


# %%
def activations(model: nn.Module, batch: int, source: int, target: int) -> int:
    """Bytes kept between the forward and the backward pass of one training step."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # a reference, so that its number is not reused
        return tensor

    device = next(model.parameters()).device
    ids = torch.full((batch, source), 5, device=device)  # (b, s)
    labels = torch.full((batch, target), 5, device=device)  # (b, t)
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        logits = model(input_ids=ids, decoder_input_ids=labels, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # (b t, v), (b t,)
    return sum(storage.nbytes() for storage in kept.values())


def account(model: nn.Module, batch: int, source: int, target: int) -> dict[str, int]:
    """Bytes of a training step, by purpose."""
    trained = sum(p.nbytes for p in minilora.trainable_parameters(model))
    own = {t.untyped_storage()._cdata: t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return {
        "weights": sum(own.values()),
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": activations(model.train(), batch, source, target),
    }


# %% [markdown]
# ## pocket-bart, five ways
#
# Rank 8 on `q_proj` and `v_proj`, a batch of 8 dialogues of 160 tokens with summaries of 40.
# (Attention uses plain operations here; fused kernels keep less, for every method.) LoRA is counted
# without dropout, with dropout on the adapter's input, and with the same dropout when autograd
# computes the backward pass.

# %%
LORA = LoRAConfig(rank=8, alpha=32, targets=("q_proj", "v_proj"))
DROPOUT = LoRAConfig(rank=8, alpha=32, targets=("q_proj", "v_proj"), dropout=0.05)
base, _ = workshop.pocket()
base.set_attn_implementation("eager")


def by_autograd(model: nn.Module) -> nn.Module:
    """The same model, the adapters' backward pass by autograd instead of the library's own."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.fused = False
    return model


def adapted(config: LoRAConfig, four_bits: bool = False) -> nn.Module:
    model = copy.deepcopy(base)
    if four_bits:
        minilora.quantize(model)
    minilora.inject(model, config)
    return model


models = {
    "full": copy.deepcopy(base).requires_grad_(True),
    "LoRA": adapted(LORA),
    "dropout": adapted(DROPOUT),
    "by autograd": by_autograd(adapted(DROPOUT)),
    "QLoRA": adapted(LORA, four_bits=True),
}
pocket = {name: account(model, 8, 160, 40) for name, model in models.items()}

# %% [markdown]
# The two moments of AdamW were assumed above. Take a step and count them:


# %%
def moments(model: nn.Module) -> int:
    """Bytes that AdamW keeps, without its step counters."""
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model))
    ids = torch.full((1, 8), 5)
    model(input_ids=ids, decoder_input_ids=ids).logits.sum().backward()
    optimizer.step()
    states = (state for entry in optimizer.state.values() for state in entry.values())
    return sum(state.nbytes for state in states if state.dim() > 0)


counted = {name: moments(models[name]) for name in ("full", "LoRA")}
assert all(counted[name] == pocket[name]["optimizer"] for name in counted)

# %% [markdown]
# ## BART-large, on a machine without the memory for it
#
# In PyTorch's `FakeTensorMode` tensors have shapes but no numbers. A model of any size can be built and
# run forward, and the hooks see the same shapes. First check this on pocket-bart, then count
# BART-large. (Four-bit codes need numbers. So QLoRA's weights count as 4.127 bits for each weight of
# a linear layer, the figure of lesson 6.)


# %%
# `inject` compares addresses to find tied tensors; these tensors have none, and PyTorch warns of it.
warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")


def in_shapes(
    config: BartConfig, batch: tuple[int, int, int], lora: LoRAConfig | None, fused: bool = True
) -> dict[str, int]:
    """`account` of a model without numbers; if `lora` is None, of its full fine-tuning."""
    config._attn_implementation = "eager"
    with FakeTensorMode():
        model = BartForConditionalGeneration(config)
        if lora is not None:
            minilora.inject(model, lora)
        return account(model if fused else by_autograd(model), *batch)


assert in_shapes(base.config, (8, 160, 40), None) == pocket["full"]  # to the byte
assert in_shapes(base.config, (8, 160, 40), DROPOUT) == pocket["dropout"]

LARGE = BartConfig()  # the defaults are BART-large: 12 + 12 layers, width 1,024
BATCH = (8, 256, 64)  # dialogues, source tokens, target tokens
totals = {
    "full": in_shapes(LARGE, BATCH, None),
    "LoRA": in_shapes(LARGE, BATCH, LORA),
    "dropout": in_shapes(LARGE, BATCH, DROPOUT),
    "by autograd": in_shapes(LARGE, BATCH, DROPOUT, fused=False),
}
with torch.device("meta"):
    large = BartForConditionalGeneration(LARGE)
linear = sum(m.weight.nbytes for n, m in large.named_modules()
             if isinstance(m, nn.Linear) and n != "lm_head")  # fmt: skip
saved = linear - round(linear / 4 * 4.127 / 8)
totals["QLoRA"] = totals["LoRA"] | {"weights": totals["LoRA"]["weights"] - saved}

for title, unit, table in (("pocket-bart, MiB", 2**20, pocket), ("BART-large, GiB", 2**30, totals)):
    print(f"{title:16}" + "".join(f"{part:>13}" for part in [*table["full"], "sum"]))
    for name, parts in table.items():
        figures = [*parts.values(), sum(parts.values())]
        print(f"{name:16}" + "".join(f"{figure / unit:13.2f}" for figure in figures))

# %%
figure, (left, right) = plt.subplots(1, 2, sharey=False)
for axis, table, unit, label, title in (
    (left, pocket, 2**20, "MiB", "pocket-bart, 8 × (160 + 40) tokens"),
    (right, totals, 2**30, "GiB", "BART-large, 8 × (256 + 64) tokens"),
):
    bottom = torch.zeros(len(table))
    for part in ("weights", "gradients", "optimizer", "activations"):
        heights = torch.tensor([table[name][part] / unit for name in table])
        axis.bar(list(table), heights, bottom=bottom, label=part)
        bottom += heights
    axis.set(xlabel="method", ylabel=f"memory of a step ({label})", title=title)
    axis.tick_params(axis="x", labelsize=9)
right.legend(fontsize=9)
plt.show()

# %% [markdown]
# **What to see.** LoRA removes nearly all memory of gradients and optimizer. QLoRA also removes most
# of the weights. The largest part remains with both: activations shrink by only about a quarter.
# Frozen linear layers without an adapter keep no inputs, but everything else keeps as much as before.
# Activations grow with the batch, so a larger batch soon costs more than LoRA saves. Shorter
# sequences, less padding, recomputation (gradient checkpointing) and fused attention make them
# smaller. Dropout on the adapter's input need not cost much: a mask of one byte per element is
# enough. With autograd each adapted layer keeps its own $D(x)$, the input after dropout, and a mask,
# which on a CPU has four bytes per element. All counts here are a CPU's; on a GPU masks, BART's own
# too, have one byte.
#
# ## The claim
#
# LoRA's gradients and moments are under 2% of full fine-tuning's, but its activations are over half.
# Dropout adds activations, and with autograd it adds more. Four bits make the weights of the linear
# layers at least seven times smaller. (The code above asserts that shapes and memory give the same
# count.)


# %%
def claim(table: dict[str, dict[str, int]]) -> None:
    full, lora = table["full"], table["LoRA"]
    trained = (lora["gradients"] + lora["optimizer"]) / (full["gradients"] + full["optimizer"])
    assert trained < 0.02, f"gradients and moments are {trained:.0%} of full fine-tuning's"
    share = lora["activations"] / full["activations"]
    assert 0.5 < share < 1, f"activations are {share:.0%} of full fine-tuning's"
    kept = [table[name]["activations"] for name in ("LoRA", "dropout", "by autograd")]
    assert kept[0] < kept[1] < kept[2], (
        "dropout keeps no more, or autograd no more than the library"
    )
    four = lora["weights"] - table["QLoRA"]["weights"]
    assert four > 0, "four bits save nothing"


claim(pocket)
claim(totals)
report = minilora.quantize(copy.deepcopy(base))
assert report.before / report.after > 7

workshop.must_fail(lambda: claim(totals | {"LoRA": totals["full"]}), "LoRA is full fine-tuning")
workshop.must_fail(lambda: claim(pocket | {"dropout": pocket["LoRA"]}), "dropout is off")
inputs = pocket["LoRA"] | {"activations": pocket["full"]["activations"]}
workshop.must_fail(lambda: claim(pocket | {"LoRA": inputs}), "frozen layers keep their inputs")
workshop.must_fail(lambda: claim(pocket | {"QLoRA": pocket["LoRA"]}), "the base is not quantized")

# %% [markdown]
# ## Exercises
#
# Fill the gaps in [`exercises/lesson_5.py`](exercises/lesson_5.py), then run
# `python -m pytest lessons/exercises/test_lesson_5.py`:
#
# 1. `training_bytes`: weights, gradients and moments of a model of $N$ numbers in all, of which $T$
#    train ($N = P + T$ for LoRA in the table above).
# 2. `kept_bytes`: the counting hook, for any function of tensors.
# 3. `frozen_linear`: a frozen layer as an `autograd.Function` that keeps only its weight (what
#    PyTorch's own linear does for a frozen $W$).
