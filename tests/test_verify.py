"""verify_training: every fault that it names is made here, and it names nothing else."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration

import minilora
from minilora import LoRAConfig, TrainingReport, verify_training
from minilora.verify import checksum
from tests.marks import slow_but

LISTS = ("not_in_optimizer", "no_gradient", "not_moved", "base_changed")


class Two(nn.Module):
    """Two linears, the second of which a flag leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.uses_second = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return self.second(y) if self.uses_second else y


def injected(**more: Any) -> Two:
    torch.manual_seed(0)
    model = Two()
    minilora.inject(model, LoRAConfig(rank=2, targets=("first", "second"), **more))
    model.norm.eval()
    return model


def adamw(model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(minilora.trainable_parameters(model), **{"lr": 1e-2} | more)


def steps(model: nn.Module, optimizer: Any, count: int = 3) -> TrainingReport:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with verify_training(model, optimizer) as report:
        for _ in range(count):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return report


def test_steps_that_are_right_are_reported_as_right() -> None:
    model = injected()
    report = steps(model, adamw(model))
    assert report.problems == []
    assert report.steps == 3
    assert report.moved == {
        f"{layer}.lora_{factor}": 1.0 for layer in ("first", "second") for factor in "AB"
    }
    assert str(report) == (
        "3 steps: 4 tensors train, all entries of each changed; the base is unchanged"
    )


def test_an_adapter_that_is_merged_for_good_in_the_block_changes_the_base() -> None:
    model = injected()
    optimizer = adamw(model)
    with verify_training(model, optimizer) as report:
        for _ in range(2):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
        minilora.unwrap(model)
    assert report.base_changed == ("first.base.weight", "second.base.weight")
    assert report.not_moved == ()


def test_the_steps_are_the_same_as_without_the_check() -> None:
    watched, plain = injected(), injected()
    steps(watched, adamw(watched))
    optimizer = adamw(plain)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        plain(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = plain.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in watched.state_dict().items())


def test_an_adapter_outside_the_optimizer_is_named() -> None:
    model = injected(init="random")  # with B = 0 for good A would get no gradient either
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and "first" in name]
    report = steps(model, torch.optim.AdamW(parameters, lr=1e-2))
    assert report.not_in_optimizer == ("second.lora_A", "second.lora_B")
    assert report.not_moved == report.not_in_optimizer
    assert report.no_gradient == report.base_changed == ()


def test_an_adapter_without_gradient_is_named_though_weight_decay_moves_it() -> None:
    model = injected(init="random")  # B is not zero: weight decay moves it
    model.uses_second = False
    report = steps(model, adamw(model))
    assert report.no_gradient == report.not_moved == ("second.lora_A", "second.lora_B")
    for name, parameter in model.named_parameters():
        if name in report.no_gradient:
            parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(model, weight_decay=0.1)
    x = torch.randn(4, 8)
    with verify_training(model, optimizer) as report:
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert report.no_gradient == ("second.lora_A", "second.lora_B")
    assert report.not_moved == ()


def test_an_adapter_that_does_not_move_is_named() -> None:
    model = injected()
    groups = [
        {"params": model.first.parameters()},
        {"params": model.second.parameters(), "lr": 0.0},
    ]
    report = steps(model, torch.optim.SGD(groups, lr=1e-2))
    assert report.not_moved == ("second.lora_A", "second.lora_B")
    assert report.no_gradient == ("second.lora_A",)  # since B stays zero
    assert report.not_in_optimizer == report.base_changed == ()


def test_entries_that_a_half_precision_step_does_not_move_are_counted() -> None:
    model = injected().to(torch.bfloat16)
    for layer in (model.first, model.second):
        layer.lora_A.data.fill_(1.0)  # 1 - 1e-4 is 1 in bfloat16
    optimizer = adamw(model, lr=1e-4, weight_decay=0.0)
    with verify_training(model, optimizer) as report:
        for _ in range(3):
            model(torch.ones(4, 8, dtype=torch.bfloat16)).square().sum().backward()
            optimizer.step()
    assert report.not_moved == ("first.lora_A", "second.lora_A")
    assert report.no_gradient == ()
    assert report.moved["first.lora_B"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_moves_by_one_bit_is_named(dtype: torch.dtype) -> None:
    model = injected().to(dtype)
    optimizer = adamw(model)
    with verify_training(model, optimizer) as report:
        for _ in range(2):
            model(torch.ones(4, 8, dtype=dtype)).square().sum().backward()
            optimizer.step()
        weight = model.second.weight.data
        weight.view(torch.int16)[3, 5] ^= 1
    assert report.base_changed == ("second.base.weight",)
    assert str(report).splitlines()[0].endswith("the base changed")
    assert str(report).splitlines()[1] == "  base changed: second.base.weight"


def test_a_frozen_weight_that_weight_decay_moves_is_named() -> None:
    model = injected()
    model.first.base.weight.grad = torch.zeros(8, 8)  # left from before it was frozen
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with verify_training(model, optimizer) as report:
        for _ in range(3):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
    assert report.base_changed == ("first.base.weight",)
    assert report.no_gradient == report.not_moved == ()


def test_running_statistics_of_the_base_count_and_those_of_what_trains_whole_do_not() -> None:
    model = injected()
    model.norm.train()
    changed = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(steps(model, adamw(model)).base_changed) == changed
    model = injected(also_train=("norm",))
    model.norm.train()
    assert steps(model, adamw(model)).problems == []


def test_an_optimizer_that_takes_no_step_is_named() -> None:
    model = injected()
    with verify_training(model, adamw(model)) as report:
        model(torch.ones(4, 8)).sum().backward()
    assert report.problems[0] == "the optimizer took no step"
    assert str(report).startswith("0 steps: ")
    assert str(TrainingReport(steps=1)).startswith("1 step: ")


def test_a_model_in_which_nothing_trains_is_refused() -> None:
    model = Two().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(minilora.LoRAError, match="nothing in the model trains"):  # noqa: SIM117
        with verify_training(model, optimizer):
            pass


def test_an_error_in_the_block_passes_and_leaves_no_hook() -> None:
    model = injected()
    optimizer = adamw(model)
    with pytest.raises(KeyError), verify_training(model, optimizer) as report:
        raise KeyError
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    assert report.steps == 0
    assert not any(p._post_accumulate_grad_hooks for p in minilora.trainable_parameters(model))


def test_four_bits_are_watched_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    minilora.quantize(model, targets=("0", "2"))
    minilora.inject(model, LoRAConfig(rank=2, targets=("0", "2")))
    optimizer = adamw(model)
    x = torch.randn(4, 64)
    for change in (0, 1):
        with verify_training(model, optimizer) as report:
            for _ in range(3):
                model(x).square().sum().backward()
                optimizer.step()
            codes = next(b for b in model[0].base.buffers() if b.dtype == torch.uint8)
            codes.view(-1)[7] ^= change
        assert len(report.base_changed) == change
        assert report.not_moved == report.no_gradient == ()


def small_bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sides = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=60, **sides, **heads))


@pytest.mark.parametrize("who", ["minilora", "peft"])
def test_a_bart_of_minilora_or_of_peft_is_right_and_a_tied_weight_counts_once(who: str) -> None:
    model: Any = small_bart()
    if who == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    else:
        minilora.inject(model, LoRAConfig(targets=("q_proj", "v_proj")))
    optimizer = adamw(model)
    ids = torch.randint(4, 60, (2, 6))
    with verify_training(model, optimizer) as report:
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        model.get_input_embeddings().weight.data.view(torch.int32)[9, 9] ^= 1
    assert len(report.base_changed) == 1  # shared, embed_tokens and lm_head are one tensor
    assert len(report.moved) == 2 * 2 * 3
    assert report.not_moved == report.no_gradient == report.not_in_optimizer == ()


def test_accelerate_s_optimizer_and_a_wrapped_model_are_looked_through() -> None:
    from accelerate import Accelerator  # type: ignore[import-untyped]

    model = injected()
    optimizer = Accelerator(cpu=True).prepare(adamw(model))
    report = steps(torch.compile(model, backend="eager"), optimizer)
    assert report.problems == []
    assert "first.lora_A" in report.moved


class Made(TorchDispatchMode):
    """The largest tensor that the operations in the block make, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        old = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in old:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def test_the_base_is_passed_over_once_on_entry_and_once_on_exit_and_never_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False))  # 16 MiB
    minilora.inject(model, LoRAConfig(rank=2, targets=("0",)))
    seen = []
    monkeypatch.setattr("minilora.verify.checksum", lambda t: seen.append(t) or checksum(t))
    with Made() as made:
        steps_of = verify_training(model, adamw(model))
        with steps_of:
            entered = len(seen)
    assert made.largest <= 2**18 * 8
    assert (entered, len(seen)) == (1, 2)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
          torch.bool, torch.float8_e4m3fn, torch.complex128)  # fmt: skip


@pytest.mark.parametrize("dtype", slow_but((torch.bfloat16,), DTYPES), ids=str)
def test_a_checksum_sees_one_bit_anywhere_and_two_that_change_places(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2, (3, 16), dtype=torch.uint8)
    tensor = bits.bool() if dtype == torch.bool else bits.repeat(1, 4).view(dtype)
    before, width = checksum(tensor), tensor.view(torch.uint8).shape[1]
    for row, column, bit in itertools.product(range(3), range(width), range(8)):
        if dtype == torch.bool and bit:
            continue
        tensor.view(torch.uint8)[row, column] ^= 1 << bit
        assert checksum(tensor) != before, (row, column, bit)
        tensor.view(torch.uint8)[row, column] ^= 1 << bit
    assert checksum(tensor) == before


def test_a_checksum_sees_what_sums_do_not() -> None:
    tensor = torch.randn(2**19 + 5, generator=torch.Generator().manual_seed(0))
    before = checksum(tensor)
    for a, b in [(0, 1), (7, 7 + 2**18), (2**19, 2**19 + 4)]:  # in a chunk, across, in the last
        swapped = tensor.clone()
        swapped[[a, b]] = tensor[[b, a]]
        assert checksum(swapped) != before
        negated = tensor.clone()
        negated[[a, b]] *= -1  # two sign bits
        assert checksum(negated) != before
    words, chunk = torch.zeros(2**18 + 1, dtype=torch.int32), 2**18
    unchanged = checksum(words)
    for a, b in itertools.product(range(-5, 6), repeat=2):  # 3 and -1 cancel if chunks count 1, 3
        words[0], words[chunk] = a, b
        assert (checksum(words) == unchanged) == (a == b == 0)
    assert checksum(tensor.view(1, -1).T) == before  # strides do not count, values do
    assert checksum(torch.empty(0)) == checksum(torch.empty(0, 3))
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(2.0))
