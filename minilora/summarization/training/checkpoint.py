"""Checkpoints: the complete state of a run, in one directory that is written atomically.

    checkpoints/step-00000120/            -validated at the end of an epoch or of the run
        state.safetensors    trained parameters, the optimizer's state, random states
        state.json           position, best score, GradScaler, fingerprints
        SHA256SUMS           of both: `sha256sum -c SHA256SUMS` checks them

Each is written under a temporary name, flushed and renamed. If the newest one is damaged, the one
before is used. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.files import PARTIAL, write_directory

from .. import processes
from ..errors import UserError
from ..files import put_directory, remove_directory

TENSORS, STATE, SUMS = "state.safetensors", "state.json", "SHA256SUMS"


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    """The current epoch, from 0."""
    position: int = 0
    """Optimizer steps taken in this epoch."""
    validated: bool = False
    """Whether the model of this step is validated: at the end of an epoch or of the run."""
    best: float | None = None
    """Best validation ROUGE-1 so far."""
    best_loss: float | None = None
    """Validation loss at the best ROUGE-1; None: a run of an earlier version did not keep it."""
    best_step: int = 0
    """The step of the best."""
    seconds: float = 0.0
    """Time spent training, validation included."""
    peak_bytes: int = 0
    """The most memory that a process of the run has used."""
    log_bytes: int = 0
    """Length of log.jsonl; a resumed run cuts off what was written after it."""


class Damaged(ValueError):
    """A checkpoint that is incomplete, or does not match its checksum."""


def save_checkpoint(
    directory: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    origin: Mapping[str, str] | None = None,
    keep: int = 2,
) -> None:
    """Write checkpoints/step-N; remove all but the newest `keep` and the one of the best score.

    All processes call it, for their random states; process 0 writes.

    Args:
        directory: the run's checkpoints/.
        progress: where the run stands.
        model: its trainable parameters are written, its frozen ones are not.
        optimizer: AdamW.
        scaler: fp16's, or a disabled one.
        origin: the run's fingerprints, to be compared when it is resumed.
        keep: how many of the newest to keep, 1 or more.

    Raises:
        OSError: the disk is full or read-only; the older checkpoints are unchanged.
    """
    tensors = processes.gather_tensors(_random_states())
    for name, parameter in _trained(model).items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    state = {"progress": asdict(progress), "scaler": scaler.state_dict(), "origin": origin or {}}
    processes.on_rank0(lambda: _write(directory, progress, tensors, state, keep))


def _write(
    directory: Path, progress: Progress, tensors: dict[str, Tensor], state: Any, keep: int
) -> None:
    """A complete one of this name is left as it is, unless changes were accepted since: a run that
    was resumed and stops before its next step has nothing to add to it.
    """
    target = directory / _name(progress.step, progress.validated)
    if _origin(target) != state["origin"]:
        contents = {
            TENSORS: safetensors.torch.save({k: t.cpu().contiguous() for k, t in tensors.items()}),
            STATE: json.dumps(state, indent=2).encode() + b"\n",
        }
        sums = "".join(f"{_sum(name, content)}\n" for name, content in contents.items())
        new = target.with_name(f".{target.name}{PARTIAL}")
        write_directory(new, contents | {SUMS: sums.encode()})
        put_directory(new, target)
    best = _name(progress.best_step, validated=True)
    older = [path for path in newest_first(directory) if path.name <= target.name]
    for path in newest_first(directory):
        # One that is newer than `target` is damaged: this run was resumed from an older one.
        if path not in older[:keep] and path.name != best:
            remove_directory(path)


def load_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[Progress, dict[str, str], list[str]]:
    """Restore model, optimizer, scaler and random states from the newest complete checkpoint.

    Returns:
        The progress (a new one where there is no checkpoint), the run's fingerprints, and notices
        about damaged checkpoints.

    Raises:
        UserError: there are checkpoints, but all are damaged; or it belongs to another model or
            method.
    """
    notices = list[str]()
    for path in newest_first(directory):
        try:
            tensors, state = read_checkpoint(path)
            state["progress"].pop("rows_at_once", None)  # of --auto-batch-size, which was removed
            # Earlier versions told it by the name only.
            known = {"validated": path.name.endswith("-validated")}
            progress = Progress(**known | state["progress"])
        except (Damaged, TypeError, KeyError, AttributeError) as error:
            notices.append(f"checkpoint {path} is damaged ({error}): the one before is used")
            continue
        _restore(path, tensors, model, optimizer)
        _set_random_states(tensors)
        if state["scaler"]:  # empty if the run computed without fp16
            scaler.load_state_dict(state["scaler"])
        return progress, state["origin"], notices
    if notices:
        raise UserError(
            f"{directory}: all {len(notices)} checkpoints are damaged ({notices[0]}): restore one "
            "from a copy, or start again with another --output"
        )
    return Progress(), {}, notices


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a complete checkpoint.

    Raises:
        Damaged: a file is missing, cannot be read, or does not match its checksum.
    """
    try:
        contents = {name: (path / name).read_bytes() for name in (TENSORS, STATE)}
        for name, content in contents.items():
            if _sum(name, content) not in (path / SUMS).read_text().splitlines():
                raise Damaged(f"{name}: its checksum does not match")
        return safetensors.torch.load(contents[TENSORS]), json.loads(contents[STATE])
    except OSError as error:
        raise Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, safetensors.SafetensorError) as error:
        raise Damaged(str(error)) from None


def newest_first(directory: Path) -> list[Path]:
    """A run's checkpoints, damaged ones too."""
    return sorted(directory.glob("step-*"), reverse=True)


def _name(step: int, validated: bool) -> str:
    return f"step-{step:08d}" + ("-validated" if validated and step else "")


def _origin(path: Path) -> object:
    """The fingerprints in a complete checkpoint; None where there is none."""
    try:
        return read_checkpoint(path)[1]["origin"]
    except Damaged:
        return None


def _sum(name: str, content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {name}"


def _restore(
    path: Path, tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    trained = _trained(model)
    stored = {key: t.shape for key, t in tensors.items() if key.startswith("parameter.")}
    if stored != {f"parameter.{name}": p.shape for name, p in trained.items()}:
        advice = "use the settings and the model that it was written with"
        raise UserError(f"{path} holds other parameters than this run trains: {advice}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    moments = {key.split(".")[1] for key in tensors if key.startswith("optimizer.")}
    for name, parameter in trained.items():
        for key in moments:  # AdamW's moments, and AdaLoRA's sensitivities
            if (value := tensors.get(f"optimizer.{key}.{name}")) is not None:
                # fused AdamW needs `step` on the parameter's device too
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def _random_states() -> dict[str, Tensor]:
    """The random states of this process, which dropout uses: the CPU's and its own GPU's."""
    generators = {"cpu": torch, **_gpus()}
    return {f"random.{processes.rank()}.{k}": g.get_rng_state() for k, g in generators.items()}


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    """A process that did not exist when they were written keeps its own."""
    for kind, generator in {"cpu": torch, **_gpus()}.items():
        if (state := states.get(f"random.{processes.rank()}.{kind}")) is not None:
            generator.set_rng_state(state)


def _gpus() -> dict[str, Any]:
    """The modules of the GPUs that this process can use: NVIDIA's and AMD's, Apple's."""
    found: dict[str, Any] = {"cuda": torch.cuda} if torch.cuda.is_initialized() else {}
    return found | ({"mps": torch.mps} if torch.backends.mps.is_available() else {})


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
