"""A table of transformers' models as toys, each through everything, and equal to PEFT.

Inject with the default targets, three training steps, save, load, merge, unwrap, decode. A model is
its configuration class with the small values of SMALL where the class has such a field.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import Tensor, nn

import minilora
from minilora import LoRAConfig

WIDTH, HEADS, LAYERS, INNER = 16, 2, 2, 24
SMALL: dict[str, Any] = {
    "vocab_size": 60, "encoder_vocab_size": 60, "decoder_vocab_size": 60, "src_vocab_size": 60,
    "tgt_vocab_size": 60,
    **dict.fromkeys(("d_model", "hidden_size", "n_embd", "embed_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers",
                     "num_hidden_layers", "num_encoder_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_heads",
                     "num_attention_heads", "num_encoder_attention_heads", "n_head",
                     "num_decoder_attention_heads", "num_key_value_heads"), HEADS),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size", "d_ff", "n_inner"),
                    INNER),
    "d_kv": WIDTH // HEADS, "head_dim": WIDTH // HEADS,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions",
                     "max_target_positions"), 64),
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "scale_embedding": True,
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "router_jitter_noise"), 0.0),
    "num_experts": 2, "num_local_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
    "num_mel_bins": 8, "init_std": 0.2, "initializer_range": 0.2,
}  # fmt: skip


def small(config: str, **more: Any) -> Any:
    """The configuration class of this name with the small values of the fields that it has."""
    kind = getattr(transformers, f"{config}Config")
    default = kind()
    fields = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    if config == "ProphetNet":  # it has the field to say that it must not be set
        del fields["num_hidden_layers"]
    return kind(**fields | more)


IDS = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 2], [11, 12, 13, 14, 15, 16, 17, 2]])
LABELS = torch.tensor([[21, 22, 23, 2], [24, 25, 26, 2]])


@dataclass(frozen=True)
class Toy:
    """A model, what goes in beside the defaults, and what is particular about it."""

    model: str
    config: str | Callable[[], Any]
    more: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] | None = None
    labels: Tensor | None = LABELS
    cache: bool = True

    def build(self) -> Any:
        torch.manual_seed(0)
        config = small(self.config, **self.more) if isinstance(self.config, str) else self.config()
        return getattr(transformers, self.model)(config).eval()


def seq2seq(name: str, **more: Any) -> Toy:
    return Toy(f"{name}ForConditionalGeneration", name, more)


def bert2bert() -> Any:
    decoder = small("Bert", is_decoder=True, add_cross_attention=True)
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        small("Bert"), decoder, pad_token_id=1, decoder_start_token_id=2, eos_token_id=2
    )


def t5gemma() -> Any:
    side = small("T5GemmaModule" if hasattr(transformers, "T5GemmaModuleConfig") else "Gemma2")
    ends: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    sides: dict[str, Any] = {"encoder": side.to_dict(), "decoder": side.to_dict()}
    return transformers.T5GemmaConfig(vocab_size=60, **sides, **ends)


SPEECH = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(0))
BLOCKS = {"block_size": 4, "num_random_blocks": 1, "attention_type": "original_full"}
ENCODER_DECODERS = {
    "BART": seq2seq("Bart"),
    "mBART": seq2seq("MBart"),
    "T5": seq2seq("T5", decoder_start_token_id=1),
    "mT5": seq2seq("MT5"),
    "LongT5": seq2seq("LongT5", decoder_start_token_id=1, local_radius=4),
    "LongT5, global": seq2seq("LongT5", decoder_start_token_id=1, local_radius=4,
                              global_block_size=4, encoder_attention_type="transient-global"),
    "UMT5": seq2seq("UMT5"),
    "Pegasus": seq2seq("Pegasus"),
    "Pegasus-X": seq2seq("PegasusX", num_global_tokens=2, block_size=4),
    "BigBird-Pegasus": seq2seq("BigBirdPegasus", **BLOCKS),
    "LED": seq2seq("LED", attention_window=[4, 4], max_encoder_position_embeddings=64,
                   max_decoder_position_embeddings=64),
    "Marian": Toy("MarianMTModel", "Marian"),
    "M2M100": seq2seq("M2M100"),
    "NLLB-MoE": seq2seq("NllbMoe"),
    "Blenderbot": seq2seq("Blenderbot"),
    "Blenderbot small": seq2seq("BlenderbotSmall"),
    "ProphetNet": Toy("ProphetNetForConditionalGeneration", "ProphetNet", {
        "ngram": 2, "num_buckets": 8, "relative_max_distance": 16},
        cache=False),  # by itself it cannot decode with one, in transformers 5
    "Switch": seq2seq("SwitchTransformers", decoder_start_token_id=1),
    "T5Gemma": Toy("T5GemmaForConditionalGeneration", t5gemma),
    "PLBart": seq2seq("PLBart"),
    "MVP": seq2seq("Mvp"),
    "FSMT": Toy("FSMTForConditionalGeneration", "FSMT", {"langs": ["en", "de"]}, labels=IDS),
    "Whisper": Toy("WhisperForConditionalGeneration", "Whisper", {
        "suppress_tokens": [], "begin_suppress_tokens": [], "max_source_positions": 64},
        {"input_features": SPEECH}),
    "bert2bert": Toy("EncoderDecoderModel", bert2bert),
}  # fmt: skip
SOUND = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
CONVOLUTIONS = {
    "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "mask_time_prob": 0.0,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1])
OTHERS = {
    "Llama": Toy("LlamaForCausalLM", "Llama"),
    "GPT-2": Toy("GPT2LMHeadModel", "GPT2"),
    "GPT-NeoX": Toy("GPTNeoXForCausalLM", "GPTNeoX"),
    "Mixtral": Toy("MixtralForCausalLM", "Mixtral"),
    "Gemma": Toy("GemmaForCausalLM", "Gemma"),
    "OPT": Toy("OPTForCausalLM", "OPT", {"word_embed_proj_dim": WIDTH, "ffn_dim": INNER}),
    "BLOOM": Toy("BloomForCausalLM", "Bloom"),
    "Phi-3": Toy("Phi3ForCausalLM", "Phi3"),
    "BERT": Toy("BertForSequenceClassification", "Bert", labels=CLASSES),
    "RoBERTa": Toy("RobertaForSequenceClassification", "Roberta", labels=CLASSES),
    "DistilBERT": Toy("DistilBertForSequenceClassification", "DistilBert",
                      {"dim": WIDTH, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": HEADS},
                      labels=CLASSES),
    "ELECTRA": Toy("ElectraForSequenceClassification", "Electra", labels=CLASSES),
    "DeBERTa": Toy("DebertaForSequenceClassification", "Deberta",
                   {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, labels=CLASSES),
    "DeBERTa-v2": Toy("DebertaV2ForSequenceClassification", "DebertaV2", labels=CLASSES),
    "ViT": Toy("ViTForImageClassification", "ViT", {"image_size": 16, "patch_size": 8},
               {"pixel_values": PIXELS},
               labels=CLASSES),
    "Wav2Vec2": Toy("Wav2Vec2ForCTC", "Wav2Vec2", CONVOLUTIONS, {"input_values": SOUND},
                    labels=LABELS[:, :2]),  # no tokens go in, so that it has no embeddings
    "Longformer": Toy("LongformerForTokenClassification", "Longformer",
                      {"attention_window": [4, 4]}, labels=IDS % 2),
}  # fmt: skip
TOYS = ENCODER_DECODERS | OTHERS
QUICK = ("T5", "LED", "bert2bert", "GPT-2", "Wav2Vec2")
each = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TOYS]
)


def inputs_of(name: str) -> dict[str, Any]:
    """What the model is trained on."""
    toy = TOYS[name]
    inputs = toy.inputs or {"input_ids": IDS}
    if name in OTHERS and toy.labels is LABELS:  # the next token of the text itself
        return {**inputs, "labels": IDS}
    return {**inputs, "labels": toy.labels}


def logits(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(**inputs_of(name)).logits
    return result


def decoded(name: str, model: Any) -> list[list[int]]:
    """Four tokens, by the plainest decoding."""
    inputs = {key: value for key, value in inputs_of(name).items() if key != "labels"}
    plain = {
        "use_cache": TOYS[name].cache,
        "max_new_tokens": 4,
        "num_beams": 1,
        "do_sample": False,
        "min_new_tokens": 4,
    }
    rows: list[list[int]] = model.eval().generate(**inputs, **plain).tolist()
    return rows


def train(name: str, model: nn.Module) -> minilora.TrainingReport:
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.02)
    with minilora.verify_training(model.train(), optimizer) as report:
        for _ in range(3):
            model(**inputs_of(name)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return report


@each
def test_a_model_goes_through_everything(name: str, tmp_path: Path) -> None:
    base = TOYS[name].build()
    before, keys = logits(name, base), base.state_dict().keys()
    model = deepcopy(base)
    report = minilora.inject(model, LoRAConfig(rank=2, alpha=8), seed=0)
    for side in ("encoder", "decoder") if name in ENCODER_DECODERS else ():
        assert any(f"{side}." in module for module in report.modules), report
    peft_s = PEFT_TARGETS.get(base.config.model_type, ())
    assert {module.rpartition(".")[2] for module in report.modules} >= {*peft_s}
    assert torch.equal(logits(name, model), before)  # B is zero

    assert train(name, model).problems == []
    trained = logits(name, model)
    assert (trained - before).abs().max() > 1e-3 * before.abs().max()
    with minilora.disabled(model):
        assert torch.equal(logits(name, model), before)

    minilora.save_adapter(model, tmp_path)
    loaded = deepcopy(base)
    minilora.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(name, loaded), trained)
    # To train, as ours: torch chooses another kernel for a weight that needs no gradient.
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(logits(name, theirs), trained)  # the same operations in the same order

    generates = base.can_generate()
    texts = decoded(name, model) if generates else None
    assert not generates or decoded(name, theirs) == texts
    minilora.merge(model)
    close = {"rtol": 1e-4, "atol": 1e-4 * trained.abs().max().item()}  # of rounded float32 sums
    torch.testing.assert_close(logits(name, model), trained, **close)
    minilora.unmerge(model)
    assert torch.equal(logits(name, model), trained)
    plain = minilora.unwrap(model)
    torch.testing.assert_close(logits(name, plain), trained, **close)
    assert plain.state_dict().keys() == keys
    assert not generates or decoded(name, plain) == texts
    assert torch.equal(logits(name, minilora.unload(loaded)), before)


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(ENCODER_DECODERS) >= 20
    assert len(OTHERS) >= 10
