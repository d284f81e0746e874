"""Others' trainers: Hugging Face's Trainer, `save_pretrained`, fully_shard."""

import ast
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForSeq2SeqLM,
    BartForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import minilora
from minilora import LoRAConfig, LoRAError
from minilora.peft_format.apply import adapter_of
from tests.helpers import small_bart
from tests.test_distributed import forked

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[4, 5, 6, 7, 8, 2]])
PARTED = "model.encoder.layers.0.self_attn.q_proj.lora_A"
FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trainers") / "bart"
    small_bart().save_pretrained(directory)
    return directory


def injected(base: Path, **more: Any) -> Any:
    model = BartForConditionalGeneration.from_pretrained(base)
    minilora.inject(model, LoRAConfig(rank=2, alpha=7, **more), seed=0)
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, decoder_input_ids=IDS).logits  # type: ignore[no-any-return]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# save_pretrained ----------------------------------------------------------------------------------


def test_save_pretrained_writes_the_adapter_and_from_pretrained_reads_it(
    base: Path, tmp_path: Path
) -> None:
    """Never a model whose layers start at random."""
    plain = BartForConditionalGeneration.from_pretrained(base)
    model = injected(base, init="random")
    wanted = outputs(model)
    assert not torch.equal(wanted, outputs(plain))
    minilora.merge(model)  # no matter
    model.save_pretrained(save_directory=tmp_path / "adapter")
    minilora.unmerge(model)
    assert names(tmp_path / "adapter") == FILES
    for kind in (BartForConditionalGeneration, AutoModelForSeq2SeqLM):
        assert torch.equal(outputs(kind.from_pretrained(tmp_path / "adapter")), wanted)
    loaded = peft.PeftModel.from_pretrained(deepcopy(plain), tmp_path / "adapter")
    assert torch.equal(outputs(loaded), wanted)
    minilora.load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(outputs(plain), wanted)


@pytest.mark.parametrize("leave", [minilora.unwrap, minilora.unload])
def test_without_the_adapter_save_pretrained_is_the_model_s_own(
    leave: Callable[[nn.Module], nn.Module], base: Path, tmp_path: Path
) -> None:
    model: Any = leave(injected(base, init="random"))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "model")
    assert "model.safetensors" in names(tmp_path / "model")
    again = BartForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(again), outputs(model))


def test_a_copy_saves_its_own_adapter(base: Path, tmp_path: Path) -> None:
    model = injected(base, init="random")
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in minilora.trainable_parameters(copy):
            parameter.mul_(2)
    for name, saved in (("one", model), ("two", copy)):
        saved.save_pretrained(tmp_path / name)
    one, two = (minilora.read_adapter(tmp_path / name).tensors for name in ("one", "two"))
    assert all(torch.equal(two[key], 2 * tensor) for key, tensor in one.items())
    minilora.unwrap(copy)
    assert "save_pretrained" in vars(model)


def test_an_injection_that_fails_leaves_save_pretrained_alone(base: Path) -> None:
    model = BartForConditionalGeneration.from_pretrained(base)
    with pytest.raises(LoRAError):
        minilora.inject(model, LoRAConfig(rank=99))
    assert "save_pretrained" not in vars(model)


def test_other_processes_write_nothing_and_an_upload_is_refused(base: Path, tmp_path: Path) -> None:
    model = injected(base)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    with pytest.raises(LoRAError, match=r"minilora\.save_adapter"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)
    assert not (tmp_path / "other").exists()


def test_a_module_of_one_s_own_gets_no_such_method() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
    assert not hasattr(model, "save_pretrained")


# Hugging Face's Trainer ---------------------------------------------------------------------------


def recipe() -> type[Trainer]:
    """The class that examples/trainer.py shows."""
    tree = ast.parse((ROOT / "examples" / "trainer.py").read_text(encoding="utf-8"))
    (shown,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert len(ast.unparse(shown).splitlines()) <= 12
    found: dict[str, Any] = {"Trainer": Trainer, "minilora": minilora}
    exec(ast.unparse(shown), found)
    trainer: type[Trainer] = found[shown.name]
    return trainer


class Stop(TrainerCallback):
    """As a user does, or a machine that goes down."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 4


def train(
    base: Path, output: Path, *, stop: bool = False, resume: bool = False, best: bool = False
) -> Any:
    rows = torch.randint(4, 12, (16, 8), generator=torch.manual_seed(1))
    data = [{"input_ids": row, "labels": row[:5]} for row in rows]
    arguments = TrainingArguments(
        str(output), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, seed=3,
        save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        eval_strategy="steps" if best else "no", eval_steps=2, load_best_model_at_end=best,
    )  # fmt: skip
    model = injected(base, dropout=0.1)
    trainer = recipe()(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=[Stop()] * stop
    )
    if best:  # the losses get worse and worse: the first checkpoint is the best
        trainer.evaluate = lambda **_: {"eval_loss": trainer.state.global_step}  # type: ignore[method-assign, assignment]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_checkpoints_hold_the_adapter_and_training_goes_on_from_them(
    base: Path, tmp_path: Path
) -> None:
    whole = train(base, tmp_path / "whole")
    assert train(base, tmp_path / "parts", stop=True).state.global_step == 4
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert names(checkpoint) >= FILES | {"optimizer.pt"}
    assert not any(name.startswith(("model", "pytorch_model")) for name in names(checkpoint))
    resumed = train(base, tmp_path / "parts", resume=True)
    assert resumed.state.global_step == 8
    start = outputs(injected(base))
    assert not torch.equal(outputs(whole.model), start)
    assert torch.equal(outputs(resumed.model), outputs(whole.model))
    one, two = (
        minilora.read_adapter(tmp_path / run / "checkpoint-8").tensors for run in ("whole", "parts")
    )
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    again = BartForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    assert torch.equal(outputs(again), outputs(whole.model))


def test_the_trainer_loads_the_best_checkpoint(base: Path, tmp_path: Path) -> None:
    trainer = train(base, tmp_path, best=True)
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    best, last = (minilora.read_adapter(tmp_path / f"checkpoint-{n}").tensors for n in (2, 8))
    model = injected(base)
    minilora.load_adapter(model, tmp_path / "checkpoint-2")
    assert torch.equal(outputs(trainer.model), outputs(model))
    assert any(not torch.equal(tensor, last[key]) for key, tensor in best.items())
    trainer.save_model(tmp_path / "saved")
    saved = minilora.read_adapter(tmp_path / "saved").tensors
    assert all(torch.equal(tensor, saved[key]) for key, tensor in best.items())


def test_without_the_recipe_a_plain_trainer_refuses_to_go_on(base: Path, tmp_path: Path) -> None:
    """Rather than from the base."""
    checkpoint = tmp_path / "checkpoint-1"
    injected(base).save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    trainer = Trainer(
        injected(base), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    )
    with pytest.raises(ValueError, match="checkpoint"):
        trainer._load_from_checkpoint(str(checkpoint))


# fully_shard --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available()),
    reason="needs fork and torch.distributed",
)
def test_an_adapter_is_gathered_from_two_processes_after_fully_shard(tmp_path: Path) -> None:
    """A step on the same batch in both is the step of one, up to the order of its sums."""

    def step(model: Any) -> None:
        optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=1.0)
        model.eval()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()

    def build() -> Any:
        model = small_bart()
        config = LoRAConfig(rank=3, alpha=7, init="random", also_train=("layernorm_embedding",))
        minilora.inject(model, config, seed=0)
        return model

    def work(rank: int) -> int:
        torch.distributed.init_process_group("gloo")
        model = build()
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers, model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        assert model.get_parameter(PARTED).to_local().shape == (2 - rank, 16)
        step(model)
        minilora.save_adapter(model, tmp_path / f"of-{rank}")
        torch.distributed.barrier()
        for refused in (
            lambda: minilora.load_adapter(model, tmp_path / "of-0"),
            lambda: minilora.inject(model, LoRAConfig()),
            lambda: model.save_pretrained(tmp_path / "never"),
        ):
            with pytest.raises(LoRAError, match="fully_shard"):
                refused()
        torch.distributed.destroy_process_group()
        return 0

    printed = tmp_path / "printed"
    assert forked(2, work, printed) == [0, 0], [p.read_text() for p in printed.iterdir()]
    model = build()
    before = adapter_of(model).tensors
    step(model)
    wanted = adapter_of(model).tensors
    assert not (tmp_path / "of-1").exists()  # only the first process writes
    found = minilora.read_adapter(tmp_path / "of-0").tensors
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(tensor, before[key], atol=1e-3) for key, tensor in wanted.items())
    assert not (tmp_path / "never").exists()
