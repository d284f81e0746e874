"""Ways to train the same BART in one process, for benchmarks/gpu.py."""

import contextlib
import copy
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Run
from gpu_models import ALPHA, DROPOUT, PAD, RANK, RATE, Ids

Group = list[list[Any]]  # the batches of one optimizer step


@dataclass
class Contestant:
    """A model ready to train, by steps that it is given or by windows of its own making."""

    model: Any
    step: Callable[[Group], object] | None = None
    window: Callable[[int], tuple[float, int]] | None = None
    """Of so many steps: seconds, and real tokens."""
    held: int = 0
    """Bytes that are allocated for it between its turns."""
    cache_seconds: float = 0.0
    """In which the encoder's states of all examples were computed."""


ALL, DECODER = r".*\.(q_proj|v_proj)", r".*decoder\..*\.(q_proj|v_proj)"


def with_minilora(
    run: Run, base: Any, rows: Any, batch: int, where: str = ALL, cache: str = "off", **more: Any
) -> Contestant:
    """train.py's loop: its Session, made by hand for want of files, and its Trainer's step."""
    import minilora
    from minilora import LoRAConfig
    from minilora.summarization.model.encoder_cache import keep_states
    from minilora.summarization.settings import RunConfig
    from minilora.summarization.training.session import Session, Split, prepare
    from minilora.summarization.training.trainer import Trainer

    flags = {
        "precision": "bf16",
        "device": run.device,
        "batch_size": batch,
        "learning_rate": RATE,
        "warmup": 0.0,
        "epochs": 10**6,
        "max_steps": 10**6,
        "checkpoint_minutes": 1e9,
        "evaluate": False,
        **more,
    }
    config, device = RunConfig.from_dict(flags), torch.device(run.device)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    adapter = LoRAConfig(rank=RANK, alpha=ALPHA, dropout=DROPOUT, targets=where)
    report = minilora.inject(model, adapter)
    prepare(model, config, torch.bfloat16)
    began = time.monotonic()
    sources = [row.source for row in rows]
    states = keep_states(model, sources, torch.bfloat16, cache, f"{run.scratch}/states")
    cache_seconds = time.monotonic() - began
    session = Session(
        run=config,
        device=device,
        autocast_dtype=torch.bfloat16,
        model=model,
        tokenizer=Ids(),  # type: ignore[arg-type]
        splits={"train": Split([], rows, states)},
        report=report,
        notices=[],
        origin={},
    )
    trainer = Trainer(session, Path(tempfile.mkdtemp()) / "run")
    return Contestant(model, trainer.step, cache_seconds=cache_seconds if states else 0.0)


def peft_model(base: Any, dtype: torch.dtype | None = None, where: str = ALL) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=where,
        task_type="SEQ_2_SEQ_LM",
    )
    model = copy.deepcopy(base)
    return peft.get_peft_model(model if dtype is None else model.to(dtype), config)


def in_a_loop(run: Run, model: Any, rate: float = RATE) -> Contestant:
    """A plain loop as one writes it: the model's own loss, clipping, fused AdamW."""
    from minilora.summarization.data.batches import collate

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)

    def step(group: Group) -> None:
        optimizer.zero_grad(set_to_none=True)
        for rows in group:
            batch = {key: t.to(run.device) for key, t in collate(rows, PAD).items()}
            with torch.autocast(torch.device(run.device).type, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return Contestant(model, step)


def with_trainer(run: Run, base: Any, rows: Any, batch: int) -> Contestant:
    """PEFT and Seq2SeqTrainer as people run it: shuffled, padded to the longest of the batch."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    from minilora.summarization.data.batches import collate

    model, device, warmup = peft_model(base), run.device, 2

    def window(steps: int) -> tuple[float, int]:
        """A short training of its own, of which the first two steps are not timed."""
        tokens: list[int] = []
        marks: list[Any] = []

        def pad(chosen: Any) -> dict[str, torch.Tensor]:
            tokens.append(sum(len(row.source) + len(row.target) for row in chosen))
            return collate(chosen, PAD)

        class Clock(TrainerCallback):
            def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                if state.global_step in (warmup, warmup + steps):
                    marks.append(mark(device))

        arguments = Seq2SeqTrainingArguments(
            output_dir=tempfile.mkdtemp(),
            use_cpu=not run.cuda,
            bf16=True,
            per_device_train_batch_size=batch,
            max_steps=warmup + steps,
            learning_rate=RATE,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=run.cuda,
            seed=window.turn,  # type: ignore[attr-defined]
        )
        window.turn += 1  # type: ignore[attr-defined]
        with contextlib.redirect_stdout(sys.stderr):
            Seq2SeqTrainer(
                model=model,
                args=arguments,
                train_dataset=rows,
                data_collator=pad,
                callbacks=[Clock()],
            ).train()
        for name in ("forward", "_original_forward"):  # autocast, which each training puts on top
            model.__dict__.pop(name, None)
        gc.collect()  # the Trainer's memory
        return between(*marks), sum(tokens[warmup : warmup + steps])

    window.turn = 0  # type: ignore[attr-defined]
    return Contestant(model, window=window)


def mark(device: str) -> Any:
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    event.record()
    return event


def between(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return float(last - first)
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def full(run: Run, base: Any) -> Contestant:
    return in_a_loop(run, copy.deepcopy(base).requires_grad_(True), RATE / 10)


CACHED = "minilora, decoder only, cached"


def builders(run: Run, base: Any, rows: Any, batch: int) -> dict[str, Callable[[], Contestant]]:
    found = {
        "minilora": lambda: with_minilora(run, base, rows, batch),
        CACHED: lambda: with_minilora(run, base, rows, batch, DECODER, "on"),
        "PEFT + loop": lambda: in_a_loop(run, peft_model(base)),
        "PEFT, decoder only + loop": lambda: in_a_loop(run, peft_model(base, where=DECODER)),
        "PEFT + Seq2SeqTrainer": lambda: with_trainer(run, base, rows, batch),
        "PEFT + loop, bf16 weights": lambda: in_a_loop(run, peft_model(base, torch.bfloat16)),
        "minilora, decoder only": lambda: with_minilora(run, base, rows, batch, DECODER),
        "full fine-tuning, loop": lambda: full(run, base),
    }
    if not run.cuda:  # all in bf16, LayerNorm raises under a CPU's autocast
        del found["PEFT + loop, bf16 weights"]
    return found
