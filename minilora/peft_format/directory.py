"""An adapter on disk: PEFT's directory read, checked and written.

    adapter_config.json          what was adapted: PEFT's names for the fields of LoRAConfig
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in), ...lora_B.weight

Reading is strict. One table says which keys are expected, with their shapes; every difference is an
error that names the key. PEFT ignores an unexpected key and warns of a missing one.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minilora.config import LoRAConfig, LoRAError
from minilora.files import write_directory
from minilora.functional import scale
from minilora.modules import naming
from minilora.peft_format import keys
from minilora.peft_format.config import ADVICE, KINDS, config_from_peft, config_to_peft, kind_of
from minilora.peft_format.keys import CONFIG_FILE, WEIGHTS_FILE

NAMED = re.compile(
    r"(\.lora_[ABE]|\.lora_magnitude_vector|_tokens_delta|\.modules_to_save)\.(?!weight|bias)[^.]+"
)
"""The adapter's name in a key, ".default" in most; PEFT takes it out when it saves."""
REPEATED = re.compile(r"\.(original_module|modules_to_save)(?=\..*(bias|weight)$)")
"""PEFT writes a whole module thrice: its biases with bias="all", its weight if it is an embedding
that was resized. The plain name is trained."""


@dataclass(frozen=True)
class Adapter:
    """An adapter apart from any model: its configuration and its tensors by their names on disk.

    Args:
        config: what was adapted and how.
        tensors: by PEFT's keys, `base_model.model.<module>.lora_A.weight` (r, in),
            `...lora_B.weight` (out, r) and what the configuration adds; docs/format.md lists them.
            Keys of a prompt or prefix begin with `prompt/` or `prefix/`.
        base_model: name or directory of the model it was trained on, if known.
        fan_in_fan_out: whether the adapted modules are Conv1D: PEFT's word for it, written down
            for PEFT only.

    Raises:
        LoRAError: the tensors do not form pairs A (r, in), B (out, r) of one rank that agree with
            the configuration, hold a value that is not finite, or are not what the configuration
            asks for. Which biases and whole modules it asks for, only a model can say.

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
        expected: keys.Expected = {}
        for module in self.modules:
            parameters = self.parameters(module)
            A, B = (parameters.get(name, torch.empty(0)) for name in ("lora_A", "lora_B"))
            out, in_ = B.shape[:1].numel(), A.shape[-1:].numel()
            expected |= keys.expected_of(self.config, module, out, in_)
        held, config = self.own, self.config
        some = config.bias != "none" or config.also_train or config.token_rows
        for name in self.extras:  # whether these names are right, only a model can tell
            if some or (name.endswith((".weight", ".bias")) and ".lora_" not in name):  # PEFT's own
                held.pop(keys.PREFIX + name, None)
        problems = keys.compare(expected, held, self._explain)
        for key, tensor in self.tensors.items():
            if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
                problems.append(f"{key} is {keys.describe(tensor)}, which cannot be read exactly")
            elif not tensor.isfinite().all():
                problems.append(f"{key} holds values that are not finite")
        if not self.modules and not config.prompts:
            problems.append("it holds no lora_A and lora_B")
        keys.refuse("the adapter's tensors are wrong", problems)

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of the adapted modules, sorted."""
        return keys.modules_of(self.tensors)

    @property
    def own(self) -> dict[str, Tensor]:
        """The tensors without those of a prompt or prefix."""
        return {key: t for key, t in self.tensors.items() if not keys.is_beside(key)}

    @property
    def extras(self) -> dict[str, Tensor]:
        """The biases and whole modules that trained too, by name on disk without the prefix."""
        found = {key: t for key, t in self.own.items() if not keys.OF_A_LAYER.fullmatch(key)}
        return {key.removeprefix(keys.PREFIX): tensor for key, tensor in found.items()}

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a module."""
        parameters = self.parameters(module)
        return parameters["lora_A"], parameters["lora_B"]

    def parameters(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module by their names in LoRALinear."""
        names = {name: keys.PREFIX + module + end for name, end in keys.SUFFIXES.items()}
        return {name: self.tensors[key] for name, key in names.items() if key in self.tensors}

    def scale_of(self, module: str) -> float:
        """The scale s of a module."""
        rank = self.pair(module)[0].shape[0]
        return scale(self.config.alpha_of(module), rank, self.config.rslora)

    def _explain(self, key: str) -> str:
        for suffix, _, field in keys.PARAMETERS.values():
            if field is not None and key.endswith(suffix):
                return f": the configuration asks for no {field}"
        return f": embeddings are not adapted here: {ADVICE}" if ".lora_embedding_" in key else ""


def read_adapter(directory: str | Path) -> Adapter:
    """Read and check an adapter directory as PEFT or minilora wrote it. Never reads a pickle.

    PEFT saves an adapter with a name of its own one directory deeper; it is read from there if it
    is the only one. A prompt or prefix is read too, from `prompt/`, `prefix/` or the directory.

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
    folders = [directory / name for name in (*keys.FOLDERS, "")]
    configs, held, bases = list[Any](), dict[str, Tensor](), set[str | None]()
    for folder in [p for p in folders if (p / WEIGHTS_FILE).exists()] or [directory]:
        entries = _read_json(folder / CONFIG_FILE)
        with naming(folder):
            kind = kind_of(entries)
            config, tensors = kind.read(entries, _read_tensors(folder))
            if issubclass(kind.config, LoRAConfig):
                config = config_from_peft(config, keys.modules_of(tensors))
            base_model = entries.get("base_model_name_or_path")
            if not isinstance(base_model, str | None):
                raise LoRAError(f"{CONFIG_FILE}: base_model_name_or_path is not a string or null")
            bases |= {base_model} - {None, ""}
            if _read_json(folder / CONFIG_FILE) != entries:
                raise LoRAError("the adapter changed while it was being read: try again")
        configs.append(config)
        held |= tensors
    prompts = tuple(c for c in configs if not isinstance(c, LoRAConfig))
    lora = [replace(c, prompts=prompts) for c in configs if isinstance(c, LoRAConfig)]
    config = lora[0] if lora else LoRAConfig(targets=(), prompts=prompts)
    with naming(directory):
        if len(bases) > 1:
            raise LoRAError(f"its parts name different base models: {sorted(map(str, bases))}")
        return Adapter(config, held, next(iter(bases), None), entries.get("fan_in_fan_out") is True)


def write_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Write an adapter so that PEFT loads it: the same tensors give the same bytes.

    Args:
        adapter: as read, combined or extracted.
        directory: made if it is not there; an adapter in it is replaced.

    Raises:
        LoRAError: the directory's name is taken by a file, or it holds an adapter with a prompt or
            prefix, or with LoRA, that this one lacks.
        OSError: it cannot be written. An adapter that was there before is untouched, unless the
            last step fails, the renaming: then it lacks its adapter_config.json.

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
    writers = {kind.config: kind.write for kind in KINDS.values()}
    configs = adapter.config.prompts
    parts = {f"{c.folder}/": writers[type(c)](c, adapter.tensors) for c in configs}
    if adapter.modules:
        entries = config_to_peft(adapter.config, adapter.modules)
        entries["fan_in_fan_out"] = adapter.fan_in_fan_out
        parts[""] = kind_of(entries).write(entries, adapter.own)
    for folder in {"", *(f"{name}/" for name in keys.FOLDERS)} - parts.keys():
        if (directory / folder / WEIGHTS_FILE).exists():
            raise LoRAError(f"{directory / folder} holds another adapter: remove it first")
    contents = {}
    for folder, (entries, tensors) in parts.items():
        # Copies, since safetensors refuses one tensor under two keys.
        tensors = {key: tensors[key].contiguous().clone() for key in sorted(tensors)}
        entries = entries | {"base_model_name_or_path": adapter.base_model}
        text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
        contents[folder + WEIGHTS_FILE] = safetensors.torch.save(tensors, {"format": "pt"})
        contents[folder + CONFIG_FILE] = text.encode()
    write_directory(directory, contents)


def _adapter_directory(directory: Path) -> Path:
    if not directory.is_dir():
        raise LoRAError(f"{directory}: no such directory")
    named = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    if (directory / CONFIG_FILE).exists() or {path.name for path in named} <= {*keys.FOLDERS}:
        return directory
    if len(named) > 1:
        choices = ", ".join(path.name for path in named)
        raise LoRAError(f"{directory}: holds several adapters, name one of them: {choices}")
    return named[0]


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
    try:
        held = safetensors.torch.load_file(directory / WEIGHTS_FILE)
    except FileNotFoundError:
        what = f"{WEIGHTS_FILE}: no such file. An adapter_model.bin is a pickle, which can run any"
        raise LoRAError(f"{what} code: if you trust it, convert it with PEFT") from None
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise LoRAError(f"{WEIGHTS_FILE} is damaged: {error}") from None
    found = {NAMED.sub(r"\1", k).replace("_vector.weight", "_vector"): t for k, t in held.items()}
    if len(found) < len(held):
        raise LoRAError(f"{WEIGHTS_FILE}: holds several adapters: keep the keys of one only")
    return {k: t for k, t in found.items() if (p := REPEATED.sub("", k)) == k or p not in found}
