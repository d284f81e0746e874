"""Conventions of PEFT and transformers: heads, embeddings, token rows, targets, wrappers."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

import minilora
from minilora import LoRAConfig, LoRAError
from minilora.conventions import completed
from tests.conftest import State

SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip
SIDES: dict[str, Any] = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
LABELS: dict[str, Any] = {"num_labels": 3}
GPT2: dict[str, Any] = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2}
T5: dict[str, Any] = {
    "vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def bart(**more: Any) -> Any:
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**SIDES, scale_embedding=True, **more)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5)).eval()


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).eval()


IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 3, 3, 5, 58]])


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        try:
            output = model(input_ids=IDS)
        except ValueError:  # an encoder-decoder without decoder_start_token_id
            output = model(input_ids=IDS, decoder_input_ids=IDS)
    return torch.stack([v.float() for k, v in output.items() if k.endswith("logits")])


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in minilora.trainable_parameters(model):
        parameter.data.normal_(std=0.3)


HEADED: dict[str, tuple[str, Callable[[], Any], tuple[str, ...], str]] = {
    "Llama": ("SEQ_CLS", lambda: LlamaForSequenceClassification(
        LlamaConfig(**SMALL, pad_token_id=0, **LABELS)), ("q_proj",), "score.weight"),
    "GPT-2": ("SEQ_CLS", lambda: GPT2ForSequenceClassification(
        GPT2Config(**GPT2, pad_token_id=0, **LABELS)), ("c_attn",), "score.weight"),
    "DistilBERT": ("SEQ_CLS", lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=60, dim=16, hidden_dim=24, n_layers=1, n_heads=2, **LABELS)),
        ("q_lin",), "pre_classifier.weight"),
    "RoBERTa": ("SEQ_CLS", lambda: RobertaForSequenceClassification(
        RobertaConfig(**SMALL, **LABELS)), ("query", "dense"), "classifier.out_proj.weight"),
    "BERT": ("TOKEN_CLS", lambda: BertForTokenClassification(
        BertConfig(**SMALL, **LABELS)), ("query",), "classifier.weight"),
    "BERT, answers": ("QUESTION_ANS", lambda: BertForQuestionAnswering(BertConfig(**SMALL)),
                      ("query",), "qa_outputs.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADED)
def test_a_new_head_trains_and_goes_both_ways_between_peft_and_minilora(
    name: str, tmp_path: Path
) -> None:
    task_type, build, targets, weight = HEADED[name]
    torch.manual_seed(0)
    base = build().eval()
    ours = deepcopy(base)
    report = minilora.inject(ours, LoRAConfig(rank=2, targets=targets, task_type=task_type))
    assert weight in report.also
    theirs = peft.get_peft_model(
        deepcopy(base), peft.LoraConfig(r=2, target_modules=list(targets), task_type=task_type)
    )
    assert report.trainable == theirs.get_nb_trainable_parameters()[0]
    randomize(ours)
    assert not torch.equal(outputs(ours), outputs(base))
    minilora.save_adapter(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(outputs(loaded), outputs(ours), rtol=1e-6, atol=1e-6)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = deepcopy(base)
    minilora.load_adapter(fresh, tmp_path / "theirs")
    torch.testing.assert_close(outputs(fresh), outputs(theirs), rtol=1e-6, atol=1e-6)
    assert not torch.equal(outputs(fresh), outputs(ours))


def test_bart_s_classification_head_which_peft_leaves_frozen_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BartForSequenceClassification(BartConfig(**SIDES, eos_token_id=2, **LABELS)).eval()
    model = deepcopy(base)
    report = minilora.inject(model, LoRAConfig(rank=2, task_type="SEQ_CLS"))
    assert "classification_head.out_proj.weight" in report.also
    config = minilora.config_of(model)
    assert config is not None
    assert config.also_train == ("classification_head",)
    randomize(model)
    minilora.save_adapter(model, tmp_path)
    ids = torch.tensor([[4, 5, 6, 2]])
    loaded = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        before, after = base(input_ids=ids).logits, model.eval()(input_ids=ids).logits
        theirs = loaded(input_ids=ids).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(theirs, after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", HEADED)
def test_a_head_in_the_file_is_loaded_though_modules_to_save_is_null(
    name: str, tmp_path: Path
) -> None:
    task_type, build, targets, _ = HEADED[name]
    torch.manual_seed(0)
    base = build().eval()
    settings = peft.LoraConfig(r=2, target_modules=list(targets), task_type=task_type)
    theirs = peft.get_peft_model(deepcopy(base), settings)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))
    loaded = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    assert torch.equal(outputs(loaded), outputs(theirs))
    model = deepcopy(base)
    minilora.load_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(outputs(model), outputs(base), atol=1e-2)


def test_a_task_without_a_new_head_trains_the_adapter_alone() -> None:
    for task_type in ("SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION", None):
        model = bart()
        assert minilora.inject(model, LoRAConfig(rank=2, task_type=task_type)).also == ()


# Embeddings that PEFT saves ----------------------------------------------------------------------

EMBEDDED = {"BART": bart, "T5": t5, "Llama": llama, "Llama, tied": lambda: llama(tied=True)}


def two_more_tokens(build: Callable[[], Any]) -> Any:
    model = build()
    model.resize_token_embeddings(62, mean_resizing=False)
    return model


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_that_peft_saved_after_new_tokens_are_loaded(name: str, tmp_path: Path) -> None:
    targets = ["q"] if name == "T5" else ["q_proj"]
    theirs = peft.get_peft_model(
        two_more_tokens(EMBEDDED[name]), peft.LoraConfig(r=2, target_modules=targets)
    )
    randomize(theirs)
    with torch.no_grad():
        theirs.get_input_embeddings().weight.normal_()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    base = two_more_tokens(EMBEDDED[name])
    before = outputs(base)
    model = deepcopy(base)
    report = minilora.load_adapter(model, tmp_path / "theirs")
    assert not report.swapped
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-6, atol=1e-6)
    with minilora.disabled(model):
        assert torch.equal(outputs(model), before)
    assert minilora.load_adapter(model, tmp_path / "theirs").swapped
    minilora.save_adapter(model, tmp_path / "ours")  # and PEFT reads ours
    loaded = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(outputs(loaded), outputs(theirs), rtol=1e-6, atol=1e-6)
    copy = deepcopy(model)
    assert torch.equal(outputs(minilora.unload(copy)), before)
    torch.testing.assert_close(
        outputs(minilora.unwrap(model)), outputs(theirs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("whole", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_embeddings_that_train_whole_after_new_tokens_are_loaded(
    whole: list[str], tmp_path: Path
) -> None:
    """PEFT then writes each of them thrice, under the names of its wrapper too."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole)
    theirs = peft.get_peft_model(two_more_tokens(llama), settings)
    randomize(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("original_module" in key for key in keys)
    model = two_more_tokens(llama)
    assert (outputs(model) - outputs(theirs)).abs().max() > 1e-3
    minilora.load_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("bias", [False, True])
def test_the_base_of_an_adapted_head_is_loaded_as_peft_does(
    bias: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT saves it beside A and B. After new tokens it differs from the base that is loaded."""

    def build() -> Any:
        model = two_more_tokens(llama)
        if bias:
            model.lm_head.bias = nn.Parameter(torch.ones(62))
        return model

    settings = peft.LoraConfig(
        r=2, lora_alpha=7, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", **more
    )
    theirs = peft.get_peft_model(build(), settings)
    with torch.no_grad():
        for parameter in theirs.lm_head.base_layer.parameters():
            parameter.normal_()
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude" in name:  # what PEFT gives it for this base
                parameter.copy_(theirs.lm_head.base_layer.weight.norm(dim=1)[: len(parameter)])
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    held = minilora.read_adapter(tmp_path / "theirs").extras
    ends = {"weight", "bias"} if bias else {"weight"}
    assert {f"lm_head.base_layer.{end}" for end in ends} <= held.keys()
    base = build()
    before, model = outputs(base), deepcopy(base)
    assert not minilora.load_adapter(model, tmp_path / "theirs").swapped
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-5, atol=1e-5)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "theirs", is_trainable=True)
    assert not loaded.lm_head.base_layer.weight.requires_grad
    assert not any(p.requires_grad for p in model.lm_head.base.parameters())
    assert minilora.load_adapter(model, tmp_path / "theirs").swapped
    minilora.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    torch.testing.assert_close(outputs(again), outputs(theirs), rtol=1e-5, atol=1e-5)
    minilora.merge(model)
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-4, atol=1e-4)
    with minilora.disabled(model):
        assert torch.equal(outputs(model), before)
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(minilora.unload(deepcopy(model))), before)
    plain = minilora.unwrap(model)
    torch.testing.assert_close(outputs(plain), outputs(theirs), rtol=1e-4, atol=1e-4)


def test_embeddings_of_a_file_stay_frozen_as_in_peft(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    model = llama()
    minilora.load_adapter(model, tmp_path)
    count = sum(p.numel() for p in minilora.trainable_parameters(model))
    assert count == loaded.get_nb_trainable_parameters()[0]
    minilora.load_adapter(model.bfloat16(), tmp_path)  # nor does half precision matter


def test_a_whole_weight_that_is_no_embedding_and_is_not_named_is_refused(tmp_path: Path) -> None:
    model = llama()
    minilora.inject(model, LoRAConfig(rank=2))
    minilora.save_adapter(model, tmp_path)
    adapter = minilora.read_adapter(tmp_path)
    key = "base_model.model.model.layers.0.mlp.up_proj.weight"
    adapter.tensors[key] = model.get_parameter(key.removeprefix("base_model.model.")).detach()
    minilora.write_adapter(adapter, tmp_path)
    with pytest.raises(LoRAError, match=r"unexpected key .*up_proj\.weight"):
        minilora.load_adapter(llama(), tmp_path)


# Token rows --------------------------------------------------------------------------------------

ROWS = (3, 58)


def with_rows(name: str, **more: Any) -> Any:
    model = EMBEDDED[name]()
    minilora.inject(model, LoRAConfig(rank=2, token_rows=ROWS, **more))
    return model


@pytest.mark.parametrize("name", EMBEDDED)
def test_token_rows_go_both_ways_between_peft_and_minilora(name: str, tmp_path: Path) -> None:
    base = EMBEDDED[name]()
    ours = with_rows(name)
    # Not bit for bit: the rows' logits are a product of their own.
    torch.testing.assert_close(outputs(ours), outputs(base), rtol=1e-6, atol=1e-6)
    targets = ["q", "v"] if name == "T5" else ["q_proj", "v_proj"]
    settings = peft.LoraConfig(r=2, target_modules=targets, trainable_token_indices=list(ROWS))
    theirs = peft.get_peft_model(EMBEDDED[name](), settings)
    count = sum(p.numel() for p in minilora.trainable_parameters(ours))
    assert count == theirs.get_nb_trainable_parameters()[0]
    randomize(ours)
    assert not torch.equal(outputs(ours), outputs(base))
    minilora.save_adapter(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(EMBEDDED[name](), tmp_path / "ours")
    torch.testing.assert_close(outputs(loaded), outputs(ours), rtol=1e-5, atol=1e-5)
    randomize(theirs)
    with torch.no_grad():
        for n, parameter in theirs.named_parameters():
            if "trainable_tokens" in n:
                parameter.mul_(-2)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = EMBEDDED[name]()
    minilora.load_adapter(fresh, tmp_path / "theirs")
    torch.testing.assert_close(outputs(fresh), outputs(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs(fresh), outputs(ours), atol=1e-2)


def test_rows_of_other_tokens_replace_those_that_were_there(tmp_path: Path) -> None:
    files = {}
    for rows in ((3, 5), (7, 9), (9, 7)):
        model = llama()
        minilora.inject(model, LoRAConfig(rank=2, token_rows=rows))
        randomize(model)
        minilora.save_adapter(model, files.setdefault(rows, tmp_path / str(rows)))
    model = llama()
    for rows, folder in files.items():
        assert not minilora.load_adapter(model, folder).swapped
        loaded = peft.PeftModel.from_pretrained(llama(), folder)
        torch.testing.assert_close(outputs(model), outputs(loaded), rtol=1e-5, atol=1e-5)
        config = minilora.config_of(model)
        assert config is not None
        assert config.token_rows == rows
    assert minilora.load_adapter(model, files[9, 7]).swapped


def test_rows_of_another_embedding_are_refused_with_advice(tmp_path: Path) -> None:
    for rows, message in (
        ({"lm_head": [1]}, "only rows of the input embeddings train here"),
        (
            {"embed_tokens": [1], "lm_head": [1]},
            "several, embed_tokens, lm_head: merge it into",
        ),
    ):
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows)
        peft.get_peft_model(llama(), settings).save_pretrained(tmp_path)
        with pytest.raises(LoRAError, match=message):
            minilora.load_adapter(llama(), tmp_path)


def test_an_adapted_embedding_is_refused_with_advice(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    peft.get_peft_model(llama(), settings).save_pretrained(tmp_path)
    with pytest.raises(LoRAError, match="lora_embedding_A: embeddings are not adapted here: merge"):
        minilora.load_adapter(llama(), tmp_path)


def test_the_frozen_embeddings_beside_token_rows_are_refused_by_name(tmp_path: Path) -> None:
    """PEFT can write them too: those of a vocabulary that was resized are no base's."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3])
    theirs = peft.get_peft_model(llama(), settings)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    held = minilora.read_adapter(tmp_path).tensors
    key = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    assert key in held
    model = llama()
    before = outputs(model)
    with pytest.raises(LoRAError, match=f"unexpected key {re.escape(key)}"):
        minilora.load_adapter(model, tmp_path)
    assert minilora.config_of(model) is None
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("name", EMBEDDED)
def test_token_rows_are_disabled_unloaded_and_written_into_the_weight(name: str) -> None:
    base = EMBEDDED[name]()
    before, model = outputs(base), with_rows(name)
    randomize(model)
    trained = outputs(model)
    with minilora.disabled(model):
        assert torch.equal(outputs(model), before)
    assert torch.equal(outputs(model), trained)
    copy = deepcopy(model)
    assert torch.equal(outputs(copy), trained)
    unloaded = minilora.unload(copy)
    assert torch.equal(outputs(unloaded), before)
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert not any(module._forward_hooks for module in unloaded.modules())
    assert torch.equal(outputs(model), trained)  # the copy had rows and hooks of its own
    plain = minilora.unwrap(model)
    torch.testing.assert_close(outputs(plain), trained, rtol=1e-5, atol=1e-5)
    changed = (plain.get_input_embeddings().weight != base.get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == list(ROWS)


@pytest.mark.parametrize("name", EMBEDDED)
def test_only_the_rows_train_and_by_the_gradient_that_peft_has(name: str) -> None:
    model = with_rows(name, init="random").train()
    targets = ["q", "v"] if name == "T5" else ["q_proj", "v_proj"]
    settings = peft.LoraConfig(r=2, target_modules=targets, trainable_token_indices=list(ROWS))
    theirs = peft.get_peft_model(EMBEDDED[name](), settings)
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    with minilora.verify_training(model, optimizer) as report:
        for step in range(2):
            loss = model.eval()(input_ids=IDS, labels=IDS).loss
            loss.backward()
            if not step:
                rows = model.get_input_embeddings().token_rows.grad.clone()
            optimizer.step()
    assert report.problems == []
    base = EMBEDDED[name]()
    minilora.inject(base, LoRAConfig(rank=2, token_rows=ROWS))
    base.eval()(input_ids=IDS, labels=IDS).loss.backward()
    theirs.eval()(input_ids=IDS, labels=IDS).loss.backward()
    (wanted,) = (p.grad for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n)
    torch.testing.assert_close(
        base.get_input_embeddings().token_rows.grad, wanted, rtol=1e-4, atol=1e-6
    )
    assert rows.any()


def test_token_rows_are_said_by_name_in_peft_s_file(tmp_path: Path) -> None:
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": list(ROWS)}
    )
    theirs = peft.get_peft_model(llama(), settings)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    model = llama()
    minilora.load_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ((60,), {}, "0 to 59"),
        ((-1,), {}, "0 to 59"),
        ((3, 3), {}, "must differ"),
        ((3,), {"also_train": ("embed_tokens",)}, "trains whole"),
        ((1.5,), {}, "whole numbers"),
    ],
)
def test_wrong_token_rows_are_refused(rows: Any, more: dict[str, Any], message: str) -> None:
    model = llama()
    before = set(model.state_dict())
    with pytest.raises(LoRAError, match=message):
        minilora.inject(model, LoRAConfig(rank=2, token_rows=rows, **more))
    assert set(model.state_dict()) == before


def test_rows_that_the_embeddings_change_do_not_train() -> None:
    class Normed(nn.Embedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y / y.norm(dim=-1, keepdim=True)

    for kind, more in ((Normed, {}), (nn.Embedding, {"max_norm": 0.1})):
        model = llama()
        weight = model.get_input_embeddings().weight.detach()
        model.set_input_embeddings(kind(*weight.shape, _weight=weight, **more))
        before = State.of(model)
        with pytest.raises(LoRAError, match=f"a {kind.__name__}, changes its rows"):
            minilora.inject(model, LoRAConfig(rank=2, token_rows=(3,)))
        before.check(model)


def test_rows_beyond_float16_are_refused_before_anything_changes(tmp_path: Path) -> None:
    model = llama()
    minilora.inject(model, LoRAConfig(rank=2, token_rows=(3, 5)))
    rows = model.get_input_embeddings().token_rows
    rows.data[0, 0] = 1e6
    minilora.save_adapter(model, tmp_path)
    model.half()
    rows.data = rows.data.float()
    rows.data[0, 0] = 1e6
    before = State.of(model)
    with pytest.raises(
        LoRAError, match=r"token_rows .* not finite in torch\.float16: try model\.f"
    ):
        minilora.unwrap(model)
    before.check(model)
    assert minilora.unwrap(model.float()).get_input_embeddings().weight[3, 0] == 1e6


def test_values_beyond_float16_are_not_loaded(tmp_path: Path) -> None:
    """Whole modules: their numbers become those of the base's dtype."""
    model = llama()
    minilora.inject(model, LoRAConfig(rank=2, also_train=("norm",)))
    model.get_parameter("model.norm.weight").data[0] = 1e6
    minilora.save_adapter(model, tmp_path)
    half = llama().half()
    before = State.of(half)
    with pytest.raises(LoRAError, match=r"norm\.weight does not fit torch\.float16"):
        minilora.load_adapter(half, tmp_path, inference=True)
    before.check(half)


def test_a_model_without_named_embeddings_has_no_token_rows() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    with pytest.raises(LoRAError, match="does not name its input embeddings"):
        minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",), token_rows=(1,)))


# Wrappers ----------------------------------------------------------------------------------------

ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_with_peft_s_adapter_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(bart(), ADAPTERS[name]())
    flags = [p.requires_grad for p in wrapped.parameters()]
    mine = bart()
    minilora.inject(mine, LoRAConfig(rank=2))
    minilora.save_adapter(mine, tmp_path)
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(LoRAError, match=r"PEFT's adapter .* take model.unload\(\)"):
            minilora.inject(model, LoRAConfig(rank=2))
        with pytest.raises(LoRAError, match="PEFT's adapter"):
            minilora.load_adapter(model, tmp_path)
    assert [p.requires_grad for p in wrapped.parameters()] == flags
    assert minilora.inject(wrapped.unload(), LoRAConfig(rank=2)).modules  # as the message says


def test_a_model_with_peft_s_prompt_is_refused_too() -> None:
    """No layer of it is PEFT's, but every name begins with `base_model.`."""
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(LoRAError, match="PEFT's adapter"):
        minilora.inject(peft.get_peft_model(llama(), prompt), LoRAConfig(rank=2))


def test_a_module_of_one_s_own_called_base_layer_is_no_adapter_of_peft_s() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(8, 8)})
    assert minilora.inject(model, LoRAConfig(rank=2, targets=("base_layer",))).modules


def offloaded(folder: Path) -> Any:
    import accelerate  # type: ignore[import-untyped]

    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(names, "cpu") | {"model.layers": "disk"}
    return accelerate.dispatch_model(
        llama(), places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def test_offloaded_weights_are_refused_in_one_line_and_shapes_can_be_injected(
    tmp_path: Path,
) -> None:
    donor = llama()
    minilora.inject(donor, LoRAConfig(rank=2))
    minilora.save_adapter(donor, tmp_path / "adapter")
    model = offloaded(tmp_path / "weights")
    before = outputs(model)
    assert torch.equal(before, outputs(llama()))
    with torch.device("meta"):
        shapes = llama()
    for build in (lambda: minilora.inject(model, LoRAConfig(rank=2)),
                  lambda: minilora.load_adapter(model, tmp_path / "adapter", inference=True),
                  lambda: minilora.quantize(model),
                  lambda: minilora.load_adapter(shapes, tmp_path / "adapter")):  # fmt: skip
        with pytest.raises(LoRAError, match=r"is offloaded|on the meta device: load") as e:
            build()
        assert "\n" not in str(e.value)
    assert torch.equal(outputs(model), before)
    assert len(minilora.inject(shapes, LoRAConfig(rank=2, dora=True)).modules) == 2


def test_keys_from_before_transformers_4_52_are_refused_with_advice(tmp_path: Path) -> None:
    model = nn.ModuleDict({"language_model": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
    minilora.save_adapter(model, tmp_path)
    adapter = minilora.read_adapter(tmp_path)
    moved = {k.replace("language_model", "language_model.model"): t for k, t in
             adapter.tensors.items()}  # fmt: skip
    minilora.write_adapter(minilora.Adapter(adapter.config, moved), tmp_path)
    with pytest.raises(LoRAError, match=r"no such module; nearest: .*; PEFT knows older names"):
        minilora.load_adapter(model, tmp_path)


# Default targets ---------------------------------------------------------------------------------


QUERIES = {"q_proj", "q", "query", "query_proj", "c_attn", "query_key_value", "Wqkv", "qkv_proj",
           "in_proj"}  # fmt: skip
VALUES = {"v_proj", "v", "value", "value_proj"}
LISTS = {tuple(names) for names in PEFT_TARGETS.values() if isinstance(names, list)}


@pytest.mark.parametrize("names", sorted(names for names in LISTS if QUERIES & {*names}))
def test_a_default_of_peft_s_is_found_by_its_names(names: tuple[str, ...]) -> None:
    """Of all families with queries. Beside them PEFT lists keys and feed-forward layers of some."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in {*names, "out_proj", "fc9"}})
    assert set(completed(model, LoRAConfig()).targets) == {*names} & (QUERIES | VALUES)


def test_the_default_is_query_and_value_of_any_model() -> None:
    assert LoRAConfig().targets == "attention"
    for build, names in ((bart, ("q_proj", "v_proj")), (t5, ("q", "v"))):
        model = build()
        report = minilora.inject(model, LoRAConfig(rank=2))
        assert {name.rpartition(".")[2] for name in report.modules} == set(names)
        config = minilora.config_of(model)
        assert config is not None
        assert config.targets == names


def test_attention_is_what_the_model_calls_it_in_every_function() -> None:
    base = t5()
    tuned = deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith((".q.weight", ".v.weight")):
                parameter.add_(torch.ones_like(parameter))  # of rank 1
    fitted = minilora.extract(tuned, base, rank=1, targets="attention")
    ends = {module.rpartition(".")[2] for module in fitted.modules}
    assert (ends, len(fitted.modules)) == ({"q", "v"}, 6)
    assert fitted.left_out == ()
    both = minilora.combine([fitted, fitted], weights=[0.5, 0.25])
    assert both.modules == fitted.modules
    A, B = both.pair(fitted.modules[0])
    torch.testing.assert_close(B @ A, torch.full_like(B @ A, 0.75), rtol=0, atol=1e-5)
    wide = T5ForConditionalGeneration(T5Config(**T5 | {"d_model": 64, "d_kv": 32}))
    report = minilora.quantize(wide, targets="attention")
    assert {name.rpartition(".")[2] for name in report.modules} == {"q", "v"}
    assert len(report.modules) == 6
    with pytest.raises(LoRAError, match="no known projections"):
        minilora.quantize(nn.Sequential(nn.Linear(64, 64)), targets="attention")


def test_attention_goes_with_layers_as_names_do() -> None:
    model = bart()
    report = minilora.inject(model, LoRAConfig(rank=2, layers=(0,)))
    assert len(report.modules) == 6


@pytest.mark.parametrize(("build", "name", "near"), [(t5, "q_proj", "q"), (bart, "q", "q_proj")])
def test_another_model_s_name_is_answered_with_this_one_s(
    build: Callable[[], Any], name: str, near: str
) -> None:
    message = f"targets: '{name}': nothing matches it in the model; nearest: {near}$"
    with pytest.raises(LoRAError, match=message):
        minilora.inject(build(), LoRAConfig(rank=2, targets=(name,)))


def test_a_model_whose_projections_have_other_names_is_told_to_name_them() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    with pytest.raises(LoRAError, match="'attention': no known projections"):
        minilora.inject(model, LoRAConfig(rank=2))
