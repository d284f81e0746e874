"""An adapter on disk: PEFT's directory, read, checked, applied and written.

    adapter_config.json          what was adapted: PEFT's names for the fields of LoRAConfig
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in), ...lora_B.weight

Reading is strict. PEFT ignores an unexpected key and warns of a missing one; here either is an
error that names it, raised before the model is touched.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from minilora import bases
from minilora.config import LoRAConfig, LoRAError, first_match, scale
from minilora.files import write_file
from minilora.inject import config_of, lora_layers, plain_model, remember, remove, report, wrap
from minilora.layer import LoRALinear
from minilora.targets import ALL_LINEAR, check_modules, is_target, nearest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"

# LoRAConfig's field -> PEFT's. A file without an entry means PEFT's default, given here.
FIELDS: dict[str, tuple[str, Any]] = {
    "rank": ("r", 8),
    "alpha": ("lora_alpha", 8),
    "dropout": ("lora_dropout", 0.0),
    "targets": ("target_modules", None),
    "exclude": ("exclude_modules", None),
    "layers": ("layers_to_transform", None),
    "layers_pattern": ("layers_pattern", None),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "rslora": ("use_rslora", False),
    "init": ("init_lora_weights", True),
    "task_type": ("task_type", None),
}
EMPTY: dict[str, Any] = {
    "exclude": (),
    "layers": None,
    "layers_pattern": (),
    "rank_pattern": {},
    "alpha_pattern": {},
}
INITS = {"kaiming": True, "gaussian": "gaussian", "random": False}

# Entries that change nothing about the weights.
IGNORED = {
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config",
}  # fmt: skip

# Entries that ask for another method, and what to do about it.
REFUSED = {
    "use_dora": "DoRA is not supported yet",
    "bias": "trained biases are not supported yet",
    "lora_bias": "a bias on lora_B is not supported yet",
    "modules_to_save": "fully trained modules are not supported yet",
    "fan_in_fan_out": "transposed weights are not supported yet",
    "trainable_token_indices": "trained tokens are not supported: merge it with PEFT",
    "target_parameters": "adapted bare parameters are not supported: merge it with PEFT",
    "layer_replication": "replicated layers are not supported: merge it with PEFT",
    "alora_invocation_tokens": "activated LoRA cannot be merged; use it with PEFT",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter apart from any model: its configuration and its tensors by their names on disk.

    Raises:
        LoRAError: the tensors do not form pairs A (r, in), B (out, r) of one rank that agree with
            the configuration, or hold a value that is not finite.
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]
    base_model: str | None = None
    """Name or directory of the model it was trained on, if known."""

    def __post_init__(self) -> None:
        problems = []
        for key, tensor in self.tensors.items():
            if not key.startswith(PREFIX) or not key.endswith((A_SUFFIX, B_SUFFIX)):
                problems.append(f"unexpected key {key}")
            elif tensor.dim() != 2 or not tensor.is_floating_point():
                problems.append(f"{key} is {_kind(tensor)}, not a floating-point matrix")
            elif not tensor.isfinite().all():
                problems.append(f"{key} holds values that are not finite")
        if not problems:
            problems = [problem for name in self.modules for problem in self._check_pair(name)]
        if not self.tensors:
            problems.append("it holds no tensors")
        _raise("the adapter's tensors are wrong", problems)

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of the adapted modules, sorted."""
        return modules_of(self.tensors)

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a module."""
        stem = PREFIX + module
        return self.tensors[stem + A_SUFFIX], self.tensors[stem + B_SUFFIX]

    def _check_pair(self, module: str) -> list[str]:
        stem = PREFIX + module
        missing = [stem + end for end in (A_SUFFIX, B_SUFFIX) if stem + end not in self.tensors]
        if missing:
            return [f"missing key {key}" for key in missing]
        A, B = self.pair(module)
        rank = self.config.rank_of(module)
        if A.shape[0] != rank or B.shape[1] != rank:
            return [
                f"{module}: lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, "
                f"but the configuration says rank {rank}"
            ]
        return []


@dataclass(frozen=True)
class LoadReport:
    """What `load_adapter` did."""

    modules: tuple[str, ...]
    swapped: bool
    """Whether the tensors went into adapter layers that were there already."""
    base_model: str | None
    """The base model that the file names."""

    def __str__(self) -> str:
        how = "swapped in place" if self.swapped else "loaded"
        return f"{len(self.modules)} modules {how}"


def modules_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Dotted names of the modules that have keys among the tensors, sorted."""
    stems = {key.rpartition(".lora_")[0] for key in tensors}
    return tuple(sorted(stem.removeprefix(PREFIX) for stem in stems if stem.startswith(PREFIX)))


def read_adapter(directory: str | Path) -> Adapter:
    """Read and check an adapter directory as PEFT or minilora wrote it. Never reads a pickle.

    Raises:
        LoRAError: a file is missing, damaged, or asks for something minilora does not do.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise LoRAError(f"{directory}: no such directory")
    entries = _read_json(directory / CONFIG_FILE)
    try:
        tensors = _read_tensors(directory)
        config = _config_from_peft(entries, modules_of(tensors))
        return Adapter(config, tensors, entries.get("base_model_name_or_path"))
    except LoRAError as error:
        raise LoRAError(f"{directory}: {error}") from None


def write_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Write an adapter so that PEFT loads it: the same tensors give the same bytes.

    Raises:
        LoRAError: the directory's name is taken by a file.
        OSError: it cannot be written; a file that was there before is untouched.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise LoRAError(f"{directory} is a file, not a directory")
    tensors = {key: adapter.tensors[key].contiguous() for key in sorted(adapter.tensors)}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    text = json.dumps(_config_to_peft(adapter), indent=2, sort_keys=True) + "\n"
    write_file(directory / WEIGHTS_FILE, weights)
    write_file(directory / CONFIG_FILE, text.encode())


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter a model carries, as a value: its tensors are copies on the CPU.

    Raises:
        LoRAError: the model carries no adapter.
    """
    config = config_of(model)
    if config is None:
        raise LoRAError("the model carries no adapter: minilora.inject or load_adapter first")
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[PREFIX + name + A_SUFFIX] = layer.lora_A.detach().cpu().clone()
        tensors[PREFIX + name + B_SUFFIX] = layer.lora_B.detach().cpu().clone()
    return Adapter(config, tensors, _base_model_name(model))


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the model's adapter as PEFT's directory; merged or not, wrapped by DDP or not.

    Raises:
        LoRAError: the model carries no adapter.
        OSError: the directory cannot be written.
    """
    write_adapter(adapter_of(model), directory)


def load_adapter(model: nn.Module, directory: str | Path, inference: bool = False) -> LoadReport:
    """Load an adapter of PEFT's format into a model, in place; the file's keys decide where.

    A model that already carries an adapter of the same shapes keeps its modules and gets the new
    values; one of other shapes is unwrapped (without merging) and injected again.

    Args:
        model: the base model, or one that carries an adapter, unmerged.
        directory: holds adapter_config.json and adapter_model.safetensors.
        inference: leave the adapter frozen; otherwise it trains.

    Raises:
        LoRAError: the files are wrong or do not fit the model; every missing, unexpected and
            mis-shaped key is named, and the model is untouched.
    """
    adapter = read_adapter(directory)
    model = plain_model(model)
    layers = lora_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise LoRAError("cannot load an adapter while merged: call minilora.unmerge(model) first")
    try:
        found = _find_modules(model, adapter)
    except LoRAError as error:
        raise LoRAError(f"{directory}: {error}") from None
    swapped = _fits(layers, adapter)
    if swapped:
        _configure(layers, adapter.config)
        remember(model, adapter.config)
    else:
        remove(model)
        ranks = {name: adapter.pair(name)[0].shape[0] for name in found}
        wrap(model, found, adapter.config, ranks)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            A, B = adapter.pair(name)
            layer.lora_A.copy_(A).requires_grad_(not inference)
            layer.lora_B.copy_(B).requires_grad_(not inference)
    return LoadReport(report(model).modules, swapped, adapter.base_model)


def _find_modules(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """The base modules that the adapter's keys name, checked against model and configuration."""
    named = {
        name.removesuffix(".base"): module.base if isinstance(module, LoRALinear) else module
        for name, module in model.named_modules()
        if name and not isinstance(module, LoRALinear)
    }
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
    if not problems:
        problems = _compare_targets(model, adapter, known)
    _raise("the adapter does not fit the model", problems)
    check_modules(model, found)
    return found


def _compare_targets(model: nn.Module, adapter: Adapter, linears: list[str]) -> list[str]:
    """What the configuration targets must be in the file, and nothing else."""
    config = adapter.config
    if config.targets == ALL_LINEAR:
        return []  # resolved when it was written; which head was left out is the file's to say
    targeted = {name for name in linears if is_target(config, name)}
    stems = {name: f"{PREFIX}{name}.lora_A/B.weight" for name in targeted | set(adapter.modules)}
    missing = sorted(targeted - set(adapter.modules))
    unexpected = sorted(set(adapter.modules) - targeted)
    return [f"missing keys {stems[name]}: target_modules asks for them" for name in missing] + [
        f"unexpected keys {stems[name]}: target_modules does not ask for them"
        for name in unexpected
    ]


def _fits(layers: dict[str, LoRALinear], adapter: Adapter) -> bool:
    """Whether the adapter's tensors have the shapes of the layers that are there."""
    return sorted(layers) == list(adapter.modules) and all(
        layer.lora_A.shape == adapter.pair(name)[0].shape for name, layer in layers.items()
    )


def _base_model_name(model: nn.Module) -> str | None:
    """Where transformers says the model came from."""
    name = getattr(plain_model(model), "name_or_path", None)
    return name if isinstance(name, str) and name else None


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


def _config_from_peft(entries: Mapping[str, Any], modules: tuple[str, ...]) -> LoRAConfig:
    kind = entries.get("peft_type")
    if kind != "LORA":
        raise LoRAError(f"{CONFIG_FILE}: peft_type is {kind!r}; only 'LORA' is supported")
    known = {name for name, _ in FIELDS.values()} | IGNORED
    for key, value in entries.items():
        if key not in known and value not in (None, False, "none", [], {}):
            advice = REFUSED.get(key, "minilora does not know it, and PEFT's result depends on it")
            raise LoRAError(f"{CONFIG_FILE}: {key} is {value!r}: {advice}")
    values = {ours: entries.get(peft, default) for ours, (peft, default) in FIELDS.items()}
    inits = [ours for ours, peft in INITS.items() if peft == values["init"]]
    if not inits:
        raise LoRAError(
            f"{CONFIG_FILE}: init_lora_weights {values['init']!r} may have rewritten the base's "
            "weights: convert the adapter to plain LoRA with PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    values["init"] = inits[0]
    values["targets"] = values["targets"] or modules
    for name, empty in EMPTY.items():  # PEFT writes null, [] and {} alike
        values[name] = values[name] if values[name] not in (None, [], {}, "") else empty
    try:
        return LoRAConfig(**values)
    except LoRAError as error:
        raise LoRAError(f"{CONFIG_FILE}: {error}") from None


def _config_to_peft(adapter: Adapter) -> dict[str, Any]:
    """PEFT's entries, only those that its older versions know too, unless they are needed."""
    config = adapter.config
    values = {name: getattr(config, name) for name in FIELDS}
    if config.targets == ALL_LINEAR:
        values["targets"] = adapter.modules  # which linears, said outright
    values["alpha"] = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    values["rank_pattern"] = _resolve(config.rank_of, adapter.modules, config.rank)
    values["alpha_pattern"] = _resolve(config.alpha_of, adapter.modules, config.alpha)
    values["init"] = INITS[config.init]
    entries = {peft: values[ours] for ours, (peft, _) in FIELDS.items()}
    for key in ("exclude_modules", "layers_pattern", "layers_to_transform"):
        entries[key] = entries[key] or None
    if entries["exclude_modules"] is None:
        del entries["exclude_modules"]
    return entries | {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _resolve(
    value_of: Callable[[str], Any], modules: tuple[str, ...], default: Any
) -> dict[str, Any]:
    """A pattern with one full name per module, so that no order of keys can change its meaning.

    PEFT sorts the keys when it saves; overlapping patterns then reload with other values.
    """
    names = {name: value_of(name) for name in modules}
    pattern = {name: value for name, value in names.items() if value != default}
    if all(first_match(pattern, name, default) == value for name, value in names.items()):
        return pattern
    # A full name is also the end of another: anchor them. PEFT matches `(.*\.)?(KEY)$`.
    return {f"^{re.escape(name)}": value for name, value in pattern.items()}


def _configure(layers: dict[str, LoRALinear], config: LoRAConfig) -> None:
    for name, layer in layers.items():
        layer.alpha, layer.dropout = config.alpha_of(name), config.dropout
        layer.scale = scale(layer.alpha, layer.rank, config.rslora)


def _raise(what: str, problems: list[str], show: int = 5) -> None:
    if problems:
        more = f"; and {len(problems) - show} more" if len(problems) > show else ""
        raise LoRAError(f"{what}: {'; '.join(problems[:show])}{more}")


def _kind(tensor: Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
