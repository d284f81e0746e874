"""Tiny models of several architectures, random adapters, and what to compare."""

import copy
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Read when transformers is imported. The cache is empty, whatever the user's holds, and belongs to
# this process: another one of xdist has its own, a program that a test starts inherits it.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="minilora-tests-")
os.environ["HF_HUB_CACHE"] = os.environ["HF_HOME"] + "/hub"
os.environ["HF_DATASETS_CACHE"] = os.environ["HF_HOME"] + "/datasets"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import minilora

# In a background shell Ctrl-C is ignored, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the models are so small that threads only wait for each other

# The same examples every time, and no database beside the sources.
settings.register_profile("minilora", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("minilora")

# The files that take longest: two processes that begin with them end together (`make unit`).
LONGEST = (
    "lessons", "distributed", "conformance", "docs", "cli", "peft_interchange", "benchmarks",
    "training", "write_failures", "fused", "pretraining", "architecture", "faults", "four_bits",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


VOCABULARY = 40
RANK, ALPHA = 3, 7.0  # the rank unlike alpha, and a scale (7/3) that is no power of two


@pytest.fixture
def shared() -> Path:
    """The folder `shared` beside the repository, with the data sets."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"{folder / 'data'} is not there")
    return folder


def tiny_bart(seed: int = 0, **changes: object) -> BartForConditionalGeneration:
    sizes = {"d_model": 16, "max_position_embeddings": 32, "encoder_layers": 2, "init_std": 0.5}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    sizes |= {"decoder_layers": 1}
    return _build(BartForConditionalGeneration, BartConfig, seed, sizes | changes)


def tiny_t5(seed: int = 0, **changes: object) -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    sizes |= {"decoder_start_token_id": 0, "initializer_factor": 3.0}
    return _build(T5ForConditionalGeneration, T5Config, seed, sizes | changes)


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    return _build(LlamaForCausalLM, LlamaConfig, seed, sizes | changes)


def tiny_bert(seed: int = 0, **changes: object) -> BertForMaskedLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "initializer_range": 0.5}
    return _build(BertForMaskedLM, BertConfig, seed, sizes | changes)


def tiny_gpt2(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    return _build(GPT2LMHeadModel, GPT2Config, seed, sizes | changes)


def _build(
    model: type[PreTrainedModel], config: type, seed: int, sizes: dict[str, object]
) -> PreTrainedModel:
    torch.manual_seed(seed)
    return model(config(**{"vocab_size": VOCABULARY} | sizes)).eval()


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model, and which of its linears to adapt."""

    build: Callable[..., PreTrainedModel]
    targets: tuple[str, ...]


ARCHITECTURES = {
    "bart": Architecture(tiny_bart, ("q_proj", "v_proj", "fc1")),  # encoder-decoder, with biases
    "t5": Architecture(tiny_t5, ("q", "v", "wo")),  # encoder-decoder, without; looks at wo.weight
    "llama": Architecture(tiny_llama, ("q_proj", "v_proj", "down_proj")),  # decoder only
    "bert": Architecture(tiny_bert, ("query", "value", "dense")),  # encoder only
    "gpt2": Architecture(tiny_gpt2, ("c_attn", "c_fc")),  # decoder only; Conv1D: W is transposed
}


def inputs(model: nn.Module, seed: int = 2) -> dict[str, Tensor]:
    """Two rows of six token ids, with decoder ids for an encoder-decoder."""
    draw = torch.Generator().manual_seed(seed)
    names = ["input_ids"]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    return {name: torch.randint(4, VOCABULARY, (2, 6), generator=draw) for name in names}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def config_for(architecture: str = "bart", **changes: object) -> minilora.LoRAConfig:
    """The adapter that the tests use unless they say otherwise."""
    settings = {"rank": RANK, "alpha": ALPHA, "targets": ARCHITECTURES[architecture].targets}
    return minilora.LoRAConfig(**settings | changes)


def randomize_adapter(model: nn.Module, seed: int = 1) -> None:
    """Fill every lora_A and lora_B with random numbers (B starts at zero, where much is equal)."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                values = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.copy_(values / 2)


def adapted(architecture: str = "bart", **changes: object) -> PreTrainedModel:
    """A tiny model with a random adapter."""
    model = ARCHITECTURES[architecture].build()
    minilora.inject(model, config_for(architecture, **changes))
    randomize_adapter(model)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers as they are in memory now, merged or not."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether the same names hold the same dtypes and values, bit for bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@dataclass(frozen=True)
class State:
    """All there is to know of a model: a failed call must leave every bit of it."""

    types: dict[str, type]
    identities: dict[str, int]
    trains: dict[str, bool]
    weights: dict[str, Tensor]
    config: minilora.LoRAConfig | None

    @classmethod
    def of(cls, model: nn.Module) -> "State":
        return cls(
            {name: type(module) for name, module in model.named_modules()},
            {name: id(module) for name, module in model.named_modules()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            weights(model),
            copy.deepcopy(minilora.config_of(model)),
        )

    def check(self, model: nn.Module) -> None:
        now = State.of(model)
        assert (now.types, now.identities) == (self.types, self.identities)
        assert (now.trains, now.config) == (self.trains, self.config)
        assert equal(now.weights, self.weights)
