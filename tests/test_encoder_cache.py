"""The encoder's states are kept once, exactly, and never met by what they do not belong to."""

import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import minilora
from minilora.methods import PrefixConfig, PromptConfig
from minilora.summarization.data.batches import encode
from minilora.summarization.data.reading import Example
from minilora.summarization.errors import UserError
from minilora.summarization.model import encoder_cache, speed, state_files
from minilora.summarization.model.encoder_cache import EncoderStates, keep_states
from minilora.summarization.model.lower_layers import layers_of
from minilora.summarization.model.state_files import write_states
from minilora.summarization.settings import DataOptions
from tests.conftest import randomize_adapter, tiny_bart, tiny_t5
from tests.helpers import byte_level_bpe, small_bart
from tests.test_models import ENCODER_DECODERS, IDS, LABELS

CPU = torch.device("cpu")
SOURCES = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 30], [4], [20, 21, 22], [5, 6, 7]]  # one comes twice
DECODER = r"(.*\.)?decoder\..*\.(q_proj|v_proj|q|v)"
MODELS = {"bart": tiny_bart, "t5": tiny_t5}


def frozen(build: Any = tiny_bart, **changes: Any) -> PreTrainedModel:
    """A tiny model with a random adapter in its decoder."""
    model = build(**changes)
    minilora.inject(model, minilora.LoRAConfig(rank=3, alpha=7.0, targets=DECODER))
    randomize_adapter(model)
    return model


def kept(
    model: PreTrainedModel,
    dtype: torch.dtype | None = None,
    choice: str = "auto",
    directory: Path = Path("nowhere"),
    sources: Any = SOURCES,
) -> EncoderStates:
    states = keep_states(model, sources, dtype, choice, directory)
    assert states is not None
    return states


@pytest.fixture
def to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_cache, "IN_MEMORY", 0)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


class Counting(nn.Module):
    """Around an encoder: how many dialogues it reads; the one in which it is stopped."""

    def __init__(self, model: PreTrainedModel, stop_at: int = 10**6) -> None:
        super().__init__()
        self.rows, self.stop_at = 0, stop_at
        model.get_encoder().register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _: Any, args: Any, inputs: dict[str, Any]) -> None:
        self.rows += len(inputs["input_ids"])
        if self.rows > self.stop_at:
            raise KeyboardInterrupt


# What is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_states_are_what_the_encoder_returns_for_each_dialogue(name: str) -> None:
    model = frozen(MODELS[name])
    states = kept(model)
    assert len(states.rows) == 4  # equal dialogues have one entry
    for source in SOURCES:
        with torch.no_grad():
            alone = model.get_encoder()(input_ids=torch.tensor([source])).last_hidden_state[0]
        # float32, in a padded batch and alone: the same products in another order
        torch.testing.assert_close(states.rows[tuple(source)], alone, rtol=1e-5, atol=1e-5)
        assert alone.abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_states_gives_the_logits_and_gradients_of_its_dialogues(name: str) -> None:
    model = frozen(MODELS[name])
    states = kept(model).batch(model, SOURCES)
    longest = max(map(len, SOURCES))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in SOURCES])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in SOURCES])
    more = {"attention_mask": mask, "decoder_input_ids": torch.tensor([[2, 5, 9]] * len(SOURCES))}
    results = []
    for inputs in ({"input_ids": ids}, {"encoder_outputs": states}):
        logits = model(**inputs, **more).logits
        model.zero_grad()
        logits.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((logits.detach(), gradients))
    (wanted, wanted_gradients), (logits, gradients) = results
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(wanted_gradients) > 0
    for one, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert other.abs().max() > 0


UPPER = r"model\.encoder\.layers\.1\..*_proj|" + DECODER


def upper(**changes: Any) -> PreTrainedModel:
    """A tiny BART with a random adapter in its decoder and in the encoder's second layer."""
    model = tiny_bart(**changes)
    minilora.inject(model, minilora.LoRAConfig(rank=3, alpha=7.0, targets=UPPER))
    randomize_adapter(model)
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_below_the_lowest_adapted_layer_the_states_are_kept_too(dtype: Any) -> None:
    """Logits and gradients are those of the whole model; nothing below is computed again."""
    model = upper()
    states = keep_states(model, SOURCES, dtype)
    assert states is not None
    assert states.k == 1
    assert {row.dtype for row in states.rows.values()} == {torch.float32}
    called: list[str] = []
    for name in ("layers.0", "layers.1"):
        layer = model.get_encoder().get_submodule(name)
        layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    longest = max(map(len, SOURCES))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in SOURCES])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in SOURCES])
    more = {"attention_mask": mask, "decoder_input_ids": torch.tensor([[2, 5, 9]] * len(SOURCES))}
    results = []
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        for whole in (True, False):
            called.clear()
            inputs: Any = {"input_ids": ids}
            if not whole:
                inputs = {"encoder_outputs": states.batch(model, SOURCES)}
            logits = model(**inputs, **more).logits.float()
            assert called == (["layers.0"] * whole + ["layers.1"])
            model.zero_grad()
            logits.square().sum().backward()
            named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append((logits.detach(), named))
    (wanted, wanted_gradients), (logits, gradients) = results
    # bf16 has 8 bits; the batches are padded to other lengths
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is None else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(logits, wanted, **close)
    assert gradients.keys() == wanted_gradients.keys()
    assert any("encoder.layers.1" in name for name in gradients)
    if dtype is None:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted_gradients[name], **close)


# Their layers return more than one tensor, or are not recognized (FSMT).
HANDS_ON = {"T5", "mT5", "LongT5", "LongT5, global", "Pegasus-X", "LED", "ProphetNet", "MVP",
            "FSMT"}  # fmt: skip


@pytest.mark.parametrize("where", ["decoder", "upper layers"])
@pytest.mark.parametrize("name", [n for n, toy in ENCODER_DECODERS.items() if toy.inputs is None])
def test_any_encoder_decoder_is_computed_from_its_states_or_refused(name: str, where: str) -> None:
    """Full rows have no padding: the same products, in batches of another size at most."""
    model = ENCODER_DECODERS[name].build().requires_grad_(False)
    places = [model.get_decoder()] if where == "decoder" else layers_of(model)[1:]
    parts = {id(m) for place in places for m in place.modules() if type(m) is nn.Linear}
    linears = [n for n, m in model.named_modules() if id(m) in parts and "predictions" not in n]
    assert linears or (name, where) == ("FSMT", "upper layers")  # its layers are no modules of v5
    minilora.inject(model, minilora.LoRAConfig(rank=2, targets=tuple(linears) or ".*q_proj"))
    randomize_adapter(model)
    rows, states = IDS.tolist(), None
    with suppress(UserError):
        states = keep_states(model, rows, None, "on")
    refused = {"NLLB-MoE", "Switch"} | (HANDS_ON if where == "upper layers" else set())
    assert (states is None) == (name in refused)
    if states is None:
        return
    assert (states.k is None) == (where == "decoder")
    more = {"attention_mask": torch.ones_like(IDS), "decoder_input_ids": LABELS}
    with torch.no_grad():
        wanted = model(input_ids=IDS, **more).logits
        logits = model(encoder_outputs=states.batch(model, rows), **more).logits
        with minilora.disabled(model):
            assert (model(input_ids=IDS, **more).logits - wanted).abs().max() > 1e-3
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_states_below_a_layer_belong_to_the_layers_below() -> None:
    model = upper()
    states = kept(model)
    encoder = model.get_encoder()
    with torch.no_grad(), minilora.disabled(model):
        assert states.belong_to(model)
        encoder.layers[1].fc1.weight += 1
        assert states.belong_to(model)
        encoder.layers[0].fc1.weight += 1
        assert not states.belong_to(model)


@pytest.mark.parametrize("what", ["T5", "LayerDrop", "the first layer"])
def test_where_the_states_below_a_layer_are_not_enough(what: str) -> None:
    """T5's first layer returns a position bias too; LayerDrop could drop the kept states."""
    targets = {"T5": r".*encoder\.block\.1\..*\.q", "the first layer": ".*q_proj"}
    model = tiny_t5() if what == "T5" else tiny_bart(encoder_layerdrop=0.5 * (what == "LayerDrop"))
    minilora.inject(model, minilora.LoRAConfig(rank=3, targets=targets.get(what, UPPER)))
    words = "return more than their states" if what == "T5" else "trains and is not in the decoder"
    with pytest.raises(UserError, match=words):
        keep_states(model, SOURCES, None, "on")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rounded_to_autocast_the_decoder_reads_the_same_bits(name: str, dora: bool) -> None:
    model = MODELS[name]()
    config = minilora.LoRAConfig(rank=3, alpha=7.0, targets=DECODER, dora=dora)
    minilora.inject(model, config)
    randomize_adapter(model)
    states = kept(model, torch.bfloat16, "on", sources=[[5, 6, 7]])  # it refuses other bits
    assert {row.dtype for row in states.rows.values()} == {torch.bfloat16}
    ids, start = torch.tensor([[5, 6, 7]]), torch.tensor([[2, 5]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(input_ids=ids, decoder_input_ids=start).logits
        outputs = states.batch(model, [[5, 6, 7]])
        logits = model(encoder_outputs=outputs, decoder_input_ids=start).logits
    assert torch.equal(logits, wanted)


def test_the_encoder_does_not_drop_out_and_no_random_number_is_drawn() -> None:
    model, calm = frozen(dropout=0.5).train(), frozen(dropout=0.0)
    before = torch.get_rng_state()
    noisy, wanted = kept(model), kept(calm)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(noisy.rows[source], row) for source, row in wanted.rows.items())


# Where they can be kept ---------------------------------------------------------------------------


OTHERS: dict[str, Any] = {
    "an adapter in the encoder": {"targets": ("q_proj",)},
    "biases": {"targets": DECODER, "bias": "all"},
    "a module of the encoder": {"targets": DECODER, "also_train": ("encoder.layers.0.fc1",)},
    "token rows": {"targets": DECODER, "token_rows": (5, 6)},
}
BESIDE: dict[str, Any] = {
    "a prompt": PromptConfig(3),
    "a prefix": PrefixConfig(3, reparametrize=5),
    "a prefix of the encoder": PrefixConfig(3, "encoder", None),
}
LORA = minilora.LoRAConfig(rank=3, targets=DECODER)
CHANGING = {name: minilora.LoRAConfig(rank=3, **more) for name, more in OTHERS.items()}
CHANGING |= BESIDE | {f"LoRA and {name}": [LORA, config] for name, config in BESIDE.items()}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", CHANGING)
def test_what_changes_the_encoder_is_refused(
    what: str, inference: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_bart()
    minilora.inject(model, CHANGING[what])
    if inference:  # values that were replaced in place are the base's while it is disabled
        minilora.save_adapter(model, tmp_path)
        model = tiny_bart()
        minilora.load_adapter(model, tmp_path, inference=True)
        assert not any(p.requires_grad for p in model.parameters())
    assert keep_states(model, SOURCES, None) is None
    with pytest.raises(
        UserError, match=r"^--cache-encoder on: .* trains and is not in the decoder"
    ):
        keep_states(model, SOURCES, None, "on")
    assert capsys.readouterr().err == ""  # auto: not a word


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("places", ["decoder", "cross", ("decoder", "cross")])
@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_in_the_decoder_leaves_the_states_as_they_are(
    name: str, places: Any, hidden: int | None, inference: bool, tmp_path: Path
) -> None:
    """Beside LoRA in the decoder: the logits, and so do the texts, of a batch with padding."""
    model = MODELS[name]()
    ids = torch.tensor([[5, 6, 7, 1], [9, 8, 7, 6]])
    more: Any = {"attention_mask": (ids != 1).long()}
    start = {"decoder_input_ids": torch.tensor([[2, 5, 9]] * 2)}
    with torch.no_grad():
        base = model.eval()(input_ids=ids, **more, **start).logits
    minilora.inject(model, [LORA, PrefixConfig(3, places, hidden)])
    randomize_adapter(model)
    if inference:
        minilora.save_adapter(model, tmp_path)
        minilora.load_adapter(model := MODELS[name](), tmp_path, inference=True)
    states = kept(model, None, "on", sources=[[5, 6, 7], [9, 8, 7, 6]])
    outputs = states.batch(model, [[5, 6, 7], [9, 8, 7, 6]])
    with torch.no_grad():
        wanted = model(input_ids=ids, **more, **start).logits
        logits = model(encoder_outputs=outputs, **more, **start).logits
        # float32, in another batch: the same products in another order
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - base).abs().max() > 0.1
        how: Any = more | {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
        texts = model.generate(input_ids=ids, **how), model.generate(encoder_outputs=outputs, **how)
    assert torch.equal(*texts)


def test_a_decoder_that_needs_more_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    model = frozen()

    def add(_: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if inputs.get("input_ids") is not None:  # such as a copy of the source's words
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"] + inputs["input_ids"][:, :1]
        return args, inputs

    model.register_forward_pre_hook(add, with_kwargs=True)
    said = "the decoder of bart needs more than the encoder's last states"
    with pytest.raises(UserError, match=f"^--cache-encoder on: {said}$"):
        keep_states(model, SOURCES, None, "on")
    assert keep_states(model, SOURCES, None) is None
    assert capsys.readouterr().err == f"note: the encoder's states are not kept: {said}\n"


def test_off_keeps_nothing() -> None:
    assert keep_states(frozen(), SOURCES, None, "off") is None


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_below_the_lowest_adapted_layer_is_computed_backward(
    name: str, checkpoints: bool
) -> None:
    """What has an output without a grad_fn has no backward pass."""
    second = r"(.*\.)?encoder\.(layers|block)\.1\..*(v_proj|v)"
    computed = {targets: set[str]() for targets in (second, DECODER)}
    for targets, found in computed.items():
        model = MODELS[name]().train()
        if checkpoints:
            speed.checkpoint_activations(model)
        minilora.inject(model, minilora.LoRAConfig(rank=3, targets=targets))
        for part, module in model.get_encoder().named_modules():

            def note(_: Any, args: Any, output: Any, part: str = part, to: Any = found) -> None:
                tensor = output if isinstance(output, torch.Tensor) else output[0]
                if tensor.grad_fn is not None:
                    to.add(part)

            module.register_forward_hook(note)
        ids = torch.tensor(SOURCES[1:2])
        model(input_ids=ids, decoder_input_ids=ids).logits.sum().backward()
        assert any(p.grad is not None for p in model.parameters())
    assert any("1." in part for part in computed[second])
    assert not [part for part in computed[second] if re.search(r"(layers|block)\.0|embed", part)]
    assert not computed[DECODER]  # nothing of the whole encoder


# The file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_beyond_the_budget_the_same_bits_are_mapped_from_a_file_and_it_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: torch.dtype | None,
) -> None:
    model = frozen()
    wanted = kept(model, dtype, "on", tmp_path)
    assert files(tmp_path) == []
    monkeypatch.setattr(encoder_cache, "IN_MEMORY", 13 * 16 * 2)  # less than 14 tokens of 16
    states = kept(model, dtype, "on", tmp_path)
    assert states.path is not None
    assert files(tmp_path) == [states.path.name]
    assert re.fullmatch(r"[0-9a-f]{32}\.safetensors", states.path.name)
    assert states.rows.keys() == wanted.rows.keys()
    assert all(torch.equal(row, wanted.rows[source]) for source, row in states.rows.items())
    said = f"note: writing the encoder's states of 4 dialogues, 0.0 GB, to {states.path} ("
    assert capsys.readouterr().err.startswith(said)
    assert f"0.0 MB in {states.path}" == str(states)


@pytest.mark.parametrize("dtype", state_files.NAMES)
def test_the_file_is_the_one_that_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 5).to(dtype)
    save_file({"states": tensor}, tmp_path / "theirs", {"format": "pt"})
    write_states(tmp_path / "ours", tensor.split([4, 1, 2]), (7, 5), dtype)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert torch.equal(load_file(tmp_path / "ours")["states"], tensor)


@pytest.mark.usefixtures("to_disk")
def test_a_second_run_reads_the_file_and_a_recomputed_one_is_bit_identical(tmp_path: Path) -> None:
    model = frozen()
    counting = Counting(model)
    path = kept(model, None, "on", tmp_path).path
    assert path is not None
    assert counting.rows == 2 + 4  # the probe, with and without states; every dialogue once
    content = path.read_bytes()
    again = frozen()  # another model object: the content counts
    counting = Counting(again)
    assert kept(again, None, "on", tmp_path, sources=SOURCES[::-1]).path == path
    assert counting.rows == 2  # the probe
    path.unlink()
    assert kept(again, None, "on", tmp_path).path == path
    assert path.read_bytes() == content


@pytest.mark.usefixtures("to_disk")
def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = kept(frozen(), None, "on", tmp_path).path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"^--cache-encoder on: {path} is damaged: remove it$"):
        kept(frozen(), None, "on", tmp_path)


# What a file is of --------------------------------------------------------------------------------

TEXTS = [
    "Ann: hello there",
    "Bob: shall we meet?\nAnn: yes, at noon, with the others",
    "Cy: o",
]


def tokens(texts: list[str], vocabulary: int = 400, **options: Any) -> list[list[int]]:
    examples = [Example(str(i), text, "ok") for i, text in enumerate(texts)]
    encoded, _ = encode(examples, byte_level_bpe(vocabulary), DataOptions(**options))
    return [row.source for row in encoded]


CHOICES: dict[str, list[Any]] = {
    "texts": [TEXTS, TEXTS[::-1], TEXTS[:2], [*TEXTS[:2], "Cy: 0"]],
    "vocabulary": [261, 400],
    "length": [8, 20],
    "prompt": ["", "X"],
    "seed": [0, 1],
    "scale": [False, True],
    "bias": [0, 2**-10],
    "dtype": [None, torch.bfloat16],
}


@pytest.mark.parametrize("changed", ["", *CHOICES])
@settings(max_examples=6)
@given(st.data())
def test_a_changed_encoder_tokenizer_text_or_truncation_never_meets_an_old_file(
    changed: str, data: st.DataObject
) -> None:
    """The names of the files of two settings are equal only if the states are, bit for bit."""
    names, contents = [], []
    one = {name: data.draw(st.sampled_from(values), name) for name, values in CHOICES.items()}
    other = dict(one)
    if changed:
        others = [value for value in CHOICES[changed] if value != one[changed]]
        other[changed] = data.draw(st.sampled_from(others), "other")
    for drawn in (one, other):
        sources = tokens(
            drawn["texts"],
            drawn["vocabulary"],
            max_source_length=drawn["length"],
            prompt_before=drawn["prompt"],
        )
        model = small_bart(drawn["seed"], scale_embedding=drawn["scale"])
        with torch.no_grad():
            model.model.encoder.layers[0].fc1.bias[3] += drawn["bias"]
        model.requires_grad_(False)
        states = kept(model, drawn["dtype"], "on", sources=sources)
        order = list(states.rows)
        kind = next(iter(states.rows.values())).dtype
        names.append(encoder_cache.fingerprint(states.encoder, order, kind, model.device))
        contents.append(states.rows)
    left, right = contents
    same = left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )
    if changed == "bias":
        same = False  # the encoder is another, although bf16 may round its states to the same
    assert (names[0] == names[1]) == same
    assert same or changed


@pytest.mark.usefixtures("to_disk")
def test_of_layers_in_four_bits_each_precision_has_its_file(tmp_path: Path) -> None:
    """Those below an adapter are kept in float32 even if autocast computes them in bfloat16."""
    for dtype in (None, torch.bfloat16):
        model = tiny_bart(d_model=32)
        minilora.quantize(model)
        minilora.inject(model, minilora.LoRAConfig(rank=3, targets=UPPER))
        states = kept(model, dtype, "on", tmp_path)
        assert {row.dtype for row in states.rows.values()} == {torch.float32}
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("part", ["torch", "transformers"])
def test_another_version_of_a_library_has_another_file(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = ("encoder", [(1, 2)], torch.float32, CPU)
    before = encoder_cache.fingerprint(*of)
    monkeypatch.setattr(getattr(encoder_cache, part), "__version__", "0")
    assert encoder_cache.fingerprint(*of) != before


# Room ---------------------------------------------------------------------------------------------


def put(directory: Path, name: str, size: int, age: int) -> Path:
    path = directory / f"{name}.safetensors"
    path.write_bytes(b"0" * size)
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


@pytest.mark.usefixtures("to_disk")
def test_the_oldest_files_go_first_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 14 * 16 * 4  # of this test's states
    monkeypatch.setattr(state_files, "ON_DISK", 250 + size)
    oldest, newest = put(tmp_path, "a" * 32, 200, 9), put(tmp_path, "c" * 32, 100, 1)
    middle = put(tmp_path, "b" * 32, 150, 5)
    kept(frozen(), None, "on", tmp_path)
    assert [path.exists() for path in (oldest, middle, newest)] == [False, True, True]
    said = [line for line in capsys.readouterr().err.splitlines() if "removed" in line]
    assert said == [f"note: {oldest} was removed: the oldest of the encoder's states"]


@pytest.mark.usefixtures("to_disk")
def test_other_files_in_the_directory_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_files, "ON_DISK", 250 + 14 * 16 * 4)
    (tmp_path / "other").mkdir()
    theirs = [put(tmp_path, "model", 900, 9), put(tmp_path / "other", "a" * 32, 900, 9)]
    for name in (".download.partial", "other/.download.partial", f".{'a' * 32}.partial"):
        theirs.append(tmp_path / name)
        theirs[-1].touch()
    kept(frozen(), None, "on", tmp_path)
    assert all(path.exists() for path in theirs)


@pytest.mark.usefixtures("to_disk")
def test_a_file_that_was_read_is_not_the_oldest(tmp_path: Path) -> None:
    path = kept(frozen(), None, "on", tmp_path).path
    assert path is not None
    os.utime(path, (0, 0))
    kept(frozen(), None, "on", tmp_path)
    assert path.stat().st_mtime > 10**9


@pytest.mark.usefixtures("to_disk")
@pytest.mark.parametrize("what", ["all together", "the disk"])
def test_without_room_it_is_refused_with_the_reason(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "the disk":
        usage = shutil.disk_usage(tmp_path)._replace(free=5)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        reason = f"the states take 0.0 GB, and {tmp_path} has 0.0 GB left"
        reason += ": use --cache-directory for another disk, or --cache-encoder off"
    else:
        monkeypatch.setattr(state_files, "ON_DISK", 5)
        reason = "the states take 0.0 GB, at most 0 GB are kept: use --cache-encoder off"
    model = frozen()
    with pytest.raises(UserError, match=f"^--cache-encoder on: {reason}$"):
        keep_states(model, SOURCES, None, "on", tmp_path)
    assert keep_states(model, SOURCES, None, "auto", tmp_path) is None
    assert capsys.readouterr().err == f"note: the encoder's states are not kept: {reason}\n"
    assert files(tmp_path) == []


# Stopped, and several processes -------------------------------------------------------------------


@pytest.mark.usefixtures("to_disk")
def test_ctrl_c_while_filling_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_cache, "ROWS", 2)
    model = frozen()
    Counting(model, stop_at=2 + 2)  # in the second batch
    with pytest.raises(KeyboardInterrupt):
        keep_states(model, SOURCES, None, "on", tmp_path)
    assert files(tmp_path) == []


def in_forks(count: int, work: Any, *arguments: Any) -> list[int | None]:
    """The exit codes of processes that do this at the same time."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=arguments) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@forks
@pytest.mark.usefixtures("to_disk")
def test_what_a_killed_process_left_is_no_file_and_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_cache, "ROWS", 2)

    def die(rows: Iterator[torch.Tensor]) -> None:
        def some() -> Iterator[torch.Tensor]:
            yield from (row for row, _ in zip(rows, range(2), strict=False))
            os._exit(7)

        write_states(tmp_path / f"{'a' * 32}.safetensors", some(), (9, 9), torch.float32)

    assert in_forks(1, die, iter(torch.ones(3, 2, 9))) == [7]
    assert files(tmp_path) == [f".{'a' * 32}.safetensors.partial"]
    path = kept(frozen(), None, "on", tmp_path).path
    assert path is not None
    assert files(tmp_path) == [path.name]


@forks
@pytest.mark.usefixtures("to_disk")
def test_of_two_runs_that_begin_together_one_writes_and_the_other_reads(tmp_path: Path) -> None:
    def run() -> None:
        model = frozen()
        counting = Counting(model)
        states = kept(model, None, "on", tmp_path)
        (tmp_path.parent / f"rows-{os.getpid()}").write_text(str(counting.rows))
        assert torch.equal(states.rows[5, 6, 7], wanted.rows[5, 6, 7])

    wanted = kept(frozen(), None, "on", tmp_path / "apart")
    assert in_forks(2, run) == [0, 0]
    read = sorted(int(path.read_text()) for path in tmp_path.parent.glob("rows-*"))
    assert read == [2, 2 + 4]
