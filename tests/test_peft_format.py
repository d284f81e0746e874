"""An adapter directory: read strictly, applied whole or not at all, written reproducibly."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

import minilora
from minilora import Adapter, LoRAConfig, LoRAError
from minilora.inject import lora_layers
from minilora.peft_format import directory as reading
from tests.conftest import (
    ARCHITECTURES,
    RANK,
    State,
    adapted,
    config_for,
    equal,
    inputs,
    logits,
    randomize_adapter,
    tiny_bart,
    tiny_llama,
    weights,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FC1 = "base_model.model.model.encoder.layers.0.fc1"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with the adapter of a tiny BART."""
    minilora.save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(
    directory: Path,
    tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    **entries: object,
) -> None:
    """Change the files of an adapter."""
    values = safetensors.torch.load_file(directory / WEIGHTS)
    tensors(values)
    safetensors.torch.save_file(values, directory / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | entries))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_saved_is_loaded_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    model = adapted(architecture, dropout=0.25)
    minilora.save_adapter(model, tmp_path)
    fresh = ARCHITECTURES[architecture].build()
    base = logits(fresh)
    report = minilora.load_adapter(fresh, str(tmp_path))
    assert report.modules == tuple(lora_layers(model))
    assert not report.swapped
    assert str(report) == f"{len(report.modules)} modules loaded"
    assert minilora.config_of(fresh) == minilora.config_of(model)
    assert equal(weights(fresh), weights(model))
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.allclose(logits(fresh), base, atol=0.1)
    trains = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trains == {n for n in weights(fresh) if n.endswith(("lora_A", "lora_B"))}


def test_the_files_are_those_of_peft(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    entries = json.loads((saved / CONFIG).read_text())
    assert entries["peft_type"] == "LORA"
    assert (entries["r"], entries["lora_alpha"]) == (3, 7)
    assert entries["target_modules"] == ["q_proj", "v_proj", "fc1"]
    with safetensors.safe_open(saved / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: file.get_tensor(key).shape for key in file.keys()}  # noqa: SIM118
    assert len(shapes) == 2 * len(lora_layers(adapted()))
    assert shapes[f"{FC1}.lora_A.weight"] == (RANK, 16)
    assert shapes[f"{FC1}.lora_B.weight"] == (24, RANK)


def test_equal_tensors_give_equal_bytes(saved: Path, tmp_path: Path) -> None:
    adapter = minilora.read_adapter(saved)
    shuffled = {key: tensor.T.contiguous().T for key, tensor in reversed(adapter.tensors.items())}
    minilora.write_adapter(Adapter(adapter.config, shuffled), tmp_path / "again")
    minilora.save_adapter(adapted(), tmp_path / "merged")
    for directory in (tmp_path / "again", tmp_path / "merged"):
        for name in (WEIGHTS, CONFIG):
            assert (directory / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("state", ["merged", "disabled", "training", "half of it merged"])
def test_the_state_of_the_model_does_not_show_in_the_files(
    saved: Path, tmp_path: Path, state: str
) -> None:
    model = adapted()
    if state == "merged":
        minilora.merge(model)
    if state == "half of it merged":
        next(iter(lora_layers(model).values())).merge()
    if state == "disabled":
        with minilora.disabled(model):
            minilora.save_adapter(model, tmp_path / "again")
    else:
        minilora.save_adapter(model.train(state == "training"), tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@contextmanager
def distributed(model: nn.Module) -> Iterator[nn.Module]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


@contextmanager
def parallel(model: nn.Module) -> Iterator[nn.Module]:
    yield nn.DataParallel(model)


@contextmanager
def compiled(model: nn.Module) -> Iterator[nn.Module]:
    yield torch.compile(nn.DataParallel(model))


@contextmanager
def compiled_in_part(model: nn.Module) -> Iterator[nn.Module]:
    model.model.encoder = torch.compile(model.model.encoder)
    yield model


@pytest.mark.parametrize("wrapper", [distributed, parallel, compiled, compiled_in_part])
def test_no_wrapper_shows_in_the_keys_and_wrapped_models_load(
    saved: Path, tmp_path: Path, wrapper: Callable[[nn.Module], Any]
) -> None:
    model = adapted()
    with wrapper(model) as wrapped:
        minilora.save_adapter(wrapped, tmp_path / "again")
        for name in (WEIGHTS, CONFIG):
            assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
        before = weights(model)
        randomize_adapter(model, seed=9)
        assert not equal(weights(model), before)
        assert minilora.load_adapter(wrapped, saved).swapped
        assert equal(weights(model), before)


def test_loading_over_an_adapter_of_the_same_shapes_keeps_every_module_and_parameter(
    saved: Path,
) -> None:
    edit(saved, lora_alpha=5, lora_dropout=0.5, r=RANK)
    model = adapted()
    randomize_adapter(model, seed=9)
    parameters = [id(parameter) for parameter in model.parameters()]
    modules = [id(module) for module in model.modules()]
    report = minilora.load_adapter(model, saved)
    assert report.swapped
    assert str(report).endswith("modules swapped in place")
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [id(module) for module in model.modules()] == modules
    fresh = tiny_bart()
    minilora.load_adapter(fresh, saved)
    assert torch.equal(logits(model), logits(fresh))  # the scale is the file's too
    assert minilora.config_of(model) == minilora.config_of(fresh)
    assert {layer.dropout for layer in lora_layers(model).values()} == {0.5}


@pytest.mark.parametrize("changes", [{"rank": 5}, {"targets": ("k_proj", "fc2")}])
def test_loading_over_another_adapter_injects_anew_without_merging_the_old(
    saved: Path, changes: dict[str, object]
) -> None:
    fresh = tiny_bart()
    flags = {name: p.requires_grad for name, p in fresh.named_parameters()}
    minilora.load_adapter(fresh, saved)
    model = adapted(**changes)
    assert not minilora.load_adapter(model, saved).swapped
    assert equal(weights(model), weights(fresh))
    assert torch.equal(logits(model), logits(fresh))
    minilora.unwrap(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel], ids=["compile", "parallel"])
@pytest.mark.parametrize("build", [tiny_bart, lambda: adapted(rank=5)], ids=["plain", "adapted"])
def test_no_module_is_replaced_under_a_wrapper(
    saved: Path, build: Callable[[], nn.Module], wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    model = build()
    wrapped = wrapper(model)  # DataParallel moves the model to the GPU where there is one
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"before torch\.compile, DistributedDataParallel"):
        minilora.load_adapter(wrapped, saved)
    before.check(model)


def test_an_adapter_loaded_for_inference_is_frozen_and_can_be_thawed(saved: Path) -> None:
    model = tiny_bart()
    minilora.load_adapter(model, saved, inference=True)
    assert list(minilora.trainable_parameters(model)) == []
    assert torch.equal(logits(model), logits(adapted()))
    minilora.load_adapter(model, saved)
    assert len(list(minilora.trainable_parameters(model))) == 2 * len(lora_layers(model))


@pytest.mark.parametrize("base", [tiny_bart, adapted], ids=["plain", "adapted"])
def test_a_gradient_from_before_moves_no_frozen_adapter(
    saved: Path, base: Callable[[], nn.Module]
) -> None:
    model = base()
    model(**inputs(model)).logits.sum().backward()
    minilora.load_adapter(model, saved, inference=True)
    loaded = State.of(model)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    loaded.check(model)


def test_one_tensor_under_two_keys_is_written(tmp_path: Path) -> None:
    names, shared = ("q_proj", "v_proj"), torch.randn(4, 2)
    tensors = {f"base_model.model.{n}.lora_A.weight": shared.T for n in names}
    tensors |= {f"base_model.model.{n}.lora_B.weight": shared for n in names}
    minilora.write_adapter(Adapter(LoRAConfig(rank=2, targets=names), tensors), tmp_path)
    read = minilora.read_adapter(tmp_path).tensors
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


def test_pissa_with_dora_is_refused_and_the_model_keeps_its_adapter(saved: Path) -> None:
    path = saved / "adapter_config.json"
    more = {"use_dora": True, "init_lora_weights": "pissa"}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    tensors = safetensors.torch.load_file(saved / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        stem, rows = key.removesuffix("lora_B.weight"), len(tensors[key])
        tensors[f"{stem}lora_magnitude_vector"] = torch.ones(rows)
    safetensors.torch.save_file(tensors, saved / "adapter_model.safetensors")
    model = adapted(rank=5)
    before = State.of(model)
    with pytest.raises(LoRAError, match="init 'pissa' does not go with dora"):
        minilora.load_adapter(model, saved)
    before.check(model)


def test_loading_while_merged_is_refused(saved: Path) -> None:
    model = adapted()
    minilora.merge(model)
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"while merged: call minilora\.unmerge"):
        minilora.load_adapter(model, saved)
    before.check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_adapter_takes_the_dtype_that_suits_the_base(saved: Path, dtype: torch.dtype) -> None:
    model = tiny_bart().to(dtype)
    minilora.load_adapter(model, saved)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for layer in lora_layers(model).values():
        assert layer.lora_A.dtype == layer.lora_B.dtype == wide
        assert layer.base.weight.dtype == dtype


def remove(*keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in keys]


def add(**tensors: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda values: values.update({k.replace("__", "."): t for k, t in tensors.items()})


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(key, tensor)


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


A, B = f"{FC1}.lora_A.weight", f"{FC1}.lora_B.weight"


@pytest.mark.parametrize("carries", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(A), rf"missing key {A}"),
        (remove(B), rf"missing key {B}"),
        (remove(A, B), rf"missing key {A}; missing key {B}"),
        (put("fc1.weight", torch.ones(2, 2)), r"unexpected key fc1\.weight"),
        (put(f"{FC1}.weight", torch.ones(2, 2)), rf"unexpected key {FC1}\.weight"),
        (put(A, torch.ones(RANK, 15)), rf"{A} is a .* \(3, 15\), not .* \(3, 16\)"),
        (put(B, torch.ones(23, RANK)), rf"{B} is a .* \(23, 3\), not .* \(24, 3\)"),
        (put(A, torch.ones(4, 16)), rf"{A} is a .* \(4, 16\), not .* \(3, 16\)"),
        (put(A, torch.ones(RANK * 16)), rf"{A} is a torch.float32 tensor of shape \(48,\)"),
        (put(A, torch.ones(RANK, 16, dtype=torch.int8)), rf"{A} is a torch.int8 tensor"),
        (put(A, torch.full((RANK, 16), torch.nan)), rf"{A} holds values that are not finite"),
        (
            rename("layers.0.fc1", "layers.7.fc1"),
            r"unexpected key .*encoder\.layers\.7\.fc1.*no such module",
        ),
        (rename("layers.0.fc1", "layers.0.fc_1"), r"fc_1\.lora_A.*no such module; nearest: .*fc1"),
        (
            rename("layers.0.fc1", "layers.0.fc2"),
            r"unexpected key .*fc2\.lora_A.*target_modules does not",
        ),
        (
            rename(FC1, FC1.replace("fc1", "self_attn")),
            r"self_attn\.lora_A\.weight: a BartAttention, not",
        ),
        (rename("base_model.model.", "module."), r"unexpected key module\.model\.decoder"),
        (rename(".lora_A.weight", ".lora_A.weight.weight"), r"unexpected key .*weight\.weight"),
        (lambda tensors: tensors.clear(), "it holds no"),
    ],
)
def test_every_wrong_key_is_named_and_the_model_untouched(
    saved: Path, change: Callable[[dict[str, Tensor]], object], message: str, carries: bool
) -> None:
    edit(saved, change)
    model = adapted(rank=5) if carries else tiny_bart()
    before = State.of(model)
    with pytest.raises(LoRAError, match=message) as caught:
        minilora.load_adapter(model, saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)
    before.check(model)


def test_keys_the_configuration_does_not_ask_for_are_named(saved: Path) -> None:
    edit(saved, target_modules=["q_proj", "v_proj"])
    with pytest.raises(LoRAError, match=r"unexpected key .*fc1.*target_modules does not ask"):
        minilora.load_adapter(tiny_bart(), saved)


@pytest.mark.parametrize(
    ("build", "more"),
    [
        (tiny_llama, 22 + 8 - 5),  # 22 keys that are unexpected, 8 that are missing, 5 are named
        (lambda: tiny_bart(d_model=32), 19 - 5),  # of 22 all but fc1's B (24, 3) have another shape
    ],
)
def test_the_adapter_of_another_model_is_refused_with_keys_and_shapes(
    saved: Path, build: Callable[[], nn.Module], more: int
) -> None:
    model = build()
    before = State.of(model)
    with pytest.raises(
        LoRAError,
        match=r"unexpected key .*model\.\w+coder.*no such module|\(3, 16\), not .*\(3, 32\)",
    ) as caught:
        minilora.load_adapter(model, saved)
    assert str(caught.value).endswith(f"and {more} more")
    before.check(model)


def test_a_base_that_cannot_be_adapted_is_refused_before_the_model_is_touched(saved: Path) -> None:
    for model in (tiny_bart(), adapted(rank=5)):
        last = model.model.decoder.layers[0].fc1
        linear = getattr(last, "base", last).requires_grad_(False)
        linear.weight.data = linear.weight.data.to(torch.int8)
        before = State.of(model)
        with pytest.raises(LoRAError, match=r"decoder\.layers\.0\.fc1.*torch.int8 weights"):
            minilora.load_adapter(model, saved)
        before.check(model)


def test_a_rank_above_the_smaller_side_is_loaded_as_peft_does(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.lin.lora_A.weight": torch.randn(6, 4),
        "base_model.model.lin.lora_B.weight": torch.randn(5, 6),
    }
    config = LoRAConfig(rank=6, alpha=3, targets=("lin",))
    minilora.write_adapter(Adapter(config, tensors), tmp_path)
    model = nn.ModuleDict({"lin": nn.Linear(4, 5)})
    minilora.load_adapter(model, tmp_path)
    assert model["lin"].rank == 6


def test_modules_called_base_keep_their_names(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"base": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
        return nn.ModuleDict({"encoder": inner, "base": nn.Linear(4, 4)})

    config = LoRAConfig(rank=2, targets=("base",))
    model = build()
    assert minilora.inject(model, config).modules == ("encoder.base", "base")
    randomize_adapter(model)
    minilora.save_adapter(model, tmp_path)
    fresh = build()
    minilora.load_adapter(fresh, tmp_path)
    assert equal(weights(fresh), weights(model))
    assert minilora.load_adapter(fresh, tmp_path).swapped


def test_an_adapter_is_read_and_written_without_a_model(saved: Path, tmp_path: Path) -> None:
    adapter = minilora.read_adapter(saved)
    assert adapter.config == config_for()
    assert adapter.modules == tuple(sorted(lora_layers(adapted())))
    A, B = adapter.pair("model.encoder.layers.0.fc1")
    assert (A.shape, B.shape) == ((RANK, 16), (24, RANK))
    minilora.write_adapter(adapter, tmp_path / "again")
    again = minilora.read_adapter(tmp_path / "again")
    assert again.config == adapter.config
    assert equal(again.tensors, adapter.tensors)


def test_the_name_of_the_base_model_is_kept(tmp_path: Path) -> None:
    tiny_bart().save_pretrained(tmp_path / "base")
    model = type(tiny_bart()).from_pretrained(tmp_path / "base")
    minilora.inject(model, config_for())
    minilora.save_adapter(model, tmp_path / "adapter")
    assert minilora.read_adapter(tmp_path / "adapter").base_model == str(tmp_path / "base")
    assert minilora.load_adapter(tiny_bart(), tmp_path / "adapter").base_model is not None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
        (lambda path: (path / CONFIG).unlink(), f"{CONFIG}: no such file"),
        (lambda path: (path / WEIGHTS).write_bytes(b"\0" * 64), f"{WEIGHTS} is damaged"),
        (lambda path: (path / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is damaged"),
        (lambda path: (path / CONFIG).write_text("{"), "cannot be read as JSON"),
        (lambda path: (path / CONFIG).write_bytes(b"\xff\xfe{"), "cannot be read as JSON"),
        (lambda path: (path / CONFIG).write_text("[]"), "holds a list, not an object"),
        (lambda path: edit(path, peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda path: edit(path, r=0), "rank must be a whole number"),
        (lambda path: edit(path, lora_alpha="x"), "alpha must be a finite number"),
        (lambda path: edit(path, target_modules=r"(q"), "not a regular expression"),
        (
            lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin"),
            r"adapter_model\.bin is a pickle, which can run any code",
        ),
    ],
)
def test_a_directory_that_is_wrong_is_refused_in_one_line_that_names_it(
    saved: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(saved)
    with pytest.raises(LoRAError, match=message) as caught:
        minilora.read_adapter(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_replaced_while_it_is_read_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors would be scaled by another configuration."""
    read = reading._read_tensors

    def replaced_meanwhile(folder: Path) -> dict[str, Tensor]:
        tensors = read(folder)
        edit(folder, lora_alpha=99)
        return tensors

    monkeypatch.setattr(reading, "_read_tensors", replaced_meanwhile)
    with pytest.raises(LoRAError, match="changed while it was being read: try again"):
        minilora.read_adapter(saved)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoRAError, match="nowhere: no such directory"):
        minilora.read_adapter(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(LoRAError, match="file is a file, not a directory"):
        minilora.save_adapter(adapted(), tmp_path / "file")


def test_a_model_without_an_adapter_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(LoRAError, match="carries no adapter"):
        minilora.save_adapter(tiny_bart(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("written", [0, 1], ids=["first file", "second file"])
def test_a_full_disk_leaves_the_old_adapter_whole(
    saved: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    old = {path.name: path.read_bytes() for path in saved.iterdir()}
    calls, fsync = iter(range(9)), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) >= written:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    model = adapted(rank=5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            minilora.save_adapter(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == old
    minilora.save_adapter(model, saved)
    assert minilora.read_adapter(saved).config.rank == 5


class Twice(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_module_with_two_names_is_saved_so_that_its_file_can_be_read(
    name: str, tmp_path: Path
) -> None:
    base, x = Twice(), torch.ones(2, 8)
    model = copy.deepcopy(base)
    minilora.inject(model, LoRAConfig(rank=2, targets=(name,), init="random"))
    minilora.save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    minilora.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert not torch.equal(fresh(x), base(x))
    assert minilora.load_adapter(model, tmp_path).swapped


def test_a_module_called_like_an_adapter_s_part_keeps_its_name(tmp_path: Path) -> None:
    """After `.lora_A` a key may have the adapter's name. `lora_block` has no such thing."""
    model = nn.ModuleDict({"lora_block": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
    minilora.save_adapter(model, tmp_path)
    assert minilora.load_adapter(model, tmp_path).modules == ("lora_block.q_proj",)
