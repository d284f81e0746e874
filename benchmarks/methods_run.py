"""One run of the study of methods: train, and measure learning and forgetting.

`methods.py` starts it in a process of its own, with the job as JSON; it prints its result as JSON.

    learnt       validation loss, and loss and ROUGE of each test dialogue, after the last step: no
                 epoch is chosen
    forgotten    the loss on held-out chats and prose of the pre-training, infilled as there

Forgetting can be measured for pocket-bart, since its pre-training texts are available.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT
from pocket import minutes

import minilora
from minilora.inject import lora_layers
from minilora.summarization.errors import UserError
from minilora.summarization.evaluation.generate import summarize
from minilora.summarization.evaluation.rouge import rouge
from minilora.summarization.flags import parse_run
from minilora.summarization.training.loss import summed_loss
from minilora.summarization.training.session import Session, open_session
from minilora.summarization.training.trainer import fit
from minilora.summarization.training.validation import validate

POCKET_BART = Path(minilora.__file__).parent / "summarization" / "assets" / "pocket-bart"
TASKS = {"chat": 96, "prose": 64}  # held-out examples, as pretraining/train.py evaluates them
LONGEST = 448  # tokens of their source and target: virtual tokens take positions


def flags_of(job: dict[str, Any]) -> list[str]:
    """What train.py is told."""
    flags = [*job["flags"], "--seed", str(job["seed"]), "--data", job["data"], "--beams", "1"]
    flags += ["--epochs", str(job["epochs"]), "--max-steps", str(job["steps"]), "--no-evaluate"]
    flags += ["--precision", "fp32", "--validation-limit", "1"]  # the loss is of all of them
    flags += ["--dropout", "0"]  # only LoRA and its variants have a dropout of their own
    return flags if job["rate"] is None else [*flags, "--learning-rate", str(job["rate"])]


@torch.no_grad()
def forgotten(model: torch.nn.Module, data: Path, limit: int) -> dict[str, dict[str, list[float]]]:
    """By task the nats and the target tokens of each held-out text of the pre-training."""
    sys.path.insert(0, str(ROOT / "pretraining"))  # its scripts import each other by bare names
    from model import PAD, loss_of
    from tokenizers import Tokenizer

    from examples import STAGES, Source, collate

    model.eval()
    held = Source(data, "heldout", Tokenizer.from_file(str(POCKET_BART / "tokenizer.json")))
    found = {}
    for task, count in TASKS.items():
        rng = np.random.default_rng(1)
        drawn = [held.example(task, STAGES[-1], rng) for _ in range(min(count, limit or count))]
        texts = [collate([pair]) for pair in drawn if max(map(len, pair)) <= LONGEST]
        tokens = [int((text["labels"] != PAD).sum()) for text in texts]
        losses = [float(loss_of(model, text, "cpu", "fp32")) for text in texts]
        nats = [round(loss * n, 4) for loss, n in zip(losses, tokens, strict=True)]
        found[task] = {"nats": nats, "tokens": tokens}
    return found


@torch.no_grad()
def learnt(session: Session, limit: int) -> dict[str, Any]:
    """Of each test dialogue ROUGE of its summary, the loss in nats, and its target tokens."""
    test = session.splits["test"]
    some, how = test.encoded[: limit or len(test)], session.run.generation
    model, tokenizer = session.model.eval(), session.tokenizer
    texts = [s.text for s in summarize(model, tokenizer, some, how, session.autocast_dtype)]
    rows = rouge(texts, [example.references for example in test.examples[: len(texts)]])
    scores = {"rouge1": [round(row["rouge1"], 2) for row in rows]}
    losses = [summed_loss(model, session.tensors([row], "test")) for row in some]
    nats, tokens = [round(float(loss), 4) for loss, _ in losses], [count for _, count in losses]
    return {"scores": scores, "test": {"dialogues": {"nats": nats, "tokens": tokens}}}


def ranks(model: torch.nn.Module) -> dict[str, int]:
    """AdaLoRA's ranks by module."""
    layers = {name: getattr(layer, "lora_E", None) for name, layer in lora_layers(model).items()}
    return {name: int(E.count_nonzero()) for name, E in layers.items() if E is not None}


def stored(session: Session) -> int:
    """How many numbers the adapter's files hold: a prefix trains through a larger MLP."""
    if session.run.model.method == "full":
        return session.report.trainable
    with tempfile.TemporaryDirectory() as folder:
        minilora.save_adapter(session.model, folder)
        from safetensors.torch import load_file

        files = Path(folder).rglob("*.safetensors")
        return sum(tensor.numel() for file in files for tensor in load_file(file).values())


def work(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of one run; after a loss that is not finite there is none."""
    base = job["rate"] is None
    run = parse_run([*flags_of(job), "--output", str(folder)])
    run.output.evaluate = not job["search"]  # reads the test split
    session = open_session(run)
    result: dict[str, Any] = {}
    if base:
        minilora.unload(session.model)
        result["validation_loss"] = validate(session)["loss"]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            outcome = fit(session, folder)
        except UserError as error:
            if "lower --learning-rate" not in str(error):
                raise
            return {"validation_loss": None, "failed": str(error)}
        if not outcome.finished or outcome.progress.step < job["steps"]:
            raise SystemExit("stopped before the last step")
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        result["validation_loss"] = [r["loss"] for r in records if r["kind"] == "validation"][-1]
        result |= {"trainable": session.report.trainable, "stored": stored(session)}
        result |= {"minutes": minutes(records), "peak_gib": outcome.progress.peak_bytes / 2**30}
        if found := ranks(session.model):
            result["ranks"] = found
    if not job["search"]:
        result |= learnt(session, job["limit"])
        if job["pretraining_data"]:
            where = Path(job["pretraining_data"])
            result["forgotten"] = forgotten(session.model, where, job["limit"])
    return result


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=given["work"]) as temporary:
        answer = work(given, Path(temporary) / "run")
    Path(given["answer"]).write_text(json.dumps(answer))
