"""Injecting freezes exactly, counts exactly, refuses by name; unwrapping gives the model back."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

import minilora
from minilora import LoRAConfig, LoRAError, LoRALinear
from minilora.inject import lora_layers
from minilora.methods import AdaLoRAConfig, PromptConfig, adalora
from minilora.reports import fold_names
from tests.conftest import (
    ARCHITECTURES,
    State,
    adapted,
    config_for,
    equal,
    inputs,
    logits,
    randomize_adapter,
    tiny_bart,
    weights,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exactly_the_adapters_train_and_a_step_changes_nothing_else(architecture: str) -> None:
    model = ARCHITECTURES[architecture].build()
    model(**inputs(model)).logits.sum().backward()  # gradients from an earlier life
    base = weights(model)
    report = minilora.inject(model, config_for(architecture))
    randomize_adapter(model)
    expected = {f"{module}.{part}" for module in report.modules for part in ("lora_A", "lora_B")}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == expected
    assert [id(p) for p in minilora.trainable_parameters(model)] == [
        id(p) for p in model.parameters() if p.requires_grad
    ]

    before = weights(model)
    # all of the parameters: a frozen one that kept a gradient would decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.train()
    model(**inputs(model)).logits.square().mean().backward()
    optimizer.step()
    after = weights(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == expected
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded == expected
    frozen = {name.replace(".base.", "."): after[name] for name in after.keys() - expected}
    assert equal(frozen, base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_no_logit_and_a_random_one_does(architecture: str) -> None:
    model = ARCHITECTURES[architecture].build()
    base = logits(model)
    minilora.inject(model, config_for(architecture))
    assert torch.equal(logits(model), base)
    randomize_adapter(model)
    assert not torch.allclose(logits(model), base, atol=0.1)


def test_the_figures_of_bart_large_cnn() -> None:
    config = BartConfig(
        vocab_size=50_264,
        d_model=1024,
        encoder_layers=12,
        decoder_layers=12,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
    )
    with torch.device("meta"):
        model = BartForConditionalGeneration(config)
    report = minilora.inject(model, LoRAConfig(rank=8, alpha=32, targets=("q_proj", "v_proj")))
    first, *names = str(report).splitlines()
    assert first == "72 modules, 1,179,648 trainable of 407,470,080 (0.2895%)"
    assert (len(report.modules), report.trainable, report.total) == (72, 1_179_648, 407_470_080)
    assert names == [
        f"  model.{side}.layers.{{0-11}}.{attention}.{projection}"
        for side, attention in (
            ("encoder", "self_attn"),
            ("decoder", "self_attn"),
            ("decoder", "encoder_attn"),
        )
        for projection in ("v_proj", "q_proj")
    ]


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (("a.0.q", "a.1.q", "a.2.q"), ["a.{0-2}.q"]),
        (("a.0.q", "a.2.q", "a.10.q"), ["a.{0,2,10}.q"]),
        (("a.0.q", "a.1.v"), ["a.0.q", "a.1.v"]),
        (("fc1", "fc2"), ["fc{1,2}"]),
        (("q",), ["q"]),
        (("a.{x}.0",), ["a.{x}.0"]),
        ((), []),
    ],
)
def test_the_report_folds_layers(names: tuple[str, ...], lines: list[str]) -> None:
    assert fold_names(names) == lines


def test_a_report_never_names_a_module_that_was_not_adapted() -> None:
    names = ("a.0.b.0", "a.0.b.1", "a.1.b.1")  # no rectangle
    assert fold_names(names) == ["a.0.b.0", "a.{0,1}.b.1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 17}, r"rank 17 is above the smaller side of .*(q|v)_proj', 16"),
        ({"rank_pattern": {"fc1": 17}}, r"rank 17 is above the smaller side of .*fc1', 16"),
    ],
)
def test_a_rank_above_a_side_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    model = tiny_bart()
    before = State.of(model)
    with pytest.raises(LoRAError, match=message):
        minilora.inject(model, config_for(**changes))
    before.check(model)
    minilora.inject(model, config_for(rank=16))


def test_injecting_twice_is_refused_whatever_part_carries_the_adapter() -> None:
    model = adapted()
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"carries an adapter already.*unwrap"):
        minilora.inject(model, config_for())
    before.check(model)

    model = tiny_bart()
    minilora.inject(model.model.encoder, config_for())
    before = State.of(model)
    for targets in (("q_proj",), "all-linear"):
        with pytest.raises(LoRAError, match=r"carries an adapter already.*unwrap"):
            minilora.inject(model, LoRAConfig(rank=2, targets=targets))
    before.check(model)


@pytest.mark.parametrize("act", ["unwrap", "unload", "disabled", "load_adapter"])
def test_the_model_around_a_part_that_carries_the_adapter_is_refused(
    act: str, tmp_path: Path
) -> None:
    model = tiny_bart()
    minilora.inject(model.model.encoder, config_for(bias="all"))
    randomize_adapter(model)
    minilora.save_adapter(model.model.encoder, tmp_path)
    before = State.of(model)
    acts = {
        "unwrap": minilora.unwrap,
        "unload": minilora.unload,
        "disabled": lambda model: minilora.disabled(model).__enter__(),
        "load_adapter": lambda model: minilora.load_adapter(model, tmp_path),
    }
    with pytest.raises(LoRAError, match=r"^(\S+: )?model\.encoder carries the adapter, not the"):
        acts[act](model)
    before.check(model)
    minilora.unload(model.model.encoder)


@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel], ids=["compile", "parallel"])
def test_injecting_into_a_wrapper_is_refused(wrapper: type[nn.Module]) -> None:
    model = tiny_bart()
    wrapped, before = wrapper(model), State.of(model)
    with pytest.raises(LoRAError, match=r"inject before torch\.compile, Distributed"):
        minilora.inject(wrapped, config_for())
    before.check(model)


def test_what_stands_around_an_injected_model_is_seen_through() -> None:
    model = adapted()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert minilora.config_of(wrapped) == config_for()
        assert lora_layers(wrapped) == lora_layers(model)
        minilora.merge(wrapped)
        assert all(layer.merged for layer in lora_layers(model).values())
        minilora.unmerge(wrapped)
    assert minilora.unwrap(torch.compile(model)) is model


def test_a_part_that_is_compiled_before_or_after_changes_no_name_and_no_flag() -> None:
    expected = minilora.inject(tiny_bart(), config_for()).modules
    for before in (True, False):
        model = tiny_bart()
        flags = [number % 3 > 0 for number, _ in enumerate(model.parameters())]
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        if before:
            model.model.encoder = torch.compile(model.model.encoder)
        minilora.inject(model, config_for())
        if not before:
            model.model.encoder = torch.compile(model.model.encoder)
        assert tuple(lora_layers(model)) == expected
        minilora.unwrap(model)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_one_linear_under_two_names_is_wrapped_once_and_under_both() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"] = linear = model["a"]
    report = minilora.inject(model, LoRAConfig(rank=2, targets=("a", "b")))
    assert report.modules == ("a",)
    assert report.trainable == 16
    assert report.total == 16 + 2 * 20
    assert isinstance(model["a"], LoRALinear)
    assert model["a"] is model["b"]
    assert minilora.unwrap(model)["b"] is model["a"] is linear


def test_injecting_draws_the_same_numbers_for_the_same_seed() -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        model = tiny_bart()
        torch.manual_seed(seed)
        minilora.inject(model, config_for())
        return weights(model)

    assert equal(fresh(0), fresh(0))
    assert not equal(fresh(0), fresh(1))


def test_every_module_gets_its_own_rank_alpha_and_dropout() -> None:
    model = tiny_bart()
    config = config_for(
        dropout=0.25, rank_pattern={"fc1": 5}, alpha_pattern={"decoder.*v_proj": 11.0}
    )
    minilora.inject(model, config)
    for name, layer in lora_layers(model).items():
        rank = 5 if name.endswith("fc1") else config.rank
        alpha = 11.0 if "decoder" in name and name.endswith("v_proj") else config.alpha
        assert (layer.rank, layer.alpha, layer.scale) == (rank, alpha, alpha / rank)
        assert (layer.dropout, layer.lora_A.shape[0]) == (0.25, rank)


def test_training_and_evaluation_mode_stay_as_they_were() -> None:
    for model in (tiny_bart().train(), tiny_bart().eval()):
        minilora.inject(model, config_for())
        assert {module.training for module in model.modules()} == {model.training}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unwrapping_gives_back_the_modules_the_keys_and_the_flags(
    architecture: str, merged: bool
) -> None:
    model = ARCHITECTURES[architecture].build()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)  # not all of them trained before
    before, keys = State.of(model), list(model.state_dict())
    base = logits(model)
    minilora.inject(model, config_for(architecture))
    randomize_adapter(model)
    active = logits(model)
    names = set(lora_layers(model))
    if merged:
        minilora.merge(model)
    assert minilora.unwrap(model) is model
    now = State.of(model)
    assert (now.types, now.identities) == (before.types, before.identities)
    assert (now.trains, now.config) == (before.trains, None)
    assert list(model.state_dict()) == keys
    changed = {n for n, w in now.weights.items() if not torch.equal(w, before.weights[n])}
    assert changed == {f"{name}.weight" for name in names}
    assert not torch.allclose(logits(model), base, atol=0.1)
    # the merged product sums in another order: float32, as in test_merge.py
    close = 1e-3 if architecture == "t5" else 1e-4
    torch.testing.assert_close(logits(model), active, rtol=0, atol=close)
    minilora.inject(model, config_for(architecture))  # and it may be adapted again


def test_unwrapping_a_model_without_an_adapter_does_nothing() -> None:
    model = tiny_bart()
    before = State.of(model)
    assert minilora.unwrap(model) is model
    before.check(model)


def test_what_cannot_be_merged_is_not_unwrapped() -> None:
    model = adapted().half()
    with torch.no_grad():
        list(lora_layers(model).values())[-1].lora_B.fill_(60_000)
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"decoder.*fc1: W \+ s B A does not fit"):
        minilora.unwrap(model)
    before.check(model)


def test_an_unwrapped_model_is_saved_and_loaded_by_plain_transformers(tmp_path: Path) -> None:
    model = minilora.unwrap(adapted())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert equal(weights(loaded), weights(model))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_of_an_injected_model_lives_its_own_life(pickled: bool) -> None:
    model = adapted()
    twin = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
    minilora.merge(model)
    before = State.of(model)
    randomize_adapter(twin, seed=7)
    minilora.unwrap(twin)
    before.check(model)
    assert minilora.config_of(twin) is None
    assert not twin._load_state_dict_pre_hooks  # what guards a merged model is gone with it
    with pytest.raises(LoRAError, match="while merged"):
        model.load_state_dict(model.state_dict())


def test_a_seed_decides_the_start_is_recorded_and_leaves_the_random_state() -> None:
    starts = []
    for seed in (5, 5, 6):
        model = tiny_bart()
        before = torch.get_rng_state()
        report = minilora.inject(model, config_for(), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert report.seed == seed
        assert f"A starts from seed {seed}" in str(report)
        starts.append(weights(model))
    assert equal(starts[0], starts[1])
    assert not equal(starts[0], starts[2])
    torch.manual_seed(5)
    model = tiny_bart()
    torch.manual_seed(5)
    assert minilora.inject(model, config_for()).seed is None
    assert equal(weights(model), starts[0])
    for wrong in ("5", True, 2.5, 2**64):
        with pytest.raises(LoRAError, match=f"seed must be a whole number .*, not '?{wrong}'?"):
            minilora.inject(tiny_bart(), config_for(), seed=wrong)  # type: ignore[arg-type]


def test_a_seed_reaches_no_gpu_that_the_model_is_not_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a GPU's state would not be restored; before CUDA starts, the seed would wait for it."""
    model, seeded = tiny_bart(), list[int]()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    minilora.inject(model, config_for(), seed=5)
    assert not seeded
    torch.manual_seed(5)
    assert seeded == [5]  # what it would have called


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"dora": True}, {"bias": "all", "also_train": ("layernorm_embedding",)}]
)
def test_unloading_gives_the_base_back_bit_for_bit(
    changes: dict[str, object], merged: bool
) -> None:
    model = tiny_bart()
    before, base = State.of(model), logits(model)
    minilora.inject(model, config_for(**changes))
    with torch.no_grad():
        for parameter in minilora.trainable_parameters(model):
            parameter += 0.3
    assert not torch.allclose(logits(model), base, atol=0.1)
    if merged:
        minilora.merge(model)
    assert minilora.unload(model) is model
    before.check(model)
    assert torch.equal(logits(model), base)
    assert minilora.unload(model) is model  # without an adapter it does nothing
    before.check(model)


def test_a_start_that_fails_midway_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minilora.initialization import STARTS, kaiming

    model, calls = tiny_bart(), iter(range(99))
    before = State.of(model)

    def fails(*arguments: object) -> nn.Module:
        if next(calls) == 3:
            raise MemoryError
        return kaiming(*arguments)  # type: ignore[arg-type]

    monkeypatch.setitem(STARTS, "kaiming", fails)
    with pytest.raises(MemoryError):
        minilora.inject(model, config_for())
    before.check(model)


def test_an_extra_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilora.trained_whole import TrainedWhole

    model = tiny_bart()
    before = State.of(model)

    def fails(extra: TrainedWhole, model: nn.Module) -> None:
        assert lora_layers(model)  # the layers stand in their places already
        raise MemoryError

    monkeypatch.setattr(TrainedWhole, "start", fails)
    with pytest.raises(MemoryError):
        minilora.inject(model, config_for())
    before.check(model)
    assert minilora.config_of(model) is None


def test_an_extra_that_started_is_stopped_if_a_later_one_fails() -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    before = State.of(model)
    lora = AdaLoRAConfig(rank=2, target_rank=1, total_steps=3, targets=["q_proj"], token_rows=[3])
    hooks = set(adalora.FOLLOWING)
    with pytest.raises(LoRAError, match="must lie in the vocabulary"):
        minilora.inject(model, [lora, PromptConfig(length=2, tokens=[9999])])
    before.check(model)
    assert set(model.state_dict()) == set(LlamaForCausalLM(config).state_dict())
    assert not any(module._forward_hooks for module in model.modules())
    assert not model._load_state_dict_pre_hooks
    assert "save_pretrained" not in vars(model)
    assert set(adalora.FOLLOWING) == hooks
    assert minilora.inject(model, lora).modules  # and nothing hinders the next
