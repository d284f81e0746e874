"""The base model and its tokenizer, from a directory or the hub; where and how it computes."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from minilora.files import PARTIAL
from minilora.summarization.data import Encoded
from minilora.summarization.directories import put_directory
from minilora.summarization.four_bits import FourBits, forget, refusals
from minilora.summarization.presets import RunConfig, UserError, embedded, local_path


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
            no encoder-decoder.
    """
    with refusals(four_bits, name), loading(name) as source:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if not config.is_encoder_decoder:
            raise UserError(
                f"model {name}: a {config.model_type} model, which is no encoder-decoder"
            )
        _check_weights(name, Path(source))
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # to be told which they are
            output_loading_info=True,
            quantization_config=four_bits,
        )
        forget(model)
    check_complete(name, info)
    assert isinstance(model, PreTrainedModel)
    model.eval().to(device)
    return model


def check_complete(name: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers found not every weight, and so made some up.

    Args:
        name: what messages call it.
        info: from `from_pretrained(..., ignore_mismatched_sizes=True, output_loading_info=True)`.

    Raises:
        UserError: a weight is missing, or has another shape than config.json says.
    """
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model {name}: its weights lack {len(missing)} tensors ({missing[0]}, ...): "
            "they would be random; the file is incomplete or belongs to another architecture"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, stored, wanted = mismatched[0]
        raise UserError(
            f"model {name}: {key} is {tuple(stored)} in the weights, but {tuple(wanted)} by "
            f"config.json ({len(mismatched)} such tensors): the two belong to different models"
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        UserError: there is none.
    """
    with loading(name, "its tokenizer: ") as source:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    # Where the files are missing, transformers 5 makes a tokenizer that knows no word.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"model {name}: no tokenizer lies beside it, such as tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no padding token")
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write both as a directory that `load_model`, or plain transformers, reads; never half of it.

    Raises:
        OSError: it cannot be written; a model that was there before is untouched.
    """
    new = directory.with_name(f".{directory.name}{PARTIAL}")
    shutil.rmtree(new, ignore_errors=True)
    with _quiet():
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    put_directory(new, directory)


def adapter_directory(name: str) -> Path:
    """A run or adapter directory as it is; an adapter's hub name as the directory it comes to.

    Only the adapter's two files are fetched, into huggingface_hub's cache.

    Raises:
        UserError: there is no such directory, and the hub does not give it.
    """
    path = local_path(name)
    if path.is_dir():
        return path
    # `runs/misspelt` has the form of a hub name; but there is a folder `runs` here.
    if len(path.parts) != 2 or name.startswith((".", "/", "~")) or path.parent.is_dir():
        raise UserError(f"{name}: no such directory; name a run or an adapter")
    try:
        with _quiet(bars=True):
            files = ["adapter_config.json", "adapter_model.safetensors"]
            directory = Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of the network, the hub, its cache: a dozen kinds
        raise UserError(
            f"{name}: no such directory, nor does the hub give it: {_one_line(error)}"
        ) from None
    if not (directory / files[0]).is_file():
        raise UserError(f"{name}: on the hub, but without {files[0]}: it is no adapter")
    return directory


def limit_lengths(run: RunConfig, model: PreTrainedModel) -> RunConfig:
    """The same settings with lengths that the model has positions for (T5 has no such limit)."""

    def limit(side: str, wanted: int) -> int:
        config = model.config  # LED counts its two sides apart
        names = (f"max_{side}_position_embeddings", "max_position_embeddings")
        positions = [getattr(config, name, None) for name in names]
        return min([wanted, *(n for n in positions if isinstance(n, int))])

    return replace(
        run,
        data=replace(
            run.data,
            max_source_length=limit("encoder", run.data.max_source_length),
            max_target_length=limit("decoder", run.data.max_target_length),
        ),
        generation=replace(run.generation, max_length=limit("decoder", run.generation.max_length)),
    )


def check_vocabulary(model: PreTrainedModel, encoded: Sequence[Encoded], name: str) -> None:
    """Refuse token ids that the model has no embedding for.

    By the ids, not by the tokenizer's size: bart-large-cnn's tokenizer has one token, <mask>, more
    than the model, which no dialogue contains.

    Raises:
        UserError: the tokenizer belongs to another model.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Module)
    weight = embeddings.weight
    assert isinstance(weight, torch.Tensor)
    rows = weight.shape[0]  # (vocabulary, d)
    largest = max(max(*row.source, *row.target) for row in encoded)
    if largest >= rows:
        raise UserError(
            f"model {name}: its tokenizer gives token {largest:,}, but it has only {rows:,} "
            "embeddings: the tokenizer belongs to another model"
        )


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a meta tensor has no value to give
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {_one_line(error)}") from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32 throughout.

    `auto` is bf16 where the hardware multiplies it faster, fp16 on older GPUs, fp32 otherwise.
    """
    if name != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in `dtype` on the device; None: none."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _cpu_multiplies_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return multiplies_bf16_faster(flags.read_text(errors="replace"))


def multiplies_bf16_faster(cpuinfo: str) -> bool:
    """Whether the processor that /proc/cpuinfo describes gains by bf16.

    AMX does, and AMD's AVX512-BF16; Intel's AVX512-BF16 without AMX multiplies bf16 at 0.55 of
    float32's rate (docs/log.md, 2026-11-26).
    """
    return "amx_bf16" in cpuinfo or ("avx512_bf16" in cpuinfo and "AuthenticAMD" in cpuinfo)


@contextmanager
def loading(name: str, what: str = "") -> Iterator[str]:
    """Where to load `name` from; whatever transformers says about it ends in one line.

    It raises a dozen kinds of errors, of which a damaged file brings out any.
    """
    source, is_local = _locate(name)
    try:
        with _quiet(bars=not is_local):  # a download takes long enough to want its bar
            yield source
    except UserError:
        raise
    except Exception as error:
        where = "" if is_local else "no such directory, nor does the hub give it: "
        raise UserError(f"model {name}: {what}{where}{_one_line(error)}") from None


@contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """No warnings of transformers inside the block, and no bars unless they are wanted."""
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


def _locate(name: str) -> tuple[str, bool]:
    """The directory or hub name to load from, and whether it is a directory."""
    source = embedded(name)
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or not source
    path = local_path(name)
    if source and path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model {name}: the directory has no config.json; is it a model?")
        return str(path), True
    if looks_like_path or path.exists():
        raise UserError(f"model {name}: no such directory")
    return source, False


def _check_weights(name: str, directory: Path) -> None:
    if not directory.is_dir() or any(directory.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in directory.glob("*.bin"))
    hint = (
        f"; {pickles[0]} is a pickle, which can run any code when loaded: load it with "
        "transformers where you trust it, and save it again"
        if pickles
        else ""
    )
    raise UserError(f"model {name}: the directory holds no weights (model.safetensors){hint}")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
