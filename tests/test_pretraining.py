"""The parts of pre-training that need neither the texts nor a trained model."""

import argparse
import importlib.util
import json
import lzma
import re
import sys
from itertools import pairwise
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BartForConditionalGeneration

import minilora
from tests.forks import run_script
from tests.test_distributed import forked

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
vary = script("vary")
reword = script("reword")
examples = script("examples")
muon = script("muon")
cpu = script("cpu")
pocket = script("model")
pretrain_loop = script("train")


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
    orders = {tuple(noise.permute_sentences(tokens, {end}, generator(n))) for n in range(5)}
    assert len(orders) > 1
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


def test_blended_names_begin_as_known_ones_do() -> None:
    found = names.blend(["Stephen", "Kim"], 50, generator(0))
    assert all(name.isalpha() and name.startswith(("St", "Ki")) for name in found)
    assert len(set(found)) > 40
    assert not {"Stephen", "Kim"} & set(found)
    plain, blended = (examples.Names(blended=on).pool for on in (False, True))
    for gender in names.GENDERS:  # what is held out stays as it was
        assert blended[gender][: len(plain[gender])] == plain[gender]
        assert len(blended[gender]) > len(plain[gender])


def test_batches_are_shifted_and_padded_as_bart_does() -> None:
    bart = pytest.importorskip("transformers.models.bart.modeling_bart")
    drawn = [([0, *range(5, 5 + n), 2], [0, *range(9, 9 + 2 * n), 2]) for n in (3, 1, 2)]
    batch = examples.collate(drawn)
    expected = bart.shift_tokens_right(batch["labels"], pad_token_id=1, decoder_start_token_id=2)
    assert torch.equal(batch["decoder_input_ids"], expected)
    assert batch["labels"][0].tolist() == [0, 9, 10, 11, 12, 13, 14, 2]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4]


def test_parts_hold_every_example_within_the_budget() -> None:
    rng = generator(0)
    drawn = [([0] * int(rng.integers(3, 90)), [0] * int(rng.integers(3, 40))) for _ in range(300)]
    parts = examples.chunks(drawn, 900)
    assert sorted(map(id, drawn)) == sorted(id(pair) for part in parts for pair in part)
    for part in parts:
        padded = (max(len(s) for s, _ in part) + max(len(t) for _, t in part)) * len(part)
        assert padded <= 900


def test_slots_are_filled_alike_in_dialogue_and_summary() -> None:
    table = examples.Names().draw(generator(0))
    assert len(set(table.values())) == len(table) == 3 * names.SLOTS
    ann = names.slot("f", 0)
    chat, told = (examples.Names.fill(text, table) for text in (f"{ann}: hi", f"{ann} says hi."))
    assert chat == f"{table[ann]}: hi"
    assert told == f"{table[ann]} says hi."


@pytest.mark.parametrize("seed", range(20))
def test_numbers_days_and_places_change_alike(seed: int) -> None:
    chat = "Ann: the train to Whitby leaves at 4, Monday\nTom: four? Two of us, 16:30 back"
    told = "Ann takes the four o'clock train to Whitby on Monday with two tickets."
    first, second = vary.vary([chat, told], ["Leeds"], generator(seed))
    numbers = [{vary.value(n) for n in vary.NUMBER.findall(text)} for text in (first, second)]
    assert numbers[1] <= numbers[0]
    day = vary.DAY.search(second)
    assert day
    assert day[0] in first
    assert ("Leeds" in first) == ("Leeds" in second)
    assert "16:30" in first  # no summary copies it


def test_numbers_are_drawn_anew() -> None:
    drawn = {vary.vary(["Ann: at 4", "At 4."], [], generator(seed))[1] for seed in range(40)}
    assert len(drawn) > 5


def test_a_number_that_was_reckoned_stays() -> None:
    texts = ["Ann: I have 3\nTom: and I have 4", "They have seven."]
    assert vary.vary(texts, [], generator(0)) == texts


@pytest.mark.parametrize(
    "summary",
    [
        "Ann is looking for a hotel in Leeds, and Tom suggests The Swan.",
        "Ann reserves a table for two at The Swan at 7 pm on March 3rd for Tom.",
        "Ann buys two bus tickets from Leeds to York on March 3rd at 7 am.",
        "Ann rents a standard car at York from March 3rd to March 5th.",
    ],
)
def test_rewording_keeps_facts_and_no_template(summary: str) -> None:
    for seed in range(10):
        told = reword.reword(summary, generator(seed))
        assert told
        assert not reword.FORBIDDEN.search(told)
        facts = re.findall(r"\b(?:[A-Z]\w+|\d\w*|two)\b", summary)
        assert set(facts) <= set(re.findall(r"\b\w+\b", told))


def test_rewording_leaves_out_what_it_does_not_know() -> None:
    assert reword.reword("Bob sings.", generator(0)) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cross_entropy_in_rows_is_torchs(dtype: torch.dtype) -> None:
    """Its gradients against autograd's: 1e-12 in float64; bf16 has 8 bits, so 1e-2 there.

    More rows than are computed at a time, and an upstream gradient that is not one.
    """
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(cpu.ROWS + 70, 24, generator=draw, dtype=torch.float64).to(dtype)
    W = torch.randn(50, 24, generator=draw, dtype=torch.float64).to(dtype)
    labels = torch.randint(50, (len(h),), generator=draw)
    ours = [tensor.clone().requires_grad_() for tensor in (h, W)]
    theirs = [tensor.double().requires_grad_() for tensor in (h, W)]
    loss = cpu.CrossEntropy.apply(*ours, labels)
    wanted = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].t(), labels)
    bound = 1e-12 if dtype == torch.float64 else 1e-2
    assert abs(loss.item() - wanted.item()) < bound * wanted.item()
    (3 * loss).backward()
    (3 * wanted).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).norm() < bound * b.grad.norm()


def test_the_fast_attention_is_torchs() -> None:
    """Loss and gradients in bf16 beside torch's own attention, at most twice as far from float32.

    With padding, so that the mask counts.
    """
    shape = {"layers": 1, "decoder_layers": 1, "width": 32, "heads": 2, "init_std": 0.3}
    torch.manual_seed(0)
    ids = torch.randint(3, 50, (4, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "labels": ids}
    model = pocket.new_model(argparse.Namespace(**shape))

    def gradients(precision: str) -> dict[str, torch.Tensor]:
        model.zero_grad()
        pocket.loss_of(model, batch, "cpu", precision).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    exact, torchs = gradients("fp32"), gradients("bf16")
    cpu.use_fast_attention(model)
    ours = gradients("bf16")
    assert ours.keys() == exact.keys()
    far = [sum((g[n] - exact[n]).square().sum() for n in exact).sqrt() for g in (ours, torchs)]
    assert 0 < far[0] < 2 * far[1]
    hidden = ours["model.decoder.layers.0.encoder_attn.q_proj.weight"]
    assert hidden.norm() > 0


@needs_muon
def test_batched_muon_is_torchs_muon() -> None:
    """Same operations on a stack: equal to the last bit on a CPU, bound 1e-6 for other kernels."""
    torch.manual_seed(0)
    shapes = ((24, 24), (24, 24), (48, 24), (24, 48), (30, 20))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizers = (
        muon.Muon(ours, lr=1e-2),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).abs().max() < 1e-6
        assert (a - before).abs().max() > 1e-2


def test_two_processes_average_their_gradients_and_share_the_matrices(tmp_path: Path) -> None:
    """Both end as one process with the mean gradient; Muon rounds its directions to bf16."""
    shapes = ((24, 24), (24, 24), (24, 24), (48, 24), (30, 20))

    def parameters() -> list[torch.nn.Parameter]:
        draw = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]

    def gradients(rank: int) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(rank + 1)
        return [torch.randn(shape, generator=draw) for shape in shapes]

    def work(rank: int) -> int:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.ParameterList(parameters())
        for parameter, gradient in zip(model, gradients(rank), strict=True):
            parameter.grad = gradient
        assert pretrain_loop.average(model, [1.0, 5.0 * rank]) == [2.0, 5.0]
        muon.Muon(model, lr=1e-2).step()
        save_file({str(i): p.detach() for i, p in enumerate(model)}, tmp_path / f"{rank}")
        torch.distributed.destroy_process_group()
        return 0

    outputs = tmp_path / "printed"
    assert forked(2, work, outputs) == [0, 0], (outputs / "0.txt").read_text()
    alone = parameters()
    for parameter, *both in zip(alone, gradients(0), gradients(1), strict=True):
        parameter.grad = sum(both, torch.zeros(())) / 2
    before = parameters()
    muon.Muon(alone, lr=1e-2).step()
    ends = [load_file(tmp_path / f"{rank}") for rank in range(2)]
    for i, (start, wanted) in enumerate(zip(before, alone, strict=True)):
        assert torch.equal(ends[0][str(i)], ends[1][str(i)])
        assert (ends[0][str(i)] - wanted).abs().max() < 1e-4
        assert (wanted - start).abs().max() > 4e-3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
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


ASSETS = Path(minilora.__file__).parent / "summarization" / "assets" / "pocket-bart"


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the shape of `prepare.py`'s."""
    folder = tmp_path_factory.mktemp("pretraining")
    ann, tom = names.slot("f", 0), names.slot("m", 0)
    chat = [[ann, "f", "I love the old station in Leeds."], [tom, "m", "Do you go on Monday at 4?"],
            [ann, "f", "Yes, I go with my dog."]]  # fmt: skip
    dialogue = "\n".join(f"{who}: {text}" for who, _, text in chat)
    told = f"{ann} goes to Leeds on Monday at 4."
    prose = "The dog sat. It was big. Ann saw it. She ran home. It barked at 4."
    kinds = ("service", "game", "facts", "deal", "visit", "meeting")
    rows: dict[str, list[dict[str, object]]] = {
        "chats": [{"source": "a", "turns": chat}],
        "prose": [{"source": "a", "text": prose}],
        "pairs": [{"kind": kind, "dialogue": dialogue, "summary": told} for kind in kinds],
        "narratives": [{"dialogue": dialogue, "narrative": told, "summary": told}],
    }
    for name, found in rows.items():
        both = [{"split": split, **row} for row in found for split in ("train", "heldout")]
        write_rows(folder / f"{name}.jsonl.xz", both)
    (folder / "places.json").write_text('["Whitby", "York"]')
    return folder


def pretrain(data: Path, out: Path, *flags: str) -> "CompletedProcess[str]":
    """Pre-train a tiny model; a flag given twice counts as it comes last."""
    fixed = (
        f"--data {data} --out {out} --tokenizer {ASSETS / 'tokenizer.json'} --minutes 0.02 "
        "--layers 1 --decoder-layers 1 --width 16 --heads 2 --threads 1 --batch 0.02 --workers 0"
    )
    return run_script(FOLDER / "train.py", *fixed.split(), *flags)


def test_some_service_chats_are_retold_without_a_manner_but_no_held_out_one(
    tiny_data: Path,
) -> None:
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    manner = tokenizer.encode("Service:\n", add_special_tokens=False).ids
    plain = {}
    for split in ("train", "heldout"):
        source, rng = examples.Source(tiny_data, split, tokenizer), generator(0)
        drawn = [source.example("service", examples.STAGES[-1], rng)[0] for _ in range(200)]
        plain[split] = sum(row[1 : 1 + len(manner)] != manner for row in drawn)
    assert plain["heldout"] == 0
    assert 35 < plain["train"] < 85  # three in ten of 200: within four standard deviations


@pytest.mark.slow
def test_pretraining_writes_weights_and_goes_on(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = BartForConditionalGeneration.generate
    monkeypatch.setattr(  # the samples: 80 tokens of them take most of the time
        BartForConditionalGeneration,
        "generate",
        lambda self, **options: written(self, **{**options, "max_new_tokens": 4}),
    )
    keep = ("--checkpoint", str(tmp_path / "state.safetensors"))
    done = pretrain(tiny_data, tmp_path / "run", *keep)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["done"]
    assert 1.1 < last["seconds"] < 30  # 0.02 minutes, and the step that was being done
    assert np.isfinite(last["narrative_right"])
    assert "MODEL" in (tmp_path / "run" / "samples.txt").read_text()

    short = pretrain(tiny_data, tmp_path / "short", "--minutes", "9", "--wall", "0")
    assert short.returncode == 0, short.stderr
    end = json.loads((tmp_path / "short" / "log.jsonl").read_text().splitlines()[-1])
    assert (end["done"], end["step"]) == (True, 1)

    refused = pretrain(tiny_data, tmp_path / "run", *keep)
    assert refused.returncode == 1
    assert "are done: give more --minutes or --tokens" in refused.stderr
    assert "Traceback" not in refused.stderr
    longer = ("--minutes", str(last["seconds"] / 60 + 0.02))
    again = pretrain(tiny_data, tmp_path / "run", *keep, *longer)
    assert again.returncode == 0, again.stderr
    more = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert more["tokens"] > last["tokens"]

    places = ("--run", "run", "--tokenizer", str(ASSETS / "tokenizer.json"), "--out", "model")
    exported = run_script(FOLDER / "export.py", *places, folder=tmp_path)
    assert exported.returncode == 0, exported.stderr
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["model.encoder.layers.0.fc1.weight"].dtype == torch.float16
    assert "M tokens of source and target" in (tmp_path / "model" / "README.md").read_text()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dropout"] == 0.0
    exported = run_script(FOLDER / "export.py", *places, "--dropout", "0.1", folder=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dropout"] == 0.1

    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps(more | {"tokens": 1}) + "\n")
    refused = run_script(FOLDER / "export.py", *places, folder=tmp_path)
    assert refused.returncode == 1
    assert "are of other weights" in refused.stderr

    warm_start = ("--init", str(tmp_path / "model"))
    other = pretrain(tiny_data, tmp_path / "other", *warm_start, "--layers", "2")
    assert "has other layers than --layers and --width say" in other.stderr
    tokens = ("--seen", "3", "--tokens", "3.02", "--accumulate", "2", "--evaluate-every", "0.01")
    warm = pretrain(tiny_data, tmp_path / "warm", *warm_start, *tokens, "--decay", "0.5")
    assert warm.returncode == 0, warm.stderr
    assert "'tokens': 3000000" in warm.stdout
    rows = [json.loads(row) for row in (tmp_path / "warm" / "log.jsonl").read_text().splitlines()]
    assert 3.02e6 <= rows[-1]["tokens"] < 3.03e6  # the last step may go beyond


def test_weights_that_are_not_finite_are_not_written() -> None:
    train, model = script("train"), torch.nn.Linear(2, 2)
    train.require_finite(model, 7)
    with torch.no_grad():
        model.bias[1] = float("nan")
    with pytest.raises(SystemExit, match="step 7: the weights are not finite"):
        train.require_finite(model, 7)


def of_run(tokens: int, targets: int, step: int, seconds: float, **more: Any) -> dict[str, Any]:
    """What a run saves of itself."""
    arguments = {"layers": 5, "decoder_layers": 3, "width": 384, "heads": 6, "init": "None"}
    state = {"tokens": tokens, "targets": targets, "step": step, "seconds": seconds}
    return {"arguments": {**arguments, "seen": 0.0, **more}, "state": state}


def test_the_card_tells_of_one_run_or_of_two() -> None:
    export = script("export")
    log = [{"chat_right": 0.5, "chat_wrong": 5.25}]
    once = of_run(118_145_102, 42_923_939, 2262, 522.0)
    text = export.card(once, log, 19_514_112)
    assert "{" not in text
    assert "Seen: 118 M tokens of source and target, of them 43 M target tokens.\n" in text
    assert "118 M tokens, 2,262 steps in 8.7 minutes." in text
    assert "| chat | 0.500 | 5.250 |" in text
    assert "AMX" not in text
    # The second run counts steps, seconds and targets from zero.
    twice = of_run(201_000_000, 30_000_000, 2900, 36_720.0, init="pocket-bart", seen=118.145102)
    text = export.card(twice, log, 19_514_112)
    assert "{" not in text
    assert "Seen: 201 M tokens of source and target, of them 73 M target tokens.\n" in text
    assert "118 M tokens, 2,262 steps in 8.7 minutes." in text
    assert "83 M tokens, 2,900 steps in\n10.2 hours, without dropout." in text
    with pytest.raises(SystemExit, match="has no run that ended at 7 M tokens"):
        export.card(of_run(9_000_000, 1, 1, 1.0, init="x", seen=7.0), log, 1)


def test_the_losses_of_two_runs_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = script("plot")
    lines = (FOLDER / "losses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if json.loads(line)["tokens"] < 118.2e6]
    further = [rows[-1] | {"step": n, "tokens": 118_145_102 + n * 10**5} for n in (200, 800)]
    assert plot.further_runs(rows) == []
    assert plot.further_runs([*rows, *further]) == [118.145102]
    for name, drawn in (("one", rows), ("two", [*rows, *further])):
        plot.plot(drawn, tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").stat().st_size > 1000
    assert (tmp_path / "two.svg").read_bytes() != (tmp_path / "one.svg").read_bytes()


def test_an_export_of_half_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights-1-of-2.safetensors").write_bytes(b"")
    done = run_script(FOLDER / "export.py", "--run", tmp_path)
    assert done.returncode == 1
    assert "lacks some of its weights" in done.stderr
