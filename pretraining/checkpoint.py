"""A run's checkpoint: one file of safetensors, no pickle."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT = "checkpoint.safetensors"
Moments = dict[int, dict[str, Tensor]]  # by a parameter's place in its optimizer


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    saved: dict[str, Any],
) -> None:
    """One safetensors file, written beside and renamed; what is no tensor is JSON in its header."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for which, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"optimizer.{which}.{index}.{name}"] = value
    beside = path.with_suffix(".new")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, beside, metadata={"json": json.dumps(saved)})
    beside.rename(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[Moments], dict[str, Any]]:
    """The weights, each optimizer's moments by parameter, and what was saved beside them."""
    weights: dict[str, Tensor] = {}
    moments: list[Moments] = [{}, {}]
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            kind, _, name = key.partition(".")
            if kind == "model":
                weights[name] = file.get_tensor(key)
            else:
                which, index, moment = name.split(".")
                moments[int(which)].setdefault(int(index), {})[moment] = file.get_tensor(key)
        saved: dict[str, Any] = json.loads(file.metadata()["json"])
    return weights, moments, saved
