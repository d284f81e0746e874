"""LoRA+: B learns at a higher rate than A. Hayou et al. 2024, https://arxiv.org/abs/2402.12354."""

from typing import Any

from torch import nn

from minilora.config import LoRAError, check
from minilora.inject import lora_layers
from minilora.modules import trainable_parameters


def parameter_groups(
    model: nn.Module, learning_rate: float, ratio: float = 16.0
) -> list[dict[str, Any]]:
    """The trainable parameters, as parameter groups for any optimizer of torch.

    With one rate for both, training a wide layer is inefficient: B needs a higher rate than A
    (section 3 of the paper; section 5 recommends a ratio of about 16).

    Args:
        model: carries an adapter.
        learning_rate: of A, and of everything else that trains but B; above 0.
        ratio: B's learning rate divided by A's; above 0.

    Returns:
        Two groups, each with its `lr`: A and the rest, then B.

    Raises:
        LoRAError: no B trains in the model, or a number is out of range.

    Example:
        >>> import torch
        >>> from minilora import LoRAConfig, inject
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(16, 4)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, ratio=8))
        >>> [(group["lr"], group["params"][0].shape) for group in optimizer.param_groups]
        [(0.0001, torch.Size([2, 16])), (0.0008, torch.Size([4, 2]))]
    """
    for name, value in (("learning_rate", learning_rate), ("ratio", ratio)):
        check(name, value, "alpha")  # finite and above 0
    factors = {id(layer.lora_B) for layer in lora_layers(model).values()}
    slow, fast = list[nn.Parameter](), list[nn.Parameter]()
    for parameter in trainable_parameters(model):
        (fast if id(parameter) in factors else slow).append(parameter)
    if not fast:
        raise LoRAError("no B trains in the model: minilora.inject or load_adapter first")
    return [{"params": slow, "lr": learning_rate}, {"params": fast, "lr": ratio * learning_rate}]
