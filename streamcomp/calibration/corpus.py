"""Calibration text, cut into token windows.

Text is cut into consecutive windows of equal length, which never overlap, and the seed selects
some of them. Where the tokenizer puts a special token (BOS) in front of a text, every window
begins with it, as in the model's training.

For a model trained on conversations the text can be rendered through its chat template
first. Conversations are rendered unchanged; other text is cut into passages, each the answer
to a user message that is its first sentence. A BOS that the template puts in front of a
conversation moves to the front of the windows; one that marks every turn stays where it is.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import AutoTokenizer

from streamcomp.calibration.formats import (
    OTHER_SUFFIXES,
    SUFFIXES,
    Messages,
    Record,
    TextFile,
)
from streamcomp.errors import CalibrationError
from streamcomp.units import format_bytes

__all__ = [
    "HELD_OUT",
    "REFERENCE",
    "Windows",
    "check_text",
    "load_windows",
    "reference_text",
    "text_files",
    "tokenizing_bytes",
]

# The language reference that is part of CPython, and the part excluded from calibration.
REFERENCE = "python-reference"
HELD_OUT = "python-reference:held-out"

_SHARDS = "model*.safetensors"  # of a model's folder
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
_HELD_OUT_EVERY = 4  # every fourth topic of the reference
# Memory of a tokenizer per byte of its file, and of the tokenizer's records of one piece of text.
_BYTES_PER_FILE_BYTE, _PIECE_BYTES = 20, 48 * 2**20
_PIECE_CHARS = 128 * 1024  # tokenised at a time: the tokenizer's records are large
# Text read per window at most, so that a source of any size is read in bounded time and
# memory; windows are drawn from what was read.
_MOST_CHARS_PER_SOURCE = 16 * 2**20
_MOST_CHECKED = 1000  # files of a folder checked before any work; the others when read
# Files of a hub dataset that describe the dataset.
_ABOUT_A_DATASET = ("README.md", "dataset_infos.json", "dataset_info.json", "dataset_dict.json")

# What a chat template may take to render one conversation, and add to it.
_TEMPLATE_BYTES, _MOST_TEMPLATE_CHARS = 128 * 2**20, 4 * 2**20

_PASSAGE_CHARS = 2000  # at most, in one answer
_PASSAGE_ENDS = ("\n\n", "\n \n", "\n", " ")  # the first that occurs in the latter half
_PROMPT_CHARS = 200  # at most, in the question


@dataclass(frozen=True)
class Windows:
    """Token windows, (windows, seq) int32, and notes for the user about their sources."""

    tokens: Tensor
    notes: tuple[str, ...]


def load_windows(
    model_folder: Path,
    sources: Sequence[str],
    samples: int,
    seq_len: int,
    seed: int | None,
    *,
    chat: bool = False,
) -> Windows:
    """``samples`` windows of ``seq_len`` tokens, evenly from all ``sources``.

    A source is a text file (:mod:`streamcomp.calibration.formats`), a folder of them,
    ``REFERENCE``, ``HELD_OUT`` or the name of a dataset on the hub; none means ``REFERENCE``.
    The seed draws windows from the whole source; without a seed they are the first ones.
    ``samples=0`` takes all there are. With ``chat`` texts are rendered through the model's chat
    template. Raises CalibrationError where a source yields no window at all, and where there is
    no template to render with.
    """
    tokenizer = _tokenizer(model_folder)
    template = _Template(tokenizer, model_folder) if chat else None
    opening = _opening(tokenizer, template)
    names = list(sources) or [REFERENCE]
    notes: list[str] = []
    parts = []
    for place, name in enumerate(names):
        share = samples // len(names) + (place < samples % len(names)) if samples else 0
        if samples and not share:
            notes.append(f"{name}: no window, there are more sources than samples")
            continue
        tokens, read = _tokens(tokenizer, _texts(name, share * seq_len, template))
        if read >= _MOST_CHARS_PER_SOURCE:
            notes.append(f"{name}: its first {read:,} characters are read, and no more")
        windows = _cut(tokens, seq_len, opening)
        if not len(windows):
            raise CalibrationError(
                f"{name} holds {len(tokens)} tokens, a window needs {seq_len - len(opening)}: "
                "give more text or a smaller --seq-len"
            )
        notes += _not_read(Path(name))
        if len(windows) < share:
            notes.append(f"{name} is short: {len(windows)} windows instead of {share}")
        parts.append(_draw(windows, share or len(windows), seed))
    return Windows(torch.cat(parts), tuple(notes))


def tokenizing_bytes(folder: Path, tokens: int) -> int:
    """Bytes of the tokenizer in ``folder``, one piece of text with its records, and ``tokens``."""
    file = folder / "tokenizer.json"
    size = file.stat().st_size if file.exists() else 0
    return _BYTES_PER_FILE_BYTE * size + _PIECE_BYTES + 4 * 4 * tokens


def check_text(source: str, *, chat: bool = False) -> None:
    """CalibrationError where ``source`` cannot be text, as far as is known before any work.

    It must be a file, a folder or a name on the hub; the beginning of files is read to detect their
    formats.
    """
    path = Path(source)
    try:
        if source in (REFERENCE, HELD_OUT):
            return
        if path.is_file():
            TextFile(path, chat).check()
        elif path.is_dir():
            _check_folder(path, chat)
        elif path.exists():
            raise CalibrationError(f"{source} is neither a file nor a folder of texts")
        elif source.count("/") != 1:
            raise ValueError("no name on the hub")
        else:
            validate_repo_id(source)
    except (OSError, ValueError):  # e.g. a path too long, or with a zero byte
        short = source if len(source) < 100 else f"{source[:100]}..."
        raise CalibrationError(f"{short}: no such file or folder") from None


def _check_folder(folder: Path, chat: bool) -> None:
    files = text_files(folder)
    if not files:
        raise CalibrationError(f"{folder} holds no text file ({', '.join(SUFFIXES)})")
    for file in files[:_MOST_CHECKED]:
        TextFile(file, chat).check()


def reference_text(held_out: bool) -> list[str]:
    """The Python language reference of the running interpreter, as a list of topics.

    Every fourth topic is held out, without paragraphs that also occur in other topics, so that
    calibration has seen nothing of it.
    """
    from pydoc_data.topics import topics  # large, and only needed here

    ordered = sorted(topics)
    kept = [topics[name] for place, name in enumerate(ordered) if place % _HELD_OUT_EVERY]
    if not held_out:
        return kept
    seen = {paragraph.strip() for text in kept for paragraph in text.split("\n\n")}
    return [
        "\n\n".join(p for p in topics[name].split("\n\n") if p.strip() not in seen)
        for name in ordered[::_HELD_OUT_EVERY]
    ]


def text_files(folder: Path) -> list[Path]:
    """The text files below ``folder``, sorted, except hidden ones.

    Folders that hold a model are skipped too: the output of a job may be in its folder of texts,
    and its model card and settings are not calibration text.
    """
    return sorted(path for path in _files(folder) if path.suffix.lower() in SUFFIXES)


def _files(folder: Path) -> Iterator[Path]:
    for place, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        if any(fnmatch(name, _SHARDS) for name in names):
            continue
        paths = (Path(place, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _not_read(folder: Path) -> list[str]:
    """A note about files of a folder in formats that are not read; none for a single file."""
    suffixes = Counter(path.suffix.lower() for path in _files(folder))
    others = sorted(suffix for suffix in suffixes if suffix in OTHER_SUFFIXES)
    count = sum(suffixes[suffix] for suffix in others)
    return [f"{folder}: {count} files are not read ({', '.join(others)})"] if others else []


def _tokenizer(folder: Path) -> Any:
    with _tokenizing(folder, "be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _tokenizing(folder: str | Path, what: str) -> Iterator[None]:
    """One CalibrationError for whatever the tokenizer in ``folder`` raises."""
    try:
        yield
    except BaseException as error:  # the tokenizers library panics outside of Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if not any(path for pattern in _TOKENIZERS for path in Path(folder).glob(pattern)):
            raise CalibrationError(
                f"{folder} has no tokenizer (tokenizer.json or tokenizer.model): fetch it to where "
                "the weights are"
            ) from None
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise CalibrationError(f"the tokenizer in {folder} cannot {what}: {text}") from None


@dataclass(frozen=True)
class _Template:
    """The chat template of a model; transformers runs it in a sandbox."""

    tokenizer: Any
    folder: Path

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{self.folder} has no chat template: leave out --chat, or take the variant of "
                "the model that was trained on conversations"
            )

    @cached_property
    def bos_places(self) -> list[int]:
        """Positions of BOS in a conversation: [0] if only in front, more if it marks turns."""
        bos = self.tokenizer.bos_token
        text = self._render(_answer("a"))
        return [match.start() for match in re.finditer(re.escape(bos), text)] if bos else []

    def render(self, messages: Messages) -> str:
        """The text of a conversation, without the BOS that opens it."""
        text = self._render(messages)
        return text.removeprefix(self.tokenizer.bos_token) if self.bos_places == [0] else text

    def _render(self, messages: Messages) -> str:
        given, fault = sum(len(str(message)) for message in messages), ""
        try:
            with _little_memory():
                text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
            if len(text) > 4 * given + _MOST_TEMPLATE_CHARS:
                raise ValueError(f"it makes {len(text):,} characters of {given:,}")
        except MemoryError:
            fault = f"it takes more than {format_bytes(_TEMPLATE_BYTES)}"
        except Exception as error:  # every template raises exceptions of another kind
            fault = str(error)[:200] or type(error).__name__
        if fault:  # raised here, the error follows from no MemoryError: the system has memory
            roles = ", ".join(str(message["role"]) for message in messages) or "nobody"
            raise CalibrationError(
                f"the chat template of {self.folder} does not render a conversation of {roles}: "
                f"{fault}"
            )
        return text


@contextmanager
def _little_memory() -> Iterator[None]:
    """MemoryError where the code within the ``with`` takes more than ``_TEMPLATE_BYTES``."""
    import resource  # not on every system; status, which renders nothing, is

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now + _TEMPLATE_BYTES
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _opening(tokenizer: Any, template: _Template | None) -> list[int]:
    """Tokens in front of each window: BOS, if the template or else the tokenizer adds it."""
    with _tokenizing(tokenizer.name_or_path, "be used"):
        bos = tokenizer.bos_token_id
        if template and template.bos_places:
            return [bos] if template.bos_places == [0] else []
        return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _tokens(tokenizer: Any, texts: Iterable[str]) -> tuple[Tensor, int]:
    """Tokens of ``texts`` (tokens,) int32, and the number of characters read."""
    parts, read = [torch.empty(0, dtype=torch.int32)], 0
    for piece in _pieces(texts):
        read += len(piece)
        whole = piece.encode("utf-8", "replace").decode()  # replaces unpaired surrogates
        with _tokenizing(tokenizer.name_or_path, "be used"):
            tokens = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(torch.tensor(tokens, dtype=torch.int32))
    return torch.cat(parts), read


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at line ends into pieces of about ``_PIECE_CHARS``, up to the limit per source."""
    left = _MOST_CHARS_PER_SOURCE
    for text in texts:
        start = 0
        while start < len(text) and left > 0:
            stop = min(len(text), start + min(_PIECE_CHARS, left))
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            yield text[start:stop]
            left -= stop - start
            start = stop
        if left <= 0:
            return


def _cut(tokens: Tensor, seq_len: int, opening: list[int]) -> Tensor:
    """Consecutive windows (windows, seq) of the tokens; an incomplete last one is dropped."""
    body = seq_len - len(opening)
    count = len(tokens) // body
    windows = tokens[: count * body].view(count, body)
    head = torch.tensor(opening, dtype=torch.int32).expand(count, len(opening))
    return torch.cat((head, windows), dim=1)


def _draw(windows: Tensor, count: int, seed: int | None) -> Tensor:
    if seed is None or count >= len(windows):
        return windows[:count]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count].sort().values]


def _texts(source: str, enough: int, template: _Template | None) -> Iterator[str]:
    """The texts of ``source``, a megabyte or so at a time.

    No more files are fetched from the hub once there are ``enough`` tokens.
    """
    path = Path(source)
    check_text(source, chat=template is not None)
    if source in (REFERENCE, HELD_OUT):
        for text in reference_text(held_out=source == HELD_OUT):
            yield _rendered(text, template)
    elif path.is_file():
        yield from _read(path, template)
    elif path.is_dir():
        for file in text_files(path):
            yield from _read(file, template)
    else:
        for file in _hub_files(source, enough):
            yield from _read(file, template)


def _read(path: Path, template: _Template | None) -> Iterator[str]:
    """The texts of a file in large pieces."""
    for batch in TextFile(path, chat=template is not None).batches():
        yield "".join(_rendered(record, template) for record in batch)


def _rendered(record: Record, template: _Template | None) -> str:
    """A record as text: with a template, plain text becomes conversations of passages."""
    if template is None:
        return str(record)
    if not isinstance(record, str):
        return template.render(record)
    return "".join(template.render(_answer(passage)) for passage in _passages(record))


def _passages(text: str) -> Iterator[str]:
    """Passages of ``text``, cut at blank lines, or else at line ends or spaces."""
    start = 0
    while start < len(text):
        stop = start + _PASSAGE_CHARS
        if stop < len(text):
            ends = (text.rfind(mark, stop - _PASSAGE_CHARS // 2, stop) for mark in _PASSAGE_ENDS)
            stop = next((end for end in ends if end >= 0), stop)
        if passage := text[start:stop].strip():
            yield passage
        start = stop


def _answer(passage: str) -> Messages:
    """A conversation in which ``passage`` answers its first sentence or line."""
    sentence = re.split(r"(?<=[.!?])\s|\n", passage, maxsplit=1)[0]
    return [
        {"role": "user", "content": sentence[:_PROMPT_CHARS]},
        {"role": "assistant", "content": passage},
    ]


def _hub_files(name: str, enough: int) -> Iterator[Path]:
    """Text files of a hub dataset, fetched one by one until there are ``enough`` tokens."""
    from huggingface_hub import HfApi, hf_hub_download

    def fetched(fetch: Callable[[], Any]) -> Any:
        try:
            return fetch()
        except Exception as error:  # the hub's client raises many kinds of exceptions
            raise CalibrationError(
                f"{name} is no file here, and as a hub dataset it cannot be fetched "
                f"({type(error).__name__}): check the name, or the network"
            ) from None

    files = fetched(lambda: HfApi().list_repo_files(name, repo_type="dataset"))
    texts = [file for file in files if Path(file).suffix.lower() in SUFFIXES]
    wanted = [file for file in texts if Path(file).name not in _ABOUT_A_DATASET]
    if not wanted:
        held = sorted({Path(file).suffix for file in files if Path(file).suffix} - {".md"})
        raise CalibrationError(
            f"dataset {name} holds no text file ({', '.join(SUFFIXES)}) but "
            f"{', '.join(held) or 'nothing'}: save its text to a file and give that"
        )
    size = 0
    for file in wanted:
        path = Path(fetched(partial(hf_hub_download, name, file, repo_type="dataset")))
        yield path
        size += path.stat().st_size
        if enough and size > 8 * enough:  # 4 bytes a token, and twice as many tokens to draw from
            return
