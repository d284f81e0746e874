"""The beams of a dialogue share its states, and write what they write without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
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
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache

import minilora
from minilora.summarization.evaluation import beams
from minilora.summarization.evaluation.beams import BeamCache, attention, shared_beams
from tests.conftest import randomize_adapter, tiny_t5

SIZES: dict[str, Any] = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "init_std": 0.3,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 64,
}  # fmt: skip


def family(model: type[PreTrainedModel], config: Any, **more: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        return model(config(**SIZES, **more)).eval()

    return build


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "bart": family(BartForConditionalGeneration, BartConfig),
    "blenderbot": family(BlenderbotForConditionalGeneration, BlenderbotConfig),
    "m2m_100": family(M2M100ForConditionalGeneration, M2M100Config),
    "marian": family(MarianMTModel, MarianConfig, pad_token_id=59, decoder_start_token_id=59),
    "mbart": family(MBartForConditionalGeneration, MBartConfig, decoder_start_token_id=2),
    "pegasus": family(PegasusForConditionalGeneration, PegasusConfig),
    "t5": lambda: tiny_t5(vocab_size=60),
}


def write(model: PreTrainedModel, lengths: tuple[int, ...], beams: int, **more: Any) -> Any:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 55, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()  # (b, s)
    settings: Any = {"num_beams": beams, "min_length": 6, "max_length": 15, "do_sample": False}
    cache = BeamCache(DynamicCache(), DynamicCache())
    more |= {"attention_mask": mask, "past_key_values": cache}
    return model.generate(input_ids=ids, **more, **settings)  # type: ignore[operator]


def test_these_are_all_families() -> None:
    assert FAMILIES.keys() == beams.SHARING


@pytest.mark.parametrize("lengths", [(12, 5, 9, 2, 7), (6, 6)])  # with padding, and without
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_summaries_are_those_of_transformers(
    name: str, count: int, lengths: tuple[int, ...]
) -> None:
    """The same tokens, by the same scores up to float32's rounding in products of other shapes."""
    model = FAMILIES[name]()
    more: Any = {"output_scores": True, "return_dict_in_generate": True}
    wanted = write(model, lengths, count, **more)
    with shared_beams(model):
        found = write(model, lengths, count, **more)
    assert torch.equal(found.sequences, wanted.sequences)
    scores, others = torch.stack(wanted.scores), torch.stack(found.scores)  # (steps, b n, v)
    torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)
    own = scores[2, ::count]  # of each dialogue's best beam, before any has ended
    apart = (own[:, None] - own).nan_to_num().abs().amax(-1) + torch.eye(len(own))
    assert apart.min() > 1e-2  # each read its own dialogue
    assert model.config._attn_implementation == "sdpa"
    assert "_expand_inputs_for_generation" not in vars(model)


def test_keys_and_values_are_computed_once_for_a_dialogue_with_an_adapter_too() -> None:
    model = FAMILIES["bart"]()
    minilora.inject(model, minilora.LoRAConfig(rank=3, targets=r".*decoder.*_proj"))
    randomize_adapter(model)
    rows: list[int] = []
    projection = model.model.decoder.layers[0].encoder_attn.v_proj
    projection.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    wanted = write(model, (8, 4), 3)
    with shared_beams(model):
        assert torch.equal(write(model, (8, 4), 3), wanted)
    assert rows == [2 * 3, 2]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("t", [1, 2])
def test_attention_is_softmax_of_the_products(t: int, masked: bool) -> None:
    """Written out in float64, with K and V copied for the beams. Other heads, beams and lengths."""
    b, n, h, s, d = 2, 3, 4, 5, 6
    draw = torch.Generator().manual_seed(0)
    Q, K, V = (
        torch.randn(rows, h, length, d, generator=draw, dtype=torch.float64)
        for rows, length in ((b * n, t), (b, s), (b, s))
    )
    mask = torch.ones(b, 1, t, s, dtype=torch.bool)
    mask[1, ..., 3:] = False
    copied = [x.repeat_interleave(n, 0) for x in (K, V, mask)]
    scores = Q @ copied[0].mT * 0.3
    if masked:
        scores = scores.masked_fill(~copied[2], -torch.inf)
    wanted = (scores.softmax(-1) @ copied[1]).transpose(1, 2)  # (b n, t, h, d)
    found, _ = attention(torch.nn.Module(), Q, K, V, mask if masked else None, scaling=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("why", ["eager", "another family"])
def test_other_models_copy_as_before(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["bart"]()
    if why == "eager":
        model.set_attn_implementation("eager")
    else:
        monkeypatch.setattr(beams, "SHARING", {"t5"})
    rows: list[int] = []
    projection = model.model.decoder.layers[0].encoder_attn.v_proj
    projection.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with shared_beams(model):
        write(model, (8, 4), 3)
    assert rows == [2 * 3]
