"""TokenRows: some rows of the embeddings train, such as new tokens'. PEFT's token adapter."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minilora.config import LoRAConfig, LoRAError
from minilora.conventions import embeddings
from minilora.inject import Extra
from minilora.modules import named_modules, others, owners
from minilora.targets import trained_whole

ROWS = ".token_adapter.trainable_tokens_delta"
"""The end of the rows' name in PEFT. They are the rows themselves, in spite of "delta"."""


class TokenRows(Extra):
    """E[rows] trains, the rest of the embeddings E (vocabulary, d) stays frozen: an `inject.Extra`.

    The rows are a parameter of their own, so weight decay does not reach the other rows. Hooks put
    them into the outputs of the modules that share E: the embeddings, and a tied output head.

    Args:
        model: not yet changed.
        config: its `token_rows` and `also_train` count.

    Raises:
        LoRAError: there are no such rows, or the embeddings train whole or change E's rows.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, _: Collection[str]) -> None:
        self.embedding: Any = embeddings(model)[0]  # None in a model of sounds or images
        self.rows, self.enabled = list(config.token_rows), True
        self.hooks: list[RemovableHandle] = []
        if not self.rows:
            return
        names: dict[Any, str] = {module: name for name, module in reversed(named_modules(model))}
        if self.embedding not in names:
            raise LoRAError("token_rows: the model does not name its input embeddings")
        self.name, size = names[self.embedding], self.embedding.weight.shape[0]
        if len(set(self.rows)) < len(self.rows) or not all(0 <= row < size for row in self.rows):
            raise LoRAError(f"token_rows must differ and lie in {self.name}, 0 to {size - 1}")
        if trained_whole(config, self.name):
            raise LoRAError(f"token_rows: {self.name} trains whole, by also_train: choose one")
        if not self.embedding.weight.is_meta and not self.is_plain():
            kind = type(self.embedding).__name__
            raise LoRAError(f"token_rows: {self.name}, a {kind}, changes its rows: use also_train")

    @torch.no_grad()
    def is_plain(self) -> bool:
        """Whether the embeddings return rows of E, times `embed_scale` where there is one."""
        if getattr(self.embedding, "max_norm", None) is not None:  # the call changes E
            return False
        E = self.embedding.weight
        index = torch.tensor(self.rows, device=E.device)
        rows = (E[index] * getattr(self.embedding, "embed_scale", 1.0)).to(E)
        out = self.embedding.forward(index)  # without the hooks of rows that train already
        return torch.allclose(out, rows, rtol=1e-2, equal_nan=True)

    def find(self, model: nn.Module) -> dict[str, Tensor]:
        """The rows, by their name on disk."""
        if not self.rows:
            return {}
        rows = self.embedding.token_rows if self.hooks else self.embedding.weight[self.rows]
        return {self.name + ROWS: rows}

    def start(self, model: nn.Module) -> None:
        """Add the parameter and the hooks."""
        if not self.rows:
            return
        weight: Tensor = self.embedding.weight
        self.index = torch.tensor(self.rows, device=weight.device)  # (n,)
        wide = torch.promote_types(weight.dtype, torch.float32)
        names = others(self.embedding, owners(model))
        self.embedding.token_rows = nn.Parameter(weight.detach()[self.index].to(wide))  # (n, d)
        for holder in [self.embedding, *map(model.get_submodule, names)]:
            self.hooks.append(holder.register_forward_hook(self.put_rows))

    def swap(self, model: nn.Module) -> None:
        """Switch the rows off, or on again."""
        self.enabled = not self.enabled

    def check(self) -> None:
        """Refuse rows that are not finite in E's dtype."""
        if not self.hooks or (E := self.embedding.weight).is_meta:
            return
        if not self.embedding.token_rows.to(E).isfinite().all():
            what = f"token_rows hold values that are not finite in {E.dtype}"
            raise LoRAError(f"{what}: try model.float()")

    @torch.no_grad()
    def stop(self, model: nn.Module) -> None:
        """Write the rows into E unless they are switched off; remove parameter and hooks."""
        if self.hooks and self.enabled:
            rows = self.embedding.token_rows.to(self.embedding.weight)
            self.embedding.weight[self.index.to(rows.device)] = rows
        for hook in self.hooks:
            hook.remove()
        if self.hooks:
            del self.embedding.token_rows

    def put_rows(self, module: Any, inputs: Any, y: Tensor) -> Tensor:
        """The output y of a module that holds E, computed with the trained rows."""
        if not self.enabled:
            return y
        (x, *_), rows, index = inputs, self.embedding.token_rows, self.index.to(y.device)
        if x.is_floating_point():  # the head: y is (..., vocabulary)
            bias = module.bias[index] if module.bias is not None else None
            return y.index_copy(-1, index, F.linear(x, rows.to(x.dtype), bias).to(y.dtype))
        hits = x[..., None] == index  # (..., n)
        new = rows[hits.int().argmax(-1)] * getattr(module, "embed_scale", 1.0)  # (..., d)
        return torch.where(hits.any(-1, keepdim=True), new.to(y.dtype), y)
