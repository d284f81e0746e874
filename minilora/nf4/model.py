"""A model in four bits: its linears become NF4Linear, and plain linears again."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from minilora.config import ALL_LINEAR, ATTENTION, LoRAConfig, LoRAError, matches
from minilora.conventions import bypassed, projections
from minilora.inject import lora_layers
from minilora.modules import named_modules, naming, others, owners, plain_name, replace_modules
from minilora.nf4.linear import NF4Linear
from minilora.reports import count, fold_names
from minilora.targets import all_linear, require


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did.

    Attributes:
        modules: dotted names of the linears in four bits.
        left_out: those that cannot be: they compute more than x W^T + b, or a module reads their
            weight without calling them.
        weights: how many weights they hold.
        before: their size in bytes, biases not counted.
        after: the same in four bits, scales included.

    Example:
        >>> print(QuantizeReport(("fc",), weights=2**20, before=2**22, after=540_936))
        1 linear in 4 bits: 4.2 MB -> 0.5 MB (4.127 bits per weight)
    """

    modules: tuple[str, ...]
    weights: int
    before: int
    after: int
    left_out: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.after / max(self.weights, 1)

    def __str__(self) -> str:
        sizes = f"{self.before / 1e6:,.1f} MB -> {self.after / 1e6:,.1f} MB"
        what = f"{count(self.modules, 'linear')} in 4 bits: {sizes}"
        lines = [f"{what} ({self.bits:.3f} bits per weight)"]
        lines += [
            f"left out: {name}, which does more than x W^T + b, or is not called"
            for name in fold_names(self.left_out)
        ]
        return "\n  ".join(lines)


def quantize(
    model: nn.Module,
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] = ("lm_head",),
    double: bool = True,
) -> QuantizeReport:
    """Replace linears by `NF4Linear`, in place; `minilora.inject` afterwards makes it QLoRA.

    Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3. Of each W (out, in) half a
    byte a value is kept, and a scale for every 64 values along its rows. Everything else,
    embeddings and norms, stays as it is. A quantized model is saved by
    `safetensors.torch.save_model`, and loaded into a model that was quantized alike.

    Args:
        model: not yet injected.
        targets: which linears, as in `LoRAConfig`: names, a regular expression, "all-linear" (all
            but the output head, and those whose weight is read without calling them), or
            "attention".
        exclude: linears to leave alone, such as those that LoftQ is to quantize. "lm_head" may be
            among them though the model has none.
        double: quantize the scales too: 4.127 bits per weight instead of 4.5.

    Returns:
        The modules, their sizes before and after, and the linears that cannot be quantized.

    Raises:
        LoRAError: nothing to quantize, an entry of targets or exclude that matches nothing, or a
            linear that cannot be quantized: it is named, and the model is untouched.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(128, 128)})
        >>> print(quantize(model))
        1 linear in 4 bits: 0.1 MB -> 0.0 MB (4.129 bits per weight)
        >>> model["q_proj"].codes.shape  # two a byte
        torch.Size([8192])
    """
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise LoRAError("the model carries an adapter already: quantize it before inject")
    found = select_linears(model, targets, exclude)
    for name in list(found):
        linear = found.pop(name)  # so that its weight is let go at once
        replace_modules(model, {linear: NF4Linear(linear, double)})
    return quantize_report(model)


def quantize_report(model: nn.Module) -> QuantizeReport:
    """Which linears of a model are in four bits, and what that saves."""
    named = model.named_modules()
    found = {plain_name(name): m for name, m in named if isinstance(m, NF4Linear)}
    weights = sum(m.in_features * m.out_features for m in found.values())
    after = sum(t.nbytes for m in found.values() for t in m.packed if t is not None)
    before = sum(m.weight.nbytes for m in found.values())
    reading = _reading(model)
    linears = [name for name, m in reading.items() if isinstance(m, nn.Linear)]
    left_out = [n for n in linears if not _is_plain(reading[n]) or bypassed(reading, n)]
    return QuantizeReport(tuple(found), weights, before, after, tuple(left_out))


def select_linears(
    model: nn.Module,
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] = ("lm_head",),
) -> dict[str, nn.Linear]:
    """The linears that `quantize` would replace, by dotted name, all checked."""
    modules, reading = dict(named_modules(model)), _reading(model)
    with naming("quantize"):
        asked = LoRAConfig(targets=targets, exclude=exclude)  # type: ignore[arg-type]
        require("targets", () if asked.targets == ATTENTION else asked.targets, [*modules])
        away = asked.exclude  # many models have no lm_head
        away = away if isinstance(away, str) else tuple(n for n in away if n != "lm_head")
        require("exclude", away, [*modules])
    if asked.targets == ALL_LINEAR:
        named = all_linear(model)
        named = [(n, m) for n, m in named if _is_plain(m) and not bypassed(reading, n)]
    else:
        names = projections(model) if asked.targets == ATTENTION else asked.targets
        named = [(name, m) for name, m in named_modules(model) if matches(names, name)]
    owned, found = owners(model), dict[str, nn.Linear]()
    for name, module in named:
        if not matches(asked.exclude, name):
            found[name] = check_linear(name, module, others(module, owned))
            if what := bypassed(reading, name):
                raise LoRAError(f"quantize: {name} {what}; exclude it")
    if not found:
        raise LoRAError("quantize: no torch.nn.Linear is targeted: change targets or exclude")
    return found


def _reading(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, without those that call a linear whose weight is on another device."""
    modules = {"": model} | dict(named_modules(model))
    return {n: m for n, m in modules.items() if not isinstance(m, nn.TransformerEncoderLayer)}


def _is_plain(module: nn.Module) -> bool:
    """Whether it computes x W^T + b: a router, for example, returns more.

    Attention reads the weight of a NonDynamicallyQuantizableLinear without calling it.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    kind = type(module)
    return kind.forward is nn.Linear.forward or kind.__name__ == "FalconLinear"


def check_linear(name: str, module: nn.Module, shared_with: Sequence[str] = ()) -> nn.Linear:
    """The module, if it can be quantized."""
    kind = type(module).__name__
    if not isinstance(module, nn.Linear) or not _is_plain(module):
        raise LoRAError(f"quantize: {name} is a {kind}: only plain linears can be; exclude it")
    weight = module._parameters.get("weight")
    if weight is None:
        raise LoRAError(f"quantize: {name}: its weight is computed anew at every call; exclude it")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise LoRAError(f"quantize: {name} is quantized already ({weight.dtype}): exclude it")
    if shared_with:
        shared = ", ".join(shared_with)
        raise LoRAError(f"quantize: {name} shares its weight with {shared}; exclude it")
    if weight.is_meta and hasattr(module, "_hf_hook"):  # of accelerate, which copies it for calls
        raise LoRAError(f"quantize: {name} is offloaded: load the model onto one device")
    if not weight.is_meta and not weight.float().isfinite().all():
        what = "holds values that are not finite in float32"
        raise LoRAError(f"quantize: {name} {what}: get the model's file again")
    return module


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Replace every `NF4Linear` by a plain linear, in place; the block may merge into them.

    Within it the weights are in float32, exactly what the codes mean. When it ends each is rounded
    once to the dtype of its layer, and what that cost is logged. What quantizing took does not come
    back.

    Raises:
        LoRAError: a weight does not fit its dtype. On this, and on an error in the block, the
            quantized linears are put back.
    """
    plain: dict[NF4Linear, nn.Linear] = {}
    unmerged = [layer for layer in lora_layers(model).values() if not layer.merged]
    try:
        for quantized in [m for m in model.modules() if isinstance(m, NF4Linear)]:
            plain[quantized] = _exact_linear(quantized)
            replace_modules(model, {quantized: plain[quantized]})
        yield
        for quantized, linear in plain.items():
            final = quantized.dtype
            if not linear.weight.to(final).isfinite().all():
                name = next(plain_name(n) for n, m in model.named_modules() if m is linear)
                raise LoRAError(f"{name} overflows {final} when dequantized: try model.float()")
    except BaseException:
        for layer in unmerged:
            layer.unmerge()
        replace_modules(model, {linear: quantized for quantized, linear in plain.items()})
        raise
    roundings = [_round(linear, quantized.dtype) for quantized, linear in plain.items()]
    largest = f"rounding error at most {max(roundings, default=0.0):.2g} an entry"
    logging.getLogger("minilora").info(f"{len(roundings)} linears dequantized; {largest}")


def _exact_linear(quantized: NF4Linear) -> nn.Linear:
    linear = nn.Linear(quantized.in_features, quantized.out_features, device="meta")
    linear.weight = nn.Parameter(quantized.dense_weight(torch.float32), quantized.trained)
    linear.register_parameter("bias", quantized.bias)
    return linear.train(quantized.training)


def _round(linear: nn.Linear, dtype: torch.dtype) -> float:
    """Round the weight; the largest error of an entry."""
    exact = linear.weight.detach()
    linear.weight = nn.Parameter(exact.to(dtype), linear.weight.requires_grad)
    return (linear.weight.float() - exact).abs().max().item() if exact.numel() else 0.0
