"""Write the directory that ships: config, 16-bit weights, tokenizer, generation settings, card.

Loads with plain `AutoModelForSeq2SeqLM.from_pretrained` and `AutoTokenizer.from_pretrained`. The
directory is written beside its place and then renamed, so that a reader never finds half of it.

    python pretraining/export.py --run build/pocket-bart/run --out build/pocket-bart/export
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from checkpoint import CHECKPOINT, read_checkpoint
from curriculum import BOS, EOS, PAD, Source
from model import evaluate, evaluation_batches, new_model
from tokenizers import Tokenizer
from transformers import BartForConditionalGeneration, GenerationConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rebuild(saved: dict[str, Any], dtype: torch.dtype) -> BartForConditionalGeneration:
    """The model of a checkpoint, its weights rounded to `dtype`."""
    model = new_model(argparse.Namespace(**saved["arguments"]))
    model.load_state_dict(saved["model"], strict=False)  # a tied weight is there under one name
    model.to(dtype=dtype)  # type: ignore[call-arg]
    return model


def losses_by_dtype(saved: dict[str, Any], held: Source) -> dict[str, dict[str, float]]:
    """Held-out losses with the weights as trained and rounded to either 16-bit type."""
    sets = evaluation_batches(held)
    types = {"float32": torch.float32, **DTYPES}
    return {
        name: evaluate(rebuild(saved, dtype).float(), sets, "cpu", wrong=name == "float16")
        for name, dtype in types.items()
    }


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
        forced_bos_token_id=BOS, forced_eos_token_id=EOS, max_new_tokens=64, num_beams=4,
        early_stopping=True, length_penalty=1.0, no_repeat_ngram_size=3,
    )  # fmt: skip


def card(saved: dict[str, Any], scores: dict[str, dict[str, float]], dtype: str, size: int) -> str:
    """The model card: the template with this run's figures."""
    arguments, state = saved["arguments"], saved["state"]
    stored = scores["float16"] | scores[dtype]
    rows = [f"| {task} | {stored[task + '_right']:.3f} | {stored[task + '_wrong']:.3f} |"
            for task in ("infill", "pseudo", "pairs")]  # fmt: skip
    rounding = ", ".join(f"{name} {values['pairs_right']:.4f}" for name, values in scores.items())
    figures = {
        "PARAMETERS": f"{size / 1e6:.2f}",
        "LAYERS": f"{arguments['layers']} + {arguments['decoder_layers']}",
        "WIDTH": str(arguments["width"]),
        "HEADS": str(arguments["heads"]),
        "TOKENS": f"{state['tokens'] / 1e6:.1f}",
        "TARGETS": f"{state['targets'] / 1e6:.1f}",
        "STEPS": f"{state['step']:,}",
        "HOURS": f"{state['cpu_seconds'] / 3600:.1f}",
        "LOSSES": "\n".join(rows),
        "DTYPE": dtype,
        "ROUNDING": rounding,
    }
    text = (HERE / "card.md").read_text()
    for name, figure in figures.items():
        text = text.replace("{" + name + "}", figure)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("build/pocket-bart/run"))
    parser.add_argument("--data", type=Path, default=Path("build/pocket-bart/data"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/pocket-bart/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket-bart/export"))
    parser.add_argument("--dtype", choices=[*DTYPES, "best"], default="best")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    # Read once: a run that goes on replaces its checkpoint.
    weights, _, saved = read_checkpoint(arguments.run / CHECKPOINT)
    saved["model"] = weights
    bare = Tokenizer.from_file(str(arguments.tokenizer))
    scores = losses_by_dtype(saved, Source.load(arguments.data, "heldout", bare))
    dtype = arguments.dtype
    if dtype == "best":
        dtype = min(DTYPES, key=lambda name: scores[name]["pairs_right"])
    model = rebuild(saved, DTYPES[dtype])
    model.generation_config = generation()
    # What fine-tuning will use; pre-training ran without dropout.
    model.config.dropout = 0.1
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
    (beside / "README.md").write_text(card(saved, scores, dtype, model.num_parameters()))
    shutil.copy(HERE / "weights-LICENSE", beside / "LICENSE")
    for file in beside.iterdir():
        file.chmod(0o644)
    old = arguments.out.with_name(arguments.out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if arguments.out.exists():
        arguments.out.rename(old)
    beside.rename(arguments.out)
    shutil.rmtree(old, ignore_errors=True)
    print(json.dumps(scores, indent=1))
    for file in sorted(arguments.out.iterdir()):
        print(f"{file.stat().st_size:>10,} {file.name}")


if __name__ == "__main__":
    main()
