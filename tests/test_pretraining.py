"""The parts of pre-training that need neither the texts nor a trained model."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import minilora

pytest.importorskip("tokenizers")
FOLDER = Path(__file__).parent.parent / "pretraining"
sys.path.append(str(FOLDER))  # the scripts import each other by bare names
MASK = 99


def script(name: str) -> ModuleType:
    """Import a script of `pretraining/`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"pretraining_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


noise = script("noise")
names = script("names")
pseudo = script("pseudo")
tokenizer = script("tokenizer")
checkpoint = script("checkpoint")
curriculum = script("curriculum")
pocket = script("model")
train = script("train")


needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="this torch has no torch.optim.Muon"
)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


@pytest.mark.parametrize("seed", range(5))
def test_token_masks_change_nothing_else(seed: int) -> None:
    tokens = np.arange(1000) + 100
    noisy = noise.mask_tokens(tokens, 0.15, MASK, generator(seed))
    assert len(noisy) == len(tokens)
    masked = noisy == MASK
    assert (noisy[~masked] == tokens[~masked]).all()
    assert 0.1 < masked.mean() < 0.2


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("length", [1, 5, 24, 300])
def test_infilling_loses_only_the_rate(seed: int, length: int) -> None:
    tokens = np.arange(length) + 100
    noisy = noise.infill(tokens, 0.3, MASK, generator(seed)).tolist()
    kept = [token for token in noisy if token != MASK]
    assert len(kept) == length - round(0.3 * length)
    assert is_subsequence(kept, tokens.tolist())


def test_every_hole_of_infilling_has_a_mask() -> None:
    tokens = np.arange(200) + 100
    noisy = noise.infill(tokens, 0.3, MASK, generator(0)).tolist()
    for before, after in pairwise(noisy):
        if MASK not in (before, after):
            assert after == before + 1


def test_infilling_nothing_changes_nothing() -> None:
    tokens = np.arange(50)
    assert (noise.infill(tokens, 0.0, MASK, generator(0)) == tokens).all()
    assert len(noise.infill(np.array([], dtype=np.int64), 0.3, MASK, generator(0))) == 0


def test_span_lengths_are_poisson() -> None:
    lengths = np.array(noise.span_lengths(60_000, 3.0, generator(0)))
    assert lengths.sum() == 60_000
    assert lengths.mean() == pytest.approx(3.0, abs=0.1)
    assert lengths.var() == pytest.approx(3.0, abs=0.15)
    assert (lengths == 0).mean() == pytest.approx(np.exp(-3.0), abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_permutation_keeps_sentences(seed: int) -> None:
    end = 7
    tokens = np.array([1, 2, end, 3, end, 4, 5, 6, end, 8])
    moved = noise.permute_sentences(tokens, {end}, generator(seed))
    assert sorted(map(tuple, noise.sentences(moved, {end}))) != []
    assert sorted(moved.tolist()) == sorted(tokens.tolist())
    text = f" {' '.join(map(str, moved.tolist()))} "
    for sentence in noise.sentences(tokens, {end}):
        assert f" {' '.join(map(str, sentence.tolist()))} " in text


def test_noise_repeats_with_its_seed() -> None:
    tokens = np.arange(100)
    first = noise.infill(tokens, 0.3, MASK, generator(3))
    assert (first == noise.infill(tokens, 0.3, MASK, generator(3))).all()


def test_tokenizer_gives_text_back() -> None:
    lines = ["Ann: I'd like 2 tickets for 7:30\n", "Tom: sure, see you at the station\n"] * 20
    trained = tokenizer.train(iter(lines), 280)
    assert trained.get_vocab_size() == 280
    assert [trained.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert trained.token_to_id("<mask>") == 279
    for text in ("Ann: I'd like 2 tickets", "Zoë 😂\nNAÏVE  two spaces", " leading", "x\n\ny\t"):
        encoding = trained.encode(text)
        assert (encoding.ids[0], encoding.ids[-1]) == (0, 2)
        assert trained.decode(encoding.ids) == text


def test_slots_are_private_characters() -> None:
    people = range(names.SLOTS)
    marks = {names.slot(gender, person) for gender in names.GENDERS for person in people}
    assert len(marks) == 3 * names.SLOTS
    assert all(names.SLOT.fullmatch(mark) for mark in marks)


def test_harvest_finds_names_by_speech_tags() -> None:
    lines = ['"Well," said Norabel, and took her hat.'] * 4 + ['"No," cried The man.'] * 4
    pool = names.harvest(lines)
    assert "Norabel" in pool["f"]
    assert "Norabel" in pool["x"]
    assert "The" not in pool["x"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("I love my dog", "Ann loves her dog"),
        ("I'm late for my train", "Ann is late for her train"),
        ("I don't know if I can come", "Ann doesn't know if she can come"),
        ("I bought you a ticket", "Ann bought Tom a ticket"),
        ("we should go", "they should go"),
    ],
)
def test_retelling_changes_the_person(said: str, told: str) -> None:
    ann, tom = pseudo.Turn("Ann", "f", said), pseudo.Turn("Tom", "m", "")
    assert pseudo.retell(said, ann, tom) == told


def test_summaries_name_a_speaker() -> None:
    turns = [
        pseudo.Turn("Ann", "f", "Do you like the old station in Leeds?"),
        pseudo.Turn("Tom", "m", "Yes, I love the old station."),
        pseudo.Turn("Ann", "f", "I will meet you at the station at 7."),
    ]
    summary = pseudo.summarize(turns, generator(0))
    assert summary
    assert summary.endswith(".")
    assert "Ann" in summary or "Tom" in summary
    assert pseudo.summarize([pseudo.Turn("Ann", "f", "ok")], generator(0)) is None


def test_invented_names_are_pronounceable_words() -> None:
    found = names.invent("f", 50, generator(0))
    assert all(name.isalpha() and name.istitle() for name in found)
    assert len(set(found)) > 40


def test_batches_are_shifted_and_padded_as_bart_does() -> None:
    torch = pytest.importorskip("torch")
    bart = pytest.importorskip("transformers.models.bart.modeling_bart")
    examples = [(np.arange(5, 5 + n), np.arange(9, 9 + 2 * n)) for n in (3, 1, 2)]
    batch = curriculum.collate(examples)
    expected = bart.shift_tokens_right(batch["labels"], pad_token_id=1, decoder_start_token_id=2)
    assert torch.equal(batch["decoder_input_ids"], expected)
    assert batch["labels"][0].tolist() == [0, 9, 10, 11, 12, 13, 14, 2]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4]
    parts = curriculum.chunks(examples, 14)
    assert sum(map(len, parts)) == 3
    assert len(parts) > 1


def test_slots_are_filled_alike_in_dialogue_and_summary() -> None:
    table = {curriculum.FIRST: [5, 6], curriculum.FIRST + 1: [7]}
    text = np.array([curriculum.FIRST, 50, curriculum.FIRST + 1])
    assert curriculum.Names.fill(text, table).tolist() == [5, 6, 50, 7]


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_a_checkpoint_gives_back_weights_moments_and_random_state(
    kind: str, tmp_path: Path
) -> None:
    shape = {"layers": 1, "decoder_layers": 1, "width": 8, "heads": 2, "init_std": 0.06}
    model = pocket.new_model(argparse.Namespace(**shape))
    optimizers = pocket.new_optimizers(model, kind, 1e-2)
    ids = torch.arange(5, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    rng = generator(3)
    saved = {"state": {"step": 1}, "rngs": [rng.bit_generator.state], "arguments": shape}
    checkpoint.write_checkpoint(tmp_path / checkpoint.CHECKPOINT, model, optimizers, saved)

    weights, moments, again = checkpoint.read_checkpoint(tmp_path / checkpoint.CHECKPOINT)
    assert again == saved
    other = pocket.new_model(argparse.Namespace(**again["arguments"]))
    _, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(optimizers) == 1 + (kind == "muon")
    for optimizer, known in zip(optimizers, moments, strict=False):
        before = optimizer.state_dict()["state"]
        assert before.keys() == known.keys()
        for index, values in before.items():
            assert all(torch.equal(value, known[index][name]) for name, value in values.items())
    resumed = generator(4)
    resumed.bit_generator.state = again["rngs"][0]
    assert resumed.random() == rng.random()


@needs_muon
def test_muon_takes_the_layers_matrices_and_adamw_the_rest() -> None:
    shape = {"layers": 1, "decoder_layers": 1, "width": 8, "heads": 2, "init_std": 0.06}
    model = pocket.new_model(argparse.Namespace(**shape))
    groups = [o.param_groups for o in pocket.new_optimizers(model, "muon", 1e-3)]
    adamw, muon = ({id(p) for g in group for p in g["params"]} for group in groups)
    assert not adamw & muon
    assert adamw | muon == {id(p) for p in model.parameters()}
    assert muon == {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def test_gradients_are_views_of_one_buffer() -> None:
    layer = torch.nn.Linear(3, 2)
    buffer, counts = train.share_gradients(list(layer.parameters()), "cpu")
    counts.fill_(7.0)
    layer(torch.ones(1, 3)).sum().backward()
    assert buffer.tolist() == [1.0] * 8 + [7.0] * train.COUNTS


ASSETS = Path(minilora.__file__).parent / "summarization" / "assets" / "pocket-bart"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def pretrain(data: Path, launcher: list[str], *flags: str) -> list[str]:
    """The command that pre-trains a tiny model; a flag given twice counts as it comes last."""
    fixed = (
        f"--data {data} --out {data / 'run'} --tokenizer {ASSETS / 'tokenizer.json'} "
        "--layers 1 --decoder-layers 1 --width 16 --heads 2 --threads 1 --budget 600 --decay 0.01 "
        "--evaluate-every 0.005"
    )
    return [sys.executable, *launcher, str(FOLDER / "train.py"), *fixed.split(), *flags]


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """Arrays of random tokens in the shape of `prepare.py`'s."""
    rng = generator(0)
    for split in ("train", "heldout"):
        for name in ("prose", "chat", "pseudo", "pairs"):
            arrays: dict[str, np.ndarray] = {}
            for column in ("text", "summary"):
                lengths = rng.integers(10, 60, 40)
                arrays[f"{column}_offsets"] = np.cumsum([0, *lengths])
                arrays[f"{column}_tokens"] = rng.integers(5, 8000, lengths.sum(), dtype=np.uint16)
            np.savez(tmp_path / f"{split}-{name}.npz", **arrays)  # type: ignore[arg-type]
    people = [f"Name{chr(97 + number)}" for number in range(names.SLOTS + 1)]
    (tmp_path / "names.json").write_text(json.dumps(dict.fromkeys(names.GENDERS, people)))
    return tmp_path


@pytest.mark.slow
@needs_muon
def test_processes_share_their_gradients_and_go_on_as_one(tiny_data: Path) -> None:
    log = tiny_data / "run" / "log.jsonl"
    for total, launcher in (("0.01", TORCHRUN), ("0.02", [])):
        done = subprocess.run(
            pretrain(tiny_data, launcher, "--total", total, "--optimizer", "muon"),
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    first, second = (row for row in map(json.loads, log.read_text().splitlines()) if "done" in row)
    assert 10_000 <= first["tokens"] < 12_000  # both processes' tokens, the last step's beyond
    assert first["tokens"] / first["step"] > 700  # two batches of at most 600 a step
    assert first["tokens"] < second["tokens"] < 21_000


@pytest.mark.slow
def test_processes_that_are_stopped_save_together(tiny_data: Path) -> None:
    """Most of this run's time is evaluation, during which the other process waits."""
    run = subprocess.Popen(
        pretrain(tiny_data, TORCHRUN, "--total", "1000", "--evaluate-every", "0.001"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        log = tiny_data / "run" / "log.jsonl"
        until = time.monotonic() + 120
        while not log.exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert log.exists()
        run.terminate()
        run.wait(60)
    finally:
        run.kill()
    _, _, saved = checkpoint.read_checkpoint(tiny_data / "run" / checkpoint.CHECKPOINT)
    assert saved["state"]["step"] >= len(log.read_text().splitlines())
    assert len(saved["rngs"]) == 2


@pytest.mark.slow
def test_what_pretraining_refuses(tiny_data: Path, tmp_path: Path) -> None:
    def refused(*flags: str) -> str:
        command = pretrain(tiny_data, [], *flags)
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return done.stderr

    history = tmp_path / "losses.jsonl"
    counts = {"step": 7, "tokens": 5_000, "targets": 900, "cpu_seconds": 1.5}
    history.write_text(json.dumps(counts) + "\n")
    warm = ("--history", str(history), "--init", str(ASSETS))
    assert "--init and --history go together" in refused("--init", str(ASSETS))
    assert "has other layers than" in refused(*warm, "--total", "0.01")
    assert "0.0 M tokens are done: give a larger --total" in refused(*warm, "--total", "0.001",
        "--layers", "3", "--decoder-layers", "3", "--width", "256", "--heads", "4",
    )  # fmt: skip
    command = pretrain(tiny_data, [], "--total", "0.001")
    subprocess.run(command, capture_output=True, timeout=240, check=True)
    assert "is of a run with adamw" in refused("--total", "0.002", "--optimizer", "muon")
