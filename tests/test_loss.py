"""The loss over real positions only equals transformers' own, and so do its gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

from minilora.summarization.training.loss import summed_loss

VOCABULARY = 50
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
} | {"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 32}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
T5 |= {"num_heads": 2, "decoder_start_token_id": 0, "initializer_factor": 3.0}


def gemma() -> T5GemmaForConditionalGeneration:
    side = T5GemmaModuleConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    config = T5GemmaConfig(encoder=side, decoder=side, vocab_size=VOCABULARY)
    return T5GemmaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SIDES, init_std=0.3)),
    "bart, scaled and untied": lambda: BartForConditionalGeneration(
        BartConfig(**SIDES, scale_embedding=True, tie_word_embeddings=False, init_std=0.3)
    ),
    "t5, tied, its head scaled": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5, untied": lambda: T5ForConditionalGeneration(
        T5Config(**T5, tie_word_embeddings=False)  # type: ignore[call-arg]
    ),
    "mbart, which starts with the language": lambda: MBartForConditionalGeneration(
        MBartConfig(**SIDES, init_std=0.3)
    ),
    "marian, with a bias on the logits": lambda: MarianMTModel(
        MarianConfig(**SIDES, pad_token_id=1, decoder_start_token_id=1, init_std=0.3)
    ),
    "nllb, which shifts in its forward only": lambda: M2M100ForConditionalGeneration(
        M2M100Config(**SIDES, init_std=0.3)
    ),
    "blenderbot, which shifts in its forward only": lambda: BlenderbotForConditionalGeneration(
        BlenderbotConfig(**SIDES, init_std=0.3)
    ),
    "t5gemma, whose head lies in a module of its own": gemma,
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def batch(lengths: tuple[int, ...] = (7, 2, 4), width: int = 9) -> dict[str, Tensor]:
    """Targets of unlike length, padded with -100, and one source padded too."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (len(lengths), width), generator=draw)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 1, 0
    labels = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=draw)
    for row, length in enumerate(lengths):
        labels[row, length - 1] = 2
        labels[row, length:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_loss_and_gradients(name: str) -> None:
    model, rows = make(name), batch()
    own = model(**rows, use_cache=False).loss
    own.backward()
    wanted = gradients(model)
    loss, count = summed_loss(model, rows)
    (loss / count).backward()
    found = gradients(model)
    assert count == 13
    assert own.item() > 0.1
    torch.testing.assert_close(loss / count, own, rtol=2e-6, atol=1e-6)
    assert found.keys() == wanted.keys()
    assert max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-3
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_sees_real_rows_only(name: str) -> None:
    model, seen = make(name), []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, out: seen.append(tuple(inputs[0].shape)))
    _, count = summed_loss(model, batch())
    hook.remove()
    assert seen == [(count, 16)]


def test_a_head_called_otherwise_sees_all_rows_and_the_sum_is_right() -> None:
    """ProphetNet predicts several tokens ahead: hidden states (b, n-gram, t, d)."""
    torch.manual_seed(0)
    sides = {
        f"num_{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2))
    }
    config = ProphetNetConfig(
        vocab_size=VOCABULARY, hidden_size=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sides
    )
    model, rows = ProphetNetForConditionalGeneration(config).eval(), batch()
    loss, count = summed_loss(model, rows)
    shifted = model.prepare_decoder_input_ids_from_labels(rows["labels"])
    logits = model(rows["input_ids"], rows["attention_mask"], shifted, use_cache=False).logits
    wanted = nn.functional.cross_entropy(
        logits.flatten(0, 1), rows["labels"].flatten(), reduction="sum"
    )
    assert count == 13
    torch.testing.assert_close(loss, wanted)


def test_padding_of_the_targets_changes_nothing() -> None:
    """The same rows one by one, without any padding of targets."""
    model, rows = make("bart"), batch()
    together, count = summed_loss(model, rows)
    apart = []
    for i, length in enumerate((7, 2, 4)):
        one = {key: tensor[i : i + 1] for key, tensor in rows.items()}
        one["labels"] = one["labels"][:, :length]
        apart.append(summed_loss(model, one))
    assert sum(n for _, n in apart) == count
    torch.testing.assert_close(sum(loss for loss, _ in apart), together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_sum_is_float32(dtype: torch.dtype) -> None:
    model, rows = make("bart"), batch()
    with torch.autocast("cpu", dtype):
        loss, _ = summed_loss(model, rows)
    exact, _ = summed_loss(model, rows)
    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_the_hook_goes_also_after_an_error() -> None:
    model, rows = make("bart"), batch()
    head = model.get_output_embeddings()
    summed_loss(model, rows)
    assert not head._forward_pre_hooks
    rows["input_ids"] = rows["input_ids"] + 10**6
    with pytest.raises(IndexError):
        summed_loss(model, rows)
    assert not head._forward_pre_hooks
    assert model(**batch(), use_cache=False).logits.shape == (3, 7, VOCABULARY)


FROZEN = [n for n in MODELS if "t5gemma" not in n]


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 2**20])
@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_head_in_chunks_gives_the_same_loss_and_gradients(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make(name), batch()
    model.get_output_embeddings().requires_grad_(False)
    own = model(**rows, use_cache=False).loss
    own.backward()
    wanted = gradients(model)
    monkeypatch.setattr("minilora.summarization.training.loss.CHUNK", chunk)
    loss, count = summed_loss(model, rows)
    assert loss.grad_fn.name() == "FrozenHeadLossBackward"
    (loss / count).backward()
    found = gradients(model)
    torch.testing.assert_close(loss / count, own, rtol=2e-6, atol=1e-6)
    assert found.keys() == wanted.keys()
    assert max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-3
    for key, gradient in wanted.items():
        # T5's random logits are so large that either way is off by 5e-5 of the largest entry
        atol = 2e-6 + 2e-4 * gradient.abs().max().item()
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=atol, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(model, rows)[0], loss)


def test_in_chunks_the_logits_are_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = make("bart"), []
    model.get_output_embeddings().requires_grad_(False)
    monkeypatch.setattr("minilora.summarization.training.loss.CHUNK", 2 * VOCABULARY)
    softmax = Tensor.log_softmax
    monkeypatch.setattr(
        Tensor, "log_softmax", lambda z, **more: sizes.append(tuple(z.shape)) or softmax(z, **more)
    )
    _, count = summed_loss(model, batch())
    assert sizes == [(2, VOCABULARY)] * (count // 2) + [(1, VOCABULARY)]


def test_what_is_done_to_logits_after_the_head_is_not_lost() -> None:
    """T5Gemma caps them: its head, though frozen, is called by the model for all rows."""
    model, rows = make("t5gemma, whose head lies in a module of its own"), batch()
    model.config.final_logit_softcapping = 0.5
    model.get_output_embeddings().requires_grad_(False)
    own = model(**rows, use_cache=False).loss
    loss, count = summed_loss(model, rows)
    torch.testing.assert_close(loss / count, own)
