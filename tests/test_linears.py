"""What a layer may wrap: nn.Linear, Conv1D by its shape, and whatever follows the protocol."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minilora import LoRALinear, linears
from minilora.config import LoRAError

OUT, IN = 6, 4


class Halved(nn.Module):
    """A linear of another library: keeps W / 2, so that its dense weight is a copy."""

    in_features, out_features, mergeable = IN, OUT, False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stored", torch.randn(OUT, IN) / 2)

    def dense_weight(self) -> Tensor:
        return self.stored * 2

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense_weight().T


LINEARS = {
    "Linear": lambda: nn.Linear(IN, OUT),
    "Linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "Base": Halved,
}


@pytest.mark.parametrize("kind", LINEARS)
def test_a_linear_is_known_with_its_shape_and_the_weight_it_multiplies_by(kind: str) -> None:
    base = LINEARS[kind]()
    assert linears.is_linear(base)
    assert linears.shape(base) == (OUT, IN)
    weight, bias = linears.dense_weight(base), getattr(base, "bias", None)
    x = torch.randn(3, IN)
    # close and not equal: Conv1D and Linear sum in different orders
    expected = x @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(base(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_writing_to_the_dense_weight_writes_to_the_layer(kind: str) -> None:
    base = LINEARS[kind]()
    assert linears.is_mergeable(base)
    linears.dense_weight(base).zero_()
    assert not base.weight.any()


def test_a_base_says_itself_whether_it_can_be_merged() -> None:
    assert not linears.is_mergeable(Halved())
    with pytest.raises(LoRAError, match=r"Halved.*quantized.*dequantize"):
        LoRALinear(Halved(), rank=2).merge()


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 1), nn.Bilinear(4, 4, 4), nn.Identity()],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_linear_is_refused_by_its_type(module: nn.Module) -> None:
    assert not linears.is_linear(module)
    with pytest.raises(LoRAError, match=type(module).__name__):
        LoRALinear(module, rank=2)


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_adapters_are_float32_or_float64_on_a_float64_base(
    base: torch.dtype, adapter: torch.dtype
) -> None:
    for linear in (nn.Linear(IN, OUT), Conv1D(OUT, IN)):
        assert linears.adapter_placement(linear.to(base)) == (torch.device("cpu"), adapter)
    assert linears.adapter_placement(nn.Linear(IN, OUT, device="meta"))[0].type == "meta"
    assert linears.adapter_placement(Halved()) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_quantized_weights_are_refused_with_what_to_do(dtype: torch.dtype) -> None:
    base = nn.Linear(IN, OUT).requires_grad_(False)
    base.weight.data = base.weight.data.to(dtype)
    with pytest.raises(
        LoRAError, match=rf"{dtype} weights: they must be floating point of .* unquantized"
    ):
        linears.adapter_placement(base)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm]
)
def test_a_weight_that_is_computed_is_refused_since_merging_would_be_lost(
    norm: Callable[[nn.Module], nn.Module],
) -> None:
    with pytest.raises(LoRAError, match=r"Linear: its weight is computed.*parametrization"):
        LoRALinear(norm(nn.Linear(IN, OUT)), rank=2)


def test_a_weight_that_is_a_buffer_is_merged_like_any_other() -> None:
    base = nn.Linear(IN, OUT)
    weight = base.weight.detach().clone()
    del base.weight
    base.register_buffer("weight", weight.clone())
    layer = LoRALinear(base, rank=2, init="random")
    layer.merge()
    assert torch.equal(base.weight, weight + layer.delta())
