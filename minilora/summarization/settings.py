"""Every setting of a run.

Each field of the dataclasses below is a flag of `train.py`: `metadata["help"]` is its help text,
the class's `_argument_group_name` its heading. A preset lists the fields that differ from the
defaults, and a run's `config.json` holds the values of all of them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from .errors import UserError
from .presets import PRESETS

SPLITS = ("train", "validation", "test")
FILES = ("train_file", "validation_file", "test_file")
PATHS = ("model", "data", "adapter", *FILES)  # settings that may be paths

# The ranges that argparse does not check by the type.
POSITIVE = (
    *("epochs", "learning_rate", "batch_size", "accumulate", "beams", "validation_beams"),
    *("evaluation_batch_size", "keep_checkpoints", "max_source_length", "max_target_length"),
    *("lora_plus_ratio", "virtual_tokens", "rank"),
)
NOT_NEGATIVE = (
    *("max_steps", "clip", "weight_decay", "validation_limit", "min_length", "no_repeat_ngram"),
    *("checkpoint_minutes", "checkpoint_steps", "seed", "prefix_hidden"),
)


def _flag(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model: str = _flag("pocket-bart", "directory or hub name of the base model, or pocket-bart")
    method: Literal["lora", "qlora", "adalora", "prompt", "prefix", "full"] = _flag(
        "lora", "training method; qlora: base in 4 bits; adalora: chooses the ranks during training"
    )
    with_: Literal["none", "prompt", "prefix"] = _flag("none", "also train a prompt or a prefix")
    device: str = _flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _flag(
        "auto", "auto: the fastest on this device"
    )
    seed: int = _flag(0, "random seed of the adapter's initialization, batch order and dropout")


@dataclass
class DataOptions:
    _argument_group_name = "data"

    data: str = _flag(
        "bookings",
        "bookings, minichat, minichat-hard, a hub name, a file (.json, .jsonl, .csv, .tsv, "
        ".parquet), or a directory with train, validation and test files",
    )
    train_file: str | None = _flag(None, "file of the training split, instead of --data")
    validation_file: str | None = _flag(None, "file of the validation split, instead of --data")
    test_file: str | None = _flag(None, "file of the test split, instead of --data")
    dialogue_column: str = _flag("dialogue", "column with the dialogue: a text, or a list of turns")
    summary_column: str = _flag(
        "summary", "column with the reference summary (several: summary1, summary2, ...)"
    )
    prompt_before: str = _flag("", "text put before every dialogue (\\n is a line break)")
    prompt_after: str = _flag("", "text put after every dialogue")
    max_source_length: int = _flag(512, "truncate longer dialogues (tokens, with the prompt)")
    max_target_length: int = _flag(128, "truncate longer reference summaries (tokens)")
    skip_bad_rows: bool = _flag(False, "leave malformed rows out instead of stopping")

    @property
    def name(self) -> str:
        """The name of the data in messages."""
        return ", ".join(filter(None, (getattr(self, name) for name in FILES))) or self.data


@dataclass
class AdapterOptions:
    _argument_group_name = "adapter (LoRA, Hu et al. 2021)"

    adapter: str | None = _flag(
        None, "start from this adapter or run (directory or hub name), which decides the settings"
    )
    rank: int = _flag(8, "r: rows of A, columns of B; adalora: the mean rank at the end")
    alpha: float = _flag(32.0, "numerator of the scale s = alpha / r")
    dropout: float = _flag(0.05, "dropout probability of the adapter's input")
    targets: list[str] = _flag(
        ["attention"],
        "names, a regular expression, all-linear, attention (query and value), or decoder (query "
        "and value of the decoder only, so that the encoder is computed once)",
    )
    exclude: list[str] = _flag(
        [], "names among the targets to leave alone, a regular expression, or decoder: all of it"
    )
    layers: list[int] = _flag([], "only these layers, counted from 0 in encoder and decoder alike")
    rank_pattern: list[str] = _flag([], "other ranks for some modules: NAME=RANK ...")
    also_train: list[str] = _flag(
        [], "modules whose own weights train too, such as final_layer_norm"
    )
    dora: bool = _flag(False, "DoRA: train magnitude and direction of W's rows (Liu et al. 2024)")
    rslora: bool = _flag(False, "scale s = alpha / sqrt(r) (Kalajdzievski 2023)")
    init: Literal["kaiming", "gaussian", "loftq", "pissa"] = _flag(
        "kaiming", "initial values of A (loftq, pissa: of A and B)"
    )


@dataclass
class VirtualOptions:
    _argument_group_name = "virtual tokens (prompt and prefix tuning)"

    virtual_tokens: int = _flag(20, "length of a prompt or a prefix")
    prefix_places: list[str] = _flag(
        ["encoder", "decoder", "cross"], "the attentions that get a prefix"
    )
    prefix_hidden: int = _flag(512, "width of the MLP through which a prefix trains; 0: no MLP")


@dataclass
class TrainingOptions:
    _argument_group_name = "training"

    epochs: int = _flag(2, "passes over the training split")
    max_steps: int = _flag(0, "stop after this many optimizer steps; 0: no limit")
    learning_rate: float | None = _flag(
        None,
        "peak of the schedule (LoRA+: A's); default: the preset's, divided by "
        "sqrt(--lora-plus-ratio)",
    )
    lora_plus_ratio: float = _flag(1.0, "LoRA+: B's learning rate divided by A's, such as 16")
    warmup: float = _flag(0.06, "share of the steps over which the learning rate rises")
    weight_decay: float = _flag(0.0, "decoupled weight decay (AdamW)")
    batch_size: int = _flag(8, "dialogues per batch, over all processes together")
    accumulate: int = _flag(1, "batches per optimizer step (gradient accumulation)")
    compile: bool = _flag(False, "torch.compile the layers: slow to start, then faster")
    checkpoint_activations: bool = _flag(
        False, "recompute activations in the backward pass to save memory"
    )
    cache_encoder: Literal["auto", "on", "off"] = _flag(
        "auto",
        "compute the encoder once for all epochs, without its dropout; auto: if it is frozen",
    )
    cache_directory: str = _flag("runs/.encoder-cache", "directory for encoder states above 1 GB")
    clip: float = _flag(1.0, "clip the gradient's norm at this value; 0: no clipping")
    validation_beams: int = _flag(1, "beam width in validation; 1: greedy search")
    validation_limit: int = _flag(0, "validation dialogues summarized per epoch; 0: all")


@dataclass
class GenerationOptions:
    """Length belongs to the task: bart-large-cnn's own min_length 56 ruins short summaries."""

    _argument_group_name = "decoding"

    beams: int = _flag(4, "beam width; 1: greedy search")
    min_length: int = _flag(5, "minimum length of a summary (tokens)")
    max_length: int = _flag(60, "maximum length of a summary (tokens)")
    length_penalty: float = _flag(1.0, "above 1 prefers longer summaries, below 1 shorter ones")
    no_repeat_ngram: int = _flag(3, "never repeat an n-gram of this size; 0: off")
    evaluation_batch_size: int = _flag(32, "dialogues per batch when decoding, in each process")


@dataclass
class OutputOptions:
    _argument_group_name = "output"

    output: str | None = _flag(None, "directory of the run; default: runs/NAME")
    resume: str | None = _flag(None, "run directory to resume")
    accept_changes: bool = _flag(False, "resume although settings, data or base model changed")
    checkpoint_minutes: float = _flag(10.0, "minutes between two checkpoints within an epoch")
    checkpoint_steps: int = _flag(0, "also save a checkpoint every N steps; 0: by time only")
    keep_checkpoints: int = _flag(2, "recent checkpoints to keep, in addition to the best")
    evaluate: bool = _flag(True, "compare base and fine-tuned model on the test split at the end")
    report: bool = _flag(True, "write report.html at the end")


@dataclass
class RunConfig:
    """All settings of a run, by group."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    virtual: VirtualOptions = field(default_factory=VirtualOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    preset: str = "pocket"
    typed = frozenset[str]()  # not a setting
    """Names of the settings that a flag or a file gave: they are not adapted to the data."""

    def to_dict(self) -> dict[str, Any]:
        """Flat: one entry per flag."""
        flat: dict[str, Any] = {"preset": self.preset}
        for group in GROUPS:
            flat.update(asdict(getattr(self, group)))
        return flat

    @classmethod
    def from_dict(cls, flat: dict[str, Any]) -> "RunConfig":
        """Inverse of `to_dict`. A missing entry takes its default.

        Raises:
            UserError: an entry is unknown, or of another type than the flag's.
        """
        known: dict[str, Any] = {"preset": Literal[tuple(PRESETS)]}
        for kind in GROUPS.values():
            known |= get_type_hints(kind)
        if unknown := sorted(set(flat) - set(known)):
            raise UserError(f"unknown settings: {', '.join(unknown)}")
        for name, value in flat.items():
            if not _is_of(value, known[name]):
                kind = known[name]
                wanted = kind.__name__ if type(kind) is type else kind
                choices = get_args(kind) if get_origin(kind) is Literal else ()
                text = f"one of {', '.join(choices)}" if choices else f"of type {wanted}"
                raise UserError(f"{name} is {value!r}, not {text}")
        groups = {
            group: kind(**{f.name: flat[f.name] for f in fields(kind) if f.name in flat})
            for group, kind in GROUPS.items()
        }
        run = cls(**cast(Any, groups), preset=flat.get("preset", "pocket"))
        run.typed = frozenset(flat)
        return run

    def of_preset(self, *names: str) -> bool:
        """Whether these settings are those of the preset."""
        preset = self.from_dict(PRESETS[self.preset]).to_dict()
        return all(self.to_dict()[name] == preset[name] for name in names)

    def unused(self) -> set[str]:
        """The settings that the method does not read."""
        kinds = {self.model.method, self.model.with_}
        groups: list[Any] = [] if kinds & {"lora", "qlora", "adalora"} else [AdapterOptions]
        groups += [] if kinds & {"prompt", "prefix"} else [VirtualOptions]
        of_prefix = set[str]() if "prefix" in kinds else {"prefix_places", "prefix_hidden"}
        return of_prefix.union(f.name for group in groups for f in fields(group))

    def check(self) -> None:
        """Refuse values that argparse does not.

        Raises:
            UserError: a value out of its range, or settings that exclude each other.
        """
        flat = self.to_dict()
        for name in POSITIVE:
            if flat[name] is not None and not 0 < flat[name] < math.inf:
                raise UserError(f"{spelt(name)} must be above 0, not {flat[name]}")
        for name in NOT_NEGATIVE:
            if not flat[name] >= 0:  # NaN too
                raise UserError(f"{spelt(name)} must be 0 or more, not {flat[name]}")
        for name in ("prompt_before", "prompt_after"):
            if re.search("[\ud800-\udfff]", flat[name]):
                raise UserError(f"{spelt(name)} is not UTF-8 text: type it in a UTF-8 terminal")
        warmup = self.training.warmup
        for name in ("length_penalty", "weight_decay"):
            if not math.isfinite(flat[name]):
                raise UserError(f"{spelt(name)} must be finite, not {flat[name]}")
        if self.model.seed >= 2**63:
            raise UserError(f"--seed must be below 2^63, not {self.model.seed}")
        if self.adapter.init == "loftq" and self.model.method != "qlora":
            raise UserError("--init loftq requires --method qlora")
        if self.adapter.init == "pissa" and self.model.method != "lora":
            raise UserError("--init pissa requires --method lora")
        adapts = self.model.method not in ("full", "prompt", "prefix")
        if self.training.lora_plus_ratio != 1 and not adapts:
            raise UserError(
                f"--lora-plus-ratio requires --method lora, qlora or adalora, not "
                f"{self.model.method}"
            )
        if self.model.with_ != "none" and not adapts:
            raise UserError(f"--with is for LoRA, not --method {self.model.method}")
        if self.model.with_ != "none" and self.adapter.adapter:
            raise UserError(f"--adapter does not go with --with {self.model.with_}: leave one out")
        for side in ("targets", "exclude"):
            if "decoder" in (names := flat[side]) and len(names) > 1:
                raise UserError(
                    f"--{side} decoder cannot be combined with other names: leave them out, or "
                    "write one regular expression"
                )
        if self.adapter.layers and self.adapter.targets == ["decoder"]:
            raise UserError(
                "--layers does not go with --targets decoder: name the linears, such as "
                "--targets q_proj v_proj"
            )
        if self.training.compile and "prefix" in (self.model.method, self.model.with_):
            raise UserError("--compile does not go with a prefix: leave the flag out")
        if not 0 <= warmup < 1:
            raise UserError(f"--warmup is a share of the steps, from 0 to below 1, not {warmup}")


def in_words(flat: Mapping[str, Any]) -> str:
    """A description of what trains. Settings of an earlier version may lack some entries."""
    rank, tokens = flat.get("rank", "?"), f"of {flat.get('virtual_tokens', '?')} tokens"
    words = {"lora": f"LoRA of rank {rank}", "qlora": f"QLoRA of rank {rank}"}
    words |= {"adalora": f"AdaLoRA of mean rank {rank}", "full": "every parameter fine-tuned"}
    words |= {"prompt": f"a prompt {tokens}", "prefix": f"a prefix {tokens}"}
    what, second = (words.get(flat.get(name, "")) for name in ("method", "with_"))
    return (what or words["lora"]) + (f" with {second}" if second else "")


def spelt(name: str) -> str:
    """A setting as a flag: `with_` is --with, since `with` is a keyword of Python."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value read from JSON is of a field's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(item, *get_args(kind)) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


# The groups by name: each is a class, and a heading of `train.py --help`.
GROUPS: dict[str, Any] = {f.name: f.default_factory for f in fields(RunConfig)[:-1]}

# Settings of earlier versions: the default they had, and what does the same now.
REMOVED: dict[str, tuple[Any, str]] = {
    "auto_batch_size": (False, "lower --batch-size and raise --accumulate"),
    "skip_bad_batches": (False, "lower --learning-rate or use --precision fp32"),
}
