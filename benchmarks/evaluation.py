"""How fast are SAMSum's 819 test dialogues summarized, and are the summaries the same?

    python benchmarks/evaluation.py [--model pocket base] [--limit 0] [--device cuda]

minilora's `summarize` batches dialogues of like length, and the beams of a dialogue share its
encoder output. With the adapter in the decoder only, base and fine-tuned model share it too: a row
has the time for both models, halved. It is compared with PEFT and Seq2SeqTrainer.predict, at the
default batch size of 8 and at minilora's, and at its best: dialogues sorted by length, no pass for
the loss. Weights, adapter, beams and lengths are the same. There are two models: pocket-bart, whose
summaries have different lengths, and BART-base's dimensions with random weights, whose summaries
always have the largest length. Each contestant has a process of its own; they take turns by parts
of the dialogues, and each part has short and long ones.

The summaries are compared one by one. In bf16 another padding gives another rounding, which can
decide between two beams of nearly equal score. So fp32 shows whether the summaries are the same.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import WEIGHTS, digest, parser, write_result
from fine_tuning import DTYPES
from safetensors.torch import load_file, save_file
from turns import Turns, contestants, peak_bytes, reset_peak
from workplace import (
    MAX_SOURCE,
    MAX_TARGET,
    bart_tokenizer,
    furnish,
    random_bart,
    read_rows,
    require_samsum,
    samsum,
    spread,
)

from minilora.summarization.data.batches import Encoded
from minilora.summarization.model.loading import load_model, load_tokenizer
from minilora.summarization.settings import DataOptions, GenerationOptions

BASE = "minilora"
BOTH = "minilora, base and fine-tuned model, encoder computed once"
TRAINER = "PEFT + Seq2SeqTrainer.predict"


def minilora_summarize(
    folder: Path, device: str, precision: str, options: Any, adapter: str, both: bool = False
) -> Any:
    """As evaluate.py summarizes; `both`: with the base, from one set of the encoder's states."""
    import minilora
    from minilora.summarization.evaluation.generate import summarize
    from minilora.summarization.model.encoder_cache import keep_states, of_encoder
    from minilora.summarization.model.speed import hold_frozen_linears

    model = load_model(str(folder / "model"), torch.device(device))
    tokenizer = load_tokenizer(str(folder / "model"))
    minilora.load_adapter(model, folder / adapter, inference=True)
    dtype = None if precision == "fp32" else DTYPES[precision]
    hold_frozen_linears(model.requires_grad_(False), dtype)

    encoder = of_encoder(model) if both else ""  # as a command does, once

    def run(rows: Sequence[Encoded]) -> list[str]:
        kept = (model, [row.source for row in rows], dtype, "on")
        states = keep_states(*kept, encoder=encoder) if both else None
        how = (tokenizer, rows, options, dtype, None, states)
        texts = [summary.text for summary in summarize(model, *how)]
        if both:
            with minilora.disabled(model):
                summarize(model, *how)
        return texts

    return run


def predict(
    folder: Path,
    device: str,
    precision: str,
    options: Any,
    adapter: str,
    batch_size: int | None = None,
    by_length: bool = False,
) -> Any:
    """Seq2SeqTrainer.predict; then the texts, in the order of the data.

    Without a batch size as people run it: the Trainer's own, and labels, so with the loss.
    """
    import datasets
    import peft
    from transformers import (
        AutoModelForSeq2SeqLM,
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
    )

    plain = AutoModelForSeq2SeqLM.from_pretrained(folder / "model", dtype=torch.float32)
    plain.generation_config.max_new_tokens = None  # it would override max_length
    tokenizer = load_tokenizer(str(folder / "model"))
    model = peft.PeftModel.from_pretrained(plain, str(folder / adapter)).to(device).eval()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=not device.startswith("cuda"),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        predict_with_generate=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.startswith("cuda"),
        **({} if batch_size is None else {"per_device_eval_batch_size": batch_size}),
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=plain)
        if batch_size is None
        else DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    settings = {
        "num_beams": options.beams,
        "min_length": options.min_length,
        "max_length": options.max_length,
        "length_penalty": options.length_penalty,
        "no_repeat_ngram_size": options.no_repeat_ngram,
        "early_stopping": True,
        "do_sample": False,
    }

    def run(given: Sequence[Encoded]) -> list[str]:
        order = list(range(len(given)))
        if by_length:
            order.sort(key=lambda i: -len(given[i].source))
        rows = [given[i] for i in order]
        data = datasets.Dataset.from_dict(
            {
                "input_ids": [row.source for row in rows],
                "attention_mask": [[1] * len(row.source) for row in rows],
                # Without labels there is no extra forward pass for the loss.
                **({"labels": [row.target for row in rows]} if batch_size is None else {}),
            }
        )
        found: Any = trainer.predict(data, **settings).predictions
        found[found == -100] = tokenizer.pad_token_id
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        written = dict(zip(order, texts, strict=True))
        return [written[i].strip() for i in range(len(given))]

    return run


def builders(batch_size: int, adapter: str = "decoder") -> dict[str, Any]:
    """By the folder of the adapter: that of all layers, "adapter", or of the decoder only."""
    ours, theirs = partial(minilora_summarize, adapter=adapter), partial(predict, adapter=adapter)
    return {
        BASE: ours,
        **({BOTH: partial(ours, both=True)} if adapter == "decoder" else {}),
        f"{TRAINER} (batch 8, with loss)": theirs,
        f"{TRAINER}, batch {batch_size}": partial(theirs, batch_size=batch_size),
        **{
            f"{TRAINER}, sorted by length, batch {size}": partial(
                theirs, batch_size=size, by_length=True
            )
            for size in (8, batch_size)
        },
    }


def work(
    turns: Turns,
    name: str,
    folder: Path,
    device: str,
    precision: str,
    options: Any,
    threads: int,
    adapter: str,
) -> None:
    """The work of a process: each turn summarizes the given rows."""
    if threads:
        torch.set_num_threads(threads)
    run = builders(options.evaluation_batch_size, adapter)[name](folder, device, precision, options)
    rows = read_rows(folder)["test"]
    reset_peak(device)
    turns.answer({"threads": torch.get_num_threads()})
    while True:
        part = [rows[i] for i in turns.wait()]
        start = time.perf_counter()
        texts = run(part)
        seconds = (time.perf_counter() - start) / (2 if name == BOTH else 1)
        tokens = sum(len(row.source) for row in part)
        turns.answer(
            {
                "seconds": seconds,
                "dialogues": len(part),
                "source_tokens": tokens,
                "texts": texts,
                "peak_bytes": peak_bytes(device),
            }
        )


def prepare(folder: Path, model_name: str, options: Any) -> int:
    """Write model, adapter (B random, so that it has an effect) and test rows; their number."""
    examples = samsum("test")
    if model_name == "pocket":
        tokenizer = load_tokenizer("pocket-bart")
        model: Any = load_model("pocket-bart", torch.device("cpu"))
        longest = 512
    else:
        # Weights five times as large as at the start of training: no near ties between tokens.
        tokenizer = bart_tokenizer()
        model = random_bart(model_name, len(tokenizer), 0, std=0.1).eval()
        longest = MAX_SOURCE
    chosen = spread(examples, [len(e.dialogue) for e in examples], options.limit)
    data = DataOptions(max_source_length=longest, max_target_length=MAX_TARGET)
    furnish(folder, model, tokenizer, {"test": chosen}, data, rank=8, dropout=0.0, seed=0)
    path = folder / options.adapter / "adapter_model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.01
    save_file(tensors, path, {"format": "pt"})
    return len(chosen)


def parts(folder: Path, number: int, warmup: int) -> list[list[int]]:
    """The rows of the warm-up, then of each part: every n-th by length."""
    rows = read_rows(folder)["test"]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].source))
    middle = order[len(order) // 2 :][:warmup]
    return [middle, *(sorted(order[i::number]) for i in range(number))]


def measure(folder: Path, precision: str, options: Any, generation: Any) -> dict[str, Any]:
    names = builders(options.batch_size, options.adapter)
    told = (folder, options.device, precision, generation, options.threads, options.adapter)
    chosen = parts(folder, options.parts, options.warmup)
    answers: dict[str, list[Any]] = {name: [] for name in names}
    with contestants({name: (work, (name, *told)) for name in names}) as started:
        for i, part in enumerate(chosen):
            order = list(names)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                answers[name].append(started[name].turn(part))
    answers = {name: rows[1:] for name, rows in answers.items()}  # the first part is warm-up
    texts = {
        name: [text for row in rows for text in row["texts"]] for name, rows in answers.items()
    }
    results = {}
    for name, rows in answers.items():
        seconds = [row["seconds"] for row in rows]
        same = [a == b for a, b in zip(texts[name], texts[BASE], strict=True)]
        words = [len(text.split()) for text in texts[name]]
        results[name] = {
            "dialogues": len(same),
            "seconds": sum(seconds),
            "dialogues_per_second": len(same) / sum(seconds),
            "dialogues_per_second_median": statistics.median(
                row["dialogues"] / row["seconds"] for row in rows
            ),
            "times_minilora": sum(seconds) / sum(row["seconds"] for row in answers[BASE]),
            "times_minilora_median": statistics.median(
                a["seconds"] / b["seconds"] for a, b in zip(rows, answers[BASE], strict=True)
            ),
            "same_texts_as_minilora": sum(same) / len(same),
            "different_texts": len(set(texts[name])),
            "words": statistics.mean(words),
            "peak_bytes": max(row["peak_bytes"] for row in rows),
            "seconds_of_parts": [round(value, 3) for value in seconds],
        }
    return results


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", nargs="+", default=["pocket", "base"])
    flags.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    flags.add_argument("--limit", type=int, default=0, help="stratified by length; 0: all 819")
    flags.add_argument("--parts", type=int, default=5)
    flags.add_argument("--warmup", type=int, default=8, help="dialogues")
    flags.add_argument("--beams", type=int, default=4)
    flags.add_argument("--min-length", type=int, default=10)
    flags.add_argument("--max-length", type=int, default=60)
    flags.add_argument("--batch-size", type=int, default=32)
    flags.add_argument("--adapter", default="decoder", choices=["adapter", "decoder"], help="where")
    flags.add_argument("--threads", type=int, default=0, help="of each process; 0: torch's choice")
    options = flags.parse_args()
    require_samsum()
    if options.small:
        options.model, options.limit, options.precisions = ["pocket"], 10, ["fp32"]
        options.max_length, options.beams, options.warmup = 16, 2, 2
    generation = GenerationOptions(
        beams=options.beams,
        min_length=options.min_length,
        max_length=options.max_length,
        length_penalty=1.0,
        no_repeat_ngram=3,
        evaluation_batch_size=options.batch_size,
    )
    weights = digest([WEIGHTS])
    results: dict[str, Any] = {}
    count = 0
    for model in options.model:
        with tempfile.TemporaryDirectory() as name:
            count = prepare(Path(name), model, options)
            for precision in options.precisions:
                rows = measure(Path(name), precision, options, generation)
                results.setdefault(model, {})[precision] = rows
                for contestant, row in rows.items():
                    print(
                        f"{model:6} {precision} {contestant:50} "
                        f"{row['dialogues_per_second']:7.2f} dialogues/s "
                        f"{row['times_minilora']:5.2f} x minilora's time, "
                        f"{row['same_texts_as_minilora']:6.1%} the same texts"
                    )
    settings = {
        **{key: value for key, value in vars(options).items() if key != "small"},
        "data": f"SAMSum's test split, {count} of 819 dialogues"
        + (", stratified by length" if count < 819 else ""),
        "models": "pocket: pocket-bart; others: BART's dimensions, random weights",
        "generation": vars(generation),
    }
    device = "" if options.device == "cpu" else f"_{torch.device(options.device).type}"
    result = {"weights": weights, "settings": settings, "results": results}
    print(write_result(f"evaluation{device}", result, options.small))


if __name__ == "__main__":
    main()
