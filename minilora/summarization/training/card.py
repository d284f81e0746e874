"""The model card of an adapter: README.md, which the hub shows. PEFT and minilora do not read it.

A local model or data set is named without its folder: paths are private.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.files import write_file

from ..data.batches import prompt
from ..errors import counted
from ..evaluation.rouge import METRICS
from ..presets import local_path
from ..settings import FILES, RunConfig, in_words

CARD = """---
library_name: {library}
pipeline_tag: summarization
tags: [{tags}, minilora]
{hub}---

# {base}, fine-tuned on {data}

{how}

{scores}

`ADAPTER` is the directory of this file{also}:

```python
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained("{base}")

{peft}import minilora  # with minilora
minilora.load_adapter(model, "ADAPTER", inference=True)
```

To share it, add a licence and the intended use, then: `hf upload USER/NAME ADAPTER`
{moved}"""

MOVED = """
In `adapter_config.json`, `base_model_name_or_path` is a path on the machine that trained. PEFT's
`AutoPeftModel` looks there. Before you share the adapter, replace it by the base's name on the
hub. On a machine with the base in another place, pass `--model`.
"""

PEFT = """from peft import PeftModel  # with PEFT, or else
model = PeftModel.from_pretrained(model, "{directory}")

"""


def write_card(run: RunConfig, adapter: Path, evaluation: Mapping[str, Any] | None = None) -> None:
    """Write README.md into an adapter's directory, atomically.

    Args:
        run: the settings of the run.
        adapter: the directory.
        evaluation: what evaluation.json holds; None before the run is scored.

    Raises:
        OSError: it cannot be written.
    """
    text = card(run, evaluation).encode("utf-8", "replace")  # a file name need not be UTF-8
    write_file(adapter / "README.md", text)


def card(run: RunConfig, evaluation: Mapping[str, Any] | None) -> str:
    """The card in Markdown. Its front matter names model and data if they are on the hub."""
    files = filter(None, (getattr(run.data, split) for split in FILES))
    names = (run.model.model, *(list(files) or [run.data.data]))
    base, *data = map(_shown, names)
    keys = ("base_model", *("datasets" for _ in data))
    hub = (f"{k}: {name}\n" for k, name in zip(keys, names, strict=True) if not _is_local(name))
    method, second, directory = run.model.method, run.model.with_, _peft_directory(run)
    virtual = [kind for kind in ("prompt", "prefix") if kind in (method, second)]
    lora = [] if method in virtual else ["lora"]
    how = in_words(run.to_dict()) + (f", alpha {run.adapter.alpha:g}." if lora else ".")
    if method == "qlora":
        how += " The base was in four bits: `minilora.quantize(model)` before the adapter."
    if any(around := prompt(run.data)):
        how += f" Every dialogue stands between {around[0]!r} and {around[1]!r}."
    return CARD.format(
        library="peft" if directory else "minilora",
        tags=", ".join([*lora, *(f"{kind}-tuning" for kind in virtual)]),
        also="; PEFT also takes its name on a hub" if directory == "ADAPTER" else "",
        peft=PEFT.format(directory=directory) if directory else "",
        hub="".join(hub),
        base=base,
        data=", ".join(data),
        how=how[0].upper() + how[1:],
        scores=_scores(evaluation) if evaluation else "Not scored yet.",
        moved=MOVED if _is_local(run.model.model) else "",
    )


def _peft_directory(run: RunConfig) -> str | None:
    """The directory that PEFT can load, or None: for LoRA with more, or a prefix elsewhere."""
    kind, places = run.model.method, set(run.virtual.prefix_places)
    if run.model.with_ != "none" or (kind == "prefix" and places != {"decoder"}):
        return None
    return f"ADAPTER/{kind}" if kind in ("prompt", "prefix") else "ADAPTER"


def _scores(evaluation: Mapping[str, Any]) -> str:
    title = f"{counted(evaluation['n'], 'dialogue')} of {evaluation['split']}, F1 x 100"
    rows = [f"| {title} | base | fine-tuned |", "| --- | ---: | ---: |"]
    for name in METRICS:
        base, tuned = (evaluation[side][name] for side in ("base", "finetuned"))
        rows.append(f"| {name} | {base:.2f} | {tuned:.2f} |")
    return "\n".join(rows)


def _shown(name: str) -> str:
    """A name on the hub, or the last part of a path."""
    return local_path(name).resolve().name if _is_local(name) else name


def _is_local(name: str) -> bool:
    return local_path(name).is_absolute() or local_path(name).exists()
