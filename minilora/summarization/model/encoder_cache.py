"""The states of a frozen encoder, computed once for all epochs, validations and evaluations.

    H = encoder(x)                        (s, d), once for each dialogue x
    loss = -log p(y | H), by the decoder  in every step

If nothing in the encoder trains, H is the same in every epoch. It is computed before the first
step, and the steps compute the decoder only. H is kept without padding, in the dtype in which the
decoder's linears read it. If it is larger than `IN_MEMORY`, it is written to a file
(`state_files.py`), which is mapped into memory.

If only the layers from k on train, H is the output of layer k - 1, and the steps compute the rest
(`lower_layers.py`).

The fingerprint covers all that H depends on, so a file is never stale, and the runs of a sweep
share it. Order and batches depend on the dialogues only, so H is the same when it is computed
again, bit for bit. The encoder is in evaluation mode: its dropout is off.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from minilora.inject import injection_of
from minilora.modules import plain_name

from .. import processes
from ..errors import UserError, counted, one_line
from .device import autocast
from .digest import of_tensors
from .lower_layers import from_states, layers_of, lower_states
from .speed import uncompiled
from .state_files import make_room, only_one, read_states, write_states

ROWS = 8  # dialogues in a batch, fastest on a CPU; another size changes the last bits of the states
IN_MEMORY = 2**30  # bytes
DECODER_ONLY = "choose targets, and places of a prefix, in the decoder"

Source = tuple[int, ...]
"""A dialogue's token ids, after prompt and truncation."""


@dataclass(frozen=True)
class EncoderStates:
    """H of some dialogues."""

    rows: dict[Source, Tensor]
    """(s, d) each, on the CPU."""
    encoder: str
    """Digest of the encoder that computed them."""
    path: Path | None
    """The file from which they are mapped; None: they are in memory."""
    k: int | None = None
    """How many of the encoder's layers computed them; None: all."""

    def batch(self, model: PreTrainedModel, sources: Sequence[Sequence[int]]) -> BaseModelOutput:
        """The encoder's output for a batch: (b, s, d); 0 at padding if no layer is computed."""
        rows = [self.rows[tuple(source)] for source in sources]
        padded: Any = pad_sequence(rows, batch_first=True).to(model.device)
        if self.k is not None:
            padded = from_states(model, self.k, padded, **_padded(model, sources))
        return BaseModelOutput(last_hidden_state=padded)

    def belong_to(self, model: PreTrainedModel) -> bool:
        """Whether this model's encoder computes the same states."""
        return self.encoder == of_encoder(model, self.k)

    def __str__(self) -> str:
        size = sum(row.nbytes for row in self.rows.values())
        return f"{size / 1e6:,.1f} MB {f'in {self.path}' if self.path else 'in memory'}"


def keep_states(
    model: PreTrainedModel,
    sources: Iterable[Sequence[int]],
    autocast_dtype: torch.dtype | None,
    choice: str = "auto",
    directory: str | Path = "runs/.encoder-cache",
    encoder: str = "",
) -> EncoderStates | None:
    """Compute the encoder's states of these dialogues, or read them from their file.

    The model is in evaluation mode afterwards. With several processes, process 0 writes the file
    and all of them read it.

    Args:
        model: its encoder computes the states.
        sources: the dialogues' token ids.
        autocast_dtype: None: no autocast.
        choice: the value of --cache-encoder. If the states cannot be kept, "auto" returns None:
            silently if the encoder trains, else with a note.
        directory: where the files are.
        encoder: its digest, if it is known.

    Returns:
        The states; None if they are not kept.

    Raises:
        UserError: they cannot be kept, and the choice is "on".
    """
    reason = None if choice == "off" else obstacle(model)
    if choice == "off" or (reason and choice == "auto"):
        return None
    try:
        if reason:
            raise UserError(reason)
        return _keep(model.eval(), sources, autocast_dtype, Path(directory), encoder)
    except (UserError, OSError) as error:
        if choice == "on":
            raise UserError(f"--cache-encoder on: {one_line(error)}") from None
        print(f"note: the encoder's states are not kept: {one_line(error)}", file=sys.stderr)
        return None


def obstacle(model: PreTrainedModel) -> str | None:
    """The reason why training or the adapter changes the states; None if neither does.

    All that trains, or has trained in a loaded adapter, must lie in the decoder or the output head.
    Trained rows of the embeddings, for example, do not: a hook puts them into the encoder.
    """
    later = [model.get_decoder(), model.get_output_embeddings()]
    allowed = {id(p) for module in later if module is not None for p in module.parameters()}
    allowed -= {id(p) for p in model.get_encoder().parameters()}
    k = kept_layers(model)
    if k and not getattr(model.config, "encoder_layerdrop", 0) and processes.world_size() == 1:
        allowed |= {id(p) for layer in layers_of(model)[k:] for p in layer.parameters()}
    for name, parameter in _trained(model):
        if id(parameter) not in allowed:
            return f"{name} trains and is not in the decoder: {DECODER_ONLY}"
    return None


def kept_layers(model: PreTrainedModel) -> int | None:
    """k, the number of the encoder's layers below the lowest that trains; None: no layer trains."""
    trained = {id(parameter) for _, parameter in _trained(model)}
    holders = (
        number
        for number, layer in enumerate(layers_of(model))
        if any(id(parameter) in trained for parameter in layer.parameters())
    )
    return next(holders, None)


def _trained(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train, or have trained in a loaded adapter."""
    injection = injection_of(model)
    extras = injection.extras if injection else []
    whole = {id(tensor) for extra in extras for tensor in extra.find(model).values()}
    for name, parameter in model.named_parameters():
        new = injection is not None and plain_name(name) not in injection.required_grad
        if new or id(parameter) in whole or parameter.requires_grad:
            yield plain_name(name), parameter


def _keep(
    model: PreTrainedModel,
    sources: Iterable[Sequence[int]],
    dtype: torch.dtype | None,
    place: Path,
    encoder: str,
) -> EncoderStates:
    # Equal dialogues have one entry. The longest come first, so a lack of memory shows at once.
    order = sorted({tuple(source) for source in sources}, key=lambda row: (-len(row), row))
    k = kept_layers(model)
    width = processes.run_on_all(lambda: _probe(model, order[-1], dtype, k))[0]
    # Under autocast the decoder's linears would round the states to this dtype anyway. Layers of
    # the encoder add to them in the weights' dtype.
    kept = model.dtype if k is not None or dtype is None else dtype
    encoder = encoder or of_encoder(model, k)
    shape = (sum(map(len, order)), width)
    size = shape[0] * shape[1] * kept.itemsize
    if size <= IN_MEMORY and processes.world_size() == 1:
        copies = map(torch.clone, _computed(model, order, dtype, kept, k))
        return EncoderStates(dict(zip(order, copies, strict=True)), encoder, None, k)
    path = place / f"{fingerprint(encoder, order, (kept, dtype), model.device)}.safetensors"

    def write() -> None:
        with only_one(place):
            if path.exists():
                os.utime(path)  # `make_room` removes the least recently used file first
            else:
                make_room(place, size)
                count = counted(len(order), "dialogue")
                what = f"the encoder's states of {count}, {size / 1e9:.1f} GB"
                advice = "--cache-directory moves it, --cache-encoder off does without"
                print(f"note: writing {what}, to {path} ({advice})", file=sys.stderr)
                write_states(path, _computed(model, order, dtype, kept, k), shape, kept)

    processes.on_rank0(write)
    if not all(processes.gather(path.exists())):
        raise UserError(f"{place} must be on a file system that the machines share")
    rows = read_states(path, [len(source) for source in order])
    return EncoderStates(dict(zip(order, rows, strict=True)), encoder, path, k)


# Fingerprints -------------------------------------------------------------------------------------


def of_encoder(model: PreTrainedModel, k: int | None = None) -> str:
    """A digest of the encoder: its class, settings and tensors. Of layers[k:] only the class."""
    encoder: nn.Module = model.get_encoder()
    settings = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    described = [repr(encoder), settings, model.config._attn_implementation]
    tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    upper = nn.ModuleList([] if k is None else layers_of(model)[k:])
    others = {id(tensor) for tensor in (*upper.parameters(), *upper.buffers())}
    tensors = {name: tensor for name, tensor in tensors.items() if id(tensor) not in others}
    content = json.dumps([*described, k, of_tensors(tensors)], default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def fingerprint(encoder: str, order: Sequence[Source], dtype: Any, device: torch.device) -> str:
    """A digest of all that the bits of the states depend on."""
    versions = [torch.__version__, transformers.__version__]
    content = json.dumps([encoder, order, str(dtype), device.type, ROWS, *versions])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


# Computing ----------------------------------------------------------------------------------------


@torch.no_grad()
def _probe(model: PreTrainedModel, source: Source, dtype: torch.dtype | None, k: int | None) -> int:
    """The width d, after a check on one dialogue that the rest of the model needs the states only.

    Raises:
        UserError: the logits from the kept states differ.
    """
    (states,) = _encoded(model, [source], dtype, dtype if k is None else None, k)
    ids = torch.tensor([source], device=model.device)
    first = getattr(model.config, "decoder_start_token_id", None) or 0
    start = torch.full((1, 1), first, device=model.device)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "decoder_input_ids": start}
    how["use_cache"] = False
    with uncompiled(model), autocast(model.device, dtype):
        kept = EncoderStates({source: states}, "", None, k).batch(model, [source])
        wanted = model(input_ids=ids, **how).logits  # (1, 1, v)
        try:
            logits = model(encoder_outputs=kept, **how).logits
        except (AttributeError, TypeError, IndexError):  # such as router logits
            logits = torch.empty(0)
    if not torch.equal(wanted, logits):
        kind = model.config.model_type
        more = "decoder of {} needs more than the encoder's last states"
        if k is not None:
            more = "encoder of {} passes more than states from layer to layer"
        raise UserError(f"the {more.format(kind)}")
    return states.shape[-1]


@torch.no_grad()
def _encoded(
    model: PreTrainedModel,
    batch: Sequence[Source],
    dtype: torch.dtype | None,
    kept: torch.dtype | None,
    k: int | None,
) -> list[Tensor]:
    """(s, d) for each dialogue of a batch, on the CPU, in the dtype in which they are kept."""
    with uncompiled(model), autocast(model.device, dtype):
        inputs = _padded(model, batch)
        if k is None:
            states: Tensor = model.get_encoder()(**inputs).last_hidden_state  # (b, s, d)
        else:
            states = lower_states(model, k, **inputs)
    rounded = states.to(kept or states.dtype).cpu()
    return [row[: len(source)] for row, source in zip(rounded, batch, strict=True)]


def _padded(model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The encoder's inputs (b, s)."""
    ids = pad_sequence([torch.tensor(row) for row in batch], True, model.config.pad_token_id or 0)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in batch], True)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _computed(
    model: PreTrainedModel,
    order: Sequence[Source],
    dtype: torch.dtype | None,
    kept: torch.dtype,
    k: int | None,
) -> Iterator[Tensor]:
    with tqdm(order, "encoder", unit="dialogue", disable=None, leave=False) as bar:
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            yield from _encoded(model, batch, dtype, kept, k)
            bar.update(len(batch))
