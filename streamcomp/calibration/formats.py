"""Formats of text files, detected by name; others are refused by name or by their first bytes.

A file is read a piece at a time, whatever its size. From a format that marks its texts, only these
are read:

================  =================================================================
``.jsonl``        one JSON object per line (``.ndjson`` too)
``.json``         an array of objects, or a sequence of objects
``.csv, .tsv``    a table whose header names a column ``text``
anything else     plain text, unless it is recognised as another format
================  =================================================================

An object is ``{"text": "..."}`` or, where conversations are rendered, ``{"messages": [...]}``, each
message with ``role`` and ``content``. An object or a table without them is refused: read as plain
text, its braces, keys and escapes would become part of the text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from streamcomp.errors import CalibrationError

__all__ = ["OTHER_SUFFIXES", "SUFFIXES", "Messages", "Record", "TextFile"]

Messages = Sequence[dict[str, Any]]  # each with role and content
Record = str | Messages

# Files of a folder or a dataset that are read.
SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")

_MOST_RECORDS, _BATCH_CHARS = 4096, 2 * 2**20  # per batch; a record is shorter than a batch
_CHUNK_CHARS = 64 * 1024  # minimum read of a .json
_OPENING_BYTES = 4096  # read to detect the format of a file
_NAMES_TOLD, _NAME_CHARS = 8, 40  # names of fields and columns, in an error message

_PACKED = "packed: unpack it, and give what comes out"
_BINARY_TABLE = (
    "a table in a binary format: write it as .jsonl, say by "
    "pandas.read_parquet(FILE).to_json('FILE.jsonl', orient='records', lines=True)"
)
_MARKUP = "marked up: save its text alone as .txt"
_DOCUMENT = "a document: save its text alone as .txt"
_OTHER_KINDS = {
    _PACKED: (".gz", ".zip", ".zst", ".bz2", ".xz", ".lz4", ".7z", ".rar", ".tar", ".tgz"),
    _BINARY_TABLE: (".parquet", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx"),
    _MARKUP: (".xml", ".html", ".htm", ".xhtml"),
    _DOCUMENT: (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub"),
}
OTHER_SUFFIXES = {suffix: kind for kind, suffixes in _OTHER_KINDS.items() for suffix in suffixes}

# First bytes of files that are not text, and what they are; the first match counts.
_OPENINGS = (
    (rb"\x1f\x8b|PK\x03\x04|\x28\xb5\x2f\xfd|\xfd7zXZ\x00|BZh\d1AY&SY", _PACKED),
    (rb"PAR1\x15|ARROW1\x00", _BINARY_TABLE),
    (rb"%PDF-", _DOCUMENT),
    (rb"\xff\xfe|\xfe\xff", "no UTF-8 text but UTF-16: iconv -f UTF-16 -t UTF-8 makes it that"),
    (rb"(?s:.*)\x00", "no text, with zero bytes in it: give UTF-8 text, .jsonl, .json or .csv"),
)

_BETWEEN = re.compile(r"[\s,]*")  # separators of the values of a JSON array


@dataclass(frozen=True)
class TextFile:
    """The file ``path``, read for texts and, with ``chat``, for conversations."""

    path: Path
    chat: bool = False

    def check(self) -> None:
        """CalibrationError where its name, its first bytes or its first record are not accepted."""
        with closing(self._records()) as records:
            next(records, None)

    def batches(self) -> Iterator[list[Record]]:
        """The records, a megabyte or so at a time; in plain text each batch is one record.

        Holds about ``_BATCH_CHARS`` characters, plus a record of up to as many.
        """
        for batch in _batches(self._records()):
            yield batch if self._kind else ["".join(map(str, batch))]

    @property
    def _kind(self) -> str:
        """The suffix of a structured format; empty for plain text."""
        suffix = self.path.suffix.lower()
        suffix = ".jsonl" if suffix == ".ndjson" else suffix
        return suffix if suffix in (".jsonl", ".json", ".csv", ".tsv") else ""

    def _records(self) -> Generator[Record, None, None]:
        try:
            self._refuse_other_formats()
            with self.path.open(encoding="utf-8-sig") as file:  # skips a byte order mark
                match self._kind:
                    case ".jsonl":
                        yield from self._json_lines(file)
                    case ".json":
                        yield from (self._record(value, "object") for value in self._values(file))
                    case ".csv":
                        yield from self._rows(file, ",")
                    case ".tsv":
                        yield from self._rows(file, "\t")
                    case _:
                        yield from iter(lambda: file.readline(_BATCH_CHARS), "")
        except OSError as error:
            raise CalibrationError(f"{self.path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{self.path} is no UTF-8 text: {error.reason}") from None

    def _refuse_other_formats(self) -> None:
        kind = OTHER_SUFFIXES.get(self.path.suffix.lower())
        if kind is None:
            with self.path.open("rb") as file:
                opening = file.read(_OPENING_BYTES)
            kind = next((kind for mark, kind in _OPENINGS if re.match(mark, opening)), None)
        if kind is not None:
            raise CalibrationError(f"{self.path} is {kind}")

    # -- JSON ------------------------------------------------------------------------------

    def _json_lines(self, file: TextIO) -> Iterator[Record]:
        for line in self._lines(file):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):  # ValueError also for overlong integers
                raise self._refusal("line", "one is no JSON") from None
            yield self._record(value, "line")

    def _values(self, file: TextIO) -> Iterator[Any]:
        """The values of a JSON array, or of a file with a sequence of JSON values."""
        decoder = json.JSONDecoder()
        while (waiting := file.read(_CHUNK_CHARS)).isspace():
            pass
        waiting = waiting.lstrip()
        array = waiting.startswith("[")
        place = int(array)
        while True:
            place += len(_BETWEEN.match(waiting, place)[0])  # type: ignore[index]
            if array and waiting.startswith("]", place):
                return
            try:
                value, place = decoder.raw_decode(waiting, place)
            except (ValueError, RecursionError) as error:
                waiting, place = waiting[place:], 0  # most likely the value continues
                wanted = min(max(_CHUNK_CHARS, len(waiting)), _BATCH_CHARS - len(waiting))
                if more := file.read(max(0, wanted)):
                    waiting += more
                    continue
                if not waiting and not array:
                    return
                told = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
                raise CalibrationError(
                    f"{self.path} cannot be read as a JSON array of objects, or as one object "
                    f"after the other, of fewer than {_BATCH_CHARS:,} characters each: {told}"
                ) from None
            yield value

    def _record(self, value: Any, unit: str) -> Record:
        """The text or the conversation that one JSON object holds."""
        if not isinstance(value, dict):
            raise self._refusal(unit, f"one is {json.dumps(value)[:_NAME_CHARS]}")
        if self.chat and "messages" in value:
            messages = value["messages"]
            if not _is_conversation(messages):
                raise self._refusal(unit, f"one has {json.dumps(messages)[:_NAME_CHARS]}")
            return list(messages)
        if "messages" in value and "text" not in value:
            raise CalibrationError(
                f'{self.path} holds conversations ("messages"): --chat renders them'
            )
        if "text" not in value:
            raise self._refusal(unit, f"one has {_told(value)}: {_remedy(value)}")
        if not isinstance(value["text"], str):
            raise self._refusal(unit, f"one has the text {json.dumps(value['text'])[:_NAME_CHARS]}")
        return value["text"] + "\n\n"

    def _refusal(self, unit: str, problem: str) -> CalibrationError:
        chat = ' or {"messages": [{"role": "...", "content": "..."}]}' if self.chat else ""
        return CalibrationError(
            f'{self.path}: every {unit} must be {{"text": "..."}}{chat}; {problem}'
        )

    # -- tables ----------------------------------------------------------------------------

    def _rows(self, file: TextIO, delimiter: str) -> Iterator[Record]:
        reader = csv.reader(self._lines(file), delimiter=delimiter, strict=True)
        header = self._row(reader) or []
        if header and "text" not in header:
            raise CalibrationError(
                f"{self.path}: its header must name a column text; it has {_told(header)}: "
                f"{_remedy(header)}"
            )
        while (row := self._row(reader)) is not None:
            if row and len(row) != len(header):
                raise CalibrationError(
                    f"{self.path}, line {reader.line_num}: {len(row)} fields, and the header names "
                    f"{len(header)}: a field that holds {delimiter!r} stands in double quotes"
                )
            if row:
                yield row[header.index("text")] + "\n\n"

    def _row(self, reader: Any) -> list[str] | None:
        """The next row, None after the last; csv's global limit on fields is changed meanwhile."""
        before = csv.field_size_limit(_BATCH_CHARS)
        try:
            return next(reader, None)
        except csv.Error as error:
            raise CalibrationError(
                f"{self.path}, line {reader.line_num}: {error}; a quote inside a field is doubled"
            ) from None
        finally:
            csv.field_size_limit(before)

    def _lines(self, file: TextIO) -> Iterator[str]:
        """Lines of a format whose lines must not be split."""
        for line in iter(lambda: file.readline(_BATCH_CHARS), ""):
            if len(line) >= _BATCH_CHARS:
                raise CalibrationError(
                    f"{self.path}: a line of {_BATCH_CHARS:,} characters or more: split it"
                )
            yield line


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    chars = 0
    for record in records:
        batch.append(record)
        chars += len(record) if isinstance(record, str) else len(str(record))
        if len(batch) >= _MOST_RECORDS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    )


def _told(names: Iterable[str]) -> str:
    """A list of fields or columns for an error message; long names and lists are shortened."""
    listed = [repr(name[:_NAME_CHARS]) for name in names]
    more = f" and {len(listed) - _NAMES_TOLD} more" if len(listed) > _NAMES_TOLD else ""
    return ", ".join(listed[:_NAMES_TOLD]) + more if listed else "nothing"


def _remedy(names: Iterable[str]) -> str:
    """Advice for a file that has text or conversations under other ``names``."""
    kept = set(names)
    if {"instruction", "output"} <= kept:
        return (
            'write each as {"messages": [{"role": "user", "content": instruction and input}, '
            '{"role": "assistant", "content": output}]} into a .jsonl, and give --chat'
        )
    if "conversations" in kept:
        return (
            "call them messages, from role (human user, gpt assistant) and value content, in a "
            ".jsonl, and give --chat"
        )
    return 'call the field with the text "text"'
