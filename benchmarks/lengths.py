"""The best length settings for the base, on the validation split, before any fine-tuning.

    python benchmarks/lengths.py [--preset pocket]
    python benchmarks/lengths.py --data ../shared/data/samsum --limit 100 --name lengths_samsum

If the base scored less than it can, every fine-tune would look better than it is. So the preset
decodes with the settings at which the *base* scores highest here (the shortest within 0.1 ROUGE-1
of the best), for base and fine-tuned model alike.
"""

import argparse
import itertools
import sys
from dataclasses import replace

from common import write_result

from minilora.summarization.data.batches import encode
from minilora.summarization.data.splits import load
from minilora.summarization.evaluation.generate import summarize
from minilora.summarization.evaluation.rouge import rouge
from minilora.summarization.model.device import choose_device, choose_precision
from minilora.summarization.model.loading import load_model, load_tokenizer
from minilora.summarization.presets import PRESETS
from minilora.summarization.settings import RunConfig

GRID = {
    "min_length": (5, 15, 20, 25, 30, 40, 50),
    "length_penalty": (1.0, 2.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="pocket", choices=PRESETS)
    parser.add_argument("--data", default=None, help="other than the preset's")
    parser.add_argument("--limit", type=int, default=0, help="the first so many dialogues; 0: all")
    parser.add_argument("--name", default="lengths", help="benchmarks/results/NAME.json")
    options = parser.parse_args()
    run = RunConfig.from_dict(PRESETS[options.preset] | {"preset": options.preset})
    run.data.data = options.data or run.data.data
    device = choose_device(run.model.device)
    dtype = choose_precision(run.model.precision, device)
    model, tokenizer = load_model(run.model.model, device), load_tokenizer(run.model.model)
    examples = load(run.data, ("validation",))[0]["validation"]
    examples = examples[: options.limit or None]
    encoded, _ = encode(examples, tokenizer, run.data)
    references = [example.summary for example in examples]

    rows = []
    for values in itertools.product(*GRID.values()):
        settings = dict(zip(GRID, values, strict=True))
        generation = replace(run.generation, **settings)
        summaries = summarize(model, tokenizer, encoded, generation, dtype)
        scores = rouge([summary.text for summary in summaries], references)
        means = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
        length = sum(summary.tokens for summary in summaries) / len(summaries)
        rows.append({**settings, **means, "gen_len": length})
        print({key: round(value, 2) for key, value in rows[-1].items()}, file=sys.stderr)
    rows.sort(key=lambda row: -row["rouge1"])
    settings = {
        "preset": options.preset,
        "model": run.model.model,
        "data": "samsum" if "samsum" in run.data.data else run.data.data,
        "split": "validation",
        "dialogues": len(examples),
    }
    print(f"best: {rows[0]}")
    print(write_result(options.name, {"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
