"""An adapter on disk: PEFT's directory read, checked, applied and written.

    adapter_config.json          what was adapted: PEFT's names for the fields of LoRAConfig
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in), ...lora_B.weight

Reading is strict. PEFT ignores an unexpected key and warns of a missing one; here either is an
error that names it, raised before the model is touched.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from minilora import bases, extras
from minilora.config import ALL_LINEAR, LoRAConfig, LoRAError, scale
from minilora.files import write_directory
from minilora.inject import (
    injection_of,
    layer_type,
    lora_layers,
    plain_model,
    remove,
    report,
    wrap,
)
from minilora.layer import LoRALinear
from minilora.peft_config import CONFIG_FILE as CONFIG_FILE
from minilora.peft_config import config_from_peft, config_to_peft
from minilora.targets import check_modules, is_target, nearest

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
MAGNITUDE_SUFFIX, LORA_BIAS_SUFFIX = ".lora_magnitude_vector", ".lora_B.bias"
# How a layer's parameters end on disk.
SUFFIXES = {
    "lora_A": A_SUFFIX,
    "lora_B": B_SUFFIX,
    "magnitude": MAGNITUDE_SUFFIX,
    "lora_bias": LORA_BIAS_SUFFIX,
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Adapter:
    """An adapter apart from any model: its configuration and its tensors by their names on disk.

    Args:
        config: what was adapted and how.
        tensors: by PEFT's keys, `base_model.model.<module>.lora_A.weight` (r, in),
            `...lora_B.weight` (out, r) and what the configuration adds; docs/format.md lists them.
        base_model: name or directory of the model it was trained on, if known.
        fan_in_fan_out: whether the adapted modules are Conv1D: PEFT's word for it, written down
            for PEFT only.

    Raises:
        LoRAError: the tensors do not form pairs A (r, in), B (out, r) of one rank that agree with
            the configuration, hold a value that is not finite, or are not what `dora`, `bias`,
            `lora_bias` and `also_train` ask for.

    Example:
        >>> config = LoRAConfig(rank=2, alpha=8, targets=("q_proj",))
        >>> A, B = torch.ones(2, 16), torch.ones(4, 2)
        >>> stem = "base_model.model.q_proj"
        >>> adapter = Adapter(config, {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B})
        >>> adapter.modules, adapter.scale_of("q_proj")
        (('q_proj',), 4.0)
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]
    base_model: str | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        problems = [p for key, tensor in self.tensors.items() for p in self._check_key(key, tensor)]
        if not problems:
            problems = [problem for name in self.modules for problem in self._check_module(name)]
        if not self.modules:
            problems.append("it holds no lora_A and lora_B")
        _raise("the adapter's tensors are wrong", problems)

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of the adapted modules, sorted."""
        return modules_of(self.tensors)

    @property
    def extras(self) -> dict[str, Tensor]:
        """The biases and whole modules that trained too, by name on disk without the prefix."""
        return {
            key.removeprefix(PREFIX): tensor
            for key, tensor in self.tensors.items()
            if not key.endswith(tuple(SUFFIXES.values()))
        }

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a module."""
        parameters = self.parameters(module)
        return parameters["lora_A"], parameters["lora_B"]

    def parameters(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module by their names in LoRALinear."""
        keys = {name: PREFIX + module + suffix for name, suffix in SUFFIXES.items()}
        return {name: self.tensors[key] for name, key in keys.items() if key in self.tensors}

    def scale_of(self, module: str) -> float:
        """The scale s of a module."""
        rank = self.pair(module)[0].shape[0]
        return scale(self.config.alpha_of(module), rank, self.config.rslora)

    def _check_key(self, key: str, tensor: Tensor) -> list[str]:
        name, config = key.removeprefix(PREFIX), self.config
        module, _, end = name.rpartition(".")
        if key.endswith(MAGNITUDE_SUFFIX) and not config.dora:
            return [f"unexpected key {key}: DoRA's magnitudes, but use_dora is false"]
        if key.endswith(LORA_BIAS_SUFFIX) and not config.lora_bias:
            return [f"unexpected key {key}: lora_bias is false"]
        in_layer = key.endswith(tuple(SUFFIXES.values()))
        in_place = (
            (name.endswith(extras.BASE_BIAS) and config.bias != "none")
            or (end == "bias" and config.bias == "all")
            or extras.trained_module(config, module) is not None
        )
        if name == key or not (in_layer or in_place):
            return [f"unexpected key {key}"]
        dim = 2 if key.endswith((A_SUFFIX, B_SUFFIX)) else 1
        if in_layer and (tensor.dim() != dim or tensor.dtype not in FLOATS):
            what = "vector" if dim == 1 else "matrix"
            return [f"{key} is {_kind(tensor)}, not a floating-point {what}"]
        if tensor.dtype.is_floating_point and tensor.dtype not in FLOATS:
            return [f"{key} is {_kind(tensor)}, which cannot be read exactly"]
        return [] if tensor.isfinite().all() else [f"{key} holds values that are not finite"]

    def _check_module(self, module: str) -> list[str]:
        tensors = self.parameters(module)
        wanted = parameter_names(self.config)
        missing = [name for name in wanted if name not in tensors]
        if missing:
            return [f"missing key {PREFIX}{module}{SUFFIXES[name]}" for name in missing]
        A, B = tensors["lora_A"], tensors["lora_B"]
        rank = self.config.rank_of(module)
        if A.shape[0] != rank or B.shape[1] != rank:
            return [
                f"{module}: lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, "
                f"but the configuration says rank {rank}"
            ]
        return [
            f"{module}: lora_B has {B.shape[0]} rows, but {PREFIX}{module}{SUFFIXES[name]} "
            f"{tensors[name].shape[0]} entries"
            for name in wanted[2:]
            if tensors[name].shape[0] != B.shape[0]
        ]


@dataclass(frozen=True)
class LoadReport:
    """What `load_adapter` did. Printed: one line.

    Attributes:
        modules: dotted names of the adapted modules.
        swapped: whether the tensors went into adapter layers that were there already.
        base_model: the base model that the file names.
        notice: says so if the file names another base model than this one.
    """

    modules: tuple[str, ...]
    swapped: bool
    base_model: str | None
    notice: str | None = None

    def __str__(self) -> str:
        how = "swapped in place" if self.swapped else "loaded"
        return f"{len(self.modules)} modules {how}" + (f"; {self.notice}" if self.notice else "")


def modules_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Dotted names of the modules that have keys among the tensors, sorted."""
    stems = {
        key.removeprefix(PREFIX).removesuffix(suffix)
        for key in tensors
        for suffix in SUFFIXES.values()
        if key.startswith(PREFIX) and key.endswith(suffix)
    }
    return tuple(sorted(stems))


def parameter_names(config: LoRAConfig) -> tuple[str, ...]:
    """The parameters that each layer has under this configuration."""
    more = ("magnitude",) if config.dora else ("lora_bias",) if config.lora_bias else ()
    return ("lora_A", "lora_B", *more)


def read_adapter(directory: str | Path) -> Adapter:
    """Read and check an adapter directory as PEFT or minilora wrote it. Never reads a pickle.

    PEFT saves an adapter with a name of its own one directory deeper; it is read from there if it
    is the only one.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The adapter; its tensors lie on the CPU, in the file's dtypes.

    Raises:
        LoRAError: a file is missing, damaged, or asks for something minilora does not do.

    Example:
        >>> read_adapter("nowhere")
        Traceback (most recent call last):
        minilora.config.LoRAError: nowhere: no such directory
    """
    directory = _adapter_directory(Path(directory))
    entries = _read_json(directory / CONFIG_FILE)
    try:
        tensors = _read_tensors(directory)
        config = config_from_peft(entries, modules_of(tensors))
        if config.bias == "all" and config.also_train:
            tensors = _without_repeats(tensors)
        base_model = entries.get("base_model_name_or_path")
        if not isinstance(base_model, str | None):
            raise LoRAError(f"{CONFIG_FILE}: base_model_name_or_path is {base_model!r}")
        if _read_json(directory / CONFIG_FILE) != entries:
            raise LoRAError("it was written anew while it was read: read it again")
        return Adapter(config, tensors, base_model, entries.get("fan_in_fan_out") is True)
    except LoRAError as error:
        raise LoRAError(f"{directory}: {error}") from None


def write_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Write an adapter so that PEFT loads it: the same tensors give the same bytes.

    Args:
        adapter: as read, combined or extracted.
        directory: made if it is not there; an adapter in it is replaced, whole or not at all.

    Raises:
        LoRAError: the directory's name is taken by a file.
        OSError: it cannot be written; a file that was there before is untouched.

    Example:
        >>> import tempfile
        >>> config = LoRAConfig(rank=2, alpha=8, targets=("q_proj",))
        >>> stem = "base_model.model.q_proj"
        >>> tensors = {f"{stem}.lora_A.weight": torch.ones(2, 16)}
        >>> tensors[f"{stem}.lora_B.weight"] = torch.ones(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_adapter(Adapter(config, tensors), folder)
        ...     print(read_adapter(folder).config == config)
        True
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise LoRAError(f"{directory} is a file, not a directory")
    tensors = {key: adapter.tensors[key].contiguous() for key in sorted(adapter.tensors)}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    entries = config_to_peft(adapter.config, adapter.modules) | {
        "base_model_name_or_path": adapter.base_model,
        "fan_in_fan_out": adapter.fan_in_fan_out,
    }
    text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
    write_directory(directory, {WEIGHTS_FILE: weights, CONFIG_FILE: text.encode()})


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter a model carries, as a value: its tensors are copies on the CPU.

    Raises:
        LoRAError: the model carries no adapter, or is in a `disabled` block.
    """
    model = plain_model(model)
    injection = injection_of(model)
    if injection is None:
        raise LoRAError("the model carries no adapter: minilora.inject or load_adapter first")
    if injection.kept.exchanged and injection.kept.live:
        raise LoRAError("cannot save inside `with minilora.disabled(model)`: save after it")
    tensors = {}
    layers = lora_layers(model)
    for name, layer in layers.items():
        for attribute in parameter_names(injection.config):
            tensors[name + SUFFIXES[attribute]] = getattr(layer, attribute)
    state = extras.tensors(model) if injection.kept.live else {}  # unmerged, merged or not
    tensors |= {name: state[key] for name, key in injection.kept.live.items()}
    copies = {PREFIX + name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    transposed = any(bases.is_conv1d(layer.base) for layer in layers.values())
    return Adapter(injection.config, copies, _base_model_name(model), transposed)


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the model's adapter as PEFT's directory; merged or not, wrapped by DDP or not.

    Args:
        model: carries an adapter, from `inject` or `load_adapter`.
        directory: made if it is not there; gets adapter_config.json and
            adapter_model.safetensors, replaced whole or not at all.

    Raises:
        LoRAError: the model carries no adapter, or is in a `disabled` block.
        OSError: the directory cannot be written.

    Example:
        >>> import tempfile
        >>> from minilora import inject
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     print(sorted(path.name for path in Path(folder).iterdir()))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    write_adapter(adapter_of(model), directory)


def load_adapter(model: nn.Module, directory: str | Path, inference: bool = False) -> LoadReport:
    """Load an adapter of PEFT's format into a model, in place; the file's keys decide where.

    A model that already carries an adapter of the same shapes keeps its modules and gets the new
    values; one of other shapes becomes the base again and is injected anew.

    Args:
        model: the base model, or one that carries an adapter, unmerged.
        directory: holds adapter_config.json and adapter_model.safetensors.
        inference: leave the adapter frozen; otherwise it trains.

    Returns:
        The modules, and whether the values went into layers that were there.

    Raises:
        LoRAError: the files are wrong or do not fit the model; every missing, unexpected and
            mis-shaped key is named, and the model is untouched.

    Example:
        >>> import tempfile
        >>> from minilora import inject
        >>> trained, fresh = (nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(2))
        >>> _ = inject(trained, LoRAConfig(rank=2, targets=("q_proj",), init="random"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(trained, folder)
        ...     print(load_adapter(fresh, folder, inference=True))
        1 modules loaded
        >>> torch.equal(fresh["q_proj"].lora_B, trained["q_proj"].lora_B)
        True
    """
    adapter = read_adapter(directory)
    try:
        return apply_adapter(model, adapter, inference)
    except LoRAError as error:
        raise LoRAError(f"{directory}: {error}") from None


def apply_adapter(model: nn.Module, adapter: Adapter, inference: bool = False) -> LoadReport:
    """What `load_adapter` does, with an adapter that was read, combined or extracted already."""
    wrapped, model = model, plain_model(model)
    layers, injection = lora_layers(model), injection_of(model)
    if any(layer.merged for layer in layers.values()):
        raise LoRAError("cannot load an adapter while merged: call minilora.unmerge(model) first")
    if injection is not None and injection.kept.exchanged:
        raise LoRAError("cannot load an adapter inside `with minilora.disabled(model)`")
    found = _check_fit(model, adapter)
    kept = injection.kept.live if injection is not None else {}
    swapped = _fits(layers, adapter) and set(kept) == set(adapter.extras)
    if not swapped:
        if wrapped is not model:  # data-parallel copies would never learn of the new parameters
            raise LoRAError(
                "load an adapter of other shapes before torch.compile or DistributedDataParallel, "
                "not after"
            )
        remove(model, restore=True)
        ranks = {name: adapter.pair(name)[0].shape[0] for name in found}
        wrap(model, found, replace(adapter.config, init="kaiming"), ranks)  # only for a moment
    _fill(model, adapter, inference)
    notice = _compare_base(adapter.base_model, _base_model_name(model))
    return LoadReport(report(model).modules, swapped, adapter.base_model, notice)


@torch.no_grad()
def _fill(model: nn.Module, adapter: Adapter, inference: bool) -> None:
    """Copy the adapter's values into an injected model of the same shapes."""
    for name, layer in lora_layers(model).items():
        layer.alpha, layer.dropout = adapter.config.alpha_of(name), adapter.config.dropout
        layer.scale = adapter.scale_of(name)
        for attribute, tensor in adapter.parameters(name).items():
            getattr(layer, attribute).copy_(tensor).requires_grad_(not inference)
    injection = injection_of(model)
    assert injection is not None
    injection.config = adapter.config
    state = extras.tensors(model) if injection.kept.live else {}
    for name, key in injection.kept.live.items():
        state[key].copy_(adapter.extras[name])
        trains = not inference and isinstance(state[key], nn.Parameter)
        state[key].requires_grad_(trains and state[key].is_floating_point())


def _check_fit(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """The base modules that the adapter's keys name, checked against model and configuration."""
    extras.check_dense(model, adapter.config)
    named = _base_modules(model)
    found = {name: named[name] for name in adapter.modules if name in named}
    known = [name for name, module in named.items() if bases.is_linear(module)]
    problems = [
        f"the model has no module {name}{nearest(name, known)}"
        for name in adapter.modules
        if name not in named
    ]
    for name, module in found.items():
        if not bases.is_linear(module):
            problems.append(f"{name} is a {type(module).__name__}, not a linear layer")
            continue
        (out, in_), (A, B) = bases.shape(module), adapter.pair(name)
        if A.shape[1] != in_ or B.shape[0] != out:
            problems.append(
                f"{name} is {out} x {in_} (out, in), but lora_A is {tuple(A.shape)} "
                f"and lora_B {tuple(B.shape)}"
            )
        if adapter.config.init == "loftq" and bases.is_mergeable(module):
            problems.append(f"{name} must be in 4 bits, by minilora.quantize: LoftQ started it so")
    if not problems:
        problems = _compare_targets(adapter, known) + _compare_extras(model, adapter)
    _raise("the adapter does not fit the model", problems)
    check_modules(model, found)
    extras.check_untied(model, adapter.config)
    return found


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names they have, or had before an adapter was injected."""
    layers = lora_layers(model)
    named = {}
    for name, module in ((bases.plain_name(n), m) for n, m in model.named_modules()):
        parent, _, last = name.rpartition(".")
        if name and name not in layers:
            named[parent if last == "base" and parent in layers else name] = module
    return named


def _compare_targets(adapter: Adapter, linears: list[str]) -> list[str]:
    """What the configuration targets must be in the file, and nothing else."""
    config = adapter.config
    if config.targets == ALL_LINEAR:
        return []  # resolved when it was written; which head was left out is the file's to say
    targeted, held = {name for name in linears if is_target(config, name)}, set(adapter.modules)
    return [
        f"missing keys {PREFIX}{name}.lora_A/B.weight: target_modules asks for them"
        if name in targeted
        else f"unexpected keys {PREFIX}{name}.lora_A/B.weight: target_modules does not ask for them"
        for name in sorted(targeted ^ held)
    ]


def _compare_extras(model: nn.Module, adapter: Adapter) -> list[str]:
    """The biases and whole modules in the file must be those the configuration asks for."""
    wanted, state = extras.find(model, adapter.config, adapter.modules), extras.tensors(model)
    problems = [f"missing key {PREFIX}{name}" for name in sorted(set(wanted) - set(adapter.extras))]
    for name, tensor in adapter.extras.items():
        if name not in wanted:
            problems.append(f"unexpected key {PREFIX}{name}")
            continue
        live = state[wanted[name]]
        if live.shape != tensor.shape or live.is_floating_point() != tensor.is_floating_point():
            problems.append(f"{PREFIX}{name} is {_kind(tensor)}, but the model's is {_kind(live)}")
    return problems


def _fits(layers: dict[str, LoRALinear], adapter: Adapter) -> bool:
    """Whether the adapter's tensors have the shapes of the layers that are there."""
    kind = layer_type(adapter.config)
    return sorted(layers) == list(adapter.modules) and all(
        type(layer) is kind and layer.lora_A.shape == adapter.pair(name)[0].shape
        for name, layer in layers.items()
    )


def _base_model_name(model: nn.Module) -> str | None:
    """Where transformers says the model came from."""
    name = getattr(plain_model(model), "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _compare_base(trained_on: str | None, loaded_into: str | None) -> str | None:
    """A notice if the names differ. No error: a name may be a directory of another machine."""
    if not trained_on or not loaded_into or PurePath(trained_on).name == PurePath(loaded_into).name:
        return None
    return f"it was trained on {trained_on}, and this model is {loaded_into}"


def _adapter_directory(directory: Path) -> Path:
    if not directory.is_dir():
        raise LoRAError(f"{directory}: no such directory")
    if (directory / CONFIG_FILE).exists():
        return directory
    named = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    if len(named) > 1:
        choices = ", ".join(path.name for path in named)
        raise LoRAError(f"{directory}: holds several adapters, name one of them: {choices}")
    return named[0] if named else directory


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise LoRAError(f"{path}: no such file; an adapter directory needs one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoRAError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(entries, dict):
        raise LoRAError(f"{path}: holds a {type(entries).__name__}, not an object")
    return entries


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise LoRAError(
                "adapter_model.bin is a pickle, which can run any code when loaded: load it with "
                "PEFT where you trust it, and save it again as safetensors"
            )
        raise LoRAError(f"{WEIGHTS_FILE}: no such file")
    try:
        return dict(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise LoRAError(f"{WEIGHTS_FILE} is damaged: {error}") from None


def _without_repeats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With bias="all" PEFT writes the biases of whole modules thrice; the plain name is trained."""
    plain = dict(tensors)
    for key in tensors:
        for inner in (".original_module.", ".modules_to_save."):
            if key.replace(inner, ".") in tensors and key.endswith(".bias") and inner in key:
                plain.pop(key, None)
    return plain


def _raise(what: str, problems: list[str], show: int = 5) -> None:
    if problems:
        more = f"; and {len(problems) - show} more" if len(problems) > show else ""
        raise LoRAError(f"{what}: {'; '.join(problems[:show])}{more}")


def _kind(tensor: Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
