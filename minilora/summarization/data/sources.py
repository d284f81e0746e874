"""Finds the rows of each split: in a directory, in files, or in a data set of the hub."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .. import hub
from ..errors import UserError
from ..presets import local_path
from ..settings import SPLITS, DataOptions
from . import formats
from .formats import FORMATS, Rows, datasets_or_error, is_data, no_such, some, suffix, table_rows

_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ABOUT = ("dataset_dict.json", "dataset_infos.json")  # metadata of `datasets`, without rows
_SHARD = re.compile(r"\d+-of-0*(\d+)(-[0-9a-f]+)?")  # train-00000-of-00002


@dataclass(frozen=True)
class Source:
    """Where rows are read: a file, its shards, or a split of a hub data set."""

    name: str
    """Its name in messages."""
    rows: Callable[[], Rows]


def find(options: DataOptions) -> tuple[dict[str, Source], list[str]]:
    """The sources of the data, by split: train, validation and test; and notices for the user.

    They are the files of --train-file, --validation-file and --test-file, or else what --data
    names: a directory, a file (used as train), a hub name, or an embedded data set.

    Raises:
        UserError: there is no such data, or nothing in it that can be read.
    """
    files = {split: getattr(options, f"{split}_file") for split in SPLITS}
    if any(files.values()):
        return {split: file_source(local_path(name)) for split, name in files.items() if name}, []
    data, path = options.data, local_path(options.data)
    try:
        if path.is_dir() and not is_data(path):
            return _directory(path)
        if path.exists():
            return {"train": file_source(path)}, []
    except OSError as error:  # no permission, too long a name
        raise UserError(f"{data}: cannot be read ({error})") from None
    is_path = suffix(path) in FORMATS or ("/" in data and path.parent.is_dir())
    if is_path or not re.fullmatch(r"\w[\w.-]{,95}(/[\w.-]{1,95})?", data):
        raise UserError(no_such(path))
    return _hub(data), []


def file_source(path: Path) -> Source:
    """One file as a source. Whether it exists is checked when it is read.

    Raises:
        UserError: its name is not that of a data file.
    """
    if not is_data(path) and suffix(path) not in FORMATS:
        raise UserError(f"{path}: not a data file; the name must end in {', '.join(FORMATS)}")
    return Source(str(path), lambda: formats.file_rows(path))


def _directory(path: Path) -> tuple[dict[str, Source], list[str]]:
    unread = list[Path]()
    for folder in (path, path / "data"):  # as in a data set of the hub
        seen = sorted(folder.glob("[!.]*"))  # macOS adds hidden files such as ._train.jsonl
        files = list(filter(is_data, seen))
        found = _by_split(files)
        read = list(chain.from_iterable(found.values()))
        unread += [file for file in files if file not in read and file.name not in _ABOUT]
        if found:
            names = some([file.relative_to(path) for file in unread])
            notices = [f"{path}: not read: {names}"] if unread else []
            return {split: _shards(split, files) for split, files in found.items()}, notices
    raise UserError(
        f"{path}: no data; expected train, validation and test, each with one of "
        f"{', '.join(FORMATS)}; found: {some([file.name for file in sorted(path.iterdir())])}"
    )


def _by_split(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The files by split, for names that contain the word of a split: dialogsum.train.jsonl."""
    found: dict[str, list[Path]] = {}
    for file in files:
        words = re.findall("[a-z]+", file.name.lower())
        splits = sorted({_SPLIT_OF[word] for word in words if word in _SPLIT_OF})
        if len(splits) > 1:
            raise UserError(f"{file}: is it {' or '.join(splits)} data? Rename it")
        for split in splits:
            found.setdefault(split, []).append(file)
    return found


def _shards(split: str, files: list[Path]) -> Source:
    kinds = {_SHARD.sub(r"of \1", file.name): str(file) for file in files}
    if len(kinds) > 1:
        several = " and ".join(kinds.values())
        raise UserError(f"{several} are both {split} data: join them, or keep one of them")
    count = _SHARD.search(files[0].name)
    if count and int(count[1]) != len(files):
        raise UserError(f"{files[0]}: {len(files)} of the {count[1]} {split} files are there")
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return Source(f"{files[0]}{more}", lambda: chain.from_iterable(map(formats.file_rows, files)))


def _hub(name: str) -> dict[str, Source]:
    hub.look_for_network()
    failed = f"{no_such(Path(name))}, and {hub.not_found()}"
    with datasets_or_error(name, failed) as datasets:
        found = datasets.load_dataset(name)

    def source(key: str) -> Source:
        return Source(f"{name} {key}", lambda: table_rows(f"{name} {key}", found[key]))

    keys = [key for key in found if key.lower() in _SPLIT_OF]
    sources = {_SPLIT_OF[key.lower()]: source(key) for key in keys}
    if not sources or len(sources) < len(keys):
        advice = "download it and name --train-file, --validation-file and --test-file"
        raise UserError(
            f"{name}: its splits are {some(found)}, not train, validation and test: {advice}"
        )
    return sources
