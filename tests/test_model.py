"""The base model: whatever is wrong with it ends in one line, and nothing is printed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LEDConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from minilora.summarization.data.batches import Encoded
from minilora.summarization.errors import UserError
from minilora.summarization.model import device
from minilora.summarization.model.device import choose_device, choose_precision
from minilora.summarization.model.loading import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    save_model,
)
from minilora.summarization.model.requirements import limit_lengths
from minilora.summarization.presets import PRESETS
from minilora.summarization.settings import RunConfig
from tests.helpers import byte_level_bpe, save_bart, small_bart

CPU = torch.device("cpu")
IDS = torch.tensor([[0, 7, 9, 30, 2]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bart(tmp_path_factory.mktemp("models") / "bart")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS).logits


def refused(directory: Path | str, *says: str, load: Callable[[str], object] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        (load or (lambda name: load_model(name, CPU)))(str(directory))
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(f"model {directory}: ")
    assert len(line) < len(str(directory)) + 400
    for part in says:
        assert part in line
    return line


# What loads ---------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "unlike sides": {"encoder_layers": 3, "decoder_layers": 1, "decoder_ffn_dim": 40},
    "unlike heads": {"encoder_attention_heads": 4, "decoder_attention_heads": 1},
    "wide": {"d_model": 48, "encoder_ffn_dim": 8},
    "long": {"max_position_embeddings": 1024},
    "untied": {"tie_word_embeddings": False},
    "scaled, relu": {"scale_embedding": True, "activation_function": "relu"},
    "no encoder layers": {"encoder_layers": 0},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_of_barts_shapes_loads_as_it_was_saved(tmp_path: Path, shape: dict[str, Any]) -> None:
    original = small_bart(seed=3, **shape)
    original.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), CPU)
    assert torch.equal(logits(loaded), logits(original))
    assert not torch.equal(logits(loaded), logits(small_bart(seed=4, **shape)))
    assert not loaded.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_load_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    original = small_bart().to(dtype)
    original.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(original.float()))


def test_a_t5_loads_and_has_no_limit_of_positions(tmp_path: Path) -> None:
    config = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    original = T5ForConditionalGeneration(config).eval()
    original.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), CPU)
    assert torch.equal(logits(loaded), logits(original))
    run = RunConfig()
    run.data.max_source_length = 5000
    assert limit_lengths(run, loaded) == run


def test_nothing_is_printed(copy: Path, capfd: Any) -> None:
    model, tokenizer = load_model(str(copy), CPU), load_tokenizer(str(copy))
    save_model(model, tokenizer, copy.parent / "again")
    assert capfd.readouterr() == ("", "")


def test_transformers_is_left_as_talkative_as_it_was(copy: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(str(copy), CPU)
    (copy / "config.json").write_text("{")
    refused(copy)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# What does not ------------------------------------------------------------------------------------


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, edit: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    path = directory / "model.safetensors"
    tensors = {k: edit(k, v) for k, v in safetensors.torch.load_file(path).items()}
    kept = {k: v.contiguous() for k, v in tensors.items() if v is not None}
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})


def test_no_such_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "none", "./none", "~/none/at/all", "a/b/c", "file", ""):
        refused(name, "no such directory")
        refused(name, "no such directory", load=load_tokenizer)


@pytest.mark.parametrize(
    "name", sorted({str(p["model"]) for p in PRESETS.values() if "model" in p} | {"nosuch", "a b"})
)
def test_hub_models_fail_offline_in_one_line(name: str) -> None:
    refused(name, "no such directory, and offline it is not in the hub's cache")
    refused(
        name, "no such directory, and offline it is not in the hub's cache", load=load_tokenizer
    )


def test_a_directory_without_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    refused(copy, "holds no weights (model.safetensors)")
    torch.save({"a": torch.ones(1)}, copy / "pytorch_model.bin")
    refused(copy, "holds no weights", ".bin file is a pickle")
    for damaged in (b"", b"hello" * 99, content[: len(content) // 2]):
        weights.write_bytes(damaged)
        refused(copy, "SafetensorError")


def test_a_directory_without_a_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    refused(copy, "has no config.json")
    refused(copy, "has no config.json", load=load_tokenizer)


def test_a_broken_config(copy: Path) -> None:
    edit_config(copy, d_model="many")
    refused(copy, "d_model", "expected int")
    edit_config(copy, d_model=16, encoder_attention_heads=3)
    refused(copy, "divisible")
    edit_config(copy, model_type="nonsense")
    refused(copy, "nonsense")
    for text in ("[]", "{", "", "{}"):
        (copy / "config.json").write_text(text)
        refused(copy)


def test_code_of_others_is_never_run_nor_asked_for(copy: Path, capfd: Any) -> None:
    edit_config(copy, model_type="x", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"})
    (copy / "code.py").write_text("raise SystemExit('it ran')")
    refused(copy, "custom code")
    assert capfd.readouterr() == ("", "")


def test_weights_that_lack_tensors_or_have_others(copy: Path) -> None:
    edit_weights(copy, lambda name, tensor: None if "fc1" in name else tensor)
    refused(copy, "lack 4 tensors (model.decoder.layers.0.fc1.bias")
    shutil.rmtree(copy)
    save_bart(copy)
    edit_weights(copy, lambda name, tensor: tensor[:5] if name.endswith("fc1.bias") else tensor)
    refused(copy, "fc1.bias is (5,) in the weights, but (24,) in config.json (2 such tensors)")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_no_encoder_decoder(tmp_path: Path, kind: str) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes))
        if kind == "llama"
        else BertModel(BertConfig(**sizes))
    )
    model.save_pretrained(tmp_path)
    refused(tmp_path, f"{kind} is not an encoder-decoder such as BART or T5")


def test_a_directory_without_a_tokenizer(copy: Path) -> None:
    """Transformers 5 makes one that knows five special tokens and no word."""
    for path in copy.glob("*token*"):
        path.unlink()
    refused(copy, "there is no tokenizer: add its files", load=load_tokenizer)


def test_a_damaged_tokenizer(copy: Path) -> None:
    for text in ("{}", "{", ""):
        (copy / "tokenizer.json").write_text(text)
        refused(copy, "its tokenizer: ", load=load_tokenizer)


def test_a_tokenizer_without_padding(copy: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    refused(copy, "no pad token: set pad_token", load=load_tokenizer)


def test_a_tokenizer_of_another_model() -> None:
    model = small_bart(vocab_size=50)
    check_vocabulary(model, [Encoded("a", [0, 49], [2])], "x")
    for row in (Encoded("a", [0, 50], [2]), Encoded("a", [0], [1050])):
        with pytest.raises(UserError, match=r"model x: .* only 50 embeddings"):
            check_vocabulary(model, [Encoded("b", [3], [4]), row], "x")


# Saving -------------------------------------------------------------------------------------------


def test_a_saved_model_loads_in_plain_transformers(tmp_path: Path) -> None:
    model, target = small_bart(seed=5), tmp_path / "model"
    save_model(small_bart(seed=6), byte_level_bpe(), target)
    save_model(model, byte_level_bpe(), target)
    plain = AutoModelForSeq2SeqLM.from_pretrained(target).eval()
    assert torch.equal(logits(plain), logits(model))
    assert (
        AutoTokenizer.from_pretrained(target)("Ann").input_ids == byte_level_bpe()("Ann").input_ids
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_model_before_it(tmp_path: Path, monkeypatch: Any) -> None:
    target, tokenizer = tmp_path / "model", byte_level_bpe()
    save_model(small_bart(seed=5), tokenizer, target)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(small_bart(seed=6), tokenizer, target)
    assert torch.equal(logits(load_model(str(target), CPU)), logits(small_bart(seed=5)))


# Lengths, devices, precision ----------------------------------------------------------------------


def test_lengths_are_limited_to_the_models_positions() -> None:
    run = RunConfig()
    limited = limit_lengths(run, small_bart(max_position_embeddings=40))
    assert (limited.data.max_source_length, limited.data.max_target_length) == (40, 40)
    assert limited.generation.max_length == 40
    assert (run.data.max_source_length, run.generation.max_length) == (512, 60)  # untouched
    assert limit_lengths(run, small_bart(max_position_embeddings=512)) == run
    led = small_bart()
    led.config = LEDConfig(max_encoder_position_embeddings=300, max_decoder_position_embeddings=60)
    limited = limit_lengths(run, led)
    assert (limited.data.max_source_length, limited.data.max_target_length) == (300, 60)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "gpu", "meta", ""):
        with pytest.raises(UserError, match=f"--device {name}: ") as caught:
            choose_device(name)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("cpuinfo", "faster"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
    ],
)
def test_which_processors_gain_by_bf16(cpuinfo: str, faster: bool) -> None:
    assert device.multiplies_bf16_faster(cpuinfo) == faster


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("fp32", CPU) is None
    assert choose_precision("bf16", CPU) == torch.bfloat16
    assert choose_precision("fp16", CPU) == torch.float16
    for multiplies, wanted in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(
            device, "_cpu_multiplies_bf16", lambda multiplies=multiplies: multiplies
        )
        assert choose_precision("auto", CPU) == wanted
    cuda = torch.device("cuda")
    for capability, wanted in (((8, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose_precision("auto", cuda) == wanted
