"""Damaged and hostile adapter directories: refused in one line, or read exactly as they are.

Whatever the mutation, nothing but a LoRAError may come out, nothing may be run or allocated because
a file says so, and a model that refused is the model that it was, bit for bit.
"""

import io
import json
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minilora
from minilora import LoRAError
from minilora.peft_format.apply import adapter_of
from minilora.peft_format.keys import CONFIG_FILE, WEIGHTS_FILE
from tests.conftest import State, adapted, tiny_bart

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

EACH = 30
"""Mutations of each kind, at least."""

Header = dict[str, Any]
Mutation = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with all there is: DoRA, trained biases and a whole module."""
    directory = tmp_path_factory.mktemp("sound")
    model = adapted("bart", dora=True, bias="all", also_train=("layernorm_embedding",))
    minilora.save_adapter(model, directory)
    return directory


# Files as bytes ----------------------------------------------------------------------------------


def split(path: Path) -> tuple[Header, bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: Header | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def with_header(change: Callable[[Header], None]) -> Mutation:
    def mutate(directory: Path) -> None:
        header, data = split(directory / WEIGHTS_FILE)
        change(header)
        join(directory / WEIGHTS_FILE, header, data)

    return mutate


def with_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Mutation:
    def mutate(directory: Path) -> None:
        path = directory / WEIGHTS_FILE
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        save_file({key: t.contiguous() for key, t in change(tensors).items()}, path)

    return mutate


def names(header: Header) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


# The kinds of mutation ---------------------------------------------------------------------------


def headers() -> Iterator[Mutation]:
    for seed in range(EACH):

        def flip(directory: Path, seed: int = seed) -> None:
            draw = random.Random(seed)
            path = directory / WEIGHTS_FILE
            content = bytearray(path.read_bytes())
            (length,) = struct.unpack("<Q", content[:8])
            for _ in range(draw.choice([1, 2, 8])):
                content[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
            path.write_bytes(content)

        yield flip
    for text in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":1}',
        b" " * 8,
    ):
        yield lambda directory, text=text: join(directory / WEIGHTS_FILE, text, b"")
    for length in (0, 1, 2**31, 2**62, 2**64 - 1):
        yield lambda directory, length=length: join(
            directory / WEIGHTS_FILE, *split(directory / WEIGHTS_FILE), length
        )


def shapes() -> Iterator[Mutation]:
    for which in (0, 7, 20, -1):
        for change in (
            lambda shape: shape[::-1],
            lambda shape: [*shape, 1],
            lambda shape: [1, *shape],
            lambda shape: [],
            lambda shape: [0, *shape[1:]],
            lambda shape: [shape[0] + 1, *shape[1:]],
            lambda shape: [2 * shape[0], *shape[1:]],
            lambda shape: [-1, *shape[1:]],
            lambda shape: [1.5, *shape[1:]],
            lambda shape: "big",
        ):

            def mutate(header: Header, which: int = which, change: Any = change) -> None:
                matrices = [n for n in names(header) if len(header[n]["shape"]) == 2]
                entry = header[matrices[which]]
                entry["shape"] = change(entry["shape"])

            yield with_header(mutate)


def dtypes() -> Iterator[Mutation]:
    for which in (3, 11, -2):
        for dtype in ("F16", "BF16", "F64", "I32", "U32", "I8", "BOOL", "F8_E4M3", "C64", "X", ""):

            def rename(header: Header, which: int = which, dtype: str = dtype) -> None:
                header[names(header)[which]]["dtype"] = dtype

            yield with_header(rename)
    for dtype in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float16):
        for end in (
            "lora_A.weight",
            "lora_B.weight",
            "magnitude_vector",
            ".bias",
            "embedding.weight",
        ):

            def cast(
                tensors: dict[str, Tensor], dtype: torch.dtype = dtype, end: str = end
            ) -> dict[str, Tensor]:
                return {k: t.to(dtype) if k.endswith(end) else t for k, t in tensors.items()}

            yield with_tensors(cast)


def keys() -> Iterator[Mutation]:
    changes: list[Callable[[str], str]] = [
        lambda key: f"../{key}",
        lambda key: key.replace("base_model.model.", "base_model.model.../../"),
        lambda key: key.replace("model.encoder", ".."),
        lambda key: key.replace(".layers.", ".layers..."),
        lambda key: key.replace(".", "/"),
        lambda key: f"/etc/passwd.{key}",
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model.module."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("base_model.model.", "base_model."),
        lambda key: key.replace("base_model.model.", ""),
        lambda key: key.replace("base_model.model.", "base_model.model.base_model.model."),
        lambda key: key.replace("base_model.model.", "base_model.model.model."),
        lambda key: key.replace(".lora_A.", ".lora_A.default."),
        lambda key: key.replace(".lora_A.weight", ".lora_A"),
        lambda key: key.replace(".lora_B.", ".lora_C."),
        lambda key: key.replace(".lora_A.", ".lora_embedding_A."),
        lambda key: key.replace("layers.0", "layers.00"),
        lambda key: key.replace("layers.0", "layers.-1"),
        lambda key: key.replace("layers.0", "layers.9"),
        lambda key: key.replace("q_proj", "__class__"),
        lambda key: key.replace("q_proj", "_parameters"),
        lambda key: key.replace("q_proj", "q_proj.base"),
        lambda key: key.replace("q_proj", "é" * 300),
        lambda key: key.replace("q_proj", "q_proj\x00"),
        lambda key: key.replace("q_proj", "q_proj\n"),
        lambda key: key.replace("self_attn", "self_attn.self_attn"),
        lambda key: key.replace("self_attn.q_proj", "self_attn"),
        lambda key: key.replace(".base_layer.bias", ".bias"),
        lambda key: key.upper(),
        lambda key: key + ".weight",
    ]
    for change in changes:
        yield with_tensors(lambda t, change=change: {change(key): v for key, v in t.items()})
        yield with_tensors(  # and only one of them
            lambda t, change=change: {
                change(key) if "encoder.layers.0.self_attn.q_proj" in key else key: v
                for key, v in t.items()
            }
        )
    for extra in ("..", "", "weight", "base_model.model.", "base_model.model..lora_A.weight"):
        yield with_tensors(lambda t, extra=extra: t | {extra: torch.ones(3, 16)})


def configs() -> Iterator[Mutation]:
    wrong: dict[str, tuple[Any, ...]] = {
        "peft_type": (None, "ADALORA", "XLORA", "IA3", 5, ["LORA"]),
        "r": (0, -3, 4, 10**30, "3", 3.0, None, True, [3]),
        "lora_alpha": (0, -1, "7", None, float("inf"), float("nan"), [7], 10**400),
        "lora_dropout": (-0.1, 1.0, 2, "0", None, []),
        "target_modules": ("(", 5, [5], ["q_proj"], {"q_proj": 1}, "nothing", [""], True),
        "exclude_modules": ("(", 5, [5], ["q_proj"], [None], "*"),
        "layers_to_transform": ("0", [0.5], [99], [None], {"0": 1}),
        "layers_pattern": (["("], 5, ["layers"]),
        "rank_pattern": ({"(": 2}, {"q_proj": 0}, {"q_proj": "2"}, {"q_proj": 9}, [], 5, "q_proj"),
        "alpha_pattern": ({"(": 2}, {"q_proj": 0}, {"q_proj": []}, 5, [["q_proj", 2]]),
        "use_rslora": ("yes", 1, None),
        "use_dora": (False, "true", 1, None),
        "bias": ("none", "lora_only", "some", True, ["all"]),
        "lora_bias": (True, "true", 1),
        "modules_to_save": (None, [], ["("], [5], ["lm_head"], [""], {"a": 1}, ["q_proj"]),
        "init_lora_weights": ("pissa", "olora", "corda", "loftq", "pissa_niter_4", 5, [], {}),
        "base_model_name_or_path": (5, ["a"], "../../etc/passwd", "a\x00b", ""),
        "task_type": (5, ["SEQ_2_SEQ_LM"], {}),
        "fan_in_fan_out": (True, "yes", 5),
        "target_parameters": (["weight"],),
        "trainable_token_indices": ([1, 2], {"embed_tokens": [1]}),
        "layer_replication": ([[0, 1], [0, 1]],),
        "alora_invocation_tokens": ([1],),
        "megatron_config": ({"a": 1},),
        "use_qalora": (True,),
        "kasa_config": ({},{"a": 1}),
        "something_new": (True, 1, "x", [1], {"a": None}),
    }  # fmt: skip
    for key, values in wrong.items():
        for value in values:

            def mutate(directory: Path, key: str = key, value: Any = value) -> None:
                path = directory / CONFIG_FILE
                path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

            yield mutate
    for text in ("", "{", "[]", "null", "5", '"x"', "[" * 100_000, "\x00", "{'r': 3}", "\ufeff{}"):
        yield lambda directory, text=text: (directory / CONFIG_FILE).write_text(text)
    yield lambda directory: (directory / CONFIG_FILE).unlink()
    yield lambda directory: (directory / CONFIG_FILE).write_bytes(b"\xff\xfe{}")


def truncations() -> Iterator[Mutation]:
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        for part in range(EACH):

            def cut(directory: Path, file: str = file, part: int = part) -> None:
                content = (directory / file).read_bytes()
                (directory / file).write_bytes(content[: len(content) * part // EACH])

            yield cut
    for size in (1, 7, 8, 9, 4096):
        yield lambda directory, size=size: (directory / WEIGHTS_FILE).write_bytes(
            (directory / WEIGHTS_FILE).read_bytes() + bytes(size)  # too long is wrong too
        )
    yield lambda directory: (directory / WEIGHTS_FILE).unlink()


def not_finite() -> Iterator[Mutation]:
    for seed in range(EACH):

        def poison(tensors: dict[str, Tensor], seed: int = seed) -> dict[str, Tensor]:
            draw = random.Random(seed)
            key = draw.choice(sorted(tensors))
            dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
            tensor = tensors[key].to(dtype)
            value = draw.choice([float("nan"), float("inf"), float("-inf")])
            tensor.view(-1)[draw.randrange(tensor.numel())] = value
            return tensors | {key: tensor}

        yield with_tensors(poison)


def huge() -> Iterator[Mutation]:
    """A tensor of 10 GB or more is declared, and is not there."""
    for which in range(EACH // 3):
        for shape in ([50_000, 50_000], [2_684_354_560], [2**31, 2**31]):

            def declare(header: Header, which: int = which, shape: Any = shape) -> None:
                entry = header[names(header)[which]]
                size = 4
                for side in shape:
                    size *= side
                start = entry["data_offsets"][0]
                entry |= {"shape": shape, "data_offsets": [start, start + size]}

            yield with_header(declare)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickles() -> Iterator[Mutation]:
    def torch_saved(value: object, legacy: bool) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
        return buffer.getvalue()

    def zipped(value: object) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(value))
        return buffer.getvalue()

    writers: list[Callable[[object], bytes]] = [
        *(lambda value, p=p: pickle.dumps(value, protocol=p) for p in range(6)),
        lambda value: torch_saved(value, legacy=False),
        lambda value: torch_saved(value, legacy=True),
        zipped,
        lambda value: struct.pack("<Q", 2) + b"{}" + pickle.dumps(value),
    ]
    for write in writers:
        for value in (
            lambda bomb: bomb,
            lambda bomb: {"base_model.model.x.lora_A.weight": bomb},
            lambda bomb: {"base_model.model.x.lora_A.weight": torch.ones(2, 2), "x": bomb},
        ):
            for remains in (True, False):

                def plant(
                    directory: Path, write: Any = write, value: Any = value, remains: bool = remains
                ) -> None:
                    content = write(value(Bomb(directory / "exploded")))
                    file = WEIGHTS_FILE if remains else "adapter_model.bin"
                    (directory / WEIGHTS_FILE).unlink()
                    (directory / file).write_bytes(content)

                yield plant


KINDS = {
    "header": headers,
    "shape": shapes,
    "dtype": dtypes,
    "key names": keys,
    "config fields": configs,
    "truncation": truncations,
    "not finite": not_finite,
    "declared 10 GB": huge,
    "pickle": pickles,
}
NEVER_LOADS = {"shape", "truncation", "not finite", "declared 10 GB", "pickle"}


@pytest.mark.parametrize("kind", KINDS)
def test_refused_in_one_line_or_read_exactly(kind: str, sound: Path, tmp_path: Path) -> None:
    mutations = list(KINDS[kind]())
    assert len(mutations) >= EACH
    files = {file: (sound / file).read_bytes() for file in (WEIGHTS_FILE, CONFIG_FILE)}
    model = tiny_bart()
    state = State.of(model)
    refused = 0
    for index, mutate in enumerate(mutations):
        directory = tmp_path / str(index)
        directory.mkdir()
        for file, content in files.items():
            (directory / file).write_bytes(content)
        mutate(directory)
        with little_memory():
            message = refusal(model, directory)
        if message is not None:
            refused += 1
            assert message.isprintable(), message
            assert len(message) < 3000, message
            state.check(model)
        else:
            assert kind not in NEVER_LOADS, index
            check_exact(model, directory)
            model = tiny_bart()
            state = State.of(model)
        assert not (directory / "exploded").exists()
    assert refused >= 0.5 * len(mutations), f"{refused} of {len(mutations)} refused"


@contextmanager
def little_memory(bytes_: int = 2**31) -> Iterator[None]:
    """Within it no more memory can be had than this: what a file declares is not allocated."""
    if resource is None or not sys.platform.startswith("linux"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's limits")
def test_the_limit_of_memory_is_felt() -> None:
    with little_memory(), pytest.raises(RuntimeError, match="memory"):
        torch.empty(10**10, dtype=torch.uint8)


PLAIN = [  # an entry, and the message
    *(
        ("modules_to_save", v, "(also_train|modules_to_save)[: ]")
        for v in (["("], [5], "(", [None])
    ),
    *(("bias", v, "bias must be one of") for v in ("some", True)),
    *(("lora_bias", True, "lora_B.bias"), ("lora_bias", 1, "lora_bias must be")),
    *(("use_dora", True, "magnitude"), ("use_dora", "yes", "dora must be")),
]


@pytest.mark.parametrize(("key", "value", "message"), PLAIN)
def test_a_plain_adapter_is_refused_for_the_entry_itself(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    """Of the sound one other entries are refused too: here nothing else is wrong."""
    minilora.save_adapter(adapted("bart"), tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    model = tiny_bart()
    state = State.of(model)
    with pytest.raises(LoRAError, match=message):
        minilora.load_adapter(model, tmp_path)
    state.check(model)


def refusal(model: torch.nn.Module, directory: Path) -> str | None:
    """What a LoRAError says, or None. Any other exception is a failure."""
    try:
        minilora.load_adapter(model, directory)
    except LoRAError as error:
        return str(error)
    return None


def check_exact(model: torch.nn.Module, directory: Path) -> None:
    """What was loaded is what the file holds, to the last bit."""
    written, in_memory = load_file(directory / WEIGHTS_FILE), adapter_of(model).tensors
    held = {key.replace(".default", ""): tensor for key, tensor in written.items()}  # PEFT's name
    assert held.keys() == in_memory.keys()
    for key, tensor in held.items():
        assert torch.equal(tensor.to(in_memory[key].dtype), in_memory[key]), key


def test_the_sound_one_loads(sound: Path) -> None:
    model = tiny_bart()
    minilora.load_adapter(model, sound)
    check_exact(model, sound)


def test_a_model_with_an_adapter_keeps_it_when_another_is_refused(
    sound: Path, tmp_path: Path
) -> None:
    model = tiny_bart()
    minilora.load_adapter(model, sound)
    state = State.of(model)
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / file).write_bytes((sound / file).read_bytes())
    next(keys())(tmp_path)
    with pytest.raises(LoRAError, match="unexpected key"):
        minilora.load_adapter(model, tmp_path)
    state.check(model)
