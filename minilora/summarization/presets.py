"""Every setting of a run, and the presets: a name for a whole configuration.

A setting is a field of one of the dataclasses below. Each field is a flag of `train.py` (its
`metadata["help"]` is the help text, the class's `_argument_group_name` its heading), each preset a
table of the fields that differ from the defaults, and `config.json` of a run their values.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

ASSETS = Path(__file__).parent / "assets"
# What works without a download: a model, and data sets from easy to hard.
EMBEDDED = ("pocket-bart", "bookings", "minichat", "minichat-hard")


PRESETS: dict[str, dict[str, Any]] = {
    "pocket": {},  # pocket-bart on minichat: the defaults
    "bart-large-cnn-samsum": {
        "model": "facebook/bart-large-cnn",
        "data": "knkarthick/samsum",
        "batch_size": 8,
        "epochs": 3,
        "max_source_length": 1024,
        "min_length": 8,
        "max_length": 100,
        "length_penalty": 1.0,
    },
    "bart-large-xsum-samsum": {
        "model": "facebook/bart-large-xsum",
        "data": "knkarthick/samsum",
        "batch_size": 8,
        "epochs": 3,
        "max_source_length": 1024,
        "min_length": 8,
        "max_length": 100,
        "length_penalty": 1.0,
    },
    "bart-base-samsum": {
        "model": "facebook/bart-base",
        "data": "knkarthick/samsum",
        "batch_size": 16,
        "epochs": 5,
        "max_source_length": 1024,
        "min_length": 8,
        "max_length": 100,
        "length_penalty": 1.0,
    },
    # The settings of the notebook this project grew from, to compare with: its learning rate is a
    # tenth of what suits LoRA, and it decodes as bart-large-cnn does for news.
    "notebook": {
        "model": "facebook/bart-large-cnn",
        "data": "knkarthick/samsum",
        "prompt_before": "Summarize the following conversation.\\n\\n",
        "prompt_after": "\\n\\nSummary:",
        "batch_size": 1,
        "epochs": 5,
        "precision": "fp16",
        "max_source_length": 1024,
        "min_length": 56,
        "max_length": 142,
        "length_penalty": 2.0,
    },
}

# The peak learning rate of each method: what suits LoRA is four to ten times what suits a full
# fine-tune, so neither may borrow the other's. "loftq": QLoRA with that start, where measured.
# pocket's: benchmarks/results/grid.json, and docs/log.md for LoftQ's.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "pocket": {"lora": 4e-3, "qlora": 4e-3, "loftq": 2e-3, "full": 5e-4},
    "bart-large-cnn-samsum": {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5},
    "bart-large-xsum-samsum": {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5},
    "bart-base-samsum": {"lora": 5e-4, "qlora": 5e-4, "full": 5e-5},
    "notebook": {"lora": 1e-5, "qlora": 1e-5, "full": 1e-5},
}


def embedded(name: str) -> str:
    """The path of an embedded model or data set; any other name as it is."""
    return str(ASSETS / name) if name in EMBEDDED else name


def local_path(name: str) -> Path:
    """Where a model or data set lies if it is local; with an unknown ~user it is nowhere."""
    try:
        return Path(embedded(name)).expanduser()
    except RuntimeError:
        return Path(name)


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where and what to do. Ends in exit code 2."""


def _flag(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model: str = _flag(
        "pocket-bart", "directory or hub name of the base model; pocket-bart is embedded"
    )
    method: Literal["lora", "qlora", "full"] = _flag(
        "lora",
        "lora trains the adapter only, qlora the same on a base in 4 bits, full every parameter",
    )
    device: str = _flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _flag(
        "auto", "auto: bf16 where it is faster, fp16 on older GPUs, fp32 otherwise"
    )
    seed: int = _flag(0, "seed of the adapter's start, the order of the batches and dropout")


@dataclass
class DataOptions:
    _argument_group_name = "data"

    data: str = _flag(
        "minichat",
        "directory with train/validation/test files, one file (.json, .jsonl, .csv), or a hub "
        "name; bookings, minichat and minichat-hard are embedded",
    )
    dialogue_column: str = _flag("dialogue", "column with the text to summarize")
    summary_column: str = _flag("summary", "column with the reference summary")
    prompt_before: str = _flag("", "text put before every dialogue (\\n is a line break)")
    prompt_after: str = _flag("", "text put after every dialogue")
    max_source_length: int = _flag(512, "tokens a dialogue is cut to, prompt included")
    max_target_length: int = _flag(128, "tokens a reference summary is cut to")
    skip_bad_rows: bool = _flag(False, "leave malformed rows out and go on instead of stopping")


@dataclass
class AdapterOptions:
    _argument_group_name = "adapter (LoRA, Hu et al. 2021)"

    rank: int = _flag(8, "r: rows of A, columns of B")
    alpha: float = _flag(32.0, "numerator of the scale s = alpha / r")
    dropout: float = _flag(0.05, "probability that an input of the adapter's branch is dropped")
    targets: list[str] = _flag(
        ["q_proj", "v_proj"],
        "names of the linears to adapt, a regular expression, or all-linear",
    )
    exclude: list[str] = _flag([], "names among the targets to leave alone")
    rslora: bool = _flag(False, "scale s = alpha / sqrt(r) (Kalajdzievski 2023)")
    init: Literal["kaiming", "gaussian", "loftq"] = _flag(
        "kaiming",
        "how A starts, B at zero; loftq: A and B hold what qlora's 4 bits rounded away",
    )


@dataclass
class TrainingOptions:
    _argument_group_name = "training"

    epochs: int = _flag(5, "passes over the training split")
    max_steps: int = _flag(0, "stop after so many optimizer steps; 0: no limit")
    learning_rate: float | None = _flag(
        None, "peak of the schedule; if not given, the preset's for the method and the start"
    )
    warmup: float = _flag(0.06, "share of the steps over which the learning rate rises")
    weight_decay: float = _flag(0.0, "decoupled weight decay (AdamW)")
    batch_size: int = _flag(8, "dialogues in a batch, of all processes together")
    accumulate: int = _flag(1, "batches in an optimizer step")
    auto_batch_size: bool = _flag(
        False, "halve batches that memory does not suffice for, and sum over more of them"
    )
    skip_bad_batches: bool = _flag(
        False, "leave out steps whose loss or gradient is not finite instead of stopping"
    )
    compile: bool = _flag(
        False, "torch.compile the layers: faster steps after some minutes, other last bits"
    )
    checkpoint_activations: bool = _flag(
        False, "save only the layers' inputs and compute the rest twice: less memory, slower"
    )
    clip: float = _flag(1.0, "largest norm of the gradient; 0: no clipping")
    validation_beams: int = _flag(
        1, "beams of the summaries written after each epoch, to choose the best; 1 is greedy"
    )
    validation_limit: int = _flag(
        0, "summarize only so many validation dialogues after each epoch; 0: all"
    )


@dataclass
class GenerationOptions:
    """Length belongs to the task: bart-large-cnn's own min_length 56 ruins short summaries."""

    _argument_group_name = "decoding"

    beams: int = _flag(4, "beams of the search; 1 is greedy")
    min_length: int = _flag(40, "fewest tokens of a summary")
    max_length: int = _flag(80, "most tokens of a summary")
    length_penalty: float = _flag(1.0, "above 1 prefers longer beams, below 1 shorter ones")
    no_repeat_ngram: int = _flag(3, "no n-gram of this size occurs twice; 0: no such rule")
    evaluation_batch_size: int = _flag(32, "dialogues that a process summarizes at once")


@dataclass
class OutputOptions:
    _argument_group_name = "output"

    output: str | None = _flag(None, "directory of the run; runs/NAME if not given")
    resume: str | None = _flag(None, "directory of a run to go on with")
    accept_changes: bool = _flag(
        False, "resume although settings, data or base model differ from those the run began with"
    )
    checkpoint_minutes: float = _flag(10.0, "minutes between two checkpoints within an epoch")
    checkpoint_steps: int = _flag(0, "steps between two checkpoints, beside the minutes; 0: none")
    keep_checkpoints: int = _flag(2, "how many of the newest to keep; the best is kept too")
    evaluate: bool = _flag(True, "compare base and fine-tuned model on the test split at the end")
    report: bool = _flag(True, "write report.html at the end")


@dataclass
class RunConfig:
    """All settings of a run, by group."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    preset: str = "pocket"

    def to_dict(self) -> dict[str, Any]:
        """Flat: one entry per flag."""
        flat: dict[str, Any] = {"preset": self.preset}
        for group in GROUPS:
            flat.update(asdict(getattr(self, group)))
        return flat

    @classmethod
    def from_dict(cls, flat: dict[str, Any]) -> "RunConfig":
        """Inverse of `to_dict`; a missing entry takes its default.

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
                kind = getattr(known[name], "__name__", "") if known[name] in (str, int) else ""
                wanted = kind or str(known[name]).removeprefix("typing.")
                raise UserError(f"{name} is {value!r}, not of type {wanted}")
        groups = {
            group: kind(**{f.name: flat[f.name] for f in fields(kind) if f.name in flat})
            for group, kind in GROUPS.items()
        }
        return cls(**cast(Any, groups), preset=flat.get("preset", "pocket"))


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value read from JSON is of a field's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


GROUPS: dict[str, Any] = {
    "model": ModelOptions,
    "data": DataOptions,
    "adapter": AdapterOptions,
    "training": TrainingOptions,
    "generation": GenerationOptions,
    "output": OutputOptions,
}
