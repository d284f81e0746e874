"""Arithmetic on adapters: several into one, or one out of a full fine-tune.

An adapter holds the updates s B A of its modules. The adapters made here have s = 1 in every module
(alpha is the rank): the scale of each input, rsLoRA's too, is multiplied into B.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from minilora import linears
from minilora.config import ALL_LINEAR, LoRAConfig, LoRAError, check
from minilora.conventions import completed
from minilora.inject import config_of, layer_for
from minilora.layer import LoRALinear
from minilora.modules import plain_model
from minilora.peft_format.config import resolve
from minilora.peft_format.directory import Adapter
from minilora.peft_format.keys import PREFIX, SUFFIXES
from minilora.targets import select

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


class Fit(NamedTuple):
    """How well B A approximates the update Delta of a module.

    Attributes:
        module: dotted name.
        norm: ||Delta||, the Frobenius norm.
        error: ||Delta - B A|| / ||Delta||; 0 where Delta is 0.
    """

    module: str
    norm: float
    error: float


@dataclass(frozen=True)
class Fitted(Adapter):
    """An adapter extracted from a full fine-tune, with its approximation errors.

    Args:
        config: as in `Adapter`, and so are `tensors`, `base_model` and `fan_in_fan_out`.
        fits: one for each module, with `module`, `norm` and `error`.
        left_out: parameters that the full fine-tune changed and an adapter cannot hold.

    Raises:
        LoRAError: as in `Adapter`.
    """

    fits: tuple[Fit, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """The share of the updates' squared norm that the adapter keeps, over all modules."""
        total = sum(fit.norm**2 for fit in self.fits)
        lost = sum((fit.norm * fit.error) ** 2 for fit in self.fits)
        return 1 - lost / total if total else 1.0

    def __str__(self) -> str:
        kept = f"{len(self.fits)} modules, {self.energy:.2%} of the update's energy kept"
        return f"{kept}; {len(self.left_out)} changed parameters left out"


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], method: Literal["cat"] = "cat"
) -> Adapter:
    """One adapter for the weighted sum of the updates of several: Delta = sum of w_i s_i B_i A_i.

    The factors are concatenated, so the ranks add up, and the sum is exact. (PEFT's "linear" adds
    up A and B each, which adds cross terms B_i A_j. For a lower rank, `extract` at that rank.)
    Where only some of the adapters have a module, the sum is over those.

    Args:
        adapters: plain LoRA (no DoRA, no trained biases or modules).
        weights: one number each; any sign.
        method: PEFT's name for this; there is no other.

    Returns:
        An adapter with s = 1.

    Raises:
        LoRAError: the arguments are wrong, or the adapters do not go with each other.

    Example:
        >>> config = LoRAConfig(rank=2, alpha=8, targets=("q_proj",))
        >>> stem = "base_model.model.q_proj"
        >>> A, B = torch.ones(2, 16), torch.ones(4, 2)
        >>> one = Adapter(config, {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B})
        >>> both = combine([one, one], weights=[0.5, 0.25])  # Delta = 0.75 x 4 B A, rank 4
        >>> A4, B4 = both.pair("q_proj")
        >>> A4.shape, torch.allclose(B4 @ A4, 3 * B @ A)
        (torch.Size([4, 16]), True)
    """
    if not adapters or len(adapters) != len(weights):
        raise LoRAError(f"{len(adapters)} adapters, {len(weights)} weights: give one weight each")
    if method != "cat":
        raise LoRAError(f"method must be 'cat', not {method!r}; for a lower rank: minilora.extract")
    if any(layer_for(a.config) is not LoRALinear or a.extras or a.config.prompts for a in adapters):
        raise LoRAError("cannot combine what is not plain LoRA: use as_lora, or merge and extract")
    if len({a.config.init == "loftq" for a in adapters}) > 1:
        raise LoRAError("LoftQ's base is quantized, the others' is not: combine those of one base")
    factors: dict[str, Factors] = {}
    for module in sorted({module for adapter in adapters for module in adapter.modules}):
        having = [(a, w) for a, w in zip(adapters, weights, strict=True) if module in a.modules]
        terms = [(weight * one.scale_of(module), *one.pair(module)) for one, weight in having]
        factors[module] = _concatenate(module, terms)
    first, config = adapters[0], adapters[0].config
    if set(factors) != set(first.modules):  # what it targets is not what the sum has
        config = replace(config, targets=tuple(factors), exclude=(), layers=None, layers_pattern=())
    base_model = first.base_model if len({a.base_model for a in adapters}) == 1 else None
    return Adapter(*_from_factors(factors, config), base_model, first.fan_in_fan_out)


def extract(
    finetuned: nn.Module, base: nn.Module, rank: int, targets: str | Sequence[str] = ALL_LINEAR
) -> Fitted:
    """An adapter from a full fine-tune: Delta = W' - W of each linear, truncated to a rank.

    The truncated singular value decomposition is the best approximation of a given rank (Eckart and
    Young 1936, https://doi.org/10.1007/BF02288367).

    Args:
        finetuned: the model after the fine-tune; not changed.
        base: the same model before it; not changed.
        rank: r. A layer with a smaller side than r gets that side as its rank.
        targets: as in `LoRAConfig`.

    Returns:
        The adapter, with the error of each module and, in `left_out`, the names of the changed
        parameters that are no target's weight: an adapter cannot hold those.

    Raises:
        LoRAError: the models differ in shape, a target cannot be adapted or is not finite, or a
            model carries an adapter.

    Example:
        >>> base, tuned = (nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False)}) for _ in range(2))
        >>> update = torch.outer(torch.ones(8), torch.arange(8.0))  # of rank 1
        >>> _ = tuned["fc"].weight.data.copy_(base["fc"].weight + update)
        >>> adapter = extract(tuned, base, rank=1)
        >>> A, B = adapter.pair("fc")
        >>> torch.allclose(B @ A, update, atol=1e-5)
        True
    """
    check("rank", rank)
    finetuned, base = plain_model(finetuned), plain_model(base)
    if config_of(finetuned) is not None or config_of(base) is not None:
        raise LoRAError("a model carries an adapter: minilora.unwrap it, or save its adapter")
    config = completed(base, LoRAConfig(rank, rank, targets=targets))  # type: ignore[arg-type]
    found = select(base, config)
    after, before = dict(finetuned.named_parameters()), dict(base.named_parameters())
    if {name: p.shape for name, p in after.items()} != {n: p.shape for n, p in before.items()}:
        raise LoRAError("the models differ in names or shapes: these are not one model's weights")
    factors, fits = {}, []
    for module, layer in found.items():
        W, tuned = (linears.dense_weight(m) for m in (layer, finetuned.get_submodule(module)))
        delta = tuned.to(W.device) - W.to(torch.promote_types(W.dtype, torch.float32))  # (out, in)
        if not delta.isfinite().all():
            raise LoRAError(f"{module} holds values that are not finite")
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        root = S[:rank].sqrt()  # in either factor
        factors[module] = root[:, None] * Vh[:rank], U[:, :rank] * root
        norm, lost = S.norm().item(), S[rank:].norm().item()
        fits.append(Fit(module, norm, lost / norm if norm else 0.0))
    held = {f"{module}.weight" for module in found}
    left_out = tuple(
        n for n, p in before.items() if n not in held and not torch.equal(p, after[n].to(p.device))
    )
    transposed = any(linears.is_conv1d(layer) for layer in found.values())
    name = getattr(base, "name_or_path", None) or None
    return Fitted(*_from_factors(factors, config), name, transposed, tuple(fits), left_out)


def _concatenate(module: str, terms: Sequence[tuple[float, Tensor, Tensor]]) -> Factors:
    """A_1 .. A_n below each other and w_1 B_1 .. w_n B_n side by side, in float64."""
    shapes = sorted({(B.shape[0], A.shape[1]) for _, A, B in terms})
    if len(shapes) > 1:
        raise LoRAError(f"{module} has shapes {shapes} (out, in): combine adapters of one model")
    As, Bs = zip(*((A.double(), weight * B.double()) for weight, A, B in terms), strict=True)
    return torch.cat(As), torch.cat(Bs, dim=1)


def _from_factors(
    factors: Mapping[str, Factors], config: LoRAConfig
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The arguments of an `Adapter`, with s = 1 and a pattern for ranks unlike the commonest."""
    ranks = {module: A.shape[0] for module, (A, _) in sorted(factors.items())}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = resolve(ranks.__getitem__, tuple(ranks), rank)
    config = replace(config, rank=rank, rank_pattern=pattern, rslora=False)
    config = replace(config, alpha=rank, alpha_pattern=pattern)
    tensors = {}
    for module, (A, B) in factors.items():
        tensors[PREFIX + module + SUFFIXES["lora_A"]] = A.float().contiguous()
        tensors[PREFIX + module + SUFFIXES["lora_B"]] = B.float().contiguous()
    return config, tensors
