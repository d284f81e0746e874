"""`minilora merge`: the adapter in its base, as a checkpoint that plain transformers loads."""

import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import minilora
from minilora.config import LoRAError
from minilora.conventions import HEADS
from minilora.inject import lora_layers, merge_layers
from minilora.merge import rounding_of
from minilora.peft_format.apply import apply_adapter
from minilora.peft_format.directory import Adapter
from minilora.reports import MergeReport

from .errors import UserError
from .evaluation.generate import generate_arguments
from .flags import read_run
from .model import requirements
from .model.loading import check_complete, load_tokenizer, loading, saving
from .model.start import base_of, run_of
from .settings import RunConfig

TASK_MODELS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def write(
    out: Path, directory: Path, adapter: Adapter, model: str | None, dtype: torch.dtype | None
) -> None:
    """Merge an adapter into its base and write a checkpoint to `out`: all of it or nothing.

    Args:
        out: a directory that is new or empty.
        directory: the adapter's.
        adapter: what was read from it.
        model: the base; None: the one that the run or the adapter names.
        dtype: of the merged weights; None: the base's.

    Raises:
        LoRAError: `out` is neither new nor empty, no base is named, or the merged outputs differ.
        UserError: the base cannot be loaded.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoRAError(f"{out} exists and is not an empty directory: name another")
    base, around = base_of(directory, adapter), run_of(directory)
    try:
        run = read_run(around) if around != directory else None
    except UserError as error:
        print(f"note: {error}; the base's settings for decoding are kept", file=sys.stderr)
        run = None
    name = model or base.get("model")
    if name is None:
        raise LoRAError(f"{directory} does not name its base model: pass --model")
    # An empty directory may be a mount point or the current directory: it is filled, not replaced.
    place = out if out.exists() else out.parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=place) as folder:
        new = Path(folder) / "model"
        _write_merged(new, name, adapter, base["method"] == "qlora", dtype, run)
        if place == out:
            for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(out / path.name)  # config.json last: without it this is no model
        else:
            new.replace(out)


def _write_merged(
    new: Path,
    name: str,
    adapter: Adapter,
    four_bits: bool,
    dtype: torch.dtype | None,
    run: RunConfig | None,
) -> None:
    """Merge the adapter into its base and write a checkpoint; read it back and compare outputs.

    Args:
        new: the directory to write.
        name: the base model.
        adapter: goes into the base.
        four_bits: it was trained on a base in four bits, so it belongs to the quantized weights.
        dtype: of the weights; None: the base's.
        run: in which it was trained. The checkpoint gets its tokens and lengths for decoding.
    """
    model, stored = _load(name, adapter)
    if four_bits:
        print(minilora.quantize(model))
    print(apply_adapter(model, adapter, inference=True))
    sample = _sample(model)
    before = _outputs(model, sample) if sample else None
    dtype = dtype or stored
    if not four_bits:
        measure = partial(rounding_of, dtype=dtype)  # of the weights in the file
        print(MergeReport(tuple(merge_layers(lora_layers(model), measure))))
    minilora.unwrap(model, dequantize=four_bits)
    torch.nn.Module.to(model, dtype)
    try:
        tokenizer = load_tokenizer(name, pads=run is not None)
        tokenizer.save_pretrained(new)
    except UserError as error:
        print(f"note: no tokenizer is written beside the model: {error}", file=sys.stderr)
    else:
        if run:
            for notice in requirements.check(model, tokenizer, name):
                print(f"note: {notice}", file=sys.stderr)
            lengths = requirements.limit_lengths(run, model).generation
            model.generation_config.update(**generate_arguments(model, lengths))
    with saving():
        model.save_pretrained(new)
    written = _load(str(new))[0]  # read back from disk
    if sample and before is not None:
        apart = (_outputs(written, sample) - before).abs().max().item()
        said = "on a sample the checkpoint's outputs differ from those of base and adapter"
        print(f"{said} by at most {apart:.2g}")
        exact = dtype == torch.float32
        bound = 1e-3 * before.abs().max().item() if exact else sys.float_info.max
        if not apart <= bound:  # NaN too, where 16 bits do not hold a weight
            advice = "" if exact else "; --dtype fp32 holds larger weights"
            raise LoRAError(f"the merged outputs differ by {apart:.2g}: nothing is written{advice}")


def _load(name: str, adapter: Adapter | None = None) -> tuple[PreTrainedModel, torch.dtype]:
    """The model in float32, and the dtype of its file: sums are rounded once, by the final cast.

    An adapter may contain the head of its task, as PEFT's do; the base then needs none.
    """
    brought = adapter.extras if adapter else {}
    task = (adapter and adapter.config.task_type) or ""
    heads = {*HEADS.get(task, ())}
    # Of a head's weights (out, in) the last one has the fewest rows: one for each label.
    widths = [len(t) for key, t in brought.items() if t.dim() == 2 and heads & {*key.split(".")}]
    with loading(name) as source:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        # facebook/bart-base names BartModel, which lacks the head that is tied to the embeddings.
        has_head = bool(widths) or task == "SEQ_2_SEQ_LM"
        auto = getattr(transformers, TASK_MODELS[task]) if has_head else None
        if auto is not None and type(config) in auto._model_mapping:  # not for Whisper: it has one
            kind = auto
        config.num_labels = min(widths, default=config.num_labels)
        if kind is None:
            raise UserError(f"model {name}: config.json names no architecture of transformers")
        model, info = kind.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # to be told which they are
            output_loading_info=True,
        )
    missing = info["missing_keys"] - brought.keys()
    mismatched = [entry for entry in info["mismatched_keys"] if entry[0] not in brought]
    check_complete(name, model, {"missing_keys": missing, "mismatched_keys": mismatched})
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return model.eval(), stored


def _sample(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Inputs drawn from a fixed seed; None if no input that the model accepts is known."""
    config, draw = model.config, torch.Generator().manual_seed(0)
    try:
        vocabulary = getattr(config.get_text_config(), "vocab_size", 1)  # images have none
        ids = torch.randint(vocabulary, (1, 8), generator=draw)
        if isinstance(eos := getattr(config, "eos_token_id", None), int) and eos < vocabulary:
            ids[0, -1] = eos  # BART classifies by the last eos
        shape: tuple[int, ...] = ()
        if model.main_input_name == "pixel_values":
            shape = (config.num_channels, config.image_size, config.image_size)
        elif model.main_input_name == "input_features":  # Whisper's, 30 seconds
            shape = (config.num_mel_bins, 2 * config.max_source_positions)
        elif model.main_input_name == "input_values":  # a second of audio
            shape = (16_000,)
        inputs = {model.main_input_name: torch.randn(1, *shape, generator=draw) if shape else ids}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids.flip(1)
        _outputs(model, inputs)
    except Exception as error:  # models differ in what they raise for inputs they do not accept
        name, reason = type(model).__name__, f"{error}".partition("\n")[0]
        print(f"note: no sample input is known for {name}; outputs are not compared: {reason}")
        return None
    return inputs


def _outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits, flattened and concatenated; without a head, all its output tensors."""
    with torch.no_grad():
        found = {name: t for name, t in model(**inputs).items() if isinstance(t, torch.Tensor)}
    logits = [tensor for name, tensor in found.items() if name.endswith("logits")]
    return torch.cat([tensor.flatten().float() for tensor in logits or found.values()])
