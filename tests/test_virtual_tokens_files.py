"""Prompts and prefixes on disk against PEFT, both ways, with random values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import minilora
from minilora import LoRAConfig, LoRAError
from minilora.methods import PrefixConfig, PromptConfig

from .conftest import inputs, logits
from .test_virtual_tokens import ALL, MODELS, PROMPT, difference, randomized, tuned

DECODER = PrefixConfig(3, "decoder", None)
NAMES = sorted(MODELS)


def task(name: str) -> str:
    return "CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM"


def masked(model: nn.Module) -> dict[str, Tensor]:
    """Two rows, the second one padded on the right."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return inputs(model) | {"attention_mask": mask}


@torch.no_grad()
def outputs(model: Any, own: int = 0) -> Tensor:
    """Logits with and without a mask; `own` rows in front are the prompt's, in PEFT."""
    found = [model(**data).logits[:, own:] for data in (inputs(model), masked(model))]
    return torch.cat([logits[:, :4] for logits in found])  # padded rows see other rows in PEFT


def expected_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("reparametrize", [None, 5])
@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_a_prefix_of_the_decoder(
    name: str, reparametrize: int | None, tmp_path: Path
) -> None:
    model = tuned(name, PrefixConfig(3, "decoder", reparametrize), torch.float32)
    plain = outputs(MODELS[name]())
    minilora.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(MODELS[name](), tmp_path / "prefix").eval()
    assert difference(outputs(theirs), outputs(model)) < 1e-4  # float32, logits of up to 30
    assert difference(outputs(model), plain) > 0.1
    assert expected_file(tmp_path / "prefix")["peft_type"] == "PREFIX_TUNING"


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_a_prompt(name: str, tmp_path: Path) -> None:
    model = tuned(name, PROMPT, torch.float32)
    minilora.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(MODELS[name](), tmp_path / "prompt").eval()
    own = 3 if name == "llama" else 0  # PEFT's logits of a Llama are the prompt's too
    assert difference(outputs(theirs, own), outputs(model)) < 1e-4
    assert difference(outputs(model), outputs(MODELS[name]())) > 0.1
    ids = inputs(model)["input_ids"][:1]
    written = [
        m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
        for m in (theirs, model)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_of_peft_is_read(name: str, tmp_path: Path) -> None:
    """With PEFT's defaults: it then uses a part of what it holds, and some of it twice."""
    layers = None if name != "mbart" else 2  # even: two layers of the decoder share their pairs
    theirs = get_peft_model(
        MODELS[name](),
        PrefixTuningConfig(task_type=task(name), num_virtual_tokens=3, num_layers=layers),
    ).eval()
    randomized(theirs)
    theirs.save_pretrained(tmp_path)
    model = MODELS[name]()
    minilora.load_adapter(model, tmp_path)
    assert difference(outputs(theirs), outputs(model)) < 1e-4
    assert difference(outputs(model), outputs(MODELS[name]())) > 0.1
    assert minilora.config_of(model) == PrefixConfig(3, "decoder", None, task(name))
    minilora.save_adapter(model, tmp_path / "again")
    again = PeftModel.from_pretrained(MODELS[name](), tmp_path / "again" / "prefix").eval()
    assert difference(outputs(again), outputs(model)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_peft_is_read(name: str, tmp_path: Path) -> None:
    """Of an encoder-decoder PEFT holds twice as many rows as it uses."""
    config = PromptTuningConfig(task_type=task(name), num_virtual_tokens=3)
    theirs = get_peft_model(MODELS[name](), config).eval()
    randomized(theirs)
    theirs.save_pretrained(tmp_path)
    (held,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert len(held) == (3 if name == "llama" else 6)
    model = MODELS[name]()
    minilora.load_adapter(model, tmp_path)
    assert difference(outputs(theirs, 3 if name == "llama" else 0), outputs(model)) < 1e-4
    assert minilora.config_of(model) == PromptConfig(3, task_type=task(name))


def test_peft_with_a_reparametrization_is_read_folded(tmp_path: Path) -> None:
    config = PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, prefix_projection=True
    )
    theirs = get_peft_model(MODELS["bart"](), config).eval()
    theirs.save_pretrained(tmp_path)
    model = MODELS["bart"]()
    minilora.load_adapter(model, tmp_path)
    assert difference(outputs(theirs), outputs(model)) < 1e-4


def test_peft_refuses_what_it_cannot_express(tmp_path: Path) -> None:
    """It would compute something else from it, in silence."""
    for number, config in enumerate([ALL, PrefixConfig(2, "encoder"), PrefixConfig(2, "cross")]):
        minilora.save_adapter(tuned("bart", config, torch.float32), tmp_path / str(number))
        folder = tmp_path / str(number) / "prefix"
        assert expected_file(folder)["peft_type"] == "MINILORA_PREFIX"
        with pytest.raises((ValueError, KeyError), match="MINILORA_PREFIX"):
            PeftModel.from_pretrained(MODELS["bart"](), folder)


def test_peft_reads_the_lora_of_a_directory_with_a_prompt(tmp_path: Path) -> None:
    model = tuned("bart", [LoRAConfig(rank=2), PROMPT], torch.float32)
    minilora.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(MODELS["bart"](), tmp_path).eval()
    alone = MODELS["bart"]()
    lora = minilora.read_adapter(tmp_path)
    minilora.write_adapter(
        minilora.Adapter(
            LoRAConfig(rank=2, targets=("q_proj", "v_proj")),
            {key: tensor for key, tensor in lora.tensors.items() if "lora" in key},
        ),
        tmp_path / "lora",
    )
    minilora.load_adapter(alone, tmp_path / "lora")
    assert torch.equal(logits(theirs), logits(alone))
    assert difference(logits(alone), logits(model)) > 0.1


def test_the_files_are_the_same_in_every_run(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        minilora.save_adapter(tuned("bart", [LoRAConfig(rank=2), PROMPT, ALL]), tmp_path / folder)
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_prefix_of_another_model_is_refused(tmp_path: Path) -> None:
    minilora.save_adapter(tuned("bart", DECODER), tmp_path)
    model = MODELS["bart"](decoder_layers=5)
    with pytest.raises(LoRAError, match="does not fit the model: prefix/decoder is a"):
        minilora.load_adapter(model, tmp_path)
