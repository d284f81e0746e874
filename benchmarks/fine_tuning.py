"""Ways to fine-tune a BART, each made to pause after every window of steps.

All have the same weights, start of the adapter, examples, batch size, learning rate, schedule,
clipping, and precision of autocast. They differ in how they form batches, what they compute, and
what they keep in memory.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flops import step_flops
from safetensors.torch import load_file
from turns import Turns, peak_bytes, reset_peak, resident_bytes
from workplace import DECODER, MAX_SOURCE, MAX_TARGET, TARGETS, read_rows

from minilora.summarization.data.batches import IGNORED, Encoded, by_length, collate
from minilora.summarization.training.schedule import learning_rate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CACHED = "minilora, decoder only, cached"
FULL_RATE = 0.1  # of LoRA's learning rate, since full fine-tuning needs a lower one


@dataclass(frozen=True)
class Setting:
    """The setting of a contestant. `windows`: the steps of each window; the first is warm-up."""

    folder: Path
    windows: tuple[int, ...]
    device: str = "cpu"
    precision: str = "bf16"
    batch_size: int = 8
    learning_rate: float = 1e-3
    rank: int = 8
    dropout: float = 0.05
    seed: int = 0
    threads: int = 0
    validate_each_window: bool = False
    decoder_only: bool = False
    """The adapter is in the decoder only."""
    profile: bool = False
    """Of every window but the first: by operation. Its times are then not to be compared."""

    @property
    def steps(self) -> int:
        return sum(self.windows)

    @property
    def config(self) -> dict[str, int]:
        values: dict[str, int] = json.loads((self.folder / "model" / "config.json").read_text())
        return values

    @property
    def start(self) -> Path:
        """The adapter's start."""
        return self.folder / ("decoder" if self.decoder_only else "adapter")

    def autocast(self) -> torch.autocast:
        device = torch.device(self.device).type
        return torch.autocast(device, DTYPES[self.precision], enabled=self.precision != "fp32")


Lengths = list[tuple[int, int]]  # real (source, target) tokens of the examples of a batch


class Windows:
    """Counts steps and tokens. After the last step of a window it answers and waits."""

    def __init__(self, turns: Turns, setting: Setting, prepared: "Prepared") -> None:
        self.turns, self.setting, self.prepared = turns, setting, prepared
        self.left = list(setting.windows)
        self.after_window: Callable[[], dict[str, Any]] = dict
        self.config = setting.config

    def open(self) -> None:
        """Wait for the turn, then start the clock."""
        self.turns.wait()
        self.steps = 0
        self.batches: list[Callable[[], tuple[Lengths, int]]] = []
        self.profiler = None
        if self.setting.profile and len(self.left) < len(self.setting.windows):
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        self._synchronize()
        self.start = time.perf_counter()

    def batch(self, lengths: Callable[[], tuple[Lengths, int]]) -> None:
        """Record a batch: real lengths, and positions with padding. Read after the clock stops."""
        self.batches.append(lengths)

    def step_done(self) -> None:
        self.steps += 1
        if not self.left or self.steps < self.left[0]:
            return
        self._synchronize()
        seconds = time.perf_counter() - self.start
        self.left.pop(0)
        noted = [read() for read in self.batches]
        lengths = [pair for batch, _ in noted for pair in batch]
        self.turns.answer(
            {
                "seconds": seconds,
                "steps": self.steps,
                "examples": len(lengths),
                "source_tokens": sum(s for s, _ in lengths),
                "target_tokens": sum(t for _, t in lengths),
                "positions": sum(positions for _, positions in noted),
                "flops": step_flops(self.config, lengths, self.prepared.full, self.encoder),
                **({"profile": operations(self.profiler)} if self.profiler else {}),
                **self.after_window(),
            }
        )
        if self.left:
            self.open()

    @property
    def encoder(self) -> Any:
        if not self.setting.decoder_only or self.prepared.full:
            return "trained"
        return "cached" if self.prepared.cache_seconds else "frozen"

    def _synchronize(self) -> None:
        if self.setting.device.startswith("cuda"):
            torch.cuda.synchronize()


def operations(profiler: torch.profiler.profile) -> dict[str, float]:
    """Seconds of the twenty longest operations, without the operations that they call."""
    profiler.stop()
    times = {
        event.key: (event.self_device_time_total or event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
    }
    return dict(sorted(times.items(), key=lambda item: -item[1])[:20])


@dataclass
class Prepared:
    """A model ready to train, and how to train it: `train(windows)` runs all steps."""

    model: Any
    train: Callable[[Windows], None]
    adapters: Callable[[], dict[str, torch.Tensor]]
    """By PEFT's names; empty after full fine-tuning."""
    full: bool = False
    cache_seconds: float = 0.0
    """The time in which the states of the encoder were computed, of all dialogues."""


# The contestants ----------------------------------------------------------------------------------


def minilora_loop(setting: Setting, **settings: Any) -> Prepared:
    """As `train.py`, from the flags on: minilora's session and its loop."""
    import minilora
    from minilora.summarization.settings import RunConfig
    from minilora.summarization.training import session as sessions
    from minilora.summarization.training.trainer import Trainer

    seconds, keep = [0.0], sessions.keep

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        keep(*arguments)
        seconds.append(time.perf_counter() - start)

    sessions.keep = timed
    flat = {
        "model": str(setting.folder / "model"),
        "data": str(setting.folder / "data"),
        "rank": setting.rank,
        "alpha": 4.0 * setting.rank,
        "dropout": setting.dropout,
        "targets": [DECODER] if setting.decoder_only else list(TARGETS),
        "cache_encoder": "off",
        "device": setting.device,
        "precision": setting.precision,
        "batch_size": setting.batch_size,
        "learning_rate": setting.learning_rate,
        "warmup": 0.0,
        "epochs": 10**6,
        "max_steps": setting.steps,
        "seed": setting.seed,
        "max_source_length": min(MAX_SOURCE, setting.config["max_position_embeddings"]),
        "max_target_length": MAX_TARGET,
        "checkpoint_minutes": 1e9,
        "max_length": 80,
        "evaluate": False,
        **settings,
    }
    session = sessions.open_session(RunConfig.from_dict(flat))
    kept = session.splits["train"].states
    minilora.load_adapter(session.model, setting.start)

    def train(windows: Windows) -> None:
        class Paused(Trainer):
            def step(self, group: Any) -> dict[str, float]:
                measures = super().step(group)
                for batch in group:
                    pairs = [(len(row.source), len(row.target)) for row in batch]
                    longest = max(s for s, _ in pairs) + max(t for _, t in pairs)
                    windows.batch(partial(_known, pairs, len(pairs) * longest))
                windows.step_done()
                return measures

        trainer = Paused(session, setting.folder / f"run-{time.time_ns()}")
        with trainer.open():
            windows.open()
            while trainer.progress.step < trainer.last:
                trainer.train_epoch()
                trainer.progress.epoch, trainer.progress.position = trainer.progress.epoch + 1, 0

    def adapters() -> dict[str, torch.Tensor]:
        folder = setting.folder / f"adapter-{time.time_ns()}"
        minilora.save_adapter(session.model, folder)
        return load_file(folder / "adapter_model.safetensors")

    return Prepared(session.model, train, adapters, cache_seconds=seconds[-1] if kept else 0.0)


def _known(pairs: Lengths, positions: int) -> tuple[Lengths, int]:
    return pairs, positions


def peft_trainer(
    setting: Setting,
    *,
    grouped: bool = False,
    base: str = "fp32",
    fixed: bool = False,
    full: bool = False,
) -> Prepared:
    """PEFT and transformers' Seq2SeqTrainer.

    Args:
        setting: the setting of all contestants.
        grouped: batches of like length, as transformers' group_by_length makes them of examples
            that it sorts all at once; otherwise shuffled. Padded to the longest of the batch.
        base: dtype of the frozen linear weights: fp32 as people load them, or bf16. On a GPU this
            is the dtype of all weights; on a CPU LayerNorm does not support it under autocast.
        fixed: `padding="max_length"` for all, 1,024 and 128 tokens: a notebook's preprocessing.
        full: no adapter, every weight trains.
    """
    import peft
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        TrainerCallback,
        default_data_collator,
    )
    from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

    torch.manual_seed(setting.seed)
    on_gpu = setting.device.startswith("cuda")
    whole = base == "bf16" and on_gpu
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(
        setting.folder / "model", dtype=torch.bfloat16 if whole else torch.float32
    )
    if base == "bf16" and not whole:
        head = model.get_output_embeddings()  # tied to the embeddings: not changed
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                module.to(torch.bfloat16)
    if not full:
        config = peft.LoraConfig(
            r=setting.rank,
            lora_alpha=4 * setting.rank,
            lora_dropout=setting.dropout,
            target_modules=DECODER if setting.decoder_only else list(TARGETS),
            task_type="SEQ_2_SEQ_LM",
        )
        model = peft.get_peft_model(model, config)
        start = load_file(setting.start / "adapter_model.safetensors")
        result = peft.set_peft_model_state_dict(model, start)
        assert not result.unexpected_keys, result.unexpected_keys
    model.to(setting.device)
    tokenizer = AutoTokenizer.from_pretrained(setting.folder / "model")
    data = _dataset(read_rows(setting.folder)["train"], tokenizer.pad_token_id, setting, fixed)
    rate = setting.learning_rate * (FULL_RATE if full else 1)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(setting.folder / "trainer"),
        use_cpu=not on_gpu,
        bf16=setting.precision == "bf16",
        fp16=setting.precision == "fp16",
        per_device_train_batch_size=setting.batch_size,
        max_steps=setting.steps,
        learning_rate=rate,
        optim="adamw_torch_fused",
        seed=setting.seed,
        data_seed=setting.seed,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )

    class Grouped(LengthGroupedSampler):  # type: ignore[misc]
        """Transformers' own sorts a fourth of few examples at a time, and pads more than on many.

        The longest would come first, all in the warm-up, so the batches are shuffled.
        """

        def __iter__(self) -> Iterator[int]:
            size = self.batch_size
            found = get_length_grouped_indices(self.lengths, size, -(-len(data) // size))
            batches = list(torch.tensor(found).split(size))
            order = torch.randperm(len(data) // size).tolist()  # one that is not full stays last
            return iter(torch.cat([*(batches[i] for i in order), *batches[len(order) :]]).tolist())

    class SameSchedule(Seq2SeqTrainer):  # type: ignore[misc]
        """With minilora's schedule, step by step."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if grouped:
                return Grouped(setting.batch_size, lengths=[*map(len, data["input_ids"])])
            return super()._get_train_sampler(train_dataset)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            last = setting.steps
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: learning_rate(step, last, 1, 1.0)
            )
            return self.lr_scheduler

    class Pause(TrainerCallback):
        windows: Windows

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.windows.step_done()

    pause = Pause()
    trainer = SameSchedule(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=default_data_collator
        if fixed
        else DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        callbacks=[pause],
    )

    def train(windows: Windows) -> None:
        pause.windows = windows

        def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
            mask, labels = inputs["attention_mask"], inputs["labels"]
            windows.batch(partial(_real_lengths, mask, labels))

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        windows.open()
        trainer.train()
        hook.remove()

    def adapters() -> dict[str, torch.Tensor]:
        if full:
            return {}
        tensors = peft.get_peft_model_state_dict(model)
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    return Prepared(model, train, adapters, full)


def _real_lengths(mask: torch.Tensor, labels: torch.Tensor) -> tuple[Lengths, int]:
    sources, targets = mask.sum(1).tolist(), (labels != IGNORED).sum(1).tolist()
    return list(zip(sources, targets, strict=True)), mask.numel() + labels.numel()


def _dataset(rows: Sequence[Encoded], pad: int, setting: Setting, fixed: bool) -> Any:
    """As `Dataset.map(tokenize)` leaves it: padded by the collator, or by the tokenizer."""
    import datasets

    def column(values: list[list[int]], width: int, filling: int) -> list[list[int]]:
        return [v + [filling] * (width - len(v)) if fixed else v for v in values]

    positions = setting.config["max_position_embeddings"]
    s, t = min(MAX_SOURCE, positions), min(MAX_TARGET, positions)
    columns = {
        "input_ids": column([row.source for row in rows], s, pad),
        "attention_mask": column([[1] * len(row.source) for row in rows], s, 0),
        "labels": column([row.target for row in rows], t, IGNORED),
    }
    return datasets.Dataset.from_dict(columns)


def minilora_eager(setting: Setting) -> Prepared:
    """The same loop without the hand-written backward pass."""
    from minilora import LoRALinear

    LoRALinear.fused = False
    return minilora_loop(setting)


BUILDERS: dict[str, Callable[[Setting], Prepared]] = {
    "minilora": minilora_loop,
    "minilora, eager": minilora_eager,
    "minilora, compiled": partial(minilora_loop, compile=True),
    "minilora, checkpointed": partial(minilora_loop, checkpoint_activations=True),
    CACHED: partial(minilora_loop, cache_encoder="on"),
    "minilora, decoder only": minilora_loop,
    "PEFT, decoder only + Trainer": peft_trainer,
    "PEFT, decoder only + Trainer, best, fp32 base": partial(peft_trainer, grouped=True),
    "PEFT, decoder only + Trainer, best, bf16 base": partial(
        peft_trainer, grouped=True, base="bf16"
    ),
    "PEFT + Trainer": peft_trainer,
    "PEFT + Trainer, best, fp32 base": partial(peft_trainer, grouped=True),
    "PEFT + Trainer, best, bf16 base": partial(peft_trainer, grouped=True, base="bf16"),
    "PEFT + Trainer, fixed length": partial(peft_trainer, fixed=True),
    "full fine-tuning, Trainer": partial(peft_trainer, grouped=True, full=True),
}


# The work of a process ----------------------------------------------------------------------------


def fine_tune(turns: Turns, name: str, setting: Setting) -> None:
    """Load, answer with the facts of the start, train by windows, answer with the result."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    setting = replace(setting, decoder_only="decoder only" in name)
    prepared = BUILDERS[name](setting)
    _same_start(setting, prepared)
    validation = read_rows(setting.folder)["validation"]
    measure = partial(validation_loss, prepared.model, validation, setting)
    facts = {
        "trainable": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "validation_loss": measure(),
        "threads": torch.get_num_threads(),
        "cache_seconds": prepared.cache_seconds,
    }
    reset_peak(setting.device)
    turns.answer({**facts, "resident_bytes": resident_bytes()})
    windows = Windows(turns, setting, prepared)
    if setting.validate_each_window:
        windows.after_window = lambda: {"validation_loss": measure()}
    prepared.train(windows)
    peak = peak_bytes(setting.device)
    turns.wait()
    ends = [tensor for name, tensor in prepared.adapters().items() if "lora_B" in name]
    turns.answer(
        {
            "peak_bytes": peak,
            "validation_loss": measure(),
            # B starts at zero: did the B of every module change?
            "adapters_moved": sum(bool(tensor.any()) for tensor in ends),
            "adapters": len(ends),
        }
    )


def _same_start(setting: Setting, prepared: Prepared) -> None:
    """Check that the adapter has the tensors that every contestant starts from."""
    if prepared.full:
        return
    start = load_file(setting.start / "adapter_model.safetensors")
    found = prepared.adapters()
    assert found.keys() == start.keys(), found.keys() ^ start.keys()
    for name, tensor in start.items():
        assert torch.equal(found[name].to(tensor), tensor), name


@torch.no_grad()
def validation_loss(model: Any, rows: Sequence[Encoded], setting: Setting) -> float:
    """Nats per target token, computed alike for all; the modes of the model are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    pad = setting.config["pad_token_id"]
    total, count = 0.0, 0
    for chosen in by_length(rows, setting.batch_size):
        batch = collate([rows[i] for i in chosen], pad)
        batch = {name: tensor.to(setting.device) for name, tensor in batch.items()}
        with setting.autocast():
            logits = model(**batch).logits  # (b, t, v)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        )
        total += losses.item()
        count += int((batch["labels"] != IGNORED).sum())
    for module, mode in modes:
        module.training = mode
    return total / count


def with_windows(setting: Setting, steps: int, windows: int, warmup: int) -> Setting:
    """`steps` timed steps in `windows` windows, after a window of warm-up."""
    sizes = [steps * (i + 1) // windows - steps * i // windows for i in range(windows)]
    return replace(setting, windows=(warmup, *(size for size in sizes if size)))
