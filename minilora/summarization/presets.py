"""The presets: a name for a whole configuration, as the settings that differ from the defaults."""

import os
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
# What works without a download: a model, and data sets from easy to hard.
EMBEDDED = ("pocket-bart", "bookings", "minichat", "minichat-hard")

SAMSUM: dict[str, Any] = {
    "data": "knkarthick/samsum",
    "max_source_length": 1024,
    "min_length": 8,
    "max_length": 100,
}

PRESETS: dict[str, dict[str, Any]] = {
    "pocket": {},  # pocket-bart on bookings: the defaults
    "bart-large-cnn-samsum": SAMSUM | {"model": "facebook/bart-large-cnn", "epochs": 3},
    "bart-large-xsum-samsum": SAMSUM | {"model": "facebook/bart-large-xsum", "epochs": 3},
    "bart-base-samsum": SAMSUM | {"model": "facebook/bart-base", "epochs": 5, "batch_size": 16},
    # The settings of the notebook this project grew from, to compare with: its learning rate is a
    # tenth of what suits LoRA, and it decodes with bart-large-cnn's settings for news.
    "notebook": SAMSUM
    | {
        "model": "facebook/bart-large-cnn",
        "prompt_before": "Summarize the following conversation.\\n\\n",
        "prompt_after": "\\n\\nSummary:",
        "epochs": 5,
        "batch_size": 1,
        "precision": "fp16",
        "min_length": 56,
        "max_length": 142,
        "length_penalty": 2.0,
    },
}

# The peak learning rate of each method. LoRA needs four to ten times the rate of a full fine-tune.
# "adalora" is the best of 4e-3, 1.6e-2, 3.2e-2 and 6.4e-2 after 40 steps of one seed: lambda starts
# at zero, and AdamW moves it by about one rate a step, however wide the layer. In other presets it
# has LoRA's rate. "loftq" is QLoRA with that start, where it was measured. The log has pocket's
# rates (docs/log.md, 2026-11-29). Those of a prompt and a prefix are from benchmarks/by_heart.py. A
# "plain prefix" has no MLP.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "pocket": {
        "lora": 2e-3,
        "qlora": 2e-3,
        "loftq": 2e-3,
        "full": 2.5e-4,
        "adalora": 3.2e-2,
        "prompt": 0.1,
        "prefix": 3e-3,
        "plain prefix": 0.1,
    },
    "bart-large-cnn-samsum": {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5},
    "bart-large-xsum-samsum": {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5},
    "bart-base-samsum": {"lora": 5e-4, "qlora": 5e-4, "full": 5e-5},
    "notebook": {"lora": 1e-5, "qlora": 1e-5, "full": 1e-5},
}

# Rates of methods that were not measured with a preset: a prompt's from Lester et al. 2021, a
# prefix's from Li and Liang 2021. AdaLoRA has LoRA's.
OTHER_RATES = {"prompt": 0.3, "prefix": 5e-5}


def embedded(name: str) -> str:
    """The path of an embedded model or data set; any other name unchanged.

    An adapter may name an embedded model by its path on another machine: that is recognized too.
    """
    inside = Path(name).parent.parts[-2:] == ASSETS.parts[-2:]
    end = Path(name).name if inside else name
    return str(ASSETS / end) if end in EMBEDDED else name


def local_path(name: str) -> Path:
    """The path of a model or data set if it is local. An unknown ~user is left as it is."""
    try:
        return Path(embedded(name)).expanduser()
    except RuntimeError:
        return Path(name)


def stored(name: str, directory: Path) -> str:
    """A name as the run in `directory` stores it: a relative path is relative to the run."""
    path = local_path(name)
    if path.is_absolute() or not path.exists():  # embedded, or of the hub
        return name
    return f"./{os.path.relpath(path, directory.resolve())}"


def restored(name: str, directory: Path) -> str:
    """The inverse of `stored`. Runs of earlier versions store a path as it was typed."""
    path = directory.resolve() / name
    is_relative = name.startswith(".") and (path.exists() or not Path(name).exists())
    if not (is_relative or name.startswith("./../")):  # which nobody types
        return name
    return os.path.normpath(path) if directory.is_absolute() else os.path.relpath(path)
