"""Special tokens and lengths, for training and decoding alike, checked before the first step.

A summary starts from one token and ends with one. Training puts them into the targets, decoding
starts and stops there, and both take them from this file. If a checkpoint's configuration lacks a
token or names another one, it is corrected with a notice if the other files decide which is right;
otherwise the run is refused.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import minilora
from minilora import LoRALinear
from minilora.linears import is_linear
from minilora.methods import PrefixConfig, PromptConfig

from ..data.batches import IGNORED, encode, end_token, frame
from ..data.reading import Example
from ..errors import UserError
from ..settings import DataOptions, RunConfig

TOKENS = ("decoder_start_token_id", "pad_token_id", "eos_token_id", "forced_bos_token_id")
KEPT = (
    *("bos_token_id", "forced_eos_token_id"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
)
"""Entries of a checkpoint's generation config that decoding uses, besides `TOKENS`."""
FLAGS_DECIDE = {
    *("num_beams", "min_length", "max_length", "min_new_tokens", "max_new_tokens", "use_cache"),
    *("length_penalty", "early_stopping", "no_repeat_ngram_size", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "return_dict_in_generate", "transformers_version"),
    *("output_attentions", "output_hidden_states", "_from_model_config"),
}


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Put the tokens of training and decoding into the model's configuration.

    Returns:
        Notices of what was changed.

    Raises:
        UserError: the start or end token of a summary is unknown, or not in the vocabulary.
    """
    asked, notices = model.generation_config, list[str]()
    try:
        target = encode([Example("", "x", "x")], tokenizer, DataOptions())[0][0].target
        tokens = special_tokens(model, tokenizer, target)
        start, most = tokens["decoder_start_token_id"], _vocabulary(model)
        if not 0 <= start < most:
            raise UserError(f"its decoder_start_token_id is {start}, but it has {most} tokens")
    except UserError as error:
        raise UserError(f"model {name}: {error}") from None
    if not frame(tokenizer)[1]:
        end = tokenizer.convert_ids_to_tokens(end_token(tokenizer))
        notices.append(f"the tokenizer adds no end token: {end} is added to every summary")
    for key in TOKENS:
        value = tokens[key]
        if (said := getattr(asked, key)) != value:
            token = f" ({tokenizer.convert_ids_to_tokens(value)})" if value is not None else ""
            notices.append(
                f"the model's generation config has {key} {said}; training and decoding use "
                f"{value}{token} instead"
            )
        if key != "forced_bos_token_id":  # transformers 5 refuses it in config.json
            setattr(model.config, key, value)
    if tokens["suppress_tokens"] != asked.suppress_tokens:
        what = "the token that ends a summary"
        notices.append(
            f"the model's generation config has {what} in suppress_tokens; it is not suppressed"
        )
    known = FLAGS_DECIDE | tokens.keys()
    other = {key: value for key, value in asked.to_diff_dict().items() if key not in known}
    if other.pop("do_sample", False) or other:
        what = ", ".join(f"{key} {value}" for key, value in other.items()) or "sampling"
        notices.append(
            f"the model's generation config asks for {what}; this is ignored: summaries are "
            "written by beam search with --beams"
        )
    model.generation_config = GenerationConfig(**tokens)
    return notices


def special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Sequence[int]
) -> dict[str, Any]:
    """The tokens of a generation config, such that decoding agrees with the training targets.

    The checkpoint's decoding settings, such as sampling, are left out.

    Args:
        model: as loaded.
        tokenizer: the one that made the targets.
        target: token ids of any target, as `encode` makes it.

    Returns:
        Arguments for `GenerationConfig`.

    Raises:
        UserError: the start or end token of a summary is unknown.
    """
    asked, end = model.generation_config, end_token(tokenizer)
    opens = target[0] in tokenizer.all_special_ids and target[0] != end
    ends = asked.eos_token_id  # one, or a list
    tokens = {name: getattr(asked, name) for name in KEPT}
    tokens["decoder_start_token_id"] = start_token(model, torch.tensor([target]))
    tokens["pad_token_id"] = tokenizer.pad_token_id
    tokens["eos_token_id"] = ends if isinstance(ends, list) and end in ends else end
    forced = asked.forced_bos_token_id is not None and opens
    tokens["forced_bos_token_id"] = target[0] if forced else None
    if tokens["forced_eos_token_id"] is not None:
        tokens["forced_eos_token_id"] = end
    if end in (tokens["suppress_tokens"] or ()):  # no summary would ever end
        kept = [token for token in tokens["suppress_tokens"] if token != end]
        tokens["suppress_tokens"] = kept or None
    return tokens


def _vocabulary(model: PreTrainedModel) -> int:
    """The size of the decoder's vocabulary."""
    return int(model.get_decoder().get_input_embeddings().weight.shape[0])


def start_token(model: PreTrainedModel, labels: Tensor) -> int:
    """The decoder's first input token, from the configuration or from the model's own shift.

    mBART's configuration has none: it starts with the language, the last token of the labels.

    Raises:
        UserError: neither gives one.
    """
    for config in (model.config, model.generation_config):
        if isinstance(start := getattr(config, "decoder_start_token_id", None), int):
            return start
    try:
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels[:1])  # type: ignore[operator]
        return int(shifted[0, 0])
    except Exception:  # models differ in the error that they raise for a missing token
        raise UserError(
            "its config.json has no decoder_start_token_id, the token that a summary starts from: "
            "set it there (most models start from their eos or pad token, BERT from [CLS])"
        ) from None


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The labels (b, t) shifted right: the decoder reads </s> y1 y2 ... to predict y1 y2 ..."""
    start, pad = start_token(model, labels), getattr(model.config, "pad_token_id", None)
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, start if pad is None else pad)


def virtual_tokens(run: RunConfig) -> list[Any]:
    """The run's prompt or prefix as configurations of the library; [] without one."""
    options, length = run.virtual, run.virtual.virtual_tokens
    found: dict[str, Any] = {
        "prompt": PromptConfig(length),
        "prefix": PrefixConfig(length, tuple(options.prefix_places), options.prefix_hidden or None),
    }
    return [found[kind] for kind in (run.model.method, run.model.with_) if kind in found]


def _taken(run: RunConfig, model: PreTrainedModel) -> dict[str, int]:
    """The number of positions that virtual tokens occupy in the encoder and in the decoder.

    A prompt occupies the encoder's, a prefix the decoder's.
    """
    carried = minilora.config_of(model) or virtual_tokens(run)
    taken = {"encoder": 0, "decoder": 0}
    for config in carried if isinstance(carried, list) else [carried]:
        if isinstance(config, PromptConfig):
            taken["encoder"] = config.length
        if isinstance(config, PrefixConfig) and "decoder" in config.places:
            taken["decoder"] = config.length
    return taken


def limit_lengths(run: RunConfig, model: PreTrainedModel) -> RunConfig:
    """The settings with lengths limited to the model's positions.

    Raises:
        UserError: virtual tokens occupy all positions.
    """
    limited, taken = deepcopy(run), _taken(run, model)
    for options, name, side in (
        (limited.data, "max_source_length", "encoder"),
        (limited.data, "max_target_length", "decoder"),
        (limited.generation, "max_length", "decoder"),
    ):
        wanted, most = getattr(options, name), positions(model, side)
        if most is not None and most <= taken[side]:
            what = f"{taken[side]} virtual tokens take all {most} positions of the {side}"
            raise UserError(f"--virtual-tokens: {what}: use fewer")
        setattr(options, name, wanted if most is None else min(wanted, most - taken[side]))
    return limited


def cut_notice(asked: RunConfig, limited: RunConfig) -> list[str]:
    """A notice if summaries cannot be as long as requested."""
    wanted, most = asked.generation.max_length, limited.generation.max_length
    said = f"--max-length {wanted} is cut to {most}, the model's limit"
    return [said] if wanted > most else []


def positions(model: PreTrainedModel, side: str) -> int | None:
    """The most tokens that the encoder or the decoder reads; None: no limit, as in T5."""
    config = getattr(model.config, side, model.config)  # EncoderDecoderModel has two configurations
    names = (f"max_{side}_position_embeddings", "max_position_embeddings")  # LED has one per side
    found = [n for name in names if isinstance(n := getattr(config, name, None), int)]
    part = getattr(model, f"get_{side}")()
    for name, module in part.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            assert isinstance(module, nn.Embedding)
            found.append(module.num_embeddings - padding - 1)  # RoBERTa counts from padding_idx + 1
    return min(found, default=None)


def not_adapted(model: PreTrainedModel) -> list[str]:
    """A notice if no module of the encoder, or of the decoder, is adapted, as in LED by q_proj."""
    notices = []
    for side in ("encoder", "decoder"):
        part = getattr(model, f"get_{side}")()
        if not any(isinstance(module, LoRALinear) for module in part.modules()):
            linears = [name for name, m in part.named_modules() if is_linear(m)]
            names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            notices.append(
                f"nothing in the {side} is adapted: --targets names none of its linear layers, "
                f"which are {names}"
            )
    return notices
