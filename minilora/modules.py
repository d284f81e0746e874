"""Helpers over modules: names, wrappers, replacing, shared weights, the output head."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from minilora.config import LoRAError


def plain_name(name: str) -> str:
    """A dotted name without what torch.compile of a part puts between: `encoder._orig_mod.fc`."""
    return name.replace("_orig_mod.", "")


def plain_model(model: nn.Module) -> nn.Module:
    """The model itself, without what torch.compile or DistributedDataParallel put around it."""
    parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    inner = getattr(model, "module" if parallel else "_orig_mod", None)
    return plain_model(inner) if isinstance(inner, nn.Module) else model


def path(name: str) -> list[str]:
    """The names on the way down to a module: "a", "a.b" and "a.b.c" for "a.b.c"."""
    return list(accumulate(name.split("."), "{}.{}".format))


def layer_index(name: str, patterns: tuple[str, ...] = ()) -> int | None:
    """The index of the layer a module lies in: the first `.name.<index>.` of its dotted name.

    Example:
        >>> layer_index("model.decoder.layers.3.self_attn.q_proj")
        3
    """
    for pattern in patterns or (r"[^.]*",):
        # Without patterns PEFT requires a dot before the name too: `h.0.attn` has no index.
        start = r"(?:^|.*?\.)" if patterns else r".*?\."
        found = re.match(rf"{start}{pattern}\.(?P<index>\d+)\.", name)
        if found and found["index"]:  # "a|layers" may match without one, in PEFT too
            return int(found["index"])
    return None


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules inside a model by plain name; one that has two names comes twice."""
    named = model.named_modules(remove_duplicate=False)
    return [(plain_name(name), module) for name, module in named if name]


def replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Put other modules in the place of some, under every name that each has."""
    for parent in list(model.modules()):  # a list: the new modules are not searched
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters to hand to an optimizer: those that require a gradient.

    Args:
        model: any module.

    Example:
        >>> from minilora import LoRAConfig, inject
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(16, 4)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> [tuple(parameter.shape) for parameter in trainable_parameters(model)]
        [(2, 16), (4, 2)]
    """
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def require_grad(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Let each parameter train, or not, by its plain name; one without a name here stays."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(plain_name(name), parameter.requires_grad))


Owners = dict[int, dict[str, nn.Module]]


def owners(model: nn.Module) -> Owners:
    """The modules that hold each weight: {the weight's storage: {module name: module}}."""
    found: Owners = defaultdict(dict)
    for name, module in [("", model), *named_modules(model)]:
        for parameter in module.parameters(recurse=False):
            found[_storage(parameter)][name] = module
    return found


def others(module: nn.Module, owned: Owners) -> list[str]:
    """The names of the other modules that hold this module's weight."""
    weight = module._parameters.get("weight")
    holders = {} if weight is None else owned.get(_storage(weight), {})
    return [name for name, holder in holders.items() if holder is not module]


def _storage(weight: Tensor) -> int:
    """Two parameters can be views of one storage. The meta device has none."""
    return weight.data_ptr() or id(weight)


def output_head(model: nn.Module, task_type: str | None = None) -> nn.Module | None:
    """The head that turns hidden states into logits, where the model names one.

    A sequence classifier does not; PEFT goes by the usual names.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and task_type == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head if isinstance(head, nn.Module) else None


def nearest(name: str, known: Sequence[str], count: int = 3) -> str:
    """'; nearest: a, b, c': names with a similar last part, whole name or beginning; else ''."""
    ends = list(dict.fromkeys(k.rsplit(".", 1)[-1] for k in known))
    close = get_close_matches(name, ends, count, 0.5) or get_close_matches(name, known, count, 0.4)
    close = close or [end for end in ends if end.startswith(name) or name.startswith(end)][:count]
    return f"; nearest: {', '.join(close)}" if close else ""


@contextmanager
def naming(name: object) -> Iterator[None]:
    """A LoRAError of the block begins with this name: where it is that something is wrong."""
    try:
        yield
    except LoRAError as error:
        raise LoRAError(f"{name}: {error}") from None


@contextmanager
def seeded(model: nn.Module, seed: int | None) -> Iterator[None]:
    """In the block the seed decides; afterwards CPU and GPUs have their states from before."""
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**64):
        raise LoRAError(f"seed must be a whole number of at most 64 bits, not {seed!r}")
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            # torch.manual_seed would seed every GPU, also those that are not restored.
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device.index].manual_seed(seed)
            if {p.device.type for p in model.parameters()} - {"cpu", "cuda", "meta"}:
                torch.manual_seed(seed)  # such as mps: not restored
        yield
