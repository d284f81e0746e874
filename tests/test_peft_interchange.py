"""Interchange with PEFT, both ways: every configuration that means something of its own.

Each case is perturbed in all that trains, has a rank unlike alpha and a scale that is no power of
two, and must change the logits by at least a thousand times the tolerance.
"""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import minilora
from minilora import linears
from minilora.inject import lora_layers
from minilora.peft_format.directory import read_adapter
from minilora.peft_format.keys import SUFFIXES, WEIGHTS_FILE
from tests.conftest import (
    ALPHA,
    RANK,
    inputs,
    logits,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)
from tests.marks import slow_but

EFFECT = 1000  # the adapter must matter this many times more than the tolerance allows to differ
FLOAT32 = 2e-6  # what float32 rounds away in a tiny model, relative to its largest logit

# LoRAConfig's fields in PEFT's words.
WORDS = {
    "rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "exclude": "exclude_modules",
    "layers": "layers_to_transform", "rslora": "use_rslora", "dora": "use_dora",
    "also_train": "modules_to_save", "init": "init_lora_weights",
}  # fmt: skip


def tiny_classifier(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.5, num_labels=5,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


@dataclass(frozen=True)
class Case:
    """One configuration, in minilora's words."""

    build: Callable[[], PreTrainedModel]
    settings: dict[str, Any]
    file_dtype: torch.dtype | None = None
    """The dtype of the tensors in the file; None leaves them as they were written."""
    name: str = "default"
    """The adapter's name: PEFT saves one that is not "default" in a subdirectory."""
    ours: dict[str, Any] = field(default_factory=dict)
    """What differs in LoRAConfig when minilora injects (it is stricter than its loader)."""

    def lora_config(self) -> minilora.LoRAConfig:
        return minilora.LoRAConfig(**{"rank": RANK, "alpha": ALPHA} | self.settings | self.ours)

    def peft_config(self) -> peft.LoraConfig:
        settings = {"rank": RANK, "alpha": ALPHA} | self.settings
        words = {WORDS.get(name, name): value for name, value in settings.items()}
        for name, value in words.items():
            words[name] = list(value) if isinstance(value, tuple) else value
        return peft.LoraConfig(**words)


QV = ("q_proj", "v_proj")
CASES = {
    "list": Case(tiny_bart, {"targets": QV}),
    "list of one full name": Case(
        tiny_bart, {"targets": ("model.encoder.layers.0.fc1", "out_proj")}
    ),
    "regex": Case(tiny_bart, {"targets": r".*decoder.*\.(q|k)_proj"}),
    "all-linear": Case(tiny_bart, {"targets": "all-linear"}),
    "exclude by name": Case(
        tiny_bart, {"targets": (*QV, "fc1"), "exclude": ("encoder_attn.q_proj",)}
    ),
    "exclude by regex": Case(tiny_bart, {"targets": "all-linear", "exclude": r".*encoder\.l.*"}),
    "layers": Case(tiny_bart, {"targets": QV, "layers": [1]}),
    "one layer": Case(tiny_bart, {"targets": QV, "layers": 0}),
    "layers pattern": Case(
        tiny_gpt2, {"targets": ("c_attn",), "layers": [1], "layers_pattern": "h"}
    ),
    "rank pattern": Case(tiny_bart, {"targets": QV, "rank_pattern": {"v_proj": 5, "fc1": 2}},
        ours={"rank_pattern": {"v_proj": 5}},
    ),
    "alpha pattern": Case(
        tiny_bart, {"targets": QV, "alpha_pattern": {r"encoder\.layers\.\d\.self_attn.q_proj": 3}}
    ),
    # Sorted already, since PEFT sorts the keys on saving and the first that matches counts.
    "overlapping patterns": Case(
        tiny_bart,
        {
            "targets": QV,
            "rank_pattern": {r"decoder.*q_proj": 4, r"q_proj": 2},
            "alpha_pattern": {r".*1\.self_attn\.v_proj": 11, r"self_attn\.v_proj": 5},
        },
    ),
    "rslora": Case(tiny_bart, {"targets": QV, "rslora": True}),
    "rslora with rank pattern": Case(
        tiny_bart, {"targets": QV, "rslora": True, "rank_pattern": {"q_proj": 2}}
    ),
    "dora": Case(tiny_bart, {"targets": (*QV, "fc1"), "dora": True}),
    "dora with rslora": Case(tiny_bart, {"targets": QV, "dora": True, "rslora": True}),
    "dora without biases": Case(tiny_llama, {"targets": (*QV, "down_proj"), "dora": True}),
    "dora with trained biases": Case(
        tiny_bart, {"targets": QV, "dora": True, "bias": "lora_only"}
    ),
    "biases of the adapted": Case(tiny_bart, {"targets": QV, "bias": "lora_only"}),
    "all biases": Case(tiny_bart, {"targets": QV, "bias": "all"}),
    "all biases, some tied": Case(tiny_bert, {"targets": ("query",), "bias": "all"}),
    "lora bias": Case(tiny_bart, {"targets": QV, "lora_bias": True}),
    "lora bias with trained biases": Case(
        tiny_bart, {"targets": QV, "lora_bias": True, "bias": "all"}
    ),
    "also train": Case(
        tiny_classifier, {"targets": ("query", "value"), "also_train": ["classifier"]}
    ),
    "also train, nested": Case(
        tiny_classifier, {"targets": "all-linear", "also_train": ["pooler", "classifier"]}
    ),
    "float16 file": Case(tiny_bart, {"targets": QV}, file_dtype=torch.float16),
    "bfloat16 file": Case(tiny_bart, {"targets": QV, "dora": True}, file_dtype=torch.bfloat16),
    "named adapter": Case(tiny_bart, {"targets": QV}, name="dialogues"),
    "Conv1D": Case(tiny_gpt2, {"targets": ("c_attn", "c_fc")}),
    "Conv1D, all-linear": Case(tiny_gpt2, {"targets": "all-linear", "rslora": True}),
    "Conv1D with dora": Case(tiny_gpt2, {"targets": ("c_attn", "c_proj"), "dora": True}),
    # At the usual size of tiny_t5's weights rounding is blown up by attention near its ties.
    "T5": Case(lambda: tiny_t5(initializer_factor=1.0), {"targets": ("q", "v", "wo")}),
    "Llama": Case(tiny_llama, {"targets": "all-linear"}),
    "BERT": Case(tiny_bert, {"targets": ("query", "value", "dense")}),
    "gaussian start": Case(tiny_bart, {"targets": QV, "init": "gaussian"}),
}  # fmt: skip


# Those that meet every code path: `make quick` runs all tests on them, some tests on all cases.
SPREAD = [
    CASES[name]
    for name in (
        "all-linear", "rank pattern", "rslora with rank pattern", "dora with trained biases",
        "all biases, some tied", "lora bias with trained biases", "also train, nested",
        "bfloat16 file", "named adapter", "Conv1D with dora", "T5", "Llama",
    )
]  # fmt: skip
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(params=slow_but(SPREAD, CASES.values()), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def perturb(model: nn.Module, seed: int = 3) -> None:
    """Random numbers onto all that trains."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)


def with_peft(case: Case) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, lora_bias, bias
        model = peft.get_peft_model(case.build(), case.peft_config(), adapter_name=case.name)
    perturb(model)
    return model.eval()


def peft_directory(case: Case, folder: Path) -> Path:
    """An adapter that PEFT wrote."""
    with_peft(case).save_pretrained(folder)
    directory = folder if case.name == "default" else folder / case.name
    return cast_file(case, directory)


def our_directory(case: Case, folder: Path) -> Path:
    """An adapter that minilora wrote."""
    model = case.build()
    minilora.inject(model, case.lora_config())
    perturb(model)
    minilora.save_adapter(model, folder)
    return cast_file(case, folder)


def cast_file(case: Case, directory: Path) -> Path:
    if case.file_dtype is not None:
        path = directory / WEIGHTS_FILE
        tensors = {key: tensor.to(case.file_dtype) for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return directory


def load_in_peft(case: Case, directory: Path, trains: bool = False) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(case.build(), directory, is_trainable=trains)
    return model.eval()


def load_in_ours(case: Case, directory: Path, inference: bool = True) -> PreTrainedModel:
    model = case.build()
    minilora.load_adapter(model, directory, inference=inference)
    return model


def exact_logits(model: nn.Module) -> Tensor:
    """In float64, so that two ways of computing the same are not told apart by their rounding."""
    return logits(copy.deepcopy(model).double())


def check_close(left: Tensor, right: Tensor, base: Tensor, relative: float = 1e-9) -> None:
    """Equal as float64 computes it, and far from the base.

    In float32 the same passes or fails at 2e-6 by the order in which a processor sums.
    """
    size = max(1.0, base.abs().max().item(), right.abs().max().item())
    assert (left - right).abs().max() <= relative * size
    assert (right - base).abs().max() >= EFFECT * max(relative, FLOAT32) * size


@every
def test_what_peft_wrote_runs_here(case: Case, tmp_path: Path) -> None:
    directory = peft_directory(case, tmp_path / "peft")
    theirs = load_in_peft(case, directory)
    ours = load_in_ours(case, tmp_path / "peft")  # a named adapter's parent will do
    base = logits(case.build())
    check_close(exact_logits(ours), exact_logits(theirs), base)
    with minilora.disabled(ours):
        assert torch.equal(logits(ours), base)

    minilora.save_adapter(ours, tmp_path / "again")
    before, after = (load_file(d / WEIGHTS_FILE) for d in (directory, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.to(after[key].dtype), after[key]), key


def test_what_minilora_wrote_runs_in_peft(case: Case, tmp_path: Path) -> None:
    directory = our_directory(case, tmp_path / "ours")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(case.build(), directory).eval()
    assert not [w for w in caught if "key" in str(w.message)]  # PEFT warns of missing keys
    ours = load_in_ours(case, directory)
    check_close(exact_logits(ours), exact_logits(theirs), logits(case.build()))

    theirs.save_pretrained(tmp_path / "peft")
    written, expected = (load_file(d / WEIGHTS_FILE) for d in (directory, tmp_path / "peft"))
    assert written.keys() == expected.keys()
    for key, tensor in written.items():
        assert torch.equal(tensor.to(expected[key].dtype), expected[key]), key


def test_merged_weights_are_w_plus_delta_w(case: Case, tmp_path: Path) -> None:
    directory = peft_directory(case, tmp_path)
    adapter = read_adapter(directory)
    ours = load_in_ours(case, directory)
    before = {name: dense(layer) for name, layer in lora_layers(ours).items()}
    unmerged, adapted = copy.deepcopy(ours).state_dict(), logits(ours)
    minilora.merge(ours)
    assert not any(
        torch.equal(before[name], dense(layer)) for name, layer in lora_layers(ours).items()
    )
    for name, layer in lora_layers(ours).items():
        expected = merged_in_float64(adapter, name, before[name])
        assert torch.allclose(dense(layer).double(), expected, rtol=1e-6, atol=1e-6), name
    check_close(logits(ours), adapted, logits(case.build()), relative=1e-5)
    theirs = load_in_peft(case, directory).merge_and_unload()
    # Here both have rounded their weights to float32.
    check_close(exact_logits(ours), exact_logits(theirs), logits(case.build()), relative=FLOAT32)
    minilora.unmerge(ours)
    assert all(torch.equal(tensor, unmerged[key]) for key, tensor in ours.state_dict().items())


def dense(layer: minilora.LoRALinear) -> Tensor:
    return linears.dense_weight(layer.base).clone()


def merged_in_float64(adapter: minilora.Adapter, module: str, weight: Tensor) -> Tensor:
    """The definition, without any of the library's shortcuts."""
    stem, config = f"base_model.model.{module}", adapter.config
    A, B = (adapter.tensors[stem + SUFFIXES[name]].double() for name in ("lora_A", "lora_B"))
    rank = A.shape[0]
    scale = config.alpha_of(module) / (rank**0.5 if config.rslora else rank)
    merged = weight.double() + scale * B @ A
    if config.dora:
        magnitude = adapter.tensors[stem + SUFFIXES["magnitude"]].double()
        merged = magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True)
    return merged


def test_three_steps_of_sgd_end_alike(case: Case, tmp_path: Path) -> None:
    directory = peft_directory(case, tmp_path / "start")
    theirs = load_in_peft(case, directory, trains=True)
    ours = load_in_ours(case, directory, inference=False)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            out = model(**inputs(case.build(), seed=step)).logits.float()
            targets = torch.arange(out.shape[:-1].numel()) % out.shape[-1]
            loss = nn.functional.cross_entropy(out.flatten(0, -2), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    minilora.save_adapter(ours, tmp_path / "ours")
    start, left, right = (
        load_file(d / WEIGHTS_FILE) for d in (directory, tmp_path / "ours", tmp_path / "theirs")
    )
    assert left.keys() == right.keys()
    moved, apart = 0.0, 0.0
    for key, tensor in left.items():
        moved = max(moved, (tensor - start[key].float()).abs().max().item())
        apart = max(apart, (tensor - right[key]).abs().max().item())
    assert apart <= 1e-5 * max(1.0, moved)
    assert moved >= EFFECT * apart
    assert moved > 1e-3


def test_there_are_at_least_twenty_cases() -> None:
    assert len(CASES) >= 20
    scales = [case.lora_config().alpha / case.lora_config().rank for case in CASES.values()]
    assert all(torch.frexp(torch.tensor(scale)).mantissa != 0.5 for scale in scales)


def test_all_biases_with_whole_modules_reads_past_pefts_repeats(tmp_path: Path) -> None:
    case = Case(
        tiny_classifier, {"targets": ("query",), "bias": "all", "also_train": ["classifier"]}
    )
    directory = peft_directory(case, tmp_path)
    assert any(".original_module." in key for key in load_file(directory / WEIGHTS_FILE))
    theirs, ours = load_in_peft(case, directory), load_in_ours(case, directory)
    check_close(exact_logits(ours), exact_logits(theirs), logits(case.build()))
    minilora.save_adapter(ours, tmp_path / "ours")
    theirs = load_in_peft(case, tmp_path / "ours")
    check_close(exact_logits(ours), exact_logits(theirs), logits(case.build()))


def tiny_roberta() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(  # type: ignore[call-arg]
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.5, num_labels=5,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def test_all_biases_with_a_head_of_several_layers(tmp_path: Path) -> None:
    """PEFT's keys of the repeats hold the adapter's name: `modules_to_save.default.dense.bias`."""
    settings = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", bias="all")
    theirs = peft.get_peft_model(tiny_roberta(), settings)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    assert any(".default." in key for key in load_file(tmp_path / WEIGHTS_FILE))
    ours = tiny_roberta()
    minilora.load_adapter(ours, tmp_path)
    check_close(exact_logits(ours), exact_logits(theirs), logits(tiny_roberta()))


@pytest.mark.parametrize("name", ["list", "DoRA"])
def test_keys_may_contain_the_adapter_s_name(name: str, tmp_path: Path) -> None:
    """As in a raw state_dict, `lora_A.default.weight`; of one adapter only."""
    case = CASES["list"] if name == "list" else Case(tiny_bart, {"targets": QV, "dora": True})
    theirs = with_peft(case)
    theirs.save_pretrained(tmp_path)
    raw = {key: t.clone() for key, t in theirs.state_dict().items() if ".lora_" in key}
    assert all(".default" in key for key in raw)
    save_file(raw, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    ours = load_in_ours(case, tmp_path)
    check_close(exact_logits(ours), exact_logits(theirs), logits(case.build()))
    raw |= {key.replace("default", "other"): tensor + 1 for key, tensor in raw.items()}
    save_file(raw, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(minilora.LoRAError, match="holds several adapters: keep the keys of one"):
        load_in_ours(case, tmp_path)


@pytest.mark.parametrize("key", ["lora_bias", "use_rslora", "use_dora", "bias", "rank_pattern"])
def test_null_is_no_entry(key: str, tmp_path: Path) -> None:
    case = CASES["list"]
    directory = peft_directory(case, tmp_path)
    expected = logits(load_in_ours(case, directory))
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: None}))
    assert torch.equal(logits(load_in_ours(case, directory)), expected)


def test_a_rank_above_the_side_and_an_entry_that_matches_nothing_are_accepted(
    tmp_path: Path,
) -> None:
    case = Case(tiny_bart, {"rank": 20, "alpha": 7.0, "targets": ("q_proj", "no_such_module")})
    directory = peft_directory(case, tmp_path)
    theirs, ours = load_in_peft(case, directory), load_in_ours(case, directory)
    check_close(exact_logits(ours), exact_logits(theirs), logits(case.build()))


def test_targets_that_peft_fills_in_by_itself(tmp_path: Path) -> None:
    directory = peft_directory(Case(tiny_bart, {"targets": QV}), tmp_path)
    path = directory / "adapter_config.json"
    entries = json.loads(path.read_text())
    del entries["target_modules"]
    path.write_text(json.dumps(entries))
    case = Case(tiny_bart, {})
    check_close(
        exact_logits(load_in_ours(case, directory)),
        exact_logits(load_in_peft(case, directory)),
        logits(case.build()),
    )


def test_peft_needs_only_its_type(tmp_path: Path) -> None:
    case = Case(tiny_bart, {"rank": 8, "alpha": 8, "targets": QV})
    directory = peft_directory(case, tmp_path)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    check_close(
        exact_logits(load_in_ours(case, directory)),
        exact_logits(load_in_peft(case, directory)),
        logits(case.build()),
    )


def test_several_named_adapters_are_to_be_chosen_from(tmp_path: Path) -> None:
    for name in ("a", "b"):
        peft_directory(Case(tiny_bart, {"targets": QV}, name=name), tmp_path)
    with pytest.raises(minilora.LoRAError, match=r"several adapters, name one of them: a, b"):
        minilora.read_adapter(tmp_path)
    assert minilora.read_adapter(tmp_path / "a").modules


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reading_and_writing_keep_dtypes_and_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(tiny_bart, {"targets": QV, "dora": True, "bias": "all"}, file_dtype=dtype)
    directory = peft_directory(case, tmp_path / "peft")
    adapter = minilora.read_adapter(directory)
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {dtype}
    minilora.write_adapter(adapter, tmp_path / "first")
    minilora.write_adapter(minilora.read_adapter(tmp_path / "first"), tmp_path / "second")
    for file in (WEIGHTS_FILE, "adapter_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_what_save_adapter_wrote_loads_and_saves_to_the_same_bytes(
    case: Case, tmp_path: Path
) -> None:
    first = our_directory(Case(case.build, case.settings, ours=case.ours), tmp_path / "first")
    scrambled = tmp_path / "scrambled"  # the order of keys must not matter
    scrambled.mkdir()
    tensors = load_file(first / WEIGHTS_FILE)
    save_file(
        {key: tensors[key] for key in sorted(tensors, reverse=True)}, scrambled / WEIGHTS_FILE
    )
    entries = json.loads((first / "adapter_config.json").read_text())
    backwards = {key: entries[key] for key in sorted(entries, reverse=True)}
    (scrambled / "adapter_config.json").write_text(json.dumps(backwards))
    for directory in (first, scrambled):
        model = load_in_ours(case, directory)
        minilora.save_adapter(model, tmp_path / "again")
        for file in (WEIGHTS_FILE, "adapter_config.json"):
            again = (tmp_path / "again" / file).read_bytes()
            assert again == (first / file).read_bytes(), file


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("name", ["list", "Conv1D"])
def test_fan_in_fan_out_is_read_either_way(name: str, said: bool, tmp_path: Path) -> None:
    """PEFT sets it right by the module's type, with a warning; a file may say anything."""
    case = CASES[name]
    directory = peft_directory(case, tmp_path)
    path = directory / "adapter_config.json"
    entries = json.loads(path.read_text())
    assert entries["fan_in_fan_out"] == (name == "Conv1D")
    path.write_text(json.dumps(entries | {"fan_in_fan_out": said}))
    theirs, ours = load_in_peft(case, directory), load_in_ours(case, directory)
    check_close(exact_logits(ours), exact_logits(theirs), logits(case.build()))
    minilora.save_adapter(ours, tmp_path / "again")  # and is written as it is
    entries = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert entries["fan_in_fan_out"] == (name == "Conv1D")


@pytest.mark.parametrize("init", ["orthogonal", "mica", "eva", "Gaussian", False, None])
def test_starts_that_leave_the_base_alone_are_accepted(init: object, tmp_path: Path) -> None:
    case = CASES["list"]
    directory = peft_directory(case, tmp_path)
    expected = logits(load_in_ours(case, directory))
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    assert torch.equal(logits(load_in_ours(case, directory)), expected)


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "lora_ga"])
def test_starts_that_rewrote_the_base_are_refused(init: str, tmp_path: Path) -> None:
    directory = peft_directory(CASES["list"], tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(minilora.LoRAError, match=f"{init}.*path_initial_model_for_weight_conv"):
        minilora.read_adapter(directory)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_what_peft_converted_is_accepted(init: str, tmp_path: Path) -> None:
    """The entry of the start stays in the file, with `init_lora_weights: true`."""
    directory = peft_directory(CASES["list"], tmp_path)
    expected = logits(load_in_ours(CASES["list"], directory))
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {f"{init}_config": {"a": 1}}))
    assert torch.equal(logits(load_in_ours(CASES["list"], directory)), expected)


def test_loftq_belongs_to_a_quantized_base(tmp_path: Path) -> None:
    directory = peft_directory(CASES["list"], tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "loftq"}))
    assert minilora.read_adapter(directory).config.init == "loftq"
    with pytest.raises(minilora.LoRAError, match="quantize"):
        load_in_ours(CASES["list"], directory)


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("peft_type", "IA3", "LORA, .*MINILORA_PREFIX only: merge it into the base with PEFT"),
        ("peft_type", "XLORA", "LORA, .*MINILORA_PREFIX only: merge it into the base with PEFT"),
        (
            "alora_invocation_tokens",
            [1, 2],
            "minilora does not do this: merge.* else use it with PEFT",
        ),
        ("target_parameters", ["weight"], "minilora does not do this: merge"),
        ("layer_replication", [[0, 2]], "minilora does not do this: merge"),
        ("from_the_future", 1, "minilora does not do this"),
    ],
)
def test_what_asks_for_something_else_is_refused_by_name(
    key: str, value: object, advice: str, tmp_path: Path
) -> None:
    directory = peft_directory(CASES["list"], tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(minilora.LoRAError, match=f"{key} is .*{advice}"):
        minilora.read_adapter(directory)


def test_another_base_is_a_notice_and_no_error(tmp_path: Path) -> None:
    model = tiny_bart()
    minilora.inject(model, CASES["list"].lora_config())
    model.name_or_path = "facebook/bart-base"
    minilora.save_adapter(model, tmp_path)
    for name, noticed in [
        ("facebook/bart-base", False),
        ("/models/bart-base", False),
        ("facebook/bart-large", True),
        ("", False),
    ]:
        other = tiny_bart()
        other.name_or_path = name
        report = minilora.load_adapter(other, tmp_path)
        assert (report.notice is not None) == noticed
        assert ("trained on facebook/bart-base, but this model is" in str(report)) == noticed


@pytest.mark.parametrize(
    ("build", "head", "source"),
    [
        (tiny_bart, "lm_head", "shared"),
        (tiny_t5, "lm_head", "shared"),
        (tiny_gpt2, "lm_head", "wte"),
    ],
)
def test_tied_heads_are_refused_in_a_file_too(
    build: Callable[[], PreTrainedModel], head: str, source: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[head])
        model = peft.get_peft_model(build(), settings)
        model.save_pretrained(tmp_path)  # with the base's weight of the head
        assert f"{head}.base_layer.weight" in read_adapter(tmp_path).extras
    with pytest.raises(minilora.LoRAError, match=f"{head} shares its weight with .*{source}"):
        minilora.load_adapter(build(), tmp_path)
    untied = build()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    assert minilora.load_adapter(untied, tmp_path).modules == (head,)


def test_an_adapter_loaded_inside_autocast_takes_effect_there(tmp_path: Path) -> None:
    """Autocast keeps a 16-bit copy of each parameter, which a change in place does not renew."""
    our_directory(Case(tiny_bart, {"targets": QV}), tmp_path / "a")
    path = our_directory(Case(tiny_bart, {"targets": QV}), tmp_path / "b") / WEIGHTS_FILE
    tensors = {key: 2 * tensor for key, tensor in load_file(path).items()}  # another A
    save_file(tensors, path, metadata={"format": "pt"})
    model = tiny_bart()
    minilora.load_adapter(model, tmp_path / "a")
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
        assert minilora.load_adapter(model, tmp_path / "b").swapped
        inside = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        outside = logits(model)
    assert torch.equal(inside, outside)
    assert not torch.equal(inside, before)


def test_swapping_in_place_takes_over_scale_dropout_and_configuration(tmp_path: Path) -> None:
    base = logits(tiny_bart())
    settings = [
        {"targets": QV},
        {"targets": QV, "alpha": 2.0, "rslora": True, "dropout": 0.3},
        {"targets": QV, "alpha_pattern": {"v_proj": 1.3}},
    ]
    directories = [
        our_directory(Case(tiny_bart, changes), tmp_path / str(index))
        for index, changes in enumerate(settings)
    ]
    model = tiny_bart()
    minilora.load_adapter(model, directories[0])
    for directory in [*directories[1:], directories[0]]:
        assert minilora.load_adapter(model, directory).swapped
        check_close(exact_logits(model), exact_logits(load_in_peft(CASES["list"], directory)), base)
        assert minilora.config_of(model) == minilora.read_adapter(directory).config
        expected = minilora.config_of(model).dropout
        assert {layer.dropout for layer in lora_layers(model).values()} == {expected}
