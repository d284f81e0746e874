"""Summaries of a user's own chats, written one by one: an interrupted call keeps them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minilora.files import write_file

from .data.batches import Encoded, by_length
from .data.formats import is_data, read_text
from .data.reading import Example, load_file
from .data.splits import fingerprint
from .errors import UserError
from .settings import DataOptions
from .training.stopping import stop_requests

Row = dict[str, str]  # "summary", and "base" with --base


def read_chats(name: str, options: DataOptions) -> tuple[list[Example], list[str]]:
    """The chats of a data file or of a plain text, and notices for the user.

    A plain text holds one chat, or several separated by a line `---`. `-` is standard input.

    Raises:
        UserError: it cannot be read, or holds no chat.
    """
    if is_data(path := Path(name)):
        return load_file(path, options, references=False)
    texts = [text.strip() for text in re.split("(?m)^---[ \t]*$", read_text(path))]
    chats = [Example(str(number), text, "") for number, text in enumerate(filter(None, texts), 1)]
    if not chats:
        raise UserError(f"{name}: there is nothing to summarize")
    return chats, []


def write_summaries(
    output: Path,
    chats: Sequence[Example],
    encoded: Sequence[Encoded],
    settings: Mapping[str, Any],
    batch_size: int,
    summarize: Callable[[list[Encoded]], list[Row]],
) -> int:
    """Write JSON Lines with id, dialogue and summary, in the order of the chats.

    Until all are done, they are in `output`.partial: a line with the settings, then a line with
    position and summary for each. The next call continues there and repeats a batch that was
    interrupted, so the summaries are the same as without an interruption.

    Args:
        output: the file to write.
        chats: what to summarize.
        encoded: token ids of the chats.
        settings: those that decide the summaries; a partial file must agree with them.
        batch_size: chats at a time.
        summarize: makes the rows of a batch.

    Returns:
        The number of summaries: all, unless Ctrl-C stopped it.

    Raises:
        UserError: `output` exists, or the partial file is damaged or of another call.
    """
    if output.exists():
        raise UserError(f"--output {output} exists already: name another file")
    partial = output.with_name(f"{output.name}.partial")
    done = _begun(partial, {**settings, "chats": fingerprint(chats)})
    bar = tqdm(total=len(chats), initial=len(done), unit="chat", disable=None)
    with partial.open("ab", buffering=0) as file, bar, stop_requests() as stop:
        for batch in by_length(encoded, batch_size):
            if done.keys() >= set(batch):
                continue
            if stop.requested:
                return len(done)
            for i, row in zip(batch, summarize([encoded[i] for i in batch]), strict=True):
                file.write(_line([i, row]))
                done[i] = row
            bar.update(len(done) - bar.n)
    rows = ({"id": chat.id, "dialogue": chat.dialogue, **done[i]} for i, chat in enumerate(chats))
    write_file(output.resolve(), b"".join(map(_line, rows)))
    partial.unlink()
    return len(done)


def _begun(partial: Path, settings: Mapping[str, Any]) -> dict[int, Row]:
    """The summaries of an earlier call, by position. An incomplete last row is removed."""
    content = partial.read_bytes() if partial.exists() else b""
    whole = content[: content.rfind(b"\n") + 1] or _line(settings)
    write_file(partial, whole)
    try:
        first, *rows = map(json.loads, whole.splitlines())
        changed = [name for name in settings if first.get(name) != settings[name]]
        found: dict[int, Row] = dict(rows)
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{partial} is damaged: remove it to start again") from None
    if changed:
        names = " and ".join(changed)
        raise UserError(
            f"{partial} was started with other {names}: remove it, or give --output another name"
        )
    return found


def _line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
