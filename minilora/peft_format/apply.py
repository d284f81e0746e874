"""Save the adapter of a model, or load an adapter into a model."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path, PurePath

import torch
from torch import Tensor, nn

from minilora import conventions, linears, trained_whole
from minilora.config import ALL_LINEAR, LoRAConfig, LoRAError, matches
from minilora.conventions import HEADS, embeddings, is_sharded, refuse_half, refuse_wrapped
from minilora.inject import EXTRAS, LAYERS, Extra, injection_of, lora_layers, unload, wrap
from minilora.layer import LoRALinear
from minilora.modules import naming, nearest, plain_model, plain_name
from minilora.peft_format import keys
from minilora.peft_format.directory import Adapter, read_adapter, write_adapter
from minilora.reports import LoadReport
from minilora.targets import check_modules, is_target

CONVERSIONS: dict[str, Callable[[Adapter, dict[str, LoRALinear]], Adapter]] = {}
"""`init` -> converts an adapter that started from the base's weights to what is saved."""


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter a model carries, as a value: its tensors are copies on the CPU.

    Raises:
        LoRAError: the model carries no adapter, or is in a `disabled` block.
    """
    model = plain_model(model)
    injection, layers = injection_of(model), lora_layers(model)
    if injection is None:
        raise LoRAError("the model carries no adapter: minilora.inject or load_adapter first")
    if not injection.enabled and any(extra.find(model) for extra in injection.extras):
        raise LoRAError("cannot save inside `with minilora.disabled(model)`: save after it")
    held = {key: tensor.detach() for key, tensor in _held(model).items()}
    # After fully_shard each process has a part of each tensor: all of them gather it.
    copies = {k: getattr(t, "full_tensor", t.clone)().cpu() for k, t in held.items()}
    transposed = any(linears.is_conv1d(layer.base) for layer in layers.values())
    config = _as_written(injection.config, _base_modules(model, layers))
    if not all(is_target(config, name) for name in layers):  # by another name of the same module
        config = replace(config, targets=tuple(layers), exclude=(), layers=None, layers_pattern=())
    adapter = Adapter(config, copies, _base_model_name(model), transposed)
    convert = CONVERSIONS.get(config.init)
    return convert(adapter, layers) if convert is not None else adapter


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the model's adapter as PEFT's directory; merged or not, wrapped by DDP or not.

    Args:
        model: carries an adapter, from `inject` or `load_adapter`.
            After fully_shard every process must call this, to gather the tensors; the first writes.
        directory: made if it is not there; gets adapter_config.json and
            adapter_model.safetensors.

    Raises:
        LoRAError: the model carries no adapter, or is in a `disabled` block.
        OSError: as in `write_adapter`.

    Example:
        >>> import tempfile
        >>> from minilora import inject
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     print(sorted(path.name for path in Path(folder).iterdir()))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    adapter = adapter_of(model)
    if not is_sharded(model) or torch.distributed.get_rank() == 0:
        write_adapter(adapter, directory)


class SavePretrained(Extra):
    """`model.save_pretrained` writes the adapter: an `inject.Extra` without parameters.

    Otherwise it would write the whole model under names that `from_pretrained` does not know, such
    as `q_proj.base.weight`, and would initialize at random. Trainers call `save_pretrained`.
    """

    def __init__(self, model: nn.Module, *_: object) -> None:
        self.model = model

    def start(self, model: nn.Module) -> None:
        """Override the method of the class, in this model only."""
        if hasattr(model, "save_pretrained"):
            model.save_pretrained = self.save  # type: ignore[assignment]

    def stop(self, model: nn.Module) -> None:
        """Restore the method of the class."""
        vars(model).pop("save_pretrained", None)

    def save(
        self, save_directory: str | Path, is_main_process: bool = True, **more: object
    ) -> None:
        """Call `save_adapter` in the main process of a Trainer; do nothing in the others.

        Raises:
            LoRAError: as in `save_adapter`; the model is sharded, or an upload is asked for.
        """
        if is_sharded(self.model) or more.get("push_to_hub"):
            what = "save_pretrained cannot write a sharded model or upload"
            advice = "call minilora.save_adapter, after fully_shard in every process"
            raise LoRAError(f"{what}: {advice}")
        if is_main_process:
            save_adapter(self.model, save_directory)


def load_adapter(model: nn.Module, directory: str | Path, inference: bool = False) -> LoadReport:
    """Load an adapter of PEFT's format into a model, in place; the file's keys decide where.

    A model that already carries an adapter of the same shapes keeps its modules and gets the new
    values; one of other shapes becomes the base again and is injected anew.

    Args:
        model: the base model, or one that carries an adapter, unmerged.
        directory: holds adapter_config.json and adapter_model.safetensors.
        inference: leave the adapter frozen; otherwise it trains.

    Returns:
        The modules, and whether the values went into layers that were there.

    Raises:
        LoRAError: the files are wrong or do not fit the model; every missing, unexpected and
            mis-shaped key is named; or a bias or whole module would train in half precision.
            The model is untouched.

    Example:
        >>> import tempfile
        >>> from minilora import inject
        >>> trained, fresh = (nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(2))
        >>> _ = inject(trained, LoRAConfig(rank=2, targets=("q_proj",), init="random"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(trained, folder)
        ...     print(load_adapter(fresh, folder, inference=True))
        1 module loaded
        >>> torch.equal(fresh["q_proj"].lora_B, trained["q_proj"].lora_B)
        True
    """
    adapter = read_adapter(directory)
    with naming(directory):
        return apply_adapter(model, adapter, inference)


def apply_adapter(model: nn.Module, adapter: Adapter, inference: bool = False) -> LoadReport:
    """What `load_adapter` does, with an adapter that was read, combined or extracted already."""
    wrapped, model = model, plain_model(model)
    conventions.refuse_part(model)
    layers, injection = lora_layers(model), injection_of(model)
    refuse_wrapped(model if injection else wrapped, needs_values=True)
    if any(layer.merged for layer in layers.values()):
        raise LoRAError("cannot load an adapter while merged: call minilora.unmerge(model) first")
    if injection is not None and not injection.enabled:
        raise LoRAError("cannot load an adapter inside `with minilora.disabled(model)`")
    named = _base_modules(model, layers)
    for method in adapter.config.prompts:
        adapter = replace(adapter, tensors=method.fitted(model, adapter.tensors))
    config = _as_read(adapter, named)
    selected, unnamed = _check_fit(model, adapter, config, named)
    if not inference:
        refuse_half(model, config)
    held = {key: tensor.shape for key, tensor in _held(model).items()}
    # Shapes do not say which rows. PiSSA's A0 and B0 depend on the scale, which may change.
    old = injection.config if injection is not None else config
    alike = old.token_rows == config.token_rows and not {old.init, config.init} & LAYERS.keys()
    # The output of a prefix's MLP cannot be filled in place.
    alike &= not any(getattr(prompt, "reparametrize", False) for prompt in old.prompts)
    swapped = alike and held == {key: tensor.shape for key, tensor in adapter.tensors.items()}
    if not swapped:
        refuse_wrapped(wrapped)  # data-parallel copies would never learn of the new parameters
        unload(model)
        # A and B are overwritten below: their start is irrelevant unless it selects a layer class.
        wrap(model, selected, config if config.init in LAYERS else replace(config, init="kaiming"))
        unnamed.start(model)
    injection = injection_of(model)
    assert injection is not None
    injection.extras += [] if swapped else [unnamed]
    _fill(model, adapter, config, inference)
    model.zero_grad()  # gradients of the values before: an optimizer would move a frozen parameter
    for tensor in unnamed.find(model).values():
        tensor.requires_grad_(False)  # they are the base's
    injection.config = config
    notice = _compare_base(adapter.base_model, _base_model_name(model))
    return LoadReport(tuple(lora_layers(model)), swapped, adapter.base_model, notice)


@torch.no_grad()
def _fill(model: nn.Module, adapter: Adapter, config: LoRAConfig, inference: bool) -> None:
    """Copy the adapter's values into an injected model of the same shapes."""
    for key, tensor in _held(model).items():
        trained_whole.require_grad(tensor.copy_(adapter.tensors[key]), not inference)
    for module, layer in lora_layers(model).items():
        layer.alpha, layer.dropout = config.alpha_of(module), config.dropout
        layer.scale = adapter.scale_of(module)
        if f"{module}.base_layer.weight" in adapter.extras:
            layer.load_state_dict({}, strict=False)  # DoRA counts the squares of another W
    torch.clear_autocast_cache()  # its keys are the parameters: it would return casts of old values


def _held(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors in a model, the model's own, by their keys on disk."""
    found = _extra_tensors(model, getattr(injection_of(model), "extras", ()))
    for module, layer in lora_layers(model).items():
        for name in keys.SUFFIXES.keys() & layer._parameters.keys():
            found[keys.PREFIX + module + keys.SUFFIXES[name]] = layer.get_parameter(name)
    return found


def _extra_tensors(model: nn.Module, extras: Iterable[Extra]) -> dict[str, Tensor]:
    """What trains outside the layers, by its keys on disk; the model may be injected or not."""
    found = (item for extra in extras for item in extra.find(model).items())
    return {n if keys.is_beside(n) else keys.PREFIX + n: tensor for n, tensor in found}


def _check_fit(
    model: nn.Module, adapter: Adapter, config: LoRAConfig, named: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], trained_whole.Embeddings]:
    """The modules that the adapter's keys name, once its keys are those that the model expects.

    Also the embeddings that the file contains although no field asks for them.
    """
    known = [name for name, module in named.items() if linears.is_linear(module)]
    every = config.targets == ALL_LINEAR  # which head was left out, only the file can say
    targeted = [n for n in known if (n in adapter.modules if every else is_target(config, n))]
    extras = _extra_tensors(model, [extra(model, config, adapter.modules) for extra in EXTRAS])
    more = [name for name in adapter.extras if keys.PREFIX + name not in extras]
    unnamed = trained_whole.Embeddings(_embeddings(model, more, config))
    extras |= _extra_tensors(model, [unnamed])
    expected = {key: (tuple(t.shape), t.is_floating_point()) for key, t in extras.items()}
    for name in targeted:
        expected |= keys.expected_of(config, name, *linears.shape(named[name]))

    def explain(key: str) -> str:
        for name in keys.modules_of([key]):  # one, or none
            if name not in named:
                older = "; PEFT knows older names: save with it" * ("language_model" in str(known))
                return f": no such module{nearest(name, known, 1)}{older}"
            if name not in known:
                return f": a {type(named[name]).__name__}, not a linear layer"
            return ": target_modules does not ask for it"
        return ": only rows of the input embeddings train here" if key.endswith("_delta") else ""

    problems = keys.compare(expected, adapter.tensors, explain)
    for key in extras.keys() & adapter.tensors.keys():
        dtype = extras[key].dtype
        if not adapter.tensors[key].to(dtype).isfinite().all():
            problems.append(f"{key} does not fit {dtype}: load the model in float32")
    for name in targeted if config.init == "loftq" else ():
        if linears.is_mergeable(named[name]):
            problems += [f"{name} must be quantized to 4 bits for LoftQ, as in training"]
    keys.refuse("the adapter does not fit the model", problems)
    selected = {name: named[name] for name in adapter.modules}
    check_modules(model, selected)
    return selected, unnamed


def _embeddings(model: nn.Module, extras: Iterable[str], config: LoRAConfig) -> list[str]:
    """Those of the tensors, by name on disk, that are of the embeddings or of the output head.

    With PEFT's PiSSA the base's weight is what is left of W. The layer here keeps W, and refuses.
    """
    ends, base = embeddings(model), "" if config.init in LAYERS else ".base_layer"
    modules = {plain_name(name) for name, module in model.named_modules() if module in ends}
    return [name for name in extras if name.replace(base, "").rpartition(".")[0] in modules]


def _base_modules(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, nn.Module]:
    """The modules by the names they have, or had before an adapter was injected."""
    named = [(plain_name(name), module) for name, module in model.named_modules() if name]
    plain = ((trained_whole.base_name(name, layers), module) for name, module in named)
    return {name: module for name, module in plain if name is not None}


def _as_read(adapter: Adapter, named: Collection[str]) -> LoRAConfig:
    """The configuration with also_train as PEFT reads it: any end of a module's name counts.

    So does the head of the task. Where no dot stands before the end, and for a head, the file must
    hold the module: PEFT leaves a module without tensors as the base's.
    """
    also, extras = adapter.config.also_train, adapter.extras
    ends = (*also, *HEADS.get(adapter.config.task_type or "", ()))
    loose = [n for n in named if n.endswith(ends) and any(k.startswith(f"{n}.") for k in extras)]
    whole = tuple(name for name in named if matches(also, name) or name in loose)
    same = all(matches(also, name) for name in whole)
    return adapter.config if same else replace(adapter.config, also_train=whole)


def _as_written(config: LoRAConfig, named: Collection[str]) -> LoRAConfig:
    """The configuration with also_train by full names where PEFT would read more than is meant."""
    meant = tuple(name for name in named if matches(config.also_train, name))
    same = all(name in meant for name in named if name.endswith(config.also_train))
    return config if same else replace(config, also_train=meant)


def _base_model_name(model: nn.Module) -> str | None:
    """Where transformers says the model came from."""
    name = getattr(plain_model(model), "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _compare_base(trained: str | None, loaded: str | None) -> str | None:
    """A notice if the names differ. No error: a name may be a directory of another machine."""
    if not trained or not loaded or PurePath(trained).name == PurePath(loaded).name:
        return None
    return f"the adapter was trained on {trained}, but this model is {loaded}: are they the same?"
