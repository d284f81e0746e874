"""The base model and its tokenizer, from a directory or the hub; where and how it computes."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

from minilora.summarization.presets import DataOptions, UserError, embedded


def load_model(name: str, device: torch.device) -> PreTrainedModel:
    """An encoder-decoder in float32, in evaluation mode. Safetensors only, never remote code.

    Args:
        name: a directory that `save_pretrained` wrote, a hub name, or pocket-bart.
        device: where to put it.

    Raises:
        UserError: there is no such model, it lacks weights, or it is no encoder-decoder.
    """
    source = _existing(name)
    quiet = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {name}: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(quiet)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model {name}: its weights lack {len(missing)} tensors ({missing[0]}, ...): "
            "they would be random; the file is incomplete or belongs to another architecture"
        )
    assert isinstance(model, PreTrainedModel)
    model.eval().to(device)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        UserError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_existing(name))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"tokenizer of {name}: {_first_line(error)}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer of {name}: it has no padding token")
    return tokenizer


def limit_lengths(options: DataOptions, model: PreTrainedModel) -> DataOptions:
    """The same settings with lengths that the model has positions for (T5 has no such limit)."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return options
    return replace(
        options,
        max_source_length=min(options.max_source_length, positions),
        max_target_length=min(options.max_target_length, positions),
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
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {_first_line(error)}") from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32 throughout.

    `auto` is bf16 where the hardware multiplies it, fp16 on older GPUs, fp32 otherwise.
    """
    if name != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16
    return None


def _cpu_multiplies_bf16() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "AVX512" not in capability:
        return False
    text = flags.read_text(errors="replace")
    return "avx512_bf16" in text or "amx_bf16" in text


def _existing(name: str) -> str:
    """The directory or hub name to load from; a path that does not exist is said to be one."""
    source = embedded(name)
    path = Path(source)
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if not path.exists() and looks_like_path:
        raise UserError(f"model {name}: no such directory")
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"model {name}: the directory has no config.json; is it a model?")
    return source


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
