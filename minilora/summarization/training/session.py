"""Data, tokenizer and model of a run: read, checked, and ready to train."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import minilora
from minilora import InjectReport, LoRAConfig
from minilora.config import ATTENTION
from minilora.conventions import PROJECTIONS
from minilora.files import write_file
from minilora.inject import report as inject_report
from minilora.methods import AdaLoRAConfig

from .. import processes
from ..data.batches import Encoded, collate, encode
from ..data.lengths import fit_lengths
from ..data.reading import Example
from ..data.splits import load
from ..errors import UserError
from ..evaluation.generate import generate_arguments
from ..evaluation.rouge import rouge_is_installed
from ..model import requirements, speed
from ..model.device import autocast, choose_device, choose_precision, out_of_memory
from ..model.digest import of_tensors
from ..model.encoder_cache import EncoderStates, keep_states
from ..model.four_bits import FourBits
from ..model.loading import check_vocabulary, load_model, load_tokenizer, save_model
from ..model.requirements import limit_lengths
from ..model.start import apply_start, start
from ..presets import EMBEDDED, stored
from ..settings import FILES, PATHS, SPLITS, RunConfig, spelt
from .card import write_card
from .failures import try_out
from .fingerprint import fingerprints
from .first_steps import STEPS
from .schedule import last_step, steps_per_epoch

_NAMES = "|".join(name for names in PROJECTIONS for name in names)
DECODER = rf"(.*\.)?decoder\..*\.({_NAMES})"
"""The regular expression of --targets decoder; PEFT reads it too."""
IN_DECODER = r"(.*\.)?decoder\..*"
"""That of --exclude decoder."""
KEPT = "use of the encoder's states"  # among a run's fingerprints


@dataclass
class Split:
    """Dialogues as text and as token ids, in the same order."""

    examples: list[Example]
    encoded: list[Encoded]
    states: EncoderStates | None = None
    """The encoder's states, if they are kept."""

    def __len__(self) -> int:
        return len(self.examples)


@dataclass
class Session:
    """Data, tokenizer and model of a run, before anything is written."""

    run: RunConfig
    """With lengths cut to the model's positions."""
    device: torch.device
    autocast_dtype: torch.dtype | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Split]
    """train and validation; test if the run ends with an evaluation."""
    report: InjectReport
    notices: list[str]
    origin: dict[str, str]
    """Fingerprints of what the run begins with."""

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.autocast_dtype)

    def tensors(self, batch: Sequence[Encoded], split: str = "train") -> dict[str, Any]:
        """A padded batch on the device, see `collate`; kept encoder states replace `input_ids`."""
        pad = cast(int, self.tokenizer.pad_token_id)  # load_tokenizer requires one
        tensors: dict[str, Any] = {key: t.to(self.device) for key, t in collate(batch, pad).items()}
        if states := self.splits[split].states:
            del tensors["input_ids"]
            tensors["encoder_outputs"] = states.batch(self.model, [r.source for r in batch])
        return tensors


def open_session(run: RunConfig) -> Session:
    """Load data, model and tokenizer and make the model ready to train.

    Every error of a run's input is found here, before the first step.

    Raises:
        UserError: data or model are missing, malformed, or do not fit each other or the settings.
        LoRAError: the adapter's settings do not fit the model.
    """
    device = processes.own_device(choose_device(run.model.device))
    if (count := processes.world_size()) > run.training.batch_size:
        raise UserError(
            f"--batch-size {run.training.batch_size} is less than the {count} processes that "
            "share each batch: raise it (and lower --accumulate), or start fewer"
        )
    adapter, is_own = start(run)
    anew = run.model.method != "full" and not adapter
    if anew:
        method_configs(run)  # refuses impossible settings before anything is read
    data, notices = load(run.data, SPLITS if run.output.evaluate else SPLITS[:2])
    if not run.output.resume and (unused := run.unused() & run.typed):  # a resumed run has them all
        names = ", ".join(map(spelt, sorted(unused)))
        notices.append(f"--method {run.model.method} does not use {names}")
    tokenizer = load_tokenizer(run.model.model)
    model = load_model(run.model.model, device, four_bits(run, start=True))
    notices += requirements.check(model, tokenizer, run.model.model)
    splits, cut = tokenized(run, data, tokenizer, model)
    notices += cut
    if not run.of_preset("model", "data", *FILES):
        longest = limit_lengths(run, model).data.max_target_length
        lengths = [min(len(row.target) + 1, longest) for row in splits["train"].encoded]
        notices += _fit(run, lengths)
    asked, run = run, limit_lengths(run, model)
    notices += requirements.cut_notice(asked, run)
    # Refuses impossible settings; after a full fine-tune they are saved with the model.
    model.generation_config.update(**generate_arguments(model, run.generation))
    autocast_dtype = choose_precision(run.model.precision, device)
    if rouge_is_installed():
        row = splits["validation"].encoded[0]
        try_out(model, tokenizer, row, run.generation, autocast_dtype)
    else:
        without = "the validation loss chooses the best epoch, and nothing is scored at the end"
        notices.append(f"rouge_score is not installed: {without}")
    origin = fingerprints(splits, model)
    size, accumulate = run.training.batch_size, run.training.accumulate
    origin["batches"] = f"{size} dialogues, {accumulate} a step, seed {run.model.seed}"
    origin["validation settings"] = validation_settings(run)
    torch.manual_seed(run.model.seed)  # the start of A, then dropout
    memory = out_of_memory("while the adapter was added", "lower --rank or use --device cpu")
    if adapter:
        with memory:
            said = apply_start(model, adapter, str(run.adapter.adapter))
        if is_own:
            said = [
                f"--adapter {run.adapter.adapter} is gone: the run's checkpoint is used instead"
            ]
        else:
            origin["adapter it starts from"] = of_tensors(adapter.tensors)
        notices += said
    elif anew:
        steps = last_step(run.training, len(splits["train"]))
        with memory:
            minilora.inject(model, method_configs(run, steps))
    report = inject_report(model)  # of a full fine-tune: no modules
    if report.modules and ["decoder"] not in (run.adapter.targets, run.adapter.exclude):
        notices += requirements.not_adapted(model)
    with out_of_memory("while the model was prepared", "free some memory, or use --device cpu"):
        prepare(model, run, autocast_dtype)
    keep(model, run, splits, autocast_dtype)
    # The encoder's dropout is off with kept states: a resumed run must be the same in this.
    origin[KEPT] = str(splits["train"].states is not None)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    same = {"start": of_tensors(trained), "settings": run.to_dict()}
    processes.require_same(origin | same | {"precision": str(autocast_dtype)})
    processes.seed_by_rank(run.model.seed)
    parts = (model, tokenizer, splits, report, notices, origin)
    return Session(run, device, autocast_dtype, *parts)


def validation_settings(run: RunConfig) -> str:
    """Scores of two validations can be compared only if these are equal."""
    training, decoding = run.training, asdict(run.generation)
    for name in ("beams", "evaluation_batch_size"):  # not used there
        del decoding[name]
    chosen = [training.validation_limit, training.validation_beams, rouge_is_installed()]
    return json.dumps([*chosen, decoding])


def tokenized(
    run: RunConfig,
    data: Mapping[str, list[Example]],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> tuple[dict[str, Split], list[str]]:
    """The splits with their token ids, and notices of what was cut to the model's positions."""
    options, splits, notices = limit_lengths(run, model).data, dict[str, Split](), list[str]()
    for name, examples in data.items():
        encoded, truncation = encode(examples, tokenizer, options)
        check_vocabulary(model, encoded, run.model.model)
        splits[name] = Split(examples, encoded)
        if truncation.sources or truncation.targets:
            notices.append(f"{name}: {truncation}")
    return splits, notices


def _fit(run: RunConfig, lengths: Sequence[int]) -> list[str]:
    """Fit the preset's lengths to other data; returns notices, also about the rate.

    In place: config.json has these lengths, but not the cut to the model's positions.
    """
    notices: list[str] = []
    if run.data.data not in EMBEDDED or not run.of_preset(*FILES):  # these fit the preset
        run.generation, notices = fit_lengths(run.generation, lengths, run.typed)
    if run.training.learning_rate and "learning_rate" not in run.typed:
        notices.append(
            f"--learning-rate {run.training.learning_rate:g} is that of the preset {run.preset}, "
            "chosen for its own model and data: try three times as much, and a third"
        )
    return notices


def prepare(model: PreTrainedModel, run: RunConfig, autocast_dtype: torch.dtype | None) -> None:
    """Make the training steps of the model cheap; see `speed`."""
    speed.hold_frozen_linears(model, autocast_dtype)
    speed.release_file(model)
    if run.training.checkpoint_activations:
        speed.checkpoint_activations(model)
    if run.training.compile:
        speed.compile_layers(model)


def keep(
    model: PreTrainedModel,
    run: RunConfig,
    splits: Mapping[str, Split],
    autocast_dtype: torch.dtype | None,
) -> None:
    """Keep the encoder's states of splits that are read more than once; see `keep_states`."""
    options, rows = run.training, len(splits["train"])
    for name in ("train", "validation"):  # the test split's are computed when it is scored
        once = name == "train" and last_step(options, rows) <= steps_per_epoch(options, rows)
        if once and options.cache_encoder == "auto":
            continue
        sources, where = [row.source for row in splits[name].encoded], options.cache_directory
        with out_of_memory("while the encoder's states are computed", "use --cache-encoder off"):
            kept = keep_states(model, sources, autocast_dtype, options.cache_encoder, where)
        splits[name].states = kept


def method_configs(run: RunConfig, steps: int = 100) -> list[Any]:
    """Configurations for `minilora.inject`: LoRA, a prompt, a prefix, or LoRA and one of these."""
    alone = run.model.method in ("prompt", "prefix")
    return [*([] if alone else [adapter_config(run, steps)]), *requirements.virtual_tokens(run)]


def adapter_config(run: RunConfig, steps: int = 100) -> LoRAConfig:
    """The library's configuration for a run's settings.

    AdaLoRA starts with 1.5 times the final rank, as in the paper (section 3.3), and with the scale
    of LoRA at the final rank. The ranks fall after a tenth of the steps, and are fixed in the last
    third.

    Args:
        run: its settings.
        steps: optimizer steps of the run.
    """
    settings: dict[str, Any] = asdict(run.adapter) | {"task_type": "SEQ_2_SEQ_LM"}
    del settings["adapter"]
    settings |= {side: _names(settings[side]) for side in ("targets", "exclude")}
    whole = {"targets": DECODER, "exclude": IN_DECODER}
    settings |= {side: whole[side] for side in whole if settings[side] == ("decoder",)}
    settings["layers"] = settings["layers"] or None
    settings["rank_pattern"] = _ranks(settings["rank_pattern"])
    if run.model.method != "adalora":
        return LoRAConfig(**settings)
    rank = math.ceil(1.5 * run.adapter.rank)
    settings |= {"rank": rank, "alpha": run.adapter.alpha * rank / run.adapter.rank}
    final = steps // 3
    initial = min(max(STEPS, steps // 10), steps - final - 1)  # all ranks train while STEPS checks
    settings |= {"initial_steps": initial, "final_steps": final, "total_steps": steps}
    return AdaLoRAConfig(**settings, target_rank=run.adapter.rank)


def _ranks(entries: list[str]) -> dict[str, int]:
    """--rank-pattern, entries NAME=RANK, as a dict."""
    found = dict[str, int]()
    for entry in entries:
        name, _, rank = entry.rpartition("=")
        if not (name and rank.isdecimal()):
            raise UserError(f"--rank-pattern {entry}: must be NAME=RANK, such as q_proj=4")
        if name in found:
            raise UserError(f"--rank-pattern gives {name} twice: leave one out")
        found[name] = int(rank)
    return found


def four_bits(run: RunConfig, start: bool = False) -> FourBits | None:
    """How the base is read: in four bits for QLoRA.

    Args:
        run: its settings.
        start: an adapter will be injected. LoftQ starts it from the targets' exact weights, so they
            are quantized only then. The base is the same afterwards.
    """
    if run.model.method != "qlora":
        return None
    anew = start and run.adapter.adapter is None
    return FourBits(adapter_config(run) if anew and run.adapter.init == "loftq" else None)


def write_config(run: RunConfig, output: Path) -> None:
    """config.json: every setting that a resumed run takes over."""
    settings = run.to_dict() | {"resume": None, "accept_changes": False}
    settings |= {name: stored(settings[name], output) for name in PATHS if settings[name]}
    write_file(output / "config.json", json.dumps(settings, indent=2).encode() + b"\n")


def _names(values: list[str]) -> str | tuple[str, ...]:
    """A single value is a regular expression if it has a character that no module name has."""
    if len(values) > 1 or not values:
        return tuple(values)
    is_name = values[0].replace("_", "").replace(".", "").isalnum()
    return (values[0],) if is_name and values[0] != ATTENTION else values[0]


def save_trained(session: Session, output: Path) -> None:
    """Write the adapter (or, after a full fine-tune, the model); an atomic write.

    Scores of an earlier one are removed first: they are not those of the new one.
    """
    path = trained_path(output, session.run)
    (output / "evaluation.json").unlink(missing_ok=True)
    if session.run.model.method != "full":
        minilora.save_adapter(session.model, path)
        write_card(session.run, path)
    else:
        save_model(session.model, session.tokenizer, path)


def trained_path(output: Path, run: RunConfig) -> Path:
    """The adapter of a run, or the model of a full fine-tune."""
    return output / ("model" if run.model.method == "full" else "adapter")
