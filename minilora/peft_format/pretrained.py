"""`save_pretrained` of a transformers model that carries an adapter: it writes the adapter."""

from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn

from minilora.config import LoRAError
from minilora.conventions import is_sharded
from minilora.peft_format.apply import save_adapter


class SavePretrained:
    """An `inject.Extra` that trains nothing. Trainers save checkpoints by `save_pretrained`.

    Without it they would hold the whole model, under names such as `q_proj.base.weight` which
    `from_pretrained` does not know: it would start those layers at random.
    """

    def __init__(self, *_: object) -> None:
        """The same for every configuration."""

    def find(self, model: nn.Module) -> dict[str, Tensor]:
        """Nothing trains here."""
        return {}

    def start(self, model: nn.Module) -> None:
        """An attribute of this model alone, before the method of its class."""
        if hasattr(model, "save_pretrained"):
            model.save_pretrained = MethodType(save_pretrained, model)

    def swap(self, model: nn.Module) -> None:
        """Nothing was trained."""

    def stop(self, model: nn.Module) -> None:
        """The method of the class again."""
        vars(model).pop("save_pretrained", None)


def save_pretrained(
    model: nn.Module, directory: str | Path, is_main_process: bool = True, **more: Any
) -> None:
    """What `save_adapter` does, as PEFT's models do; not by the other processes of a Trainer.

    Raises:
        LoRAError: as in `save_adapter`; to gather a sharded model, or to upload, takes more.
    """
    if is_sharded(model) or more.get("push_to_hub"):
        raise LoRAError(
            "the model carries an adapter: call minilora.save_adapter, and after fully_shard in "
            "every process; upload what it writes"
        )
    if is_main_process:
        save_adapter(model, directory)
