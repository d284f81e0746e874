"""Write the directory that ships: config, float16 weights, tokenizer, generation settings, card.

Loads with plain `AutoModelForSeq2SeqLM.from_pretrained` and `AutoTokenizer.from_pretrained`. The
directory is written beside its place and then renamed, so no reader meets half of it.

    python pretraining/export.py --run build/pocket-bart/run --out build/pocket-bart/export
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from model import new_model
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BartForConditionalGeneration, GenerationConfig, PreTrainedTokenizerFast

from examples import BOS, EOS, PAD

HERE = Path(__file__).parent


def read_run(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights from their parts, and the run's settings and counts."""
    parts = sorted(run.glob("weights-*-of-*.safetensors"))
    if not parts or len(parts) != int(parts[0].stem.rsplit("-", 1)[1]):
        raise SystemExit(f"{run} lacks some of its weights-N-of-M.safetensors: {len(parts)} there")
    weights, states = dict[str, Tensor](), []
    for part in parts:
        with safe_open(part, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            saved: dict[str, Any] = json.loads(file.metadata()["json"])
        states.append(saved["state"])
    if any(state != states[0] for state in states):
        raise SystemExit(f"the weights in {run} are of different steps")
    return weights, saved


def rebuild(weights: dict[str, Tensor], saved: dict[str, Any]) -> BartForConditionalGeneration:
    model = new_model(argparse.Namespace(**saved["arguments"]))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ("embed_tokens.weight", "lm_head.weight", "final_logits_bias")
    if unexpected or not all(name.endswith(tied) for name in missing):
        raise SystemExit(f"the weights do not fit the settings: {missing} {unexpected}")
    return model.half()


def fast_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """BART's roles around the trained BPE."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(path)), bos_token="<s>", eos_token="</s>",
        cls_token="<s>", sep_token="</s>", unk_token="<unk>", pad_token="<pad>",
        mask_token="<mask>", model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def generation() -> GenerationConfig:
    """Settings for a summary of one to three sentences."""
    return GenerationConfig(
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=EOS,
        forced_bos_token_id=BOS, forced_eos_token_id=EOS, max_new_tokens=80, num_beams=4,
        early_stopping=True, length_penalty=1.0, no_repeat_ngram_size=3,
    )  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_run(seen: float) -> dict[str, Any]:
    """Counts at the end of the run whose weights a second one began with: `seen` M tokens."""
    for row in read_lines(HERE / "losses.jsonl"):
        if row.get("done") and abs(row["tokens"] / 1e6 - seen) < 0.5:
            return row
    raise SystemExit(f"{HERE / 'losses.jsonl'} has no run that ended at {seen:g} M tokens")


def card(saved: dict[str, Any], log: list[dict[str, Any]], size: int) -> str:
    """The model card: the template with this run's figures, and those of the run before it."""
    arguments, state, last = saved["arguments"], saved["state"], log[-1]
    tasks = [name.removesuffix("_right") for name in last if name.endswith("_right")]
    rows = [f"| {t} | {last[t + '_right']:.3f} | {last[t + '_wrong']:.3f} |" for t in tasks]
    text = (HERE / "card.md").read_text()
    second = arguments["init"] != "None"  # it counts all but the tokens from zero
    first = first_run(arguments["seen"]) if second else state
    if not second:
        text = "\n\n".join(part for part in text.split("\n\n") if "{MORE_" not in part)
    figures = {
        "PARAMETERS": f"{size / 1e6:.1f}",
        "LAYERS": f"{arguments['layers']} + {arguments['decoder_layers']}",
        "WIDTH": str(arguments["width"]),
        "HEADS": str(arguments["heads"]),
        "TOKENS": f"{state['tokens'] / 1e6:.0f}",
        "TARGETS": f"{(state['targets'] + second * first['targets']) / 1e6:.0f}",
        "FIRST_TOKENS": f"{first['tokens'] / 1e6:.0f}",
        "FIRST_STEPS": f"{first['step']:,}",
        "FIRST_MINUTES": f"{first['seconds'] / 60:.1f}",
        "MORE_TOKENS": f"{(state['tokens'] - first['tokens']) / 1e6:.0f}",
        "MORE_STEPS": f"{state['step']:,}",
        "MORE_HOURS": f"{state['seconds'] / 3600:.1f}",
        "LOSSES": "\n".join(rows),
    }
    for name, figure in figures.items():
        text = text.replace("{" + name + "}", figure)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("build/pocket-bart/run"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/pocket-bart/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket-bart/export"))
    parser.add_argument("--dropout", type=float, choices=[0.1, 0.0], default=0.0,
                        help="what fine-tuning uses")  # fmt: skip
    arguments = parser.parse_args()
    weights, saved = read_run(arguments.run)
    log = read_lines(arguments.run / "log.jsonl")
    if log[-1]["tokens"] != saved["state"]["tokens"]:
        raise SystemExit(f"the last losses of {arguments.run / 'log.jsonl'} are of other weights")
    model = rebuild(weights, saved)
    model.generation_config = generation()
    model.config.dropout = arguments.dropout
    model.config.architectures = ["BartForConditionalGeneration"]

    beside = arguments.out.with_name(arguments.out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    fast_tokenizer(arguments.tokenizer).save_pretrained(beside)
    # The class's name in transformers 4 and 5 alike.
    settings = json.loads((beside / "tokenizer_config.json").read_text())
    settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    (beside / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (beside / "README.md").write_text(card(saved, log, model.num_parameters()))
    shutil.copy(HERE / "weights-LICENSE", beside / "LICENSE")
    for file in beside.iterdir():
        file.chmod(0o644)
    old = arguments.out.with_name(arguments.out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if arguments.out.exists():
        arguments.out.rename(old)
    beside.rename(arguments.out)
    shutil.rmtree(old, ignore_errors=True)
    for file in sorted(arguments.out.iterdir()):
        print(f"{file.stat().st_size:>10,} {file.name}")


if __name__ == "__main__":
    main()
