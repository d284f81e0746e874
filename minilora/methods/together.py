"""LoRA, a prompt and a prefix in one model: `inject` takes a list, and `config_of` returns it.

`inject.py` knows LoRA only. The configurations of a prompt and a prefix go into the field `prompts`
of LoRAConfig, which their extras read. A prompt or prefix alone is a LoRAConfig without targets.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from minilora.config import LoRAConfig, LoRAError
from minilora.inject import config_of as lora_config_of
from minilora.inject import inject as inject_lora
from minilora.methods.prefix_tuning import PrefixConfig
from minilora.methods.prompt_tuning import PromptConfig
from minilora.methods.virtual_tokens import task_type
from minilora.reports import InjectReport

AnyConfig = LoRAConfig | PromptConfig | PrefixConfig


def inject(
    model: nn.Module, config: AnyConfig | Sequence[AnyConfig], seed: int | None = None
) -> InjectReport:
    """Freeze the model and add what trains, in place: LoRA, a prompt, a prefix, or several.

    With a LoRAConfig every target is wrapped into a LoRALinear: `lora_A`, `lora_B` and what the
    configuration adds train (Hu et al. 2021, section 4.1, https://arxiv.org/abs/2106.09685).
    A PromptConfig adds vectors before the input embeddings, a PrefixConfig keys and values in the
    attentions. Afterwards `config_of` returns the configuration with what depends on the model: the
    names that "attention" stands for, a head, a task type. An error leaves the model unchanged.

    Args:
        model: any module; for a prompt or prefix a BART, mBART, T5 or Llama of transformers. Not
            yet wrapped by torch.compile or DistributedDataParallel.
        config: what trains; or a list with at most one configuration of each kind.
        seed: of the random start; the report records it, and torch's global random state does not
            change. Without a seed the start is drawn from that state.

    Returns:
        The modules and the parameter counts.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "fc": nn.Linear(8, 8)})
        >>> report = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> report.modules, report.trainable, report.total
        (('q_proj',), 32, 176)

    Raises:
        LoRAError: the model carries an adapter already, or the configuration does not fit it: a
            target that matches nothing or is no linear layer, a rank above a layer's smaller side,
            a place for a prefix that the model does not have.
    """
    configs: list[Any] = list(config) if isinstance(config, list | tuple) else [config]
    lora = [c for c in configs if isinstance(c, LoRAConfig)]
    kinds = {c.folder: c for c in configs if isinstance(c, PromptConfig | PrefixConfig)}
    if len(lora) > 1 or len(lora) + len(kinds) < max(len(configs), 1):
        wanted = "a LoRAConfig, a PromptConfig, a PrefixConfig, or a list with one of each at most"
        raise LoRAError(f"config must be {wanted}, not {config!r}")
    prompts = tuple(replace(c, task_type=task_type(model, name)) for name, c in kinds.items())
    one = replace(lora[0], prompts=prompts) if lora else LoRAConfig(targets=(), prompts=prompts)
    return inject_lora(model, one, seed)


def config_of(model: nn.Module) -> Any:
    """The configuration the model carries, the list of them if there are several, or None.

    Args:
        model: any module, wrapped by torch.compile or DistributedDataParallel or not.

    Example:
        >>> config_of(nn.Linear(8, 8)) is None
        True
    """
    if (config := lora_config_of(model)) is None:
        return None
    configs = [*([replace(config, prompts=())] if config.targets else []), *config.prompts]
    return configs if len(configs) > 1 else configs[0]
