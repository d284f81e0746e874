"""The speed of --predict, against the evaluation's summaries of the same chats in batches.

    python benchmarks/predict.py [--count 1000] [--rounds 3]

pocket-bart summarizes the first chats of bookings' training split. Both take turns. --predict adds
a call for each batch, and writes a file as it goes.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import alternate, parser, write_result

from minilora.summarization.data.batches import Encoded, encode
from minilora.summarization.data.splits import load
from minilora.summarization.evaluation.generate import summarize
from minilora.summarization.model.device import choose_precision
from minilora.summarization.model.loading import load_model, load_tokenizer
from minilora.summarization.predict import Row, write_summaries
from minilora.summarization.settings import RunConfig


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--count", type=int, default=1000, help="chats")
    flags.add_argument("--rounds", type=int, default=3)
    options = flags.parse_args()
    run, device = RunConfig(), torch.device(options.device)
    dtype = choose_precision(run.model.precision, device)
    model, tokenizer = load_model(run.model.model, device), load_tokenizer(run.model.model)
    chats = load(run.data, ("train",))[0]["train"][: 20 if options.small else options.count]
    encoded, _ = encode(chats, tokenizer, run.data)

    def in_batches(rows: list[Encoded]) -> list[Row]:
        written = summarize(model, tokenizer, rows, run.generation, dtype)
        return [{"summary": summary.text} for summary in written]

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"

        def predict() -> None:
            output.unlink(missing_ok=True)
            size = run.generation.evaluation_batch_size
            write_summaries(output, chats, encoded, {}, size, in_batches)

        contestants: dict[str, Callable[[], object]] = {
            "evaluation": lambda: in_batches(encoded),
            "predict": predict,
        }
        seconds = alternate(contestants, options.rounds, warmup=0)
    pairs = zip(seconds["evaluation"], seconds["predict"], strict=True)
    ratio = statistics.median(before / after for before, after in pairs)
    print(f"{len(chats):,} chats: --predict has {ratio:.3f} of the evaluation's speed")
    settings = {"chats": len(chats), "model": run.model.model, "device": options.device}
    result = {"settings": settings, "seconds": seconds, "speed": ratio}
    print(write_result("predict", result, small=options.small))


if __name__ == "__main__":
    main()
