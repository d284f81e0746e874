"""Which modules: PEFT's rules to the letter, and an error for every name that means nothing."""

import importlib
import inspect
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import Llama4TextConfig, MambaConfig, MambaModel, WavLMConfig, WavLMModel
from transformers.models.llama4.modeling_llama4 import Llama4Router

import minilora
from minilora import LoRAConfig, LoRAError, conventions
from minilora.config import matches
from minilora.modules import layer_index, nearest
from minilora.targets import is_target, select
from tests.conftest import ARCHITECTURES, State, config_for, tiny_bart, tiny_gpt2


@pytest.mark.parametrize(
    ("names", "module", "expected"),
    [
        (("q_proj",), "q_proj", True),
        (("q_proj",), "layers.0.q_proj", True),
        (("q_proj",), "layers.0.eq_proj", False),
        (("q_proj",), "q_proj.0", False),
        (("attn.q_proj",), "layers.0.attn.q_proj", True),
        (("attn.q_proj",), "layers.0.self_attn.q_proj", False),
        (("q.proj",), "q_proj", False),  # a name, not an expression
        ((), "q_proj", False),
        (r".*\.q_proj", "layers.0.q_proj", True),
        (r"q_proj", "layers.0.q_proj", False),  # the whole name
        (r"layers\.[01]\..*", "layers.1.k", True),
    ],
)
def test_names_match_at_the_end_and_an_expression_the_whole(
    names: str | tuple[str, ...], module: str, expected: bool
) -> None:
    assert matches(names, module) is expected


@pytest.mark.parametrize(
    ("module", "patterns", "expected"),
    [
        ("model.layers.3.attn.q", (), 3),
        ("model.layers.3.experts.5.q", (), 3),  # the first
        ("layers.3.q", (), None),  # nothing stands before `layers`: so PEFT has it
        ("layers.3.q", ("layers",), 3),
        ("model.layers.3.experts.5.q", ("experts",), 5),
        ("model.layers.3.q", ("h", "layers"), 3),
        ("model.layers.3.q", ("h",), None),
        ("model.layers.3.q", ("(layers|h)",), 3),
        ("model.x.3.q", ("x|layers",), None),  # the expression is not in a group: as in PEFT
        ("model.layers.3", (), None),
        ("model.q", (), None),
    ],
)
def test_the_index_of_a_layer_is_the_first_number_after_a_name(
    module: str, patterns: tuple[str, ...], expected: int | None
) -> None:
    assert layer_index(module, patterns) == expected


PARTS = st.sampled_from(["model", "layers", "experts", "h", "0", "1", "12", "attn", "q", "v"])
LAYERS, NUMBERS = st.sampled_from(["model.layers", "model.h", "layers"]), ["0", "1", "12"]
ENDS = st.sampled_from(["q", "attn.q", "v"])
NAMES = st.tuples(LAYERS, st.sampled_from(NUMBERS), ENDS).map(".".join)  # which rules are about
NAMES |= st.lists(PARTS, min_size=1, max_size=6).map(".".join)
LISTS = st.lists(ENDS | NAMES, min_size=1, max_size=2).map(tuple)
EXPRESSIONS = st.sampled_from([r".*\.q", r"q", r"model\..*", r".*attn.*", r".*\.1\..*"])


@settings(max_examples=200)  # of microseconds each
@given(
    module=NAMES,
    targets=LISTS | EXPRESSIONS,
    exclude=st.just(()) | LISTS | EXPRESSIONS,
    layers=st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=2).map(tuple),
    patterns=st.lists(st.sampled_from(["layers", "h", "(layers|h)"]), max_size=2).map(tuple),
)
@example("model.layers.1.q", ("model.layers.1.q",), (), (0,), ())  # said outright: always
@example("model.h.1.q", ("q",), (), (1,), ("(layers|h)",))
@example("model.layers.1.q", ("q",), (), (0,), ())  # met by name, of another layer
def test_peft_asks_for_the_same_modules(
    module: str,
    targets: str | tuple[str, ...],
    exclude: str | tuple[str, ...],
    layers: tuple[int, ...] | None,
    patterns: tuple[str, ...],
) -> None:
    if isinstance(targets, str):
        layers = None  # both refuse them together
    theirs = LoraConfig(
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=exclude if isinstance(exclude, str) else list(exclude),
        layers_to_transform=None if layers is None else list(layers),
        layers_pattern=None if layers is None else list(patterns),
    )
    ours = LoRAConfig(
        targets=targets, exclude=exclude, layers=layers, layers_pattern=patterns if layers else ()
    )
    assert is_target(ours, module) is bool(check_target_module_exists(theirs, module))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_is_every_linear_but_the_output_head(architecture: str) -> None:
    model = ARCHITECTURES[architecture].build()
    head = model.get_output_embeddings()
    linears = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    ]
    assert head is not None
    assert len(linears) >= 8
    assert list(select(model, LoRAConfig(targets="all-linear"))) == linears
    excluded = select(model, LoRAConfig(targets="all-linear", exclude=(linears[0],)))
    assert list(excluded) == linears[1:]


def test_a_linear_under_two_names_is_selected_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model["b"] = model["a"]
    for targets in (("a", "b"), ("a",), r"[ab]", "all-linear"):
        found = select(model, LoRAConfig(targets=targets, exclude=("other",)))
        assert list(found.values()) == [model["a"]]
    assert list(select(model, LoRAConfig(targets=("b",))).values()) == [model["a"]]


class WithBypass(nn.Module):
    """Linears that their parents read without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False
        )
        self.free = nn.Linear(8, 8)
        self.whole = nn.Linear(8, 8).requires_grad_(False)
        self.whole.weight.data = self.whole.weight.data.to(torch.int8)


class WithTies(nn.Module):
    """Weights that two modules share: as one parameter, and as two over one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.left, self.right, self.free = (nn.Linear(8, 8) for _ in range(3))
        self.right.weight = nn.Parameter(self.left.weight.detach())


BYPASSED = r"{}.*MultiheadAttention.* without calling the layer: exclude it"
LAYER = r"encoder\.layers\.0\.{}.*TransformerEncoderLayer.* without calling the layer: exclude it"
TIED = r"{} shares its weight with {}.*exclude it, or untie"


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (tiny_bart, {"targets": ("q_prj",)}, "targets: 'q_prj'.*nearest: q_proj"),
        (tiny_bart, {"targets": ("q_proj", "w_proj")}, "targets: 'w_proj'.*nearest: .*v_proj"),
        (tiny_bart, {"targets": r".*\.q_prj"}, r"targets: '\.\*\\\\.q_prj'.*nothing matches"),
        (tiny_bart, {"exclude": ("lm_haed",)}, "exclude: 'lm_haed'.*nearest: lm_head"),
        (tiny_bart, {"exclude": r"decodr.*"}, "exclude: 'decodr.*nothing matches"),
        (
            tiny_bart,
            {"targets": "all-linear", "exclude": ("fc_1",)},
            "exclude: 'fc_1'.*nearest: fc1",
        ),
        (tiny_bart, {"layers": (0, 7)}, "layers: no target lies in a layer 7"),
        (tiny_bart, {"layers": (0,), "layers_pattern": "blocks"}, "layers: no target .* layer 0"),
        (tiny_bart, {"rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj'.*adapted modules"),
        (tiny_bart, {"alpha_pattern": {"vproj": 2}}, "alpha_pattern: 'vproj'.*nearest: v_proj"),
        (tiny_bart, {"exclude": ("q_proj", "v_proj", "fc1")}, "nothing left to adapt"),
        (
            tiny_bart,
            {"targets": ("shared",)},
            "model.shared: cannot adapt .*: it is not a linear",
        ),
        (
            tiny_bart,
            {"targets": ("final_layer_norm",)},
            "norm: cannot adapt LayerNorm",
        ),
        (
            tiny_bart,
            {"targets": ("self_attn",)},
            r"attn: cannot .* BartAttention.*name linear layers instead",
        ),
        (tiny_bart, {"targets": ("lm_head",)}, TIED.format("lm_head", "model.shared")),
        (tiny_gpt2, {"targets": ("lm_head",)}, TIED.format("lm_head", "transformer.wte")),
        (WithTies, {"targets": ("head",)}, TIED.format("head", "embedding")),
        (WithTies, {"targets": ("right",)}, TIED.format("right", "left")),
        (WithTies, {"targets": "all-linear"}, "shares its weight"),
        (WithBypass, {"targets": ("attention.out_proj",)}, BYPASSED.format("attention.out_proj")),
        (WithBypass, {"targets": ("linear1",)}, LAYER.format("linear1")),
        (WithBypass, {"targets": ("self_attn.out_proj",)}, LAYER.format("self_attn.out_proj")),
        (WithBypass, {"targets": "all-linear"}, "calling the layer: exclude it"),
        (WithBypass, {"targets": ("free", "whole")}, r"whole.*Linear with torch.int8 weights"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name_and_the_model_is_untouched(
    build: type[nn.Module], changes: dict[str, object], message: str
) -> None:
    model = build()
    before = State.of(model)
    with pytest.raises(LoRAError, match=message) as caught:
        minilora.inject(model, config_for(**changes))
    assert "\n" not in str(caught.value)
    before.check(model)


def test_a_transformer_layer_as_the_whole_model_is_refused_too() -> None:
    with pytest.raises(LoRAError, match=r"linear2.*TransformerEncoderLayer"):
        select(nn.TransformerEncoderLayer(8, 2, 16), LoRAConfig(targets=("linear2",)))


@pytest.mark.parametrize("kind", ["Mamba", "WavLM"])
def test_classes_of_transformers_that_bypass_their_linears_are_refused(kind: str) -> None:
    """A target that is accepted has an effect."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1}
    if kind == "Mamba":
        model = MambaModel(MambaConfig(vocab_size=40, state_size=4, use_cache=False, **sizes))
        x, bypassed, called = torch.tensor([[4, 5, 6]]), ("dt_proj", "out_proj"), "in_proj"
    else:
        sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        sizes |= {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,)}
        model = WavLMModel(WavLMConfig(num_attention_heads=2, intermediate_size=24, **sizes))
        x, bypassed, called = torch.ones(1, 800), ("q_proj", "v_proj", "out_proj"), "output_dense"
    for name in bypassed:
        with pytest.raises(LoRAError, match=rf"{name} lies in a \w+, .*: exclude it"):
            minilora.inject(model, LoRAConfig(rank=2, targets=(name,)))
    with pytest.raises(LoRAError, match="without calling the layer: exclude it"):
        minilora.inject(model, LoRAConfig(rank=2, targets="all-linear"))
    before = model.eval()(x)[0]
    minilora.inject(model, LoRAConfig(rank=2, targets=(called,), init="random"))
    assert not torch.equal(model(x)[0], before)


def test_a_router_that_returns_more_than_a_product_is_refused() -> None:
    router = Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=1)
    model = nn.ModuleDict({"router": Llama4Router(router), "fc": nn.Linear(8, 8)})
    with pytest.raises(LoRAError, match=r"router is a Llama4Router, .* W\^T \+ b: exclude it"):
        minilora.inject(model, LoRAConfig(rank=2, targets="all-linear"))
    report = minilora.inject(model, LoRAConfig(rank=2, targets="all-linear", exclude=("router",)))
    assert report.modules == ("fc",)


@pytest.mark.parametrize(
    ("module", "name", "linear"),
    [
        ("mamba", "MambaMixer", "x_proj"),
        ("falcon_mamba", "FalconMambaMixer", "x_proj"),
        ("zamba2", "Zamba2MambaMixer", "out_proj"),
        ("granitemoehybrid", "GraniteMoeHybridMambaLayer", "out_proj"),
        ("detr", "DetrMHAttentionMap", "k_proj"),
        ("maskformer", "MaskFormerDetrMHAttentionMap", "k_proj"),
        ("dab_detr", "DabDetrMHAttentionMap", "k_linear"),
    ],
)
def test_linears_that_a_kernel_or_a_convolution_reads(module: str, name: str, linear: str) -> None:
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    kind = getattr(code, name, None)
    if kind is None:
        pytest.skip(f"this version of transformers has no {name}")
    assert f"self.{linear} = nn.Linear(" in inspect.getsource(kind)
    bypassing = type(name, (nn.Module,), {"__module__": code.__name__})()
    named = {"": nn.Module(), "a": bypassing, f"a.{linear}": nn.Linear(2, 2)}
    assert name in conventions.bypassed(named, f"a.{linear}")


def test_excluding_what_is_bypassed_or_tied_lets_the_rest_be_adapted() -> None:
    exclude = ("out_proj", "linear1", "linear2", "whole")
    assert list(select(WithBypass(), LoRAConfig(targets="all-linear", exclude=exclude))) == ["free"]
    assert list(select(WithTies(), LoRAConfig(targets=("free",)))) == ["free"]


def test_the_nearest_names_are_those_of_the_ends_or_of_the_whole() -> None:
    known = ["encoder.layers.0.q_proj", "encoder.layers.0.k_proj", "encoder.layers.0.fc1"]
    assert re.fullmatch(r"; nearest: q_proj, k_proj", nearest("q_prj", known))
    assert nearest("xyz", known) == ""


def test_a_string_is_an_expression_and_the_error_says_so() -> None:
    model = tiny_bart()
    with pytest.raises(
        LoRAError, match=r"'q_proj': nothing .* \(one string is a regex .*'\.\*q_proj'\); nearest"
    ):
        select(model, LoRAConfig(targets="q_proj"))
    with pytest.raises(LoRAError, match=r"'q_prj': nothing matches it in the model; nearest"):
        select(model, LoRAConfig(targets=("q_prj",)))
    assert select(model, LoRAConfig(targets=r".*\.q_proj"))
