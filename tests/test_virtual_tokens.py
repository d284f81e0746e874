"""Prompt and prefix tuning: what holds for both, in every kind of model."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MBartConfig, MBartForConditionalGeneration

import minilora
from minilora import LoRAConfig, LoRAError
from minilora.methods import AdaLoRAConfig, PrefixConfig, PromptConfig, as_lora

from .conftest import (
    VOCABULARY,
    _build,
    equal,
    inputs,
    logits,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    weights,
)  # fmt: skip

# Two layers in the decoder, and unlike in number in the encoder: PEFT mixes them up.
LAYERS = {"encoder_layers": 3, "decoder_layers": 2}


def tiny_mbart(seed: int = 0, **changes: object) -> MBartForConditionalGeneration:
    sizes = {"d_model": 16, "max_position_embeddings": 32, "init_std": 0.5, "pad_token_id": 1}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    return _build(MBartForConditionalGeneration, MBartConfig, seed, sizes | LAYERS | changes)


MODELS: dict[str, Callable[..., Any]] = {
    "bart": lambda **c: tiny_bart(**LAYERS | c),
    "mbart": lambda **c: tiny_mbart(**{"decoder_start_token_id": 2} | c),
    "t5": lambda **c: tiny_t5(**{"num_layers": 3, "num_decoder_layers": 2} | c),
    "llama": lambda **c: tiny_llama(**{"pad_token_id": 0} | c),
}
PLACES = ("encoder", "decoder", "cross")
EACH = [PrefixConfig(3, place, None) for place in PLACES]
ALL = PrefixConfig(3, reparametrize=None)
MLP = PrefixConfig(3, reparametrize=5)
PROMPT = PromptConfig(3)


def cases() -> list[Any]:
    """Every model with every configuration that it takes."""
    found = []
    for name in MODELS:
        own: list[Any] = [*EACH, ALL, MLP] if name != "llama" else [
            EACH[1], PrefixConfig(3, places="decoder", reparametrize=5)
        ]  # fmt: skip
        for config in [PROMPT, *own]:
            places = "-".join(getattr(config, "places", ()))
            mlp = "-mlp" if getattr(config, "reparametrize", None) else ""
            found.append(pytest.param(name, config, id=f"{name}-{config.folder}-{places}{mlp}"))
    return found


def randomized(model: nn.Module, seed: int = 3) -> nn.Module:
    """Every parameter that trains, random: B of LoRA too, which starts at zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in minilora.trainable_parameters(model):
            values = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.copy_(values / 2)
    return model


def tuned(name: str, config: Any, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Float64: what should be equal then is, to 1e-10, and a wrong position or mask is not."""
    model = MODELS[name](**changes).to(dtype)
    minilora.inject(model, config, seed=0)
    return randomized(model)


def frozen(name: str, **changes: Any) -> Any:
    return MODELS[name](**changes).double().requires_grad_(False)


def difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "config"), cases())
def test_the_logits_change_and_disabled_and_unload_are_the_base(
    name: str, config: Any, attention: str
) -> None:
    """Each of the encoder's, the decoder's and cross-attention's prefixes by itself, too."""
    base = frozen(name)
    before = set(base.state_dict())
    base.set_attn_implementation(attention)
    plain = logits(base)
    minilora.inject(base, config, seed=0)
    model = randomized(base)
    with_tokens = logits(model)
    assert with_tokens.shape == plain.shape
    assert difference(with_tokens, plain) > 0.1
    with minilora.disabled(model):
        assert torch.equal(logits(model), plain)
        with minilora.disabled(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), with_tokens)
    minilora.unload(model)
    assert torch.equal(logits(model), plain)
    assert set(model.state_dict()) == before
    assert minilora.config_of(model) is None
    assert not any(p.requires_grad for p in model.parameters())  # as it was before


@pytest.mark.parametrize(("name", "config"), cases())
def test_sdpa_and_eager_attention_agree(name: str, config: Any) -> None:
    """In sdpa a mask may be None, and then means causal, counted from the first key."""
    model = tuned(name, config)
    found = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        found.append(logits(model))
    # Eager attention of a Llama takes its softmax in float32.
    assert difference(*found) < (1e-4 if name == "llama" else 1e-10)


class RMSNorm(nn.Module):
    """That of T5 and Llama, which take the mean square in float32 whatever the dtype."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def exact(model: nn.Module) -> Any:
    """With float64 everywhere, for finite differences."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                setattr(module, name, RMSNorm(child))
    return model


# Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), cases())
def test_gradients_equal_finite_differences(name: str, config: Any) -> None:
    """In float64: central differences with a step of 1e-6 are exact to about 1e-9 of the scale."""
    model = exact(tuned(name, config))
    data = inputs(model)
    draw = torch.Generator().manual_seed(5)
    shape = model(**data).logits.shape
    weight = torch.randn(shape, generator=draw, dtype=torch.float64)

    def loss() -> Tensor:
        return (model(**data).logits * weight).sum()

    loss().backward()
    step = 1e-6
    for parameter in minilora.trainable_parameters(model):
        assert parameter.grad is not None
        assert parameter.grad.any()
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in torch.randperm(len(flat), generator=draw)[:3].tolist():
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                with torch.no_grad():
                    values.append(float(loss()))
                flat[index] -= sign * step
            numeric = (values[0] - values[1]) / (2 * step)
            assert numeric == pytest.approx(float(gradient[index]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "config"), cases())
def test_gradient_checkpointing_gives_the_same_gradients(name: str, config: Any) -> None:
    """It takes the caches away, which is why PEFT refuses prefix tuning with it."""
    found = []
    for checkpointing in (False, True):
        model = tuned(name, config, **DROPOUT[name]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs(model)).logits.square().mean().backward()
        found.append([p.grad for p in minilora.trainable_parameters(model)])
    for left, right in zip(*found, strict=True):
        assert left is not None
        torch.testing.assert_close(left, right)


DROPOUT: dict[str, dict[str, Any]] = {
    "bart": {"dropout": 0.0}, "mbart": {"dropout": 0.0}, "t5": {"dropout_rate": 0.0}, "llama": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config"),
    [
        c
        for c in cases()
        if c.id in ("bart-prompt-", "t5-prefix-encoder-decoder-cross-mlp", "llama-prefix-decoder")
    ],
)
def test_only_the_virtual_tokens_move(name: str, config: Any) -> None:
    model = MODELS[name]()
    kept = weights(model)
    report = minilora.inject(model, [LoRAConfig(rank=2, init="random"), config], seed=0)
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.1)
    assert report.trainable == sum(p.numel() for p in minilora.trainable_parameters(model))
    assert report.total == sum(p.numel() for p in model.parameters())
    with minilora.verify_training(model, optimizer) as seen:
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs(model)).logits.square().mean().backward()
            optimizer.step()
    assert seen.problems == []
    assert min(seen.moved.values()) > 0.9
    minilora.unload(model)
    assert equal(weights(model), kept)


# Decoding ----------------------------------------------------------------------------------------


def padded(model: nn.Module, side: str = "right") -> dict[str, Tensor]:
    """Two rows, of six and of four tokens."""
    ids, mask = inputs(model)["input_ids"], torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {
        "input_ids": torch.where(mask == 1, ids, 1) if side == "right" else
        torch.where(mask.flip(1) == 1, ids.roll(2, 1), 1),
        "attention_mask": mask if side == "right" else mask.flip(1),
    }  # fmt: skip


def forced(model: Any, source: dict[str, Tensor], written: Tensor) -> Tensor:
    """The logits of each step, computed at once."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(**source, decoder_input_ids=written[:, :-1]).logits
        start = source["input_ids"].shape[1]
        new = torch.ones(2, written.shape[1] - start, dtype=torch.long)
        mask = torch.cat([source["attention_mask"], new], 1)[:, :-1]
        return model(input_ids=written[:, :-1], attention_mask=mask).logits[:, start - 1 :]


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "config"), cases())
def test_greedy_decoding_is_teacher_forcing_step_by_step(
    name: str, config: Any, attention: str, cache: bool
) -> None:
    model = tuned(name, config)
    model.set_attn_implementation(attention)
    side = "right" if model.config.is_encoder_decoder else "left"
    source = padded(model, side)
    out = model.generate(
        **source, max_new_tokens=7, min_new_tokens=7, do_sample=False, num_beams=1, use_cache=cache,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    expected = forced(model, source, out.sequences)
    # `generate` rounds the logits, of up to 30, to float32.
    assert difference(torch.stack(out.logits, 1), expected) < 1e-5


@pytest.mark.parametrize(("name", "config"), cases())
def test_the_score_of_a_beam_is_that_of_teacher_forcing(name: str, config: Any) -> None:
    """The cache is sorted anew at each step, as the beams are."""
    model = tuned(name, config)
    source = padded(model, "right" if model.config.is_encoder_decoder else "left")
    out = model.generate(
        **source, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=3,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
        forced_eos_token_id=None,
    )  # fmt: skip
    steps = forced(model, source, out.sequences).log_softmax(-1)
    eos = torch.as_tensor(model.generation_config.eos_token_id)
    steps[..., eos] = float("-inf")  # forbidden by min_new_tokens, without being left out
    chosen = out.sequences[:, -steps.shape[1] :, None]
    assert difference(steps.gather(-1, chosen).sum((1, 2)), out.sequences_scores) < 1e-5  # float32


@pytest.mark.parametrize(("name", "config"), cases())
def test_a_padded_batch_equals_single_rows(name: str, config: Any) -> None:
    """On either side; BART's positions are absolute, and padding on the left moves them."""
    model = tuned(name, config)
    encoder_decoder = model.config.is_encoder_decoder
    for side in ("right",) if "bart" in name else ("right", "left"):
        batch = padded(model, side)
        more = {"decoder_input_ids": inputs(model)["decoder_input_ids"]} if encoder_decoder else {}
        with torch.no_grad():
            together = model(**batch, **more).logits
            for row in range(2):
                kept = batch["attention_mask"][row] == 1
                ids = batch["input_ids"][row][kept][None]
                alone = model(
                    input_ids=ids, **{key: value[row : row + 1] for key, value in more.items()}
                ).logits[0]
                own = together[row] if encoder_decoder else together[row][kept]
                assert difference(own, alone) < 1e-10, side


def test_no_mask_is_a_mask_of_ones() -> None:
    for name, config in [(p.values[0], p.values[1]) for p in cases()]:
        model = tuned(name, config)
        data = inputs(model)
        ones = torch.ones_like(data["input_ids"])
        with torch.no_grad():
            given = model(**data, attention_mask=ones).logits
        assert difference(logits(model), given) < 1e-10


# In memory and on disk ---------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-lora"])
@pytest.mark.parametrize(("name", "config"), cases())
def test_saved_and_loaded_is_the_same(name: str, config: Any, beside: bool, tmp_path: Path) -> None:
    """An MLP is folded away: the file holds the prefix, and gives the same logits."""
    lora = LoRAConfig(rank=2, alpha=7)
    model = tuned(name, [lora, config] if beside else config)
    minilora.save_adapter(model, tmp_path)
    assert (tmp_path / config.folder / "adapter_config.json").exists()
    assert (tmp_path / "adapter_config.json").exists() == beside
    fresh = MODELS[name]().double()
    report = minilora.load_adapter(fresh, tmp_path)
    assert not report.swapped
    assert difference(logits(fresh), logits(model)) < 1e-10
    found = minilora.config_of(fresh)
    read = found[1] if beside else found
    assert isinstance(found, list) == beside
    assert (read.length, read.folder) == (config.length, config.folder)
    trains = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trains
    assert trains == {n for n, _ in fresh.named_parameters() if "lora_" in n or config.folder in n}
    again = minilora.load_adapter(fresh, tmp_path, inference=True)
    assert again.swapped
    assert not any(p.requires_grad for p in fresh.parameters())
    minilora.save_adapter(fresh, tmp_path / "again")
    for path in tmp_path.rglob("*.safetensors"):
        if "again" not in path.parts:
            copied = tmp_path / "again" / path.relative_to(tmp_path)
            assert equal(load_file(path), load_file(copied))
            texts = [p.parent.joinpath("adapter_config.json").read_text() for p in (path, copied)]
            assert texts[0] == texts[1]


@pytest.mark.parametrize("how", ["training", "no_grad", "frozen"])
def test_a_reparametrized_prefix_is_replaced_by_a_folded_one(how: str, tmp_path: Path) -> None:
    """The values of an MLP cannot be written to: the model is injected anew."""
    trained, model = tuned("bart", MLP), MODELS["bart"]().double()
    minilora.save_adapter(trained, tmp_path)
    expected = logits(trained)
    minilora.inject(model, MLP)
    assert difference(logits(model), expected) > 1e-3
    model.requires_grad_(how != "frozen")
    with torch.set_grad_enabled(how != "no_grad"):
        assert not minilora.load_adapter(model, tmp_path).swapped
    assert minilora.config_of(model).reparametrize is None
    assert difference(logits(model), expected) < 1e-10


@given(
    name=st.sampled_from(sorted(MODELS)),
    length=st.integers(1, 9),
    hidden=st.none() | st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layers=st.integers(1, 3),
    batch=st.integers(1, 3),
    prompt=st.booleans(),
)
def test_any_length_shape_and_dtype(
    name: str, length: int, hidden: int | None, dtype: torch.dtype, layers: int, batch: int,
    prompt: bool,
) -> None:  # fmt: skip
    places = ("decoder",) if name == "llama" else PLACES
    config = PromptConfig(length) if prompt else PrefixConfig(length, places, hidden)
    depth = {"num_hidden_layers": layers} if name == "llama" else {}
    depth = {"num_decoder_layers": layers} if name == "t5" else depth
    model = MODELS[name](**depth or {"decoder_layers": layers}).to(dtype)
    plain = model(**rows(model, batch)).logits
    report = minilora.inject(model, config, seed=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in minilora.trainable_parameters(model)} == {wide}
    out = model(**rows(model, batch)).logits
    assert (out.shape, out.dtype) == (plain.shape, plain.dtype)
    assert out.isfinite().all()
    assert not torch.equal(out, plain)
    out.float().square().mean().backward()
    assert all(p.grad is not None for p in minilora.trainable_parameters(model))
    width, d = 16, 16 if name != "llama" else 8  # keys of a Llama: one head of two
    stacks = {"encoder": 3, "decoder": layers, "cross": layers}
    if prompt:
        assert report.trainable == length * width
    elif hidden is None:
        assert report.trainable == sum(length * stacks[p] * 2 * d for p in places)


def rows(model: nn.Module, batch: int) -> dict[str, Tensor]:
    return {name: ids[:1].expand(batch, -1) for name, ids in inputs(model).items()}


def test_a_copy_of_the_model_has_hooks_of_its_own() -> None:
    for config in (PROMPT, ALL):
        model = tuned("bart", config)
        twin = copy.deepcopy(model)
        expected = logits(model)
        with torch.no_grad():
            for parameter in minilora.trainable_parameters(model):
                parameter.zero_()
        assert torch.equal(logits(twin), expected)
        assert not torch.equal(logits(model), expected)
        with minilora.disabled(twin):
            assert not torch.equal(logits(twin), expected)


def test_a_seed_gives_the_same_start_and_leaves_the_random_state_alone() -> None:
    for config in (PROMPT, ALL, MLP):
        before = torch.get_rng_state()
        models = [MODELS["bart"]() for _ in range(3)]
        torch.set_rng_state(before)
        for model, seed in zip(models, (1, 1, 2), strict=True):
            minilora.inject(model, config, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts = [
            torch.cat([p.flatten() for p in minilora.trainable_parameters(m)]) for m in models
        ]
        assert torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], starts[2])


# Beside LoRA -------------------------------------------------------------------------------------


def test_merge_merges_lora_and_says_what_stays() -> None:
    for config in (PROMPT, ALL):
        model = tuned("bart", [LoRAConfig(rank=2), config])
        expected = logits(model)
        report = minilora.merge(model)
        assert report.kept == config.folder
        assert f"the {config.folder} cannot be merged" in str(report)
        assert (
            len(report.modules) == 14
        )  # q and v of three self-, two self- and two cross-attentions
        assert difference(logits(model), expected) < 1e-10
        with pytest.raises(LoRAError, match=f"a {config.folder} cannot be merged"):
            minilora.unwrap(model)
        assert difference(logits(model), expected) < 1e-10
        with minilora.disabled(model):
            assert difference(logits(model), expected) > 0.1
        assert model.model.decoder.layers[0].self_attn.q_proj.merged
        minilora.unmerge(model)
        assert torch.equal(logits(model), expected)


def test_merge_of_a_prompt_alone_changes_nothing() -> None:
    model = tuned("bart", PROMPT)
    expected = logits(model)
    report = minilora.merge(model)
    assert str(report) == "nothing merged; the prompt cannot be merged and stays beside it"
    minilora.unmerge(model)
    assert torch.equal(logits(model), expected)


def test_all_three_together(tmp_path: Path) -> None:
    configs = [LoRAConfig(rank=2, targets=("q_proj",)), PROMPT, MLP]
    model = MODELS["bart"]().double()
    report = minilora.inject(model, configs, seed=0)
    assert "and prompt/prompt_embeddings" in str(report)
    assert "and prefix/encoder" in str(report)
    found = minilora.config_of(model)
    assert found[0] == configs[0]
    assert found[1] == PromptConfig(3, task_type="SEQ_2_SEQ_LM")
    assert found[2] == PrefixConfig(3, reparametrize=5, task_type="SEQ_2_SEQ_LM")
    randomized(model)
    minilora.save_adapter(model, tmp_path)
    fresh = MODELS["bart"]().double()
    minilora.load_adapter(fresh, tmp_path)
    assert difference(logits(fresh), logits(model)) < 1e-10
    adapter = minilora.read_adapter(tmp_path)
    minilora.write_adapter(adapter, tmp_path / "copy")
    for path in tmp_path.glob("*.json"):
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()
    with pytest.raises(LoRAError, match="cannot save inside"), minilora.disabled(model):
        minilora.save_adapter(model, tmp_path)


def test_beside_adalora_and_pissa(tmp_path: Path) -> None:
    """Both are written in other shapes than they have in memory; the prompt is not."""
    adalora = AdaLoRAConfig(rank=3, target_rank=2, total_steps=9)
    for number, lora in enumerate([adalora, LoRAConfig(rank=2, init="pissa")]):
        model = tuned("bart", [lora, PROMPT])
        folder = tmp_path / str(number)
        minilora.save_adapter(model, folder)
        adapter = as_lora(minilora.read_adapter(folder))
        minilora.write_adapter(adapter, folder / "plain")
        for path in (folder, folder / "plain"):
            fresh = MODELS["bart"]().double()
            minilora.load_adapter(fresh, path)
            assert difference(logits(fresh), logits(model)) < 1e-6  # PiSSA's W is rebuilt


def test_arithmetic_refuses_what_is_beside_lora(tmp_path: Path) -> None:
    minilora.save_adapter(tuned("bart", [LoRAConfig(rank=2), PROMPT]), tmp_path)
    adapter = minilora.read_adapter(tmp_path)
    with pytest.raises(LoRAError, match="cannot combine"):
        minilora.combine([adapter, adapter], [1, 1])


# What is refused ---------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no length": (lambda: PromptConfig(0), "length must be a whole number of at least 1, not 0"),
    "a flag for a length": (lambda: PrefixConfig(True), "length must be a whole number"),
    "too many tokens": (lambda: PromptConfig(1, (4, 5)), "2 are more than the length, 1"),
    "tokens": (lambda: PromptConfig(2, ("a",)), "tokens must be a list of whole numbers"),
    "no place": (lambda: PrefixConfig(2, ()), "places must be some of encoder, decoder, cross"),
    "a place": (lambda: PrefixConfig(2, ("heart",)), "places must be some of encoder"),
    "hidden": (lambda: PrefixConfig(2, reparametrize=0), "reparametrize must be a whole number"),
    "two of a kind": (lambda: inject("bart", [PROMPT, PROMPT]), "a list with one of each at most"),
    "none": (lambda: inject("bart", []), "config must be a LoRAConfig, a PromptConfig"),
    "no configuration": (lambda: inject("bart", "prompt"), "not 'prompt'"),
    "no such token": (lambda: inject("bart", PromptConfig(2, (VOCABULARY,))), "0 to 39"),
    "no encoder": (lambda: inject("llama", ALL), "'encoder': LlamaForCausalLM has no such"),
    "GPT-2": (lambda: minilora.inject(tiny_gpt2(), PROMPT), "BART, mBART, T5 or Llama, not GPT2"),
    "BERT": (lambda: minilora.inject(tiny_bert(), ALL), "BART, mBART, T5 or Llama, not Bert"),
    "a module": (lambda: minilora.inject(nn.Linear(2, 2), ALL), "or Llama, not Linear"),
    "an encoder alone": (
        lambda: minilora.inject(MODELS["t5"]().encoder, PROMPT), "or Llama, not T5Stack"
    ),
    "flash": (lambda: inject("bart", ALL, "flex_attention"), "'eager' or 'sdpa'"),
}  # fmt: skip


def inject(name: str, config: Any, attention: str = "sdpa") -> None:
    model = MODELS[name]()
    model.config._attn_implementation = attention
    state = weights(model)
    try:
        minilora.inject(model, config)
    except LoRAError:
        assert equal(weights(model), state)
        assert minilora.config_of(model) is None
        raise


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(case: str) -> None:
    call, words = WRONG[case]
    with pytest.raises(LoRAError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_second_injection_is_refused() -> None:
    model = tuned("bart", PROMPT)
    with pytest.raises(LoRAError, match="carries an adapter already"):
        minilora.inject(model, LoRAConfig(rank=2))


def test_an_input_that_leaves_no_position_for_the_prompt_is_refused() -> None:
    model = tuned("bart", PROMPT)  # 32 positions
    long = {name: ids.repeat(1, 5) for name, ids in inputs(model).items()}  # 30 tokens
    with pytest.raises(LoRAError, match="3 virtual tokens and 30 tokens are more than the model's"):
        model(**long)


def test_a_prompt_needs_a_mask_of_two_dimensions() -> None:
    model = tuned("llama", PROMPT)
    with pytest.raises(LoRAError, match="attention_mask of shape"):
        model(**inputs(model), attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    "first", [LoRAConfig(rank=2), PROMPT, ALL], ids=["lora", "prompt", "prefix"]
)
def test_a_directory_with_an_adapter_of_other_parts_is_not_written_to(
    first: Any, tmp_path: Path
) -> None:
    """Else the next reader would find both."""
    minilora.save_adapter(tuned("bart", first), tmp_path)
    other = PROMPT if first is not PROMPT else ALL
    with pytest.raises(LoRAError, match="holds another adapter: remove it first"):
        minilora.save_adapter(tuned("bart", other), tmp_path)
    minilora.save_adapter(tuned("bart", first), tmp_path)


def test_half_of_an_adapter_is_not_read_as_the_other_half(tmp_path: Path) -> None:
    """While a prompt and LoRA are written, adapter_config.json of LoRA is away."""
    minilora.save_adapter(tuned("bart", [LoRAConfig(rank=2), PROMPT]), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(LoRAError, match=r"adapter_config\.json: no such file"):
        minilora.load_adapter(MODELS["bart"](), tmp_path)


def test_parts_of_different_models_are_not_read_as_one_adapter(tmp_path: Path) -> None:
    minilora.save_adapter(tuned("bart", [LoRAConfig(rank=2), PROMPT]), tmp_path)
    adapter = replace(minilora.read_adapter(tmp_path), base_model="one")
    minilora.write_adapter(adapter, tmp_path)
    path = tmp_path / "prompt" / "adapter_config.json"
    for name in ("one", None):  # one part may leave it out
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name})
        )
        assert minilora.read_adapter(tmp_path).base_model == "one"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "two"}))
    with pytest.raises(LoRAError, match=r"its parts name different base models: \['one', 'two'\]"):
        minilora.load_adapter(MODELS["bart"](), tmp_path)


def broken(tmp_path: Path, config: Any, entries: dict[str, Any], **tensors: Any) -> Path:
    """The files of a prompt or prefix, with other entries or tensors (None takes one away)."""
    minilora.save_adapter(tuned("bart", config), tmp_path)
    folder = tmp_path / config.folder
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    held = load_file(folder / "adapter_model.safetensors") | tensors
    save_file(
        {k: t for k, t in held.items() if t is not None}, folder / "adapter_model.safetensors"
    )
    return tmp_path


BROKEN: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "modules_to_save": (PROMPT, {"modules_to_save": ["fc1"]}, {}, "modules_to_save is"),
    "no length": (PROMPT, {"num_virtual_tokens": None}, {}, "num_virtual_tokens must be"),
    "another length": (PROMPT, {"num_virtual_tokens": 4}, {}, r"not floating point of shape \(4"),
    "another width": (ALL, {"token_dim": 6}, {}, "the tensors are wrong"),
    "odd heads": (ALL, {"num_attention_heads": 3}, {}, "no multiple of num_attention_heads 3"),
    "a missing place": (ALL, {}, {"cross": None}, "missing key cross"),
    "an unexpected key": (PROMPT, {}, {"more": torch.ones(2)}, "unexpected key more"),
    "not finite": (PROMPT, {}, {"prompt_embeddings": torch.full((3, 16), torch.nan)}, "not finite"),
    "another type": (PROMPT, {"peft_type": "P_TUNING"}, {}, "peft_type is 'P_TUNING'"),
    "a place": (ALL, {"places": ["heart"]}, {}, "places must be some of"),
    "a number": (ALL, {"places": 5}, {}, "places must be a string or a sequence of strings, not 5"),
    "null": (ALL, {"places": None}, {}, "places must be a string or a sequence of strings, not N"),
    "a list": (ALL, {"places": [[1]]}, {}, "places must be a string or a sequence of strings"),
    "no submodules": (PROMPT, {"num_transformer_submodules": 3}, {}, "must be 1 or 2, not 3"),
    "a word": (PROMPT, {"num_transformer_submodules": "2"}, {}, "must be 1 or 2, not '2'"),
    # An empty entry means PEFT's default, two for an encoder-decoder: twice the rows.
    "empty": (PROMPT, {"num_transformer_submodules": ""}, {}, r"not floating point of shape \(6"),
    "an empty list": (PROMPT, {"num_transformer_submodules": []}, {}, r"of shape \(6"),
    "true": (PROMPT, {"num_virtual_tokens": True}, {}, "num_virtual_tokens must be a whole"),
    "too few layers": (ALL, {}, {"cross": torch.ones(3, 32)}, "prefix/cross is a"),
    "width of another model": (
        PROMPT, {"token_dim": 8}, {"prompt_embeddings": torch.ones(3, 8)}, "does not fit the model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit_is_refused_and_the_model_untouched(
    case: str, tmp_path: Path
) -> None:
    config, entries, tensors, words = BROKEN[case]
    model = MODELS["bart"]()
    state = weights(model)
    with pytest.raises(LoRAError, match=words) as error:
        minilora.load_adapter(model, broken(tmp_path, config, entries, **tensors))
    assert "\n" not in str(error.value)
    assert equal(weights(model), state)
    assert minilora.config_of(model) is None
