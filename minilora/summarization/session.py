"""What a run works with: data, tokenizer and model, read, checked and made ready to train."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import minilora
from minilora import InjectReport, LoRAConfig
from minilora.files import write_file
from minilora.summarization import distributed, speed
from minilora.summarization.data import SPLITS, Encoded, collate, encode, load
from minilora.summarization.evaluation import generate_arguments
from minilora.summarization.four_bits import FourBits
from minilora.summarization.guards import Stamps, stamps
from minilora.summarization.model import (
    autocast,
    check_vocabulary,
    choose_device,
    choose_precision,
    limit_lengths,
    load_model,
    load_tokenizer,
    save_model,
)
from minilora.summarization.origin import PLACES, fingerprints, place
from minilora.summarization.presets import RunConfig, UserError
from minilora.summarization.reading import Example


@dataclass
class Split:
    """Dialogues as they are and as token ids, in the same order."""

    examples: list[Example]
    encoded: list[Encoded]

    def __len__(self) -> int:
        return len(self.examples)


@dataclass
class Session:
    """What a run works with, checked and in memory, before anything is written."""

    run: RunConfig
    """With lengths that the model has positions for."""
    device: torch.device
    autocast_dtype: torch.dtype | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Split]
    """train and validation; test if the run ends with an evaluation."""
    report: InjectReport
    notices: list[str]
    origin: dict[str, str]
    """What the run begins with and where it computes, to be compared when it goes on."""
    stamps: Stamps
    """Of the data's files, to be told if somebody writes to them."""

    def autocast(self) -> torch.autocast:
        """What forward passes are computed in."""
        return autocast(self.device, self.autocast_dtype)

    def tensors(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """A padded batch on the device; see `collate`."""
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return {key: t.to(self.device) for key, t in collate(batch, pad).items()}


def open_session(run: RunConfig) -> Session:
    """Load data, model and tokenizer and make the model ready to train.

    Whatever can be wrong with a run's input is found here, not after an hour of training.

    Raises:
        UserError: data or model are missing, malformed, or do not fit each other or the settings.
        LoRAError: the adapter's settings do not fit the model.
    """
    device = distributed.own_device(choose_device(run.model.device))
    if (count := distributed.size()) > run.training.batch_size:
        raise UserError(
            f"--batch-size {run.training.batch_size} is less than the {count} processes that "
            "share each batch: raise it (and lower --accumulate), or start fewer"
        )
    if run.training.auto_batch_size and distributed.size() > 1:
        raise UserError("--auto-batch-size goes with one process: lower --batch-size instead")
    config = adapter_config(run) if run.model.method != "full" else None
    before = stamps(run.data.data)
    data, notices = load(run.data, SPLITS if run.output.evaluate else SPLITS[:2])
    tokenizer = load_tokenizer(run.model.model)
    model = load_model(run.model.model, device, four_bits(run, start=True))
    run = limit_lengths(run, model)
    generate_arguments(model, run.generation)  # refuses impossible settings
    splits = {}
    for name, examples in data.items():
        encoded, truncation = encode(examples, tokenizer, run.data)
        check_vocabulary(model, encoded, run.model.model)
        splits[name] = Split(examples, encoded)
        if truncation.sources or truncation.targets:
            notices.append(f"{name}: {truncation}")
    autocast_dtype = choose_precision(run.model.precision, device)
    encoded_splits = {name: split.encoded for name, split in splits.items()}
    where = place(device, autocast_dtype, distributed.size())
    origin = fingerprints(data, encoded_splits, model) | where
    torch.manual_seed(run.model.seed)  # the start of A, then dropout
    report = minilora.inject(model, config) if config else _report_of_all(model)
    prepare(model, run, device, autocast_dtype)
    began = {"start": distributed.checksum(model), "settings": run.to_dict()}
    distributed.require_same({n: v for n, v in origin.items() if n not in PLACES} | began)
    distributed.seed_apart(run.model.seed)
    return Session(
        run=run,
        device=device,
        autocast_dtype=autocast_dtype,
        model=model,
        tokenizer=tokenizer,
        splits=splits,
        report=report,
        notices=notices,
        origin=origin,
        stamps=before,
    )


def prepare(
    model: PreTrainedModel, run: RunConfig, device: torch.device, autocast_dtype: torch.dtype | None
) -> None:
    """Make the steps cheap that the model is about to take; see `speed`."""
    speed.hold_frozen_linears(model, autocast_dtype)
    speed.release_file(model)
    speed.choose_attention(model, device)
    if run.training.checkpoint_activations:
        speed.checkpoint_activations(model)
    if run.training.compile:
        speed.compile_layers(model)


def _report_of_all(model: nn.Module) -> InjectReport:
    trainable = sum(parameter.numel() for parameter in minilora.trainable_parameters(model))
    return InjectReport((), trainable, sum(p.numel() for p in model.parameters()))


def adapter_config(run: RunConfig) -> LoRAConfig:
    """The library's configuration for a run's settings."""
    options = run.adapter
    return LoRAConfig(
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        targets=_targets(options.targets),
        exclude=_targets(options.exclude) if options.exclude else (),
        rslora=options.rslora,
        init=options.init,
        task_type="SEQ_2_SEQ_LM",
    )


def four_bits(run: RunConfig, start: bool = False) -> FourBits | None:
    """How the base is read: in four bits for QLoRA.

    Args:
        run: its settings.
        start: an adapter is to be injected, which LoftQ starts with the targets' whole weights.
            The base is the same afterwards.
    """
    if run.model.method != "qlora":
        return None
    return FourBits(adapter_config(run) if start and run.adapter.init == "loftq" else None)


def write_config(run: RunConfig, output: Path) -> None:
    """config.json: every setting that a resumed run takes over."""
    settings = run.to_dict() | {"resume": None, "accept_changes": False}
    write_file(output / "config.json", json.dumps(settings, indent=2).encode() + b"\n")


def _targets(values: list[str]) -> str | tuple[str, ...]:
    """A single value with a character that no module name has is a regular expression."""
    if len(values) == 1 and not values[0].replace("_", "").replace(".", "").isalnum():
        return values[0]
    return tuple(values)


def save_trained(session: Session, output: Path) -> None:
    """Write the adapter (or, after a full fine-tune, the model), whole or not at all."""
    path = trained_path(output, session.run)
    if session.run.model.method != "full":
        minilora.save_adapter(session.model, path)
    else:
        save_model(session.model, session.tokenizer, path)


def trained_path(output: Path, run: RunConfig) -> Path:
    """Where a run keeps what it trained."""
    return output / ("model" if run.model.method == "full" else "adapter")
