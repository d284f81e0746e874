"""Everything that decides the rest of a run, in one directory that is whole or absent.

    checkpoints/step-00000120/
        state.safetensors    trained parameters, AdamW's moments, random states
        state.json           position, best score, GradScaler, and the checksum of the tensors

Written beside, flushed, renamed. A damaged one is passed over for the one before. No pickle.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.files import sync_directory, write_file
from minilora.summarization.presets import UserError

TENSORS, STATE = "state.safetensors", "state.json"


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    """The epoch under way, from 0."""
    position: int = 0
    """Optimizer steps taken in this epoch."""
    best: float | None = None
    """Best validation ROUGE-1 so far."""
    seconds: float = 0.0
    """Time spent training, validation included."""
    log_bytes: int = 0
    """Length of log.jsonl; what a stopped run wrote after it is cut off on resuming."""


def save_checkpoint(
    directory: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    keep: int = 2,
) -> Path:
    """Write checkpoints/step-N and remove all but the newest `keep`.

    Raises:
        OSError: the disk is full or read-only; the checkpoints before it are untouched.
    """
    target = directory / f"step-{progress.step:08d}"
    beside = directory / f".step-{progress.step:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    tensors = {f"parameter.{name}": p.detach() for name, p in _trained(model).items()}
    for name, parameter in _trained(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    tensors |= _random_states()
    content = safetensors.torch.save({key: t.cpu().contiguous() for key, t in tensors.items()})
    state = {
        "progress": asdict(progress),
        "scaler": scaler.state_dict(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_file(beside / TENSORS, content)
    write_file(beside / STATE, json.dumps(state, indent=2).encode())
    if target.exists():
        shutil.rmtree(target)
    beside.rename(target)
    sync_directory(directory)
    for old in _newest_first(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[Progress, list[str]]:
    """Put the newest whole checkpoint into model, optimizer, scaler and the random states.

    Returns:
        The progress (a new one where there is no checkpoint) and notices about damaged ones.

    Raises:
        UserError: the checkpoint belongs to another model or method.
    """
    notices = []
    for path in _newest_first(directory):
        try:
            tensors, state = _read(path)
            progress = Progress(**state["progress"])
        except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
            notices.append(f"checkpoint {path.name} is damaged ({error}): the one before is used")
            continue
        _restore(path, tensors, model, optimizer)
        if state["scaler"]:  # empty where the run before the resume computed without fp16
            scaler.load_state_dict(state["scaler"])
        return progress, notices
    return Progress(), notices


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = json.loads((path / STATE).read_bytes())
    content = (path / TENSORS).read_bytes()
    if hashlib.sha256(content).hexdigest() != state["sha256"]:
        raise ValueError("its checksum does not match")
    return safetensors.torch.load(content), state


def _restore(
    path: Path, tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    trained = _trained(model)
    stored = {
        key.removeprefix("parameter."): tensor.shape
        for key, tensor in tensors.items()
        if key.startswith("parameter.")
    }
    if stored != {name: parameter.shape for name, parameter in trained.items()}:
        raise UserError(f"{path}: it holds other parameters than this run trains")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    for name, parameter in trained.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"optimizer.{key}.{name}")) is not None:
                # `step` too: fused AdamW wants it where the parameter is
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
    torch.set_rng_state(tensors["random.cpu"])
    for i in range(torch.cuda.device_count()):
        if (state := tensors.get(f"random.cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state, i)


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    for i in range(torch.cuda.device_count()):
        states[f"random.cuda.{i}"] = torch.cuda.get_rng_state(i)
    return states


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), reverse=True)
