"""LoRAConfig validates itself: every message names the field and the value."""

import math
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.config import LoRAConfig, LoRAError
from minilora.functional import scale

# Python 3.10 only warns of a flag within an expression.
FLAG_INSIDE = [{"(?i)q": 4}] if sys.version_info >= (3, 11) else []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rank", value) for value in (0, -1, 2.5, 4.0, True, "8", None)),
        *(("alpha", value) for value in (0, -1, math.nan, math.inf, True, "32", None)),
        *(("dropout", value) for value in (1.0, -0.1, 1.5, math.nan, True, "0.1", None)),
        *(("targets", value) for value in ((), "", [], None, 3, ("q_proj", 3), "(q_proj", b"q")),
        *(("exclude", value) for value in (None, 3, (None,), "*q_proj")),
        *(("layers", value) for value in ("0", (0.5,), (True,), ("1",))),
        *(("layers_pattern", value) for value in (3, (3,), "(layers", ("lay(ers",))),
        *(
            ("rank_pattern", value)
            for value in (3, [("q_proj", 4)], {1: 4}, {"(q": 4}, *FLAG_INSIDE)
        ),
        *(("rank_pattern", {"q_proj": value}) for value in (0, 2.5, True)),
        *(("alpha_pattern", {"q_proj": value}) for value in (0, math.nan, True)),
        ("rslora", 1),
        ("dora", 1),
        ("lora_bias", 1),
        *(("bias", value) for value in ("lora", True, None, ["all"])),
        ("init", "zero"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_field(
    field: str, value: object
) -> None:
    more = {"layers": (0,)} if field == "layers_pattern" else {}  # it is refused without layers
    with pytest.raises(LoRAError, match=field) as caught:
        LoRAConfig(**more, **{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["targets", "exclude", "also_train", "layers_pattern", "layers"])
def test_an_iterator_is_refused_since_checking_would_empty_it(field: str) -> None:
    values = [0] if field == "layers" else ["q_proj"]
    with pytest.raises(LoRAError, match=f"{field} must be .*, not <list_iterator"):
        LoRAConfig(**{"targets": ["q_proj"], field: iter(values)})
    assert LoRAConfig(**{"targets": ["q_proj"], "layers": [0], field: dict.fromkeys(values)})


def test_numbers_of_numpy_and_torch_become_python_s() -> None:
    config = LoRAConfig(
        rank=numpy.int64(4), alpha=torch.tensor(7), dropout=numpy.float32(0.5),
        layers=numpy.array([1, 2]), token_rows=torch.tensor([3, 5]), targets=["q_proj"],
    )  # fmt: skip
    assert config == LoRAConfig(
        rank=4, alpha=7, dropout=0.5, layers=[1, 2], token_rows=[3, 5], targets=["q_proj"]
    )
    assert type(config.rank) is int
    with pytest.raises(LoRAError, match="rank must be a whole number"):
        LoRAConfig(rank=numpy.float64(4))


def test_pissa_and_dora_are_refused_together_before_a_model_is_touched() -> None:
    with pytest.raises(LoRAError, match="init 'pissa' does not go with dora"):
        LoRAConfig(init="pissa", dora=True)


def test_the_error_is_a_value_error() -> None:
    assert issubclass(LoRAError, ValueError)


def test_layers_goes_with_a_list_of_names_only() -> None:
    for targets in ("all-linear", r".*q_proj"):
        with pytest.raises(LoRAError, match="layers needs targets as a list"):
            LoRAConfig(targets=targets, layers=(0,))
    with pytest.raises(LoRAError, match="layers_pattern has no effect without layers"):
        LoRAConfig(layers_pattern=("layers",))


def test_sequences_become_tuples_a_set_is_sorted_and_one_index_is_a_sequence_of_one() -> None:
    config = LoRAConfig(targets={"v", "q", "k"}, exclude=["o"], layers=3, layers_pattern="layers")
    assert config.targets == ("k", "q", "v")
    assert config.exclude == ("o",)
    assert config.layers == (3,)
    assert config.layers_pattern == ("layers",)
    assert LoRAConfig(targets=r"(?i).*\.q").targets == r"(?i).*\.q"


def test_a_config_cannot_be_changed_nor_does_it_keep_a_dict_that_can() -> None:
    pattern = {"q_proj": 4}
    config = LoRAConfig(rank_pattern=pattern)
    pattern["q_proj"] = 5
    assert config.rank_of("q_proj") == 4
    with pytest.raises(FrozenInstanceError):
        config.rank = 4  # type: ignore[misc]


@given(st.integers(1, 512), st.floats(0.01, 1e4))
def test_the_scale_is_alpha_over_r_or_over_its_root(rank: int, alpha: float) -> None:
    # s r = alpha and s^2 r = alpha^2 in exact arithmetic, but for one rounding of 2^-53 in the
    # first and two in the second, where squaring doubles them
    plain, rooted = Fraction(scale(alpha, rank)), Fraction(scale(alpha, rank, rslora=True))
    assert abs(plain * rank / Fraction(alpha) - 1) <= Fraction(1, 2**53)
    assert abs(rooted**2 * rank / Fraction(alpha) ** 2 - 1) <= Fraction(5, 2**53)


def test_the_scales_of_the_papers() -> None:
    assert scale(32, 8) == 4.0
    assert scale(6, 4, rslora=True) == 3.0
    assert scale(7, 2) != scale(7, 2, rslora=True)


@pytest.mark.parametrize(
    ("patterns", "module", "value"),
    [
        ({"q_proj": 4}, "layers.0.q_proj", 4),  # the end after a dot
        ({"q_proj": 4}, "q_proj", 4),  # the whole name
        ({"q_proj": 4}, "layers.0.eq_proj", 8),  # not the end of a word
        ({"q_proj": 4}, "q_proj.0", 8),
        ({"0.q_proj": 4, "q_proj": 5}, "layers.0.q_proj", 4),  # the first that matches wins
        ({"q_proj": 5, "0.q_proj": 4}, "layers.0.q_proj", 5),
        ({r"encoder\..*": 4}, "model.encoder.layers.0.fc1", 4),
        ({"^layers.0.q_proj": 4}, "decoder.layers.0.q_proj", 8),  # anchored
        ({"q|k": 4}, "a.k", 4),
        ({}, "q_proj", 8),
    ],
)
def test_the_first_pattern_that_matches_the_end_of_a_name_decides(
    patterns: dict[str, int], module: str, value: int
) -> None:
    config = LoRAConfig(rank=8, alpha=8, rank_pattern=patterns, alpha_pattern=patterns)
    assert config.rank_of(module) == config.alpha_of(module) == value
