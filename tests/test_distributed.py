"""Several processes compute what one computes, stop together, and say once what went wrong.

The processes are forks of the test (gloo on the CPU), which saves them the imports; what torchrun
itself does is tested with torchrun.
"""

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import LEDConfig, LEDForConditionalGeneration
from transformers.models.bart.modeling_bart import BartEncoder

from minilora.summarization import processes
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.errors import UserError
from minilora.summarization.training import ddp, trainer, validation
from tests.helpers import as_jsonl, byte_level_bpe, dialogues, records, save_bart, save_data, write
from tests.marks import slow_but

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available()),
    reason="needs fork and torch.distributed",
)
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
TOY = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
STEPS = 30  # of 59 batches: 293 dialogues, 5 in a batch, two batches a step, 3 in the last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_bart(folder / "bart", **NO_DROPOUT)
    save_bart(folder / "dropping")
    save_data(folder / "data", train=293, validation=5, test=5)
    save_data(folder / "short", train=24, validation=5, test=5)
    return folder


def flags(folder: Path, *more: object, model: str = "bart", data: str = "data") -> list[str]:
    base = ["--model", folder / model, "--data", folder / data, "--rank", 3, "--batch-size", 5]
    base += ["--accumulate", 2, "--epochs", 1, "--learning-rate", 0.02, "--dropout", 0]
    base += ["--precision", "fp32", "--device", "cpu", "--beams", 1, "--min-length", 0]
    base += ["--targets", "q_proj", "v_proj", "--max-length", 12, "--evaluation-batch-size", 2]
    return [str(flag) for flag in [*base, *more]]


# Processes ----------------------------------------------------------------------------------------


SERVER = """
import sys
from torch.distributed import TCPStore
stores = []
for _ in sys.stdin:  # until whoever started this is gone
    stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    print(stores[-1].port, flush=True)
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def meeting_point() -> str:
    """The port of a new store, which as torchrun's lives in a process of its own.

    Its thread must not be here: a fork while it holds a lock leaves the child one that stays shut.
    """
    streams = server().stdin, server().stdout
    assert streams[0] is not None
    assert streams[1] is not None
    print(file=streams[0], flush=True)
    port = streams[1].readline().strip()
    assert port, "the process that holds the stores has died"
    return port


def forked(count: int, work: Callable[[int], int], outputs: Path) -> list[int]:
    """`work(rank)` in processes as torchrun makes them. Returns their exit codes, -n for signal n.

    What process r prints is in `outputs/r.txt`.
    """
    outputs.mkdir(parents=True, exist_ok=True)
    port, children = meeting_point(), []
    for rank in range(count):
        if (child := os.fork()) == 0:
            code = 1
            signal.alarm(300)  # a deadlock ends the test, not the job that runs it
            try:
                os.environ |= {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
                    **{"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"},
                    "MASTER_PORT": port,
                    **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
                }
                file = os.open(outputs / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
                sys.stdout = os.fdopen(1, "w", buffering=1)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                code = work(rank)
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # without pytest's own end
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train(
    count: int, argv: list[str], run: Path, before: Callable[[int], None] | None = None
) -> list[int]:
    """Train into `run` with so many processes; `before(rank)` is called in each."""

    def work(rank: int) -> int:
        if before is not None:
            before(rank)
        into = [] if "--resume" in argv else ["--output", str(run)]
        return train_main([*argv, *into])

    return forked(count, work, run.with_suffix(".printed"))


def printed(run: Path) -> list[str]:
    files = sorted(run.with_suffix(".printed").iterdir())
    return [file.read_text() for file in files]


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def counting(rank: int) -> None:
    """`sent_bytes` in log.jsonl: the gradients that DistributedDataParallel sends in a step."""
    sent, measures = [0], trainer.Trainer.measures

    class Counted(DistributedDataParallel):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.register_comm_hook(dist.group.WORLD, hook)

    def hook(group: Any, bucket: Any) -> Any:
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    hook.__annotations__.clear()  # DistributedDataParallel refuses Any

    def counted(self: trainer.Trainer, *arguments: Any) -> dict[str, Any]:
        found, sent[0] = sent[0], 0
        first = 2 if self.progress.step == 0 else 1  # the pass that arranges the buckets
        return measures(self, *arguments) | {"sent_bytes": found // first}

    ddp.DistributedDataParallel = Counted  # type: ignore[attr-defined]
    trainer.Trainer.measures = counted  # type: ignore[method-assign]


def signalled_at(step: int, who: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    """Process `who` sends itself a signal as it begins that step."""

    def before(rank: int) -> None:
        original = trainer.Trainer.step

        def step_(self: trainer.Trainer, group: Any) -> dict[str, float]:
            if rank == who and self.progress.step + 1 == step:
                os.kill(os.getpid(), number)
            return original(self, group)

        trainer.Trainer.step = step_  # type: ignore[method-assign]

    return before


class Runs(dict[int, Path]):
    """The same run with so many processes, trained when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, count: int) -> Path:
        run = self[count] = self.folder / f"run-{count}"
        if count == 1:
            assert train_main([*flags(self.folder), "--output", str(run)]) == 0
        else:
            assert train(count, flags(self.folder), run, counting) == [0] * count, printed(run)
        return run


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    return Runs(folder)


def by_step(run: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in records(run) if record["kind"] == "step"]


# The same result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", slow_but([2], [2, 4]))
def test_losses_are_those_of_one_process(runs: dict[int, Path], count: int) -> None:
    """float32 sums in another order: 1e-5 in 30 steps, while the loss falls by more than 0.5."""
    one, several = by_step(runs[1]), by_step(runs[count])
    assert len(one) == STEPS
    assert one[0] - one[-1] > 0.5
    assert max(abs(a - b) for a, b in zip(one, several, strict=True)) < 1e-5
    # every dialogue once, and each in its step: the tokens of a step say so
    assert by_step(runs[1], "tokens") == by_step(runs[count], "tokens")
    for name, tensor in trained(runs[1]).items():
        torch.testing.assert_close(trained(runs[count])[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", slow_but([2], [2, 4]))
def test_a_step_sends_the_adapters_gradients_and_nothing_else(
    runs: dict[int, Path], count: int
) -> None:
    trainable = records(runs[count])[0]["trainable"]
    assert trainable == sum(tensor.numel() for tensor in trained(runs[count]).values())
    assert by_step(runs[count], "sent_bytes") == [4 * trainable] * STEPS
    assert "sent_bytes" not in records(runs[1])[1]


@pytest.mark.parametrize("count", slow_but([2], [2, 4]))
def test_evaluation_is_split_and_put_together_in_order(runs: dict[int, Path], count: int) -> None:
    """Five dialogues in three batches: with four processes one has none."""
    one, several = (json.loads((runs[i] / "evaluation.json").read_bytes()) for i in (1, count))
    assert [row["id"] for row in several["examples"]] == [f"d{i}" for i in range(200, 205)]
    assert len({row["finetuned"] for row in several["examples"]}) > 1
    assert several["examples"] == one["examples"]
    assert several["intervals"] == one["intervals"]
    (ours,), (theirs,) = (
        [row for row in records(runs[i]) if row["kind"] == "validation"] for i in (1, count)
    )
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_the_encoder_is_computed_by_one_process_and_all_read_it(
    folder: Path, tmp_path: Path
) -> None:
    """The losses of two processes that share a file, of one that has it in memory, and of none."""
    short = flags(folder, "--targets", "decoder", "--epochs", 2, data="short")

    def reading(rank: int) -> None:
        """`encoder.RANK` holds how many dialogues this process's encoder reads."""
        original, total = BartEncoder.forward, [0]

        @functools.wraps(original)  # generate looks at the signature
        def forward(self: BartEncoder, input_ids: torch.Tensor, *more: Any, **named: Any) -> Any:
            total[0] += len(input_ids)
            write(tmp_path / f"encoder.{rank}", str(total[0]).encode())
            return original(self, input_ids, *more, **named)

        BartEncoder.forward = forward  # type: ignore[method-assign]

    two, one, none = tmp_path / "two", tmp_path / "one", tmp_path / "none"
    states = ["--cache-directory", str(tmp_path / "states"), "--cache-encoder"]
    assert train(2, [*short, *states, "on"], two, reading) == [0, 0], printed(two)
    assert train_main([*short, *states, "on", "--output", str(one)]) == 0
    assert train_main([*short, *states, "off", "--output", str(none)]) == 0
    losses = [by_step(run) for run in (two, one, none)]
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, abs=1e-5)
    assert losses[0][0] - losses[0][-1] > 0.1
    texts = [json.loads((run / "evaluation.json").read_bytes()) for run in (two, one, none)]
    assert texts[0]["examples"] == texts[1]["examples"] == texts[2]["examples"]
    assert len(list((tmp_path / "states").glob("*.safetensors"))) == 3  # a file for each split
    trial, probes = 1, 2 * 3  # by process 0; by both, for each of train, validation and test
    read = [int((tmp_path / f"encoder.{rank}").read_text()) for rank in (0, 1)]
    assert read == [trial + probes + 24 + 5 + 5, probes]


@pytest.mark.parametrize("count", slow_but([2], [2, 4]))
def test_only_one_process_prints_and_logs(runs: dict[int, Path], count: int) -> None:
    main, *others = printed(runs[count])
    assert "trainable parameters" in main
    assert others == [""] * (count - 1)
    assert [row.get("step") for row in records(runs[count]) if row["kind"] == "step"] == list(
        range(1, STEPS + 1)
    )


@pytest.mark.slow
def test_full_fine_tuning_as_well(folder: Path) -> None:
    argv = flags(folder, "--method", "full", "--no-evaluate", "--learning-rate", 1e-3, data="short")
    one, two = folder / "full-1", folder / "full-2"
    assert train_main([*argv, "--output", str(one)]) == 0
    assert train(2, argv, two, counting) == [0, 0], printed(two)
    assert by_step(two) == pytest.approx(by_step(one), abs=1e-5)
    trainable = records(two)[0]["trainable"]
    assert trainable == records(two)[0]["total"]
    assert set(by_step(two, "sent_bytes")) == {4 * trainable}


@pytest.mark.parametrize(
    "method",
    slow_but(
        ["--method prefix --prefix-hidden 0"],
        ["--method prefix --prefix-hidden 0", "--method prefix --prefix-hidden 8",
         "--method prompt", "--with prefix --prefix-hidden 0", "--with prompt"],
    ),
)  # fmt: skip
def test_prompts_and_prefixes_as_well(folder: Path, tmp_path: Path, method: str) -> None:
    """The joint batch's losses to 1e-5; weights as for LoRA: float32 sums in another order."""
    rate = "0.01" if "hidden 8" in method else "0.02" if "--with" in method else "0.1"
    argv = flags(folder, "--virtual-tokens", 3, "--no-evaluate", *method.split(), data="short")
    argv += ["--learning-rate", rate, "--epochs", "4"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_main([*argv, "--output", str(one)]) == 0
    assert train(2, argv, two, counting) == [0, 0], printed(two)
    assert by_step(two) == pytest.approx(by_step(one), abs=1e-5)
    assert by_step(one)[0] - by_step(one)[-1] > 0.1
    assert set(by_step(two, "sent_bytes")) == {4 * records(two)[0]["trainable"]}
    files = sorted((one / "adapter").rglob("*.safetensors"))
    assert len(files) == 1 + ("--with" in method)
    for file in files:
        theirs = load_file(two / file.relative_to(one))
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_adalora_chooses_the_same_ranks_in_every_process(folder: Path) -> None:
    """Each by itself, from gradients that are the same bits in all."""
    argv = flags(folder, "--method", "adalora", "--no-evaluate", data="short")
    run = folder / "adalora-2"

    def before(rank: int) -> None:
        advance = trainer.Trainer.advance

        def recorded(self: trainer.Trainer, measures: dict[str, Any]) -> None:
            advance(self, measures)
            named = self.session.model.named_parameters()
            lambdas = {name: p.detach().clone() for name, p in named if name.endswith("lora_E")}
            save_file(lambdas, folder / f"lambdas-{rank}-{self.progress.step}.safetensors")

        trainer.Trainer.advance = recorded  # type: ignore[method-assign]

    assert train(2, argv, run, before) == [0, 0], printed(run)
    steps, ranks = len(by_step(run)), list[int]()
    for step in range(1, steps + 1):
        one, other = (load_file(folder / f"lambdas-{r}-{step}.safetensors") for r in (0, 1))
        assert all(torch.equal(one[name], other[name]) for name in one)
        ranks.append(sum(int(tensor.count_nonzero()) for tensor in one.values()))
    assert ranks[0] > ranks[-1] == 3 * len(one)  # --rank for each


@pytest.mark.slow
def test_layers_that_each_process_drops_by_itself(folder: Path) -> None:
    """LayerDrop: nobody waits for the gradients of a layer that nobody else left out."""
    save_bart(folder / "layers", encoder_layers=2, encoder_layerdrop=0.5)
    run = folder / "layers-2"
    argv = flags(folder, "--no-evaluate", model="layers", data="short")
    assert train(2, argv, run, counting) == [0, 0], printed(run)
    sent = set(by_step(run, "sent_bytes"))
    assert sent == {4 * records(run)[0]["trainable"]}


@pytest.mark.slow
def test_adapters_that_nothing_reaches_are_named_and_nobody_waits_for_them(folder: Path) -> None:
    """LED's `*_global` projections, which a summary without global attention does not use."""
    sides = {f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in TOY.items()}
    positions = {f"max_{s}_position_embeddings": 64 for s in ("encoder", "decoder")}
    ends = {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = LEDConfig(
        **sides, **positions, **ends, **NO_DROPOUT, vocab_size=400, d_model=16, attention_window=[8]
    )
    LEDForConditionalGeneration(config).save_pretrained(folder / "led")
    byte_level_bpe().save_pretrained(folder / "led")
    argv = flags(folder, "--no-evaluate", "--targets", "all-linear", model="led", data="short")
    one, two = folder / "led-1", folder / "led-2"
    assert train_main([*argv, "--output", str(one)]) == 0
    assert train(2, argv, two) == [0, 0], printed(two)
    assert by_step(two) == pytest.approx(by_step(one), abs=1e-5)
    (note,) = [line for line in printed(two) if "no gradient: " in line]
    assert "note: in the first 3 steps, no gradient: led.encoder" in note
    assert "query_global.lora_A" in note
    assert "query.lora_A" not in note
    assert not any("Warning" in line for line in printed(two))
    dead = {key: t for key, t in trained(two).items() if "_global.lora_B" in key}
    assert dead
    assert not any(tensor.any() for tensor in dead.values())


# Stop and resume ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    runs: dict[int, Path], folder: Path, before: int, after: int
) -> None:
    run = folder / f"from-{before}-to-{after}"
    stop = signalled_at(11, who=before - 1)
    assert train(before, flags(folder), run, stop) == [130] * before
    assert by_step(run) == by_step(runs[before])[:11]
    assert train(after, ["--resume", str(run)], run) == [0] * after, printed(run)
    assert by_step(run) == pytest.approx(by_step(runs[1]), abs=1e-5)
    assert json.loads((run / "evaluation.json").read_bytes())["n"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_with_the_same_number_of_processes_the_end_is_the_same_bit_for_bit(
    folder: Path, count: int
) -> None:
    """With dropout, which differs from process to process; the signal comes to one of them."""
    argv = flags(folder, "--dropout", 0.1, "--epochs", 2, model="dropping", data="short")
    whole, parts = folder / f"whole-{count}", folder / f"parts-{count}"
    assert train(count, argv, whole) == [0] * count, printed(whole)
    assert train(count, argv, parts, signalled_at(2, who=count - 1)) == [130] * count
    (saved,) = checkpoints(parts)
    states = load_file(saved / "state.safetensors")
    mine = [states[f"random.{rank}.cpu"] for rank in range(count)]
    assert not any(torch.equal(mine[0], other) for other in mine[1:])
    assert f"torchrun --nproc-per-node {count} train.py --resume" in printed(parts)[0]
    assert train(count, ["--resume", str(parts)], parts) == [0] * count, printed(parts)
    assert records(parts) == records(whole)
    files = [run / "adapter" / "adapter_model.safetensors" for run in (parts, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    scores = [(run / "evaluation.json").read_bytes() for run in (parts, whole)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_stop_while_summaries_are_written_stops_all(folder: Path) -> None:
    def before(rank: int) -> None:
        original = validation._summed_losses

        def interrupted(*arguments: Any) -> tuple[float, int]:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        if rank == 1:
            validation._summed_losses = interrupted

    run = folder / "validating"
    assert train(2, flags(folder, data="short"), run, before) == [130, 130], printed(run)
    (saved,) = checkpoints(run)
    progress = json.loads((saved / "state.json").read_bytes())["progress"]
    assert (progress["epoch"], progress["position"]) == (0, 3)
    assert train(2, ["--resume", str(run)], run) == [0, 0], printed(run)
    assert [row["kind"] for row in records(run)].count("validation") == 1


# Ends ---------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from minilora.summarization.training import trainer
from minilora.summarization.cli import train_main

original = trainer.Trainer.step

def step(self, group):
    if self.progress.step == 3 and os.environ["RANK"] == "1":
        {what}
    return original(self, group)

trainer.Trainer.step = step
sys.exit(train_main())
"""


def torchrun(folder: Path, what: str, run: Path) -> tuple[int, str, float]:
    """Exit code, what was printed and seconds; at its fourth step process 1 does `what`."""
    script = write(folder / f"{run.name}.py", SCRIPT.replace("{what}", what).encode())
    started = time.monotonic()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), *flags(folder, data="short", model="dropping"), "--output", str(run)),
            *("--epochs", "9"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    printed = result.stdout + result.stderr
    return result.returncode, printed, time.monotonic() - started


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_is_named(folder: Path, tmp_path: Path) -> None:
    died = tmp_path / "died"
    what = f"open({str(died)!r}, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    code, said, _ = torchrun(folder, what, folder / "killed")
    assert code != 0
    assert time.time() - died.stat().st_mtime < 30
    assert "train.py: process 0 of 2 lost contact with a peer" in said
    assert "Signal 9 (SIGKILL)" in said  # torchrun's own report
    assert "[rank0]" not in said  # no traceback of those who are left over


@pytest.mark.slow
def test_the_main_process_may_die_as_well(folder: Path) -> None:
    run = folder / "beheaded"
    codes = train(4, flags(folder, data="short"), run, signalled_at(2, 0, signal.SIGKILL))
    assert codes == [-signal.SIGKILL, 1, 1, 1]
    said = "".join(printed(run))
    assert said.count("of 4 lost contact with a peer") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once(folder: Path) -> None:
    run = folder / "terminated"
    code, said, _ = torchrun(folder, "os.kill(os.getppid(), signal.SIGTERM)", run)
    assert code != 0
    assert said.count("stopped after step") == 1
    assert f"torchrun --nproc-per-node 2 train.py --resume {run}" in said
    saved = [json.loads((path / "state.json").read_bytes()) for path in checkpoints(run)]
    steps = [state["progress"]["step"] for state in saved]
    assert 4 <= steps[-1] < 27
    assert len(by_step(run)) == steps[-1]
    assert train(2, ["--resume", str(run), "--no-evaluate"], run) == [0, 0], printed(run)
    assert len(by_step(run)) == 27


def test_an_error_of_one_process_is_said_by_it(folder: Path) -> None:
    """Only process 1 sees the loss that is not finite; process 0 waits for its gradients."""

    def before(rank: int) -> None:
        original = ddp.Replica.loss

        def loss(self: ddp.Replica, batch: Any, last: bool) -> torch.Tensor:
            return original(self, batch, last) * (float("nan") if rank == 1 else 1.0)

        ddp.Replica.loss = loss  # type: ignore[method-assign]

    run = folder / "nan"
    codes = train(2, flags(folder, data="short"), run, before)
    said = "".join(printed(run))
    assert codes == [2, 2], said
    assert said.count("the loss is nan in step 1, on the dialogues") == 1
    assert "Traceback" not in said


# Bad use ------------------------------------------------------------------------------------------


def refused(folder: Path, name: str, argv: list[str], *says: str) -> None:
    """Exit code 2 in both processes, one line of one of them, nothing written."""
    run = folder / name
    assert train(2, argv, run) == [2, 2], printed(run)
    lines = [line for text in printed(run) for line in text.splitlines()]
    (line,) = [line for line in lines if not line.startswith(("note:", "Writing"))]
    assert line.startswith("train.py: ")
    for text in says:
        assert text in line
    assert not run.exists()


def test_what_cannot_be_is_refused_once(folder: Path) -> None:
    small = flags(folder, "--batch-size", 1, data="short")
    refused(folder, "small", small, "--batch-size 1 is less than the 2 processes")
    refused(folder, "typo", flags(folder, "--rnk", 3), "unrecognized argument --rnk")
    refused(folder, "nothing", flags(folder, data="absent"), "absent")
    if not torch.cuda.is_available():
        refused(folder, "gpu", flags(folder, "--device", "cuda", data="short"), "--device cuda")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in one of four processes on a machine."""
    monkeypatch.setattr(processes, "active", lambda: True)
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    return monkeypatch


def test_a_gpu_serves_one_process(job: pytest.MonkeyPatch) -> None:
    chosen = list[torch.device]()
    job.setattr(torch.cuda, "set_device", chosen.append)
    for found, says in ((1, "but 1 GPU: start"), (3, "but 3 GPUs: start torchrun with")):
        job.setattr(torch.cuda, "device_count", lambda found=found: found)
        with pytest.raises(UserError, match=f"4 processes on this machine, {says}"):
            processes.own_device(torch.device("cuda"))
    job.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes.own_device(torch.device("cuda")) == torch.device("cuda:2")
    assert chosen == [torch.device("cuda:2")]
    for name in ("cuda:1", "mps"):
        with pytest.raises(UserError, match=f"--device {name} is one device for 4 processes"):
            processes.own_device(torch.device(name))
    assert processes.own_device(torch.device("cpu")) == torch.device("cpu")


def test_processes_that_read_other_data_are_told(folder: Path) -> None:
    """As on two machines, one of which has an older copy."""
    write(folder / "other" / "train.jsonl", as_jsonl(dialogues(24, start=1)))
    for name in ("validation.jsonl", "test.jsonl"):
        write(folder / "other" / name, (folder / "short" / name).read_bytes())

    def work(rank: int) -> int:
        argv = flags(folder, "--output", folder / "unlike", data=("short", "other")[rank])
        return train_main(argv)

    assert forked(2, work, folder / "unlike.printed") == [2, 2]
    said = "".join(printed(folder / "unlike"))
    assert said.count("process 1 of 2 and process 0 differ") == 1
    assert not (folder / "unlike").exists()


def test_evaluate_shares_the_work_and_prints_once(runs: dict[int, Path], folder: Path) -> None:
    alone, shared = folder / "alone.json", folder / "shared.json"
    assert evaluate_main([str(runs[1]), "--output", str(alone), "--device", "cpu"]) == 0
    argv = [str(runs[1]), "--output", str(shared), "--device", "cpu"]
    assert forked(2, lambda _: evaluate_main(argv), folder / "evaluated.printed") == [0, 0]
    assert shared.read_bytes() == alone.read_bytes()
    main, other = printed(folder / "evaluated")
    assert "difference" in main
    assert other == ""


def test_the_page_about_scaling_prints_what_the_script_computes() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    table = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))["table"]()
    assert table in page
    assert "1,179,648" in table  # the 72 modules of bart-large-cnn, as minilora.inject reports them


# The calls ----------------------------------------------------------------------------------------


def test_without_torchrun_nothing_is_shared() -> None:
    assert not processes.active()
    assert (processes.rank(), processes.world_size()) == (0, 1)
    assert processes.shard([1, 2, 3]) == [1, 2, 3]
    assert processes.all_reduce_sum(1.5) == 1.5
    assert (processes.any_rank(False), processes.any_rank(True)) == (False, True)
    with pytest.raises(KeyError):
        processes.run_on_all(lambda: {}["no"])


def test_what_one_finds_out_all_know(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        with processes.join():
            assert processes.gather({"é\ud800": [rank] * rank}) == [
                {"é\ud800": []}, {"é\ud800": [1]}, {"é\ud800": [2, 2]}
            ]  # fmt: skip
            assert processes.shard(range(7)) == range(rank, 7, 3)
            assert processes.all_reduce_sum(rank / 2) == 1.5
            assert processes.any_rank(rank == 2)
            assert not processes.any_rank(False)
            assert processes.from_rank0(lambda: "main's" if rank == 0 else "") == "main's"
            assert processes.run_on_all(lambda: rank) == [0, 1, 2]

            def fail() -> None:
                if rank == 1:
                    raise OSError("disk full")

            kind = OSError if rank == 1 else UserError
            with pytest.raises(kind, match="disk full"):
                processes.run_on_all(fail)

            processes.require_same({"a": 1})
            with pytest.raises(UserError, match="process 2 of 3 and process 0 differ in b"):
                processes.require_same({"a": 1, "b": rank == 2})
        return 0

    assert forked(3, work, tmp_path) == [0, 0, 0], [p.read_text() for p in tmp_path.iterdir()]


THREADS_AT_THE_END = """
import os, torch
from minilora.summarization import processes

def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return [name for name in names if "gloo" in name]

def train():
    linear = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    linear(torch.ones(1, 2)).sum().backward()

with processes.join():
    train()
    assert threads()
assert not threads(), threads()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_thread_of_gloo_is_left_at_the_end() -> None:
    """One that frees a tensor while the interpreter ends aborts the process (SIGABRT), rarely.

    A new interpreter: what the processes of this file have imported already hides the fault.
    """
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting_point()}
    job |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    command = [sys.executable, "-c", THREADS_AT_THE_END]
    done = subprocess.run(command, env=os.environ | job, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
