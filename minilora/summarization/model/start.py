"""--adapter: the adapter that a run starts from. It decides the run's adapter settings."""

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import minilora
from minilora import Adapter, LoRAConfig
from minilora.methods import AdaLoRAConfig
from minilora.peft_format.apply import apply_adapter
from minilora.peft_format.keys import CONFIG_FILE

from ..errors import UserError
from ..files import read_object
from ..presets import restored
from ..settings import AdapterOptions, RunConfig, spelt
from .loading import adapter_directory, is_adapter

FREE = ("dropout",)
"""Settings that a flag may change, since they change no parameter."""


def run_of(directory: Path) -> Path:
    """The run in which an adapter or a model lies, however the path is spelt; else the path."""
    for path in (directory, directory.resolve()):
        inside = path.name in ("adapter", "model")  # of a run, or of a model of transformers
        if inside and "method" in (read_object(path.parent / "config.json") or {}):
            return path.parent
    return directory


def base_of(directory: Path, adapter: Adapter) -> dict[str, str]:
    """The base model and the method of an adapter, from its run's settings or from its own file.

    Raises:
        UserError: PEFT's LoftQ started it.
    """
    run = run_of(directory)
    settings = read_object(run / "config.json") or {}
    # An adapter that started from LoftQ belongs to a base in four bits.
    method = settings.get("method") or ("qlora" if adapter.config.init == "loftq" else "lora")
    if model := settings.get("model"):
        return {"model": restored(str(model), run), "method": str(method)}
    entries = read_object(directory / CONFIG_FILE) or {}
    if method == "qlora" and "auto_mapping" in entries:  # an entry that only PEFT writes
        raise UserError(
            f"{directory} was started by PEFT's LoftQ: quantize the model in Python, as in "
            "troubleshooting.md"
        )
    if revision := entries.get("revision"):
        print(
            f"note: the adapter's base is revision {revision} of {adapter.base_model}, and the "
            "latest one is used: download that revision and pass --model DIR",
            file=sys.stderr,
        )
    return {"method": str(method)} | ({"model": adapter.base_model} if adapter.base_model else {})


def decided(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that the adapter of --adapter decides. --model may name another base model.

    Args:
        given: the flags that were typed.

    Raises:
        UserError: the adapter cannot be found or is of a kind that no run starts from, or a flag
            contradicts it.
        LoRAError: the adapter cannot be read.
    """
    name = given["adapter"]
    directory = _directory(name)
    adapter = minilora.read_adapter(directory)
    if isinstance(adapter.config, AdaLoRAConfig):  # its budget was for another number of steps
        raise UserError(f"--adapter {name} is AdaLoRA: convert it with minilora.methods.as_lora")
    if adapter.config.prompts:
        what = " and ".join(config.folder for config in adapter.config.prompts)
        raise UserError(f"--adapter {name} holds a {what}: a run starts from LoRA only")
    base, found = base_of(directory, adapter), _settings(adapter.config)
    if "model" not in base | given:
        raise UserError(f"--adapter {name} does not name its base model: pass --model")
    if given.get("method", "lora") not in ("lora", "qlora"):
        raise UserError(f"--adapter goes with --method lora or qlora, not {given['method']}")
    if found["init"] == "loftq" and given.get("method", "qlora") != "qlora":
        raise UserError(f"--adapter {name} was started by LoftQ: it needs --method qlora")
    typed = (found.keys() & given.keys()).difference(FREE)
    if other := sorted(n for n in typed if _unordered(given[n]) != _unordered(found[n])):
        what = " and ".join(f"{spelt(n)} {_shown(found[n])}, not {_shown(given[n])}" for n in other)
        raise UserError(f"--adapter {name} has {what}: leave such flags out")
    if found["init"] == "random":  # --init has no such value, and the start is not used
        del found["init"]
    return base | found


def start(run: RunConfig) -> tuple[Adapter | None, bool]:
    """The adapter of --adapter, with the dropout of the run; None: the run starts from none.

    Where it is gone, the adapter of the resumed run stands for it: it has the same settings, and
    the checkpoint has the values.

    Returns:
        The adapter, and whether it is that of the resumed run.

    Raises:
        UserError: it cannot be found.
        LoRAError: it cannot be read.
    """
    if run.adapter.adapter is None:
        return None, False
    try:
        directory, is_own = _directory(run.adapter.adapter), False
    except UserError:
        resumed = Path(run.output.resume or "")
        directory, is_own = resumed / "adapter", True
        has_checkpoint = any((resumed / "checkpoints").glob("step-*"))
        if not (run.output.resume and has_checkpoint and is_adapter(directory)):
            raise
    adapter = minilora.read_adapter(directory)
    adapter = replace(adapter, config=replace(adapter.config, dropout=run.adapter.dropout))
    return adapter, is_own


def apply_start(model: PreTrainedModel, adapter: Adapter, name: str) -> list[str]:
    """Put the adapter into the model, to train it; returns notices of the settings it decides."""
    loaded = apply_adapter(model, adapter)
    plain, config = LoRAConfig(), adapter.config
    named = ("rank", "alpha", "targets")
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    told = {n: v for n, v in values.items() if n in named or v != getattr(plain, n)}
    what = ", ".join(
        f"{name} {_shown(value)}"
        for name, value in told.items()
        if name not in ("init", "task_type")
    )
    notices = [f"--adapter {name}: the run starts from it, with {what}"]
    return notices + ([loaded.notice] if loaded.notice else [])


def _directory(name: str) -> Path:
    """The directory of an adapter, given itself or by its run."""
    found = adapter_directory(name)
    return inside if (inside := found / "adapter").is_dir() else found


def _settings(config: LoRAConfig) -> dict[str, Any]:
    """The configuration of an adapter as values of flags."""
    names = {f.name for f in fields(AdapterOptions)} - {"adapter"}
    found = {name: getattr(config, name) for name in names}
    for name in ("targets", "exclude", "also_train"):
        found[name] = [found[name]] if isinstance(found[name], str) else list(found[name])
    found["layers"] = list(config.layers or ())
    found["rank_pattern"] = [f"{key}={rank}" for key, rank in config.rank_pattern.items()]
    return found


def _unordered(value: Any) -> Any:
    """A value for comparison: PEFT writes lists in any order."""
    return sorted(value) if isinstance(value, list) else value


def _shown(value: object) -> str:
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    if not isinstance(value, list | tuple):
        return str(value)
    more = f" and {len(value) - 4} more" if len(value) > 4 else ""
    return " ".join(map(str, value[:4])) + more or "none"
