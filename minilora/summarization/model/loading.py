"""The base model and its tokenizer, from a directory or the hub."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from minilora.files import PARTIAL

from .. import hub
from ..data.batches import Encoded
from ..errors import UserError, counted, one_line
from ..files import put_directory
from ..presets import local_path
from .device import out_of_memory
from .four_bits import FourBits

ADAPTER_FILES = [
    f"{folder}{name}"
    for name in ("adapter_config.json", "adapter_model.safetensors")
    for folder in ("", "prompt/", "prefix/")
]


def is_adapter(directory: Path) -> bool:
    """Whether it holds an adapter: LoRA, a prompt or a prefix."""
    return any((directory / name).is_file() for name in ADAPTER_FILES if name.endswith(".json"))


def load_model(
    name: str, device: torch.device, four_bits: FourBits | None = None
) -> PreTrainedModel:
    """An encoder-decoder in float32, in evaluation mode. Safetensors only, never remote code.

    Args:
        name: a directory that `save_pretrained` wrote, a hub name, or pocket-bart.
        device: where to put it.
        four_bits: read the weights of its linears into four bits, all but the output head's.

    Raises:
        UserError: there is no such model, its weights are missing, incomplete or damaged, or it is
            not an encoder-decoder.
    """
    with loading(name) as source:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if not config.is_encoder_decoder:
            raise UserError(
                f"model {name}: {config.model_type} is not an encoder-decoder such as BART or T5"
            )
        _check_weights(name, Path(source))
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # check_complete names them
            output_loading_info=True,
            quantization_config=four_bits,
        )
    if four_bits and four_bits.refused:
        raise UserError(f"model {name}: {four_bits.refused[0]}")
    check_complete(name, model, info)
    assert isinstance(model, PreTrainedModel)
    instead = "free some memory, or use --device cpu"
    with out_of_memory(f"while {name} is moved to {device}", instead):
        model.eval().to(device)
    return model


def check_complete(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a model with missing weights, for which transformers would draw random ones.

    Frozen parameters may be missing: Pegasus and others compute their positions.

    Args:
        name: its name in messages.
        model: as loaded.
        info: from `from_pretrained(..., ignore_mismatched_sizes=True, output_loading_info=True)`.

    Raises:
        UserError: a weight is missing, or its shape does not agree with config.json.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        with torch.device("meta"):  # a new model of this architecture, without memory
            plain = type(model)(model.config)
        learned = {key for key, tensor in plain.named_parameters() if tensor.requires_grad}
        missing = [key for key in missing if key in learned]
    if missing:
        lack = f"{counted(len(missing), 'tensor')} ({missing[0]}, ...)"
        raise UserError(
            f"model {name}: its weights lack {lack}: the file is incomplete or belongs to another "
            "architecture"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, stored, wanted = mismatched[0]
        raise UserError(
            f"model {name}: {key} is {tuple(stored)} in the weights, but {tuple(wanted)} in "
            f"config.json ({len(mismatched)} such tensors): they belong to different models"
        )


def load_tokenizer(name: str, pads: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's directory.

    Args:
        name: of the model.
        pads: it must have a padding token.

    Raises:
        UserError: there is none.
    """
    with loading(name, "its tokenizer: ") as source:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    # Where the files are missing, transformers 5 makes a tokenizer without words.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"model {name}: there is no tokenizer: add its files (tokenizer.json, ...)")
    if pads and tokenizer.pad_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no pad token: set pad_token and save it")
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write both as a directory that `load_model`, or plain transformers, reads; atomically.

    Raises:
        OSError: it cannot be written; an older model there is unchanged.
    """
    new = directory.with_name(f".{directory.name}{PARTIAL}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with saving():
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
        put_directory(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def adapter_directory(name: str) -> Path:
    """The directory of a run or an adapter; a hub name is downloaded.

    Only the adapter's files are fetched, into huggingface_hub's cache.

    Raises:
        UserError: there is no such directory, and the hub does not have it.
    """
    path = local_path(name)
    if path.is_dir():
        return path
    # `runs/misspelt` has the form of a hub name; but there is a folder `runs` here.
    if len(path.parts) != 2 or name.startswith((".", "/", "~")) or path.parent.is_dir():
        raise UserError(f"{name}: no such directory; name a run or an adapter")
    hub.look_for_network()
    try:
        with quiet(bars=True):
            directory = Path(snapshot_download(name, allow_patterns=ADAPTER_FILES))
    except Exception as error:  # the network, the hub and its cache raise many kinds
        raise UserError(
            f"{name}: no such directory, and {hub.not_found()}: {one_line(error, name=True)}"
        ) from None
    if not is_adapter(directory):
        raise UserError(f"{name}: the hub has it, but without {ADAPTER_FILES[0]}: it is no adapter")
    return directory


def check_vocabulary(model: PreTrainedModel, encoded: Sequence[Encoded], name: str) -> None:
    """Refuse token ids that the model has no embedding for.

    The ids count, not the tokenizer's size: bart-large-cnn's tokenizer has one token more than the
    model, <mask>, which no dialogue contains.

    Raises:
        UserError: the tokenizer belongs to another model.
    """
    sides = ("encoder", [row.source for row in encoded]), ("decoder", [r.target for r in encoded])
    for side, found in sides:
        weight = getattr(model, f"get_{side}")().get_input_embeddings().weight  # (vocabulary, d)
        rows, largest = weight.shape[0], max(max(tokens) for tokens in found)
        if largest < rows:
            continue
        raise UserError(
            f"model {name}: its tokenizer has token {largest:,}, but it has only {rows:,} "
            "embeddings: the tokenizer belongs to another model"
        )


@contextmanager
def loading(name: str, what: str = "") -> Iterator[str]:
    """Where to load `name` from. Inside the block every error of transformers ends in one line."""
    source, is_local = _locate(name)
    if not is_local:
        hub.look_for_network()
    try:
        with quiet(bars=not is_local):  # the bar of a download is shown
            yield source
    except UserError:
        raise
    except Exception as error:
        where = "" if is_local else f"no such directory, and {hub.not_found()}: "
        raise UserError(f"model {name}: {what}{where}{one_line(error, name=True)}") from None


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Inside the block transformers prints no warnings, and bars only if `bars`."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def saving() -> Iterator[None]:
    """Inside the block `save_pretrained` is quiet, and raises an OSError if it cannot write."""
    try:
        with quiet():
            yield
    except SafetensorError as error:
        raise OSError(one_line(error)) from None


def _locate(name: str) -> tuple[str, bool]:
    """The directory or hub name to load from, and whether it is a directory."""
    path = local_path(name)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model {name}: the directory has no config.json; is it a model?")
        if (path / "log.jsonl").exists():
            raise UserError(
                f"model {name}: it is a run, not a model: use --adapter to continue from a run"
            )
        return str(path.resolve()), True
    if path.exists() or not re.fullmatch(hub.REPOSITORY, name):
        raise UserError(f"model {name}: no such directory; give its path with --model")
    return name, False


def _check_weights(name: str, directory: Path) -> None:
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"model {name}: the directory holds no weights (model.safetensors). A .bin file is a "
            "pickle, which can run any code when loaded: load it with transformers where you trust "
            "it, and save it again"
        )
