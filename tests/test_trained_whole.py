"""Biases and whole modules that train in place: the base is kept, and comes back bit for bit."""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import minilora
from minilora import LoRAConfig, LoRAError, trained_whole
from minilora.peft_format.apply import adapter_of
from minilora.peft_format.keys import WEIGHTS_FILE
from tests.conftest import (
    State,
    equal,
    inputs,
    logits,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_t5,
    weights,
)
from tests.test_peft_interchange import perturb, tiny_classifier

QV = ("q_proj", "v_proj")
SETTINGS = {
    "biases of the adapted": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "a bias of B": {"lora_bias": True},
    "both": {"bias": "all", "lora_bias": True},
    "a whole module": {"also_train": ("layernorm_embedding",)},
    "everything": {"bias": "all", "also_train": ("fc1", "layernorm_embedding"), "dora": True},
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def settings(request: pytest.FixtureRequest) -> dict[str, object]:
    return request.param


def config(**changes: object) -> LoRAConfig:
    return LoRAConfig(**{"rank": 3, "alpha": 7.0, "targets": QV} | changes)


def trained(seed: int = 3, model: PreTrainedModel | None = None, **changes: object):
    model = model or tiny_bart()
    minilora.inject(model, config(**changes))
    perturb(model, seed)
    return model


def test_only_what_was_asked_for_trains() -> None:
    for changes, expected in [
        ({"bias": "lora_only"}, {"q_proj.base.bias", "v_proj.base.bias"}),
        ({"also_train": ("fc1",)}, {"fc1.weight", "fc1.bias"}),
        ({"lora_bias": True}, {"q_proj.lora_bias", "v_proj.lora_bias"}),
    ]:
        model = trained(**changes)
        trains = {
            ".".join(n.split(".")[-3:]) for n, p in model.named_parameters() if p.requires_grad
        }
        ends = {name.split(".", 1)[1] if name[0].isdigit() else name for name in trains}
        ends = {name.removeprefix("self_attn.").removeprefix("encoder_attn.") for name in ends}
        factors = {f"{name}.lora_{factor}" for name in QV for factor in "AB"}
        assert ends == expected | factors
    model = trained(bias="all")
    assert all(p.requires_grad for n, p in model.named_parameters() if n.endswith(".bias"))
    assert model.final_logits_bias.requires_grad is False  # a buffer, and not called bias


def test_the_report_counts_and_names_them() -> None:
    report = minilora.inject(tiny_bart(), config(also_train=("layernorm_embedding",)))
    assert report.also == tuple(
        f"model.{side}.layernorm_embedding.{end}"
        for side in ("encoder", "decoder")
        for end in ("weight", "bias")
    )
    pairs = len(report.modules) * 3 * (16 + 16)
    assert report.trainable == pairs + 4 * 16
    assert "and model.encoder.layernorm_embedding.weight" in str(report)


def test_disabled_is_the_base_bit_for_bit(settings: dict[str, object]) -> None:
    base = logits(tiny_bart())
    model = trained(**settings)
    expected, before = logits(model), weights(model)
    assert (expected - base).abs().max() > 0.1
    with minilora.disabled(model):
        assert torch.equal(logits(model), base)
        with minilora.disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    assert equal(weights(model), before)
    minilora.merge(model)
    merged = weights(model)
    with contextlib.suppress(ZeroDivisionError), minilora.disabled(model):
        assert torch.equal(logits(model), base)
        raise ZeroDivisionError
    assert equal(weights(model), merged)
    minilora.unmerge(model)
    assert equal(weights(model), before)


def test_merging_changes_no_logits_and_unmerging_is_exact(settings: dict[str, object]) -> None:
    model = trained(**settings)
    expected, before = logits(model), weights(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    minilora.merge(model)
    # float32 rounds the merged weights: 1.3e-5 of logits of 6
    assert (logits(model) - expected).abs().max() < 1e-4
    assert not equal(weights(model), before)
    assert equal(model.state_dict(), state)  # a checkpoint holds the unmerged values
    minilora.unmerge(model)
    assert equal(weights(model), before)


def test_unwrap_keeps_what_was_trained(settings: dict[str, object]) -> None:
    base, model = tiny_bart(), trained(**settings)
    expected = logits(model)
    adapter = adapter_of(model)
    plain = minilora.unwrap(model)
    assert (logits(plain) - expected).abs().max() < 1e-4  # as after a merge
    assert plain.state_dict().keys() == base.state_dict().keys()
    for name, tensor in adapter.extras.items():
        if not settings.get("lora_bias"):  # there c is added on top
            key = name.replace(".base_layer.", ".")
            assert torch.equal(plain.state_dict()[key], tensor)
    assert all(
        (p.requires_grad, type(p)) == (q.requires_grad, type(q))
        for p, q in zip(plain.parameters(), base.parameters(), strict=True)
    )


def test_replacing_an_adapter_brings_the_base_back(
    settings: dict[str, object], tmp_path: Path
) -> None:
    minilora.save_adapter(trained(**settings), tmp_path / "with")
    minilora.save_adapter(trained(4, targets=("k_proj",)), tmp_path / "without")
    alone = tiny_bart()
    minilora.load_adapter(alone, tmp_path / "without")
    model = tiny_bart()
    minilora.load_adapter(model, tmp_path / "with")
    first = logits(model)
    assert not minilora.load_adapter(model, tmp_path / "without").swapped
    assert torch.equal(logits(model), logits(alone))
    assert not minilora.load_adapter(model, tmp_path / "with").swapped
    assert torch.equal(logits(model), first)
    with minilora.disabled(model):
        assert torch.equal(logits(model), logits(tiny_bart()))


def test_the_same_kind_is_swapped_in_place(settings: dict[str, object], tmp_path: Path) -> None:
    for seed in (3, 4):
        minilora.save_adapter(trained(seed, **settings), tmp_path / str(seed))
    model = tiny_bart()
    minilora.load_adapter(model, tmp_path / "3")
    modules = [id(module) for module in model.modules()]
    first = logits(model)
    assert minilora.load_adapter(model, tmp_path / "4").swapped
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), logits(trained(4, **settings)))
    assert minilora.load_adapter(model, tmp_path / "3").swapped
    assert torch.equal(logits(model), first)
    with minilora.disabled(model):
        assert torch.equal(logits(model), logits(tiny_bart()))


def test_inference_freezes_and_training_thaws(settings: dict[str, object], tmp_path: Path) -> None:
    model = trained(**settings)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    minilora.save_adapter(model, tmp_path)
    model = tiny_bart()
    minilora.load_adapter(model, tmp_path, inference=True)
    assert not any(p.requires_grad for p in model.parameters())
    minilora.load_adapter(model, tmp_path)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_they_follow_the_model_and_its_copies(settings: dict[str, object]) -> None:
    model = trained(**settings)
    base = logits(tiny_bart())
    again = copy.deepcopy(model)
    perturb(again, 9)
    for which in (model, again):
        with minilora.disabled(which):
            assert torch.equal(logits(which), base)
    half, plain = model.to(torch.bfloat16), tiny_bart().to(torch.bfloat16)
    with minilora.disabled(half):
        assert torch.equal(logits(half), logits(plain))
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


HALF = {
    "a whole module": ({"also_train": ("classifier",)}, "classifier.weight"),
    "the head of a task": ({"task_type": "SEQ_CLS"}, "classifier.weight"),
    "biases": ({"bias": "all"}, "q_proj.bias"),
}


def two(dtype: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(0)
    model = {"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8), "classifier": nn.Linear(8, 4)}
    return nn.ModuleDict(model).to(dtype)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_would_train_in_half_precision_is_refused_and_trains_in_float32(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A step of 1e-4 moves few entries of a bfloat16 weight: the others round back."""
    settings, first = HALF[name]
    model = two(dtype)
    with pytest.raises(LoRAError, match=rf"{first} cannot train: in {dtype} .* call \.float\(\)"):
        minilora.inject(model, config(**settings))
    assert minilora.config_of(model) is None
    wide = two(torch.float32)
    minilora.inject(wide, config(**settings))
    minilora.save_adapter(wide, tmp_path)
    with pytest.raises(LoRAError, match=rf"{first} cannot train: in {dtype}"):
        minilora.load_adapter(model, tmp_path)
    assert minilora.config_of(model) is None
    minilora.load_adapter(model, tmp_path, inference=True)  # to merge it
    minilora.unload(model)
    minilora.inject(model, config())  # A and B alone are float32 anyhow
    minilora.unload(model)
    for part in model.values() if "bias" in settings else [model["classifier"]]:
        part.float()
    minilora.inject(model, config(**settings))
    assert {p.dtype for p in minilora.trainable_parameters(model)} == {torch.float32}
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=1e-4)
    x = torch.randn(5, 8, generator=torch.manual_seed(1)).to(model["q_proj"].weight.dtype)
    with minilora.verify_training(model, optimizer) as report:
        for _ in range(3):
            with torch.autocast("cpu", dtype):
                y = model["classifier"](model["q_proj"](x) + model["v_proj"](x))
            y.float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert min(report.moved.values()) > 0.9


def test_a_file_is_read_into_a_half_precision_base(tmp_path: Path) -> None:
    """To merge or to evaluate: what a file holds is not refused."""
    model = two(torch.float32)
    minilora.inject(model, config(also_train=("classifier",), bias="all"))
    perturb(model)
    minilora.save_adapter(model, tmp_path)
    half = two(torch.bfloat16)
    minilora.load_adapter(half, tmp_path, inference=True)
    assert torch.equal(half["classifier"].weight, model["classifier"].weight.bfloat16())


def test_autocast_remembers_nothing_of_what_was_exchanged(settings: dict[str, object]) -> None:
    base, model = tiny_bart(), trained(**settings)
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(**inputs(base)).logits.detach()
        first = model(**inputs(model)).logits.detach()
        with minilora.disabled(model):
            assert torch.equal(model(**inputs(model)).logits, expected)
        assert torch.equal(model(**inputs(model)).logits, first)


def test_a_part_may_be_compiled(settings: dict[str, object], tmp_path: Path) -> None:
    """Names never carry `_orig_mod`, whether it was compiled before or after."""
    expected = trained(**settings)
    minilora.save_adapter(expected, tmp_path / "expected")
    after = trained(**settings)
    after.model.encoder = torch.compile(after.model.encoder, backend="eager")
    before = tiny_bart()
    before.model.encoder = torch.compile(before.model.encoder, backend="eager")
    minilora.load_adapter(before, tmp_path / "expected")
    for model in (before, after):
        minilora.save_adapter(model, tmp_path / "again")
        again, first = (
            (tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("again", "expected")
        )
        assert again == first
        trains = {
            n.replace("_orig_mod.", "") for n, p in model.named_parameters() if p.requires_grad
        }
        assert trains == {n for n, p in expected.named_parameters() if p.requires_grad}
        with minilora.disabled(model):
            plain = trained_whole.tensors(model)
            for key, tensor in tiny_bart().state_dict().items():
                for name in (key, key.replace("proj.", "proj.base.")):
                    if name in plain:
                        assert torch.equal(plain[name], tensor), name


def test_gradients_survive_a_disabled_block() -> None:
    """A loss may be computed before and its gradient after the base was asked for an answer."""
    model = trained(bias="all", also_train=("fc1",))
    alike = copy.deepcopy(model)
    loss = model(**inputs(model)).logits.square().sum()
    with minilora.disabled(model):
        logits(model)
    loss.backward()
    alike(**inputs(alike)).logits.square().sum().backward()
    for (name, left), right in zip(model.named_parameters(), alike.parameters(), strict=True):
        if left.requires_grad:
            assert torch.equal(left.grad, right.grad), name


def test_saving_and_loading_inside_disabled_are_refused(tmp_path: Path) -> None:
    model = trained(bias="all")
    minilora.save_adapter(model, tmp_path)
    with minilora.disabled(model):
        with pytest.raises(LoRAError, match="save after it"):
            minilora.save_adapter(model, tmp_path)
        with pytest.raises(LoRAError, match="inside"):
            minilora.load_adapter(model, tmp_path)


def test_buffers_of_a_trained_module_go_with_it(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    x = torch.randn(8, 6)
    model = Net()
    settings = LoRAConfig(rank=2, alpha=3.0, targets=("linear",), also_train=("norm",))
    minilora.inject(model, settings)
    for _ in range(3):
        model(x)  # moves running_mean and num_batches_tracked
    perturb(model)
    minilora.save_adapter(model, tmp_path)
    assert load_file(tmp_path / WEIGHTS_FILE)["base_model.model.norm.num_batches_tracked"] == 3
    again = Net()
    minilora.load_adapter(again, tmp_path, inference=True)
    assert torch.equal(again.eval()(x), model.eval()(x))
    with minilora.disabled(again):
        assert torch.equal(again(x), Net().eval()(x))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (tiny_bart, "lm_head"),
        (tiny_bart, "shared"),
        (tiny_bart, "model"),
        (tiny_t5, "lm_head"),
        (tiny_gpt2, "wte"),
        (tiny_bert, "decoder"),
    ],
)
def test_tied_modules_are_refused_with_the_reason(build: object, name: str) -> None:
    model = build()
    targets = next(
        names for names in (("q_proj",), ("q",), ("c_attn",), ("query",))
        if any(module.endswith("." + names[0]) for module, _ in model.named_modules())
    )  # fmt: skip
    if name == "model":
        targets = ("lm_head",)
    state = State.of(model)
    with pytest.raises(LoRAError, match=r"same parameter|shares its weight"):
        minilora.inject(model, LoRAConfig(rank=2, targets=targets, also_train=(name,)))
    state.check(model)


def test_names_that_match_nothing_are_refused_when_injecting() -> None:
    model = tiny_classifier()
    with pytest.raises(LoRAError, match=r"also_train: 'clasifier'.*nearest: classifier"):
        minilora.inject(model, config(targets=("query",), also_train=("clasifier",)))


def test_a_name_that_matches_nothing_is_fine_in_a_file(tmp_path: Path) -> None:
    """PEFT adds "classifier" and "score" to every sequence classifier's file."""
    model = trained(model=tiny_classifier(), targets=("query",), also_train=("classifier",))
    minilora.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"classifier"', '"classifier", "score"'))
    again = tiny_classifier()
    minilora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_every_missing_unexpected_and_mis_shaped_key_is_named(tmp_path: Path) -> None:
    minilora.save_adapter(trained(bias="all", also_train=("fc1",)), tmp_path)
    path = tmp_path / WEIGHTS_FILE
    tensors = load_file(path)
    stem = "base_model.model.model.encoder.layers.0."
    for change, message in [
        ({stem + "fc1.weight": None}, "missing key .*fc1.weight"),
        ({stem + "fc2.bias": None}, "missing key .*fc2.bias"),
        ({stem + "self_attn.q_proj.base_layer.bias": None}, "missing key .*q_proj.base_layer.bias"),
        ({stem + "fc9.bias": torch.zeros(2)}, "unexpected key .*fc9.bias"),
        ({stem + "fc1.extra": torch.zeros(2)}, "unexpected key .*fc1.extra"),
        ({stem + "fc2.weight": torch.zeros(2)}, "unexpected key .*fc2.weight"),
        (
            {stem + "fc1.weight": torch.zeros(2, 2)},
            r"fc1.weight is .* \(2, 2\), not .* \(24, 16\)",
        ),
        ({stem + "fc1.bias": torch.zeros(24).int()}, "fc1.bias is a torch.int32"),
        ({stem + "fc1.bias": torch.full((24,), torch.nan)}, "not finite"),
    ]:
        changed = {key: t for key, t in (tensors | change).items() if t is not None}
        save_file(changed, path)
        model = tiny_bart()
        state = State.of(model)
        with pytest.raises(LoRAError, match=message):
            minilora.load_adapter(model, tmp_path)
        state.check(model)


def test_a_bias_of_b_cannot_be_merged_without_one_in_the_base() -> None:
    model = trained(model=tiny_t5(), targets=("q",), lora_bias=True)
    before = weights(model)
    with pytest.raises(LoRAError, match="lora_bias needs a bias in the base"):
        minilora.merge(model)
    assert equal(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_bias_is_rounded_once_and_comes_back(dtype: torch.dtype) -> None:
    model = trained(model=tiny_bart().to(dtype), lora_bias=True)
    layer = model.model.encoder.layers[0].self_attn.q_proj
    before = layer.base.bias.detach().clone()
    minilora.merge(model)
    expected = (before.float() + 7 / 3 * layer.lora_bias.detach()).to(dtype)
    assert torch.equal(layer.base.bias, expected)
    assert not torch.equal(layer.base.bias, before)
    minilora.unmerge(model)
    assert torch.equal(layer.base.bias, before)


class Projections(nn.Module):
    """A module called `proj` beside others whose names end in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj, self.proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.q_proj(x) + self.v_proj(x))


def test_an_entry_of_also_train_is_a_name_and_not_the_end_of_a_word(tmp_path: Path) -> None:
    settings = LoRAConfig(rank=2, alpha=3.0, targets=QV, also_train=("proj",))
    model, x = Projections(), torch.randn(4, 6)
    report = minilora.inject(model, settings)
    assert report.modules == QV
    assert report.also == ("proj.weight", "proj.bias")
    perturb(model)
    minilora.save_adapter(model, tmp_path)
    again = Projections()
    minilora.load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))
    assert not torch.allclose(model(x), Projections()(x), atol=0.1)
    with pytest.raises(LoRAError, match=r"also_train: 'proj': nothing matches it.*nearest"):
        minilora.inject(tiny_bart(), config(also_train=("proj",)))


def test_a_file_is_read_by_pefts_rule_where_any_end_of_a_name_counts(tmp_path: Path) -> None:
    import peft

    wanted = peft.LoraConfig(r=2, target_modules=list(QV), modules_to_save=["embedding"])
    theirs = peft.get_peft_model(tiny_bart(), wanted)
    perturb(theirs)
    theirs.eval().save_pretrained(tmp_path / "peft")
    ours = tiny_bart()
    minilora.load_adapter(ours, tmp_path / "peft", inference=True)
    # 2e-5 of logits of order 10: float32 sums in another order through few layers
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-4)
    assert not torch.allclose(logits(ours), logits(tiny_bart()), atol=0.1)
    minilora.save_adapter(ours, tmp_path / "again")
    held, again = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("peft", "again"))
    assert equal(held, again)
    also = minilora.config_of(ours).also_train
    assert also == ("model.encoder.layernorm_embedding", "model.decoder.layernorm_embedding")


def test_what_peft_would_read_as_more_is_written_by_full_names(tmp_path: Path) -> None:
    from tests.conftest import tiny_llama

    model = tiny_llama()
    minilora.inject(model, config(also_train=("norm",)))  # not input_layernorm
    perturb(model)
    minilora.save_adapter(model, tmp_path)
    assert minilora.read_adapter(tmp_path).config.also_train == ("model.norm",)
    again = tiny_llama()
    minilora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
