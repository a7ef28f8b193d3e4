from __future__ import annotations

import csv
import gzip
import json
import re
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcomp.calibration import corpus, formats
from streamcomp.calibration.corpus import HELD_OUT, REFERENCE, load_windows, reference_text
from streamcomp.calibration.formats import TextFile
from streamcomp.errors import CalibrationError
from streamcomp.memory_errors import lacks_memory
from tests.model.folders import edit_config
from tests.pico import BOS, EOS, make_tokenizer, pico_text, save_pico


@pytest.fixture
def model(pico: Callable[..., Path]) -> Path:
    """Every byte is a token, and no BOS is added."""
    return pico("llama")


def all_bytes(tokens: Tensor) -> bytes:
    """The text behind ``tokens``; an alphabet of letters has its bytes as characters."""
    text: str = make_tokenizer().decode(tokens.flatten().tolist())
    return text.encode()


def windows_of(path: Path, seq_len: int) -> list[bytes]:
    data = path.read_bytes()
    return [data[start : start + seq_len] for start in range(0, len(data), seq_len)]


# -- cutting and drawing


def test_windows_never_overlap_and_never_repeat(model: Path, tmp_path: Path) -> None:
    text = pico_text(tmp_path / "a.txt", 1000)
    whole = windows_of(text, 16)
    assert len(set(whole)) == len(whole)

    tokens = load_windows(model, [str(text)], 50, 16, seed=0).tokens

    places = [whole.index(all_bytes(window)) for window in tokens]
    assert tokens.shape == (50, 16)
    assert tokens.dtype == torch.int32
    assert len(set(places)) == 50


def test_a_seed_draws_the_same_windows_again(model: Path, tmp_path: Path) -> None:
    text = str(pico_text(tmp_path / "a.txt", 2000))

    def draw(seed: int) -> Tensor:
        return load_windows(model, [text], 20, 16, seed).tokens

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_a_seed_draws_from_the_whole_text(model: Path, tmp_path: Path) -> None:
    text = pico_text(tmp_path / "a.txt", 16 * 100)
    whole = windows_of(text, 16)

    tokens = load_windows(model, [str(text)], 20, 16, seed=0).tokens

    places = [whole.index(all_bytes(window)) for window in tokens]
    assert min(places) < 25 and max(places) >= 75


def test_drawing_leaves_the_global_random_state_alone(model: Path, tmp_path: Path) -> None:
    text = str(pico_text(tmp_path / "a.txt", 1000))
    before = torch.get_rng_state()

    load_windows(model, [text], 20, 16, seed=0)

    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_first_windows_are_taken(model: Path, tmp_path: Path) -> None:
    text = pico_text(tmp_path / "a.txt", 1000)

    tokens = load_windows(model, [str(text)], 20, 16, seed=None).tokens

    assert all_bytes(tokens) == text.read_bytes()[: 20 * 16]


@pytest.mark.parametrize("seed", [None, 0])
def test_no_number_of_samples_means_all(model: Path, tmp_path: Path, seed: int | None) -> None:
    text = pico_text(tmp_path / "a.txt", 1000)

    windows = load_windows(model, [str(text)], 0, 16, seed)

    assert all_bytes(windows.tokens) == text.read_bytes()[: 62 * 16]  # 1000 = 62 * 16 + 8
    assert windows.notes == ()


@pytest.mark.parametrize("chars", [1, 7, 100])
def test_the_tokens_do_not_depend_on_how_the_text_is_read(
    model: Path, tmp_path: Path, chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = str(pico_text(tmp_path / "a.txt", 1000))
    whole = load_windows(model, [text], 0, 16, None).tokens
    monkeypatch.setattr(corpus, "_PIECE_CHARS", chars)

    assert torch.equal(load_windows(model, [text], 0, 16, None).tokens, whole)


def test_no_more_text_is_read_than_the_bound(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pico_text(tmp_path / "a.txt", 1000)
    monkeypatch.setattr(corpus, "_MOST_CHARS_PER_SOURCE", 320)
    monkeypatch.setattr(corpus, "_PIECE_CHARS", 100)

    tokens = load_windows(model, [str(text)], 0, 16, None).tokens

    assert all_bytes(tokens) == text.read_bytes()[:320]


# -- BOS


def test_every_window_is_opened_as_the_tokenizer_opens_a_text(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    text = pico_text(tmp_path / "a.txt", 1000)

    tokens = load_windows(pico("llama", bos=True), [str(text)], 0, 16, None).tokens

    assert tokens.shape == (1000 // 15, 16)
    assert (tokens[:, 0] == BOS).all()
    assert not (tokens[:, 1:] == BOS).any()
    assert all_bytes(tokens[:, 1:]) == text.read_bytes()[: 66 * 15]


def test_a_tokenizer_that_adds_no_bos_gets_none(model: Path, tmp_path: Path) -> None:
    tokens = load_windows(model, [str(pico_text(tmp_path / "a.txt", 1000))], 0, 16, None).tokens

    assert not (tokens == BOS).any()


# -- several sources


def test_sources_are_mixed_evenly(model: Path, tmp_path: Path) -> None:
    for letter in "abc":
        (tmp_path / letter).write_text(letter * 1000)

    windows = load_windows(model, [str(tmp_path / letter) for letter in "abc"], 8, 16, seed=0)

    found = [all_bytes(window) for window in windows.tokens]
    assert found == [b"a" * 16] * 3 + [b"b" * 16] * 3 + [b"c" * 16] * 2
    assert windows.notes == ()


def test_a_short_source_gives_what_it_has_and_is_noted(model: Path, tmp_path: Path) -> None:
    long = pico_text(tmp_path / "long.txt", 1000)
    short = pico_text(tmp_path / "short.txt", 40)

    windows = load_windows(model, [str(short), str(long)], 20, 16, seed=0)

    assert len(windows.tokens) == 2 + 10
    assert windows.notes == (f"{short} is short: 2 windows instead of 10",)


def test_more_sources_than_samples_are_noted(model: Path, tmp_path: Path) -> None:
    sources = [str(pico_text(tmp_path / name, 100)) for name in "abc"]

    windows = load_windows(model, sources, 2, 16, seed=0)

    assert len(windows.tokens) == 2
    assert windows.notes == (f"{sources[2]}: no window, there are more sources than samples",)


# -- what a source may be


def test_a_folder_is_all_of_its_text_files(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "b.md").write_text("b" * 32)
    (folder / "a.txt").write_text("a" * 32)
    (folder / "below" / "c.rst").write_text("c" * 32)
    (folder / "z.jsonl").write_text('{"text": "dddddddddddddd"}\n\n{"text": "eeeeeeeeeeeeee"}\n')
    (folder / "weights.bin").write_bytes(b"\xff" * 32)

    tokens = load_windows(model, [str(folder)], 0, 16, None).tokens

    assert all_bytes(tokens) == b"a" * 32 + b"b" * 32 + b"c" * 32 + (
        b"dddddddddddddd\n\neeeeeeeeeeeeee\n\n"
    )


def test_a_byte_order_mark_is_no_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "some text"}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "some text"}\n')

    marked, plain = (
        load_windows(model, [str(tmp_path / name)], 0, 4, None).tokens
        for name in ("a.jsonl", "b.jsonl")
    )
    assert torch.equal(marked, plain)


def test_jsonl_that_nests_too_deep_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n")

    with pytest.raises(CalibrationError, match="every line must be"):
        load_windows(model, [str(tmp_path / "a.jsonl")], 0, 4, None)


def test_half_of_a_surrogate_pair_is_no_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some \\ud83d text"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "some ? text"}\n')

    half, mark = (
        load_windows(model, [str(tmp_path / name)], 0, 4, None).tokens
        for name in ("a.jsonl", "b.jsonl")
    )
    assert torch.equal(half, mark)


def test_files_are_read_in_pieces(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_BATCH_CHARS", 64)
    monkeypatch.setattr(formats, "_CHUNK_CHARS", 8)
    (tmp_path / "a.txt").write_text("abcdefgh" * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "abcdefgh"}\n' * 100)
    (tmp_path / "c.json").write_text(json.dumps([{"text": "abcdefgh"}] * 100))
    (tmp_path / "d.csv").write_text("text\n" + "abcdefgh\n" * 100)
    for name, between in (
        ("a.txt", ""),
        ("b.jsonl", "\n\n"),
        ("c.json", "\n\n"),
        ("d.csv", "\n\n"),
    ):
        pieces = ["".join(map(str, batch)) for batch in TextFile(tmp_path / name).batches()]

        assert "".join(pieces) == ("abcdefgh" + between) * 100
        assert len(pieces) > 10 and max(map(len, pieces)) < 2 * 64, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "LONG"}\n', "a line of 64 characters or more: split it"),
        ("a.csv", "text\nLONG\n", "a line of 64 characters or more: split it"),
        ("a.csv", 'text\n"ONG\nONG\nONG"\n', "field larger than field limit .64."),
        ("a.json", '[{"text": "a"}, {"text": "LONG"}]', "of fewer than 64 characters each"),
        ("a.json", '{"data": [{"text": "LONG"}]}', "of fewer than 64 characters each"),
    ],
)
def test_what_is_too_long_to_be_held_is_refused(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    message: str,
) -> None:
    monkeypatch.setattr(formats, "_BATCH_CHARS", 64)
    monkeypatch.setattr(formats, "_CHUNK_CHARS", 8)
    (tmp_path / name).write_text(content.replace("LONG", "x" * 64).replace("ONG", "x" * 30))
    before = csv.field_size_limit()

    with pytest.raises(CalibrationError, match=f"{name}.*{message}"):
        load_windows(model, [str(tmp_path / name)], 0, 4, None)
    assert csv.field_size_limit() == before


def test_a_large_array_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    text = "x" * 50_000
    (tmp_path / "a.json").write_text(json.dumps([{"text": text}] * 400, indent=1))  # 20 MB

    tracemalloc.start()
    read = sum(len(record) for batch in TextFile(tmp_path / "a.json").batches() for record in batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert read == 400 * (len(text) + 2)
    assert peak < 6 * 2**20


def test_a_source_is_read_up_to_its_bound_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_MOST_CHARS_PER_SOURCE", 1000)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("x" * 600)
    opened: list[str] = []
    read = corpus._read

    def counted(path: Path, template: Any) -> Any:
        opened.append(path.name)
        return read(path, template)

    monkeypatch.setattr(corpus, "_read", counted)

    windows = load_windows(model, [str(tmp_path)], 0, 4, None)

    assert windows.tokens.numel() == 1000 and opened == ["a.txt", "b.txt"]
    (note,) = windows.notes
    assert note.endswith("its first 1,000 characters are read, and no more")


@pytest.mark.parametrize("source", ["my texts/wiki valid.txt", "data/va..lid", "x" * 5000, "a\0b"])
def test_what_is_neither_here_nor_a_name_on_the_hub_is_refused(source: str) -> None:
    with pytest.raises(CalibrationError, match="no such file or folder"):
        corpus.check_text(source)


def test_a_hub_that_cannot_be_reached_is_one_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a client of some kind")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", fail)
    with pytest.raises(CalibrationError, match="cannot be fetched .RuntimeError"):
        load_windows(model, ["some/dataset"], 0, 4, None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["README.md", "data/train.parquet"], r"no text file \(.*\) but .parquet: save its text"),
        (["README.md", "dataset_infos.json"], r"no text file \(.*\) but .json: save"),
        (["README.md"], "but nothing: save"),
        (["a.json"], "'instruction', 'input', 'output'"),
    ],
)
def test_a_dataset_of_the_hub_without_text_is_refused(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    message: str,
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ALPACA]))
    serve(monkeypatch, tmp_path, files)

    with pytest.raises(CalibrationError, match=message):
        load_windows(model, ["some/dataset"], 1, 16, None)


def test_of_a_dataset_of_the_hub_the_texts_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("about it" * 10)
    (tmp_path / "a.json").write_text('[{"text": "aaaaaa"}]')
    (tmp_path / "b.csv").write_text("text\nbbbbbb\n")
    serve(monkeypatch, tmp_path, ["README.md", "a.json", "b.csv", "c.parquet"])

    tokens = load_windows(model, ["some/dataset"], 0, 8, None).tokens

    assert all_bytes(tokens) == b"aaaaaa\n\nbbbbbb\n\n"


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str]) -> None:
    """Have the hub's client find a dataset of ``files``, which are in ``folder``."""
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda name, file, repo_type: str(folder / file)
    )


def test_jsonl_may_hold_other_fields(model: Path, tmp_path: Path) -> None:
    lines = [{"id": 1, "text": "größe"}, {"text": "x" * 30, "url": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))

    tokens = load_windows(model, [str(path)], 0, 8, None).tokens

    assert all_bytes(tokens) == ("größe\n\n" + "x" * 30 + "\n\n").encode()[:40]


PLAIN: list[dict[str, Any]] = [
    {"id": 1, "text": "größe"},
    {"text": 'with "quotes", and\nlines', "url": None},
] * 20


def texts_of(path: Path) -> str:
    return "".join(str(record) for batch in TextFile(path).batches() for record in batch)


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(PLAIN),
        json.dumps(PLAIN, indent=2, ensure_ascii=False),
        "\n".join(json.dumps(value) for value in PLAIN),
        "\n\n".join(json.dumps(value, indent=4) for value in PLAIN) + "\n",
        "\ufeff \n" + json.dumps(PLAIN, separators=(",", ":")) + "\n",
    ],
    ids=["array", "indented array", "object a line", "indented objects", "compact array"],
)
@pytest.mark.parametrize("chunk", [1, 7, 64 * 1024])
def test_json_is_an_array_or_objects_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, chunk: int
) -> None:
    monkeypatch.setattr(formats, "_CHUNK_CHARS", chunk)
    (tmp_path / "a.json").write_text(written, "utf-8")

    assert texts_of(tmp_path / "a.json") == "".join(f"{value['text']}\n\n" for value in PLAIN)


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("A.CSV", ",")])
def test_of_a_table_the_column_text_is_taken(tmp_path: Path, name: str, delimiter: str) -> None:
    long = "y" * 200_000  # above the limit that the csv module has by itself
    texts = ['with "quotes", and\nlines', "tab\there", "größe", "", long]
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("id", "text", "url"), *((n, text, "") for n, text in enumerate(texts))])
        file.write("\n")  # a blank line is no row

    assert texts_of(tmp_path / name) == "".join(f"{text}\n\n" for text in texts)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.conf"])
def test_text_stays_text_whatever_it_looks_like(tmp_path: Path, name: str) -> None:
    content = json.dumps(PLAIN) + "\nid,text\n<html>\n"
    (tmp_path / name).write_text(content)

    assert texts_of(tmp_path / name) == content


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson"])
def test_a_suffix_counts_in_capitals_too(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_text('{"text": "a"}\n')

    assert texts_of(tmp_path / f"a{suffix}") == "a\n\n"


def test_a_folder_may_hold_every_format(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "aaaaaa"}]')
    (tmp_path / "b.csv").write_text("text\nbbbbbb\n")
    (tmp_path / "c.tsv").write_text("text\ncccccc\n")
    (tmp_path / "d.TXT").write_text("dddddddd")
    (tmp_path / "e.ndjson").write_text('{"text": "eeeeee"}')
    (tmp_path / "f.parquet").touch()
    (tmp_path / "g.txt.gz").touch()
    (tmp_path / "h.png").touch()

    windows = load_windows(model, [str(tmp_path)], 0, 8, None)

    assert all_bytes(windows.tokens) == b"aaaaaa\n\nbbbbbb\n\ncccccc\n\nddddddddeeeeee\n\n"
    assert windows.notes == (f"{tmp_path}: 2 files are not read (.gz, .parquet)",)


def test_a_model_below_a_folder_of_texts_is_none_of_them(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 32)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.txt").write_text("b" * 32)
    (tmp_path / ".c.txt").write_text("c" * 32)
    save_pico(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("d" * 32)
    (tmp_path / "model" / "texts").mkdir()
    (tmp_path / "model" / "texts" / "e.txt").write_text("e" * 32)

    tokens = load_windows(model, [str(tmp_path)], 0, 16, None).tokens

    assert all_bytes(tokens) == b"a" * 32 + b"e" * 32


def test_many_lines_are_read_in_order(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{number:07}\n" for number in range(10_000)))

    tokens = load_windows(model, [str(path)], 0, 8, None).tokens

    assert all_bytes(tokens) == path.read_bytes()


# -- conversations

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
WITH_BOS = "{{ bos_token }}" + TURNS
CONVERSATION = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
RENDERED = "<user>Hi?</s>\n<assistant>Hello.</s>\n"


def chat_model(folder: Path, template: str, *, bos: bool = False) -> Path:
    save_pico(folder)
    tokenizer = make_tokenizer(bos=bos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def jsonl(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def rendered(model: Path, source: str, seq_len: int = 4) -> str:
    """All of ``source``, rendered; what is short of a window at its end is missing."""
    tokens = load_windows(model, [source], 0, seq_len, None, chat=True).tokens
    text: str = make_tokenizer().decode(tokens.flatten().tolist())
    return text


def test_conversations_are_rendered_as_they_are(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", *[{"messages": CONVERSATION, "id": 1}] * 4)

    assert rendered(chat_model(tmp_path / "model", TURNS), source, seq_len=1) == RENDERED * 4


def test_the_marks_of_a_template_become_its_tokens(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"messages": CONVERSATION})

    tokens = load_windows(
        chat_model(tmp_path / "model", TURNS), [source], 0, 1, None, chat=True
    ).tokens

    assert int((tokens == EOS).sum()) == 2


def test_conversations_of_an_array_are_rendered_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"messages": CONVERSATION}] * 4, indent=1))
    model = chat_model(tmp_path / "model", TURNS)

    assert rendered(model, str(tmp_path / "a.json"), seq_len=1) == RENDERED * 4
    with pytest.raises(CalibrationError, match='a.json holds conversations.*"messages".*--chat'):
        load_windows(model, [str(tmp_path / "a.json")], 1, 16, seed=0)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_passage_answers_its_own_first_sentence(tmp_path: Path, name: str) -> None:
    passage = "One. Two\nthree."
    if name == "a.txt":
        (tmp_path / name).write_text(f"\n{passage}\n\n")
    else:
        jsonl(tmp_path / name, {"text": passage})

    text = rendered(chat_model(tmp_path / "model", TURNS), str(tmp_path / name), seq_len=1)

    assert text == f"<user>One.</s>\n<assistant>{passage}</s>\n"


@pytest.mark.parametrize("between", ["\n\n", "\n \n", "\n", " ", ""])
def test_text_is_cut_into_passages_without_loss(tmp_path: Path, between: str) -> None:
    paragraphs = [f"{number:04}" + "x" * 296 for number in range(40)]
    (tmp_path / "a.txt").write_text(between.join(paragraphs))

    text = rendered(chat_model(tmp_path / "model", TURNS), str(tmp_path / "a.txt"), seq_len=1)

    answers = re.findall(r"<assistant>(.*?)</s>", text, flags=re.DOTALL)
    prompts = re.findall(r"<user>(.*?)</s>", text, flags=re.DOTALL)
    assert max(map(len, answers)) <= 2000
    assert between.join(answers) == between.join(paragraphs)
    assert all(
        answer.startswith(prompt) and len(prompt) <= 200
        for prompt, answer in zip(prompts, answers, strict=True)
    )


@pytest.mark.parametrize("by_tokenizer", [False, True])
@pytest.mark.parametrize("template", [TURNS, WITH_BOS])
def test_bos_opens_every_window_once_whoever_adds_it(
    tmp_path: Path, template: str, by_tokenizer: bool
) -> None:
    model = chat_model(tmp_path / "model", template, bos=by_tokenizer)
    source = jsonl(tmp_path / "a.jsonl", *[{"messages": CONVERSATION}] * 20)

    tokens = load_windows(model, [source], 0, 9, None, chat=True).tokens

    if by_tokenizer or template is WITH_BOS:
        assert (tokens[:, 0] == BOS).all()
        assert not (tokens[:, 1:] == BOS).any()
        tokens = tokens[:, 1:]
    text = make_tokenizer().decode(tokens.flatten().tolist())
    assert text == (RENDERED * 20)[: len(text)]


@pytest.mark.parametrize("by_tokenizer", [False, True])
def test_a_bos_that_marks_every_turn_stays(tmp_path: Path, by_tokenizer: bool) -> None:
    model = chat_model(tmp_path / "model", TURNS.replace("<{{", "<s><{{"), bos=by_tokenizer)
    source = jsonl(tmp_path / "a.jsonl", *[{"messages": CONVERSATION}] * 4)

    assert rendered(model, source, seq_len=1) == re.sub("<(user|assis)", r"<s><\1", RENDERED) * 4


def test_the_reference_can_be_rendered_too(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model", TURNS)

    tokens = load_windows(model, [HELD_OUT], 50, 64, None, chat=True).tokens

    assert b"<assistant>" in all_bytes(tokens)


def test_conversations_without_chat_are_refused_with_the_remedy(
    model: Path, tmp_path: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"messages": CONVERSATION})

    with pytest.raises(CalibrationError, match='holds conversations.*"messages".*--chat renders'):
        load_windows(model, [source], 1, 16, seed=0)


def test_text_beside_a_conversation_is_taken_without_chat(model: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"messages": CONVERSATION, "text": "x" * 16})

    assert all_bytes(load_windows(model, [source], 1, 16, 0).tokens) == b"x" * 16
    assert rendered(chat_model(tmp_path / "model", TURNS), source, seq_len=1) == RENDERED


def test_a_model_without_chat_template_is_refused(model: Path) -> None:
    with pytest.raises(CalibrationError, match="has no chat template: leave out --chat"):
        load_windows(model, [REFERENCE], 1, 16, seed=0, chat=True)


def test_a_template_that_refuses_a_conversation_is_quoted(tmp_path: Path) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no systems') }}{% endif %}"
    )
    model = chat_model(tmp_path / "model", strict)
    system = [{"role": "system", "content": "Be kind."}, *CONVERSATION]
    source = jsonl(tmp_path / "a.jsonl", {"messages": system})

    with pytest.raises(CalibrationError, match="of system, user, assistant: no systems"):
        load_windows(model, [source], 1, 16, seed=0, chat=True)


def test_a_template_reaches_nothing_outside_its_sandbox(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    opened = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(marker)!r}) }}}}"
    for number, template in enumerate((escape, opened)):
        model = chat_model(tmp_path / str(number), template)

        with pytest.raises(CalibrationError, match="chat template"):
            load_windows(model, [REFERENCE], 1, 16, seed=0, chat=True)

    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x' * 10**7 }}",
        "{% set a = namespace(t='x') %}"
        "{% for i in range(40) %}{% set a.t = a.t + a.t %}{% endfor %}",
    ],
)
def test_a_template_takes_little_memory(template: str, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    model = chat_model(tmp_path / "model", template)

    with pytest.raises(CalibrationError, match="chat template of .* does not render") as raised:
        load_windows(model, [REFERENCE], 1, 16, seed=0, chat=True)

    assert not lacks_memory(raised.value)  # the system has some
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    "line",
    [
        {"messages": "Hi"},
        {"messages": 3},
        {"messages": [{"role": "user"}]},
        {"messages": ["Hi"]},
        {"messages": {"role": "user", "content": "Hi"}},
        {"text": ["Hi"]},
        {"content": "Hi"},
        ["messages"],
        3,
    ],
)
def test_lines_that_are_no_conversation_are_refused(tmp_path: Path, line: object) -> None:
    model = chat_model(tmp_path / "model", TURNS)
    source = jsonl(tmp_path / "a.jsonl", line)

    with pytest.raises(CalibrationError, match=r'every line must be {"text".* or {"messages"'):
        load_windows(model, [source], 1, 16, seed=0, chat=True)


# -- what is refused


def test_a_text_too_short_for_one_window_is_refused(model: Path, tmp_path: Path) -> None:
    text = pico_text(tmp_path / "a.txt", 15)

    with pytest.raises(CalibrationError, match="15 tokens, a window needs 16.*smaller --seq-len"):
        load_windows(model, [str(text)], 1, 16, seed=0)


def test_a_text_that_fills_one_window_is_enough(
    model: Path, tmp_path: Path, pico: Callable[..., Path]
) -> None:
    text = pico_text(tmp_path / "a.txt", 15)

    assert load_windows(model, [str(text)], 1, 15, seed=0).tokens.shape == (1, 15)
    with_bos = load_windows(pico("llama", bos=True), [str(text)], 1, 16, seed=0)
    assert with_bos.tokens.shape == (1, 16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine so far \xff\xfe", "is no UTF-8 text"),
        ("a.txt", b"", "holds 0 tokens"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', 'every line must be {"text"'),
        ("a.jsonl", b'{"content": "a"}\n', "every line must be"),
        ("a.jsonl", b'{"text": 3}\n', "every line must be"),
        ("a.jsonl", b'["a"]\n', "every line must be"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    model: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(CalibrationError, match=message):
        load_windows(model, [str(tmp_path / name)], 1, 16, seed=0)


ALPACA = {"instruction": "Say hi", "input": "", "output": "hi\nthere"}
SHAREGPT = {"id": 1, "conversations": [{"from": "human", "value": "Hi?"}]}
TURNS_OF_IT = "'instruction', 'input', 'output': write each as .*--chat"
PARQUET = b"PAR1\x15\x04\x15" + bytes(range(1, 200)) + b"PAR1"
ENDLESS = '{"text": "a", "n": ' + "9" * 5000 + "}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps([ALPACA]), TURNS_OF_IT),
        ("a.json", json.dumps(ALPACA), TURNS_OF_IT),
        ("a.jsonl", json.dumps(ALPACA), TURNS_OF_IT),
        ("a.json", json.dumps([SHAREGPT]), "'id', 'conversations': call them messages.*--chat"),
        ("a.json", json.dumps({"data": []}), "one has 'data': call the field with the text .text"),
        ("a.json", json.dumps(["a"]), 'every object must be {"text".*; one is "a"$'),
        ("a.json", json.dumps([{"text": 3}]), "one has the text 3$"),
        ("a.json", json.dumps([{}]), "one has nothing"),
        ("a.json", "no JSON", "cannot be read as a JSON array of objects.*Expecting value"),
        ("a.json", '[{"text": "b"', "cannot be read as a JSON array"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.json", f"[{ENDLESS}]", "cannot be read as a JSON array"),
        ("a.jsonl", ENDLESS, "one is no JSON"),
        ("a.csv", "instruction,output\na,b\n", "a column text; it has 'instruction', 'output': "),
        ("a.csv", ",".join(map(str, range(99))), "it has '0', '1',.* '7' and 91 more: "),
        ("a.csv", "x" * 999, "it has 'x{40}': "),
        ("a.tsv", "id,text\n1,a\n", "a column text; it has 'id,text': "),
        ("a.csv", "id,text\n1,a, b\n", "line 2: 3 fields, and the header names 2: .*quotes"),
        ("a.csv", 'id,text\n1,"a"b\n', "line 2: .*a quote inside a field is doubled"),
        ("a.csv", 'id,text\n1,"a\n', "line 2: unexpected end of data"),
        ("a.parquet", PARQUET, "is a table in a binary format: write it as .jsonl"),
        ("a.txt", PARQUET, "is a table in a binary format: write it as .jsonl"),
        ("a.jsonl.gz", b"", "a.jsonl.gz is packed: unpack it"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "a.jsonl is packed: unpack it"),
        ("a", b"PK\x03\x04\x14", "is packed: unpack it"),
        ("a.ZST", b"", "is packed: unpack it"),
        ("a.xml", b"<a/>", "is marked up: save its text alone as .txt"),
        ("a.html", b"<p>", "is marked up: save its text alone as .txt"),
        ("a.docx", b"PK\x03\x04", "is a document: save its text alone as .txt"),
        ("a.bin", b"some text\0", "is no text, with zero bytes in it"),
        ("a.txt", "text".encode("utf-16"), "is no UTF-8 text but UTF-16: iconv"),
        ("a.txt", b"gr\xf6\xdfe", "is no UTF-8 text"),
    ],
)
def test_a_file_in_another_format_is_refused_before_any_work(
    model: Path, tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    pico_text(tmp_path / "text.txt", 100)
    in_folder = path.suffix in formats.SUFFIXES  # others are not read there

    for source in [path, tmp_path] if in_folder else [path]:
        with pytest.raises(CalibrationError, match=message) as refusal:
            corpus.check_text(str(source))
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
        with pytest.raises(CalibrationError, match=message):
            load_windows(model, [str(source)], 1, 16, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps([PLAIN[0], ALPACA]), "one has 'instruction'"),
        ("a.json", json.dumps(PLAIN)[:-4], "cannot be read as a JSON array"),
        ("a.json", json.dumps(PLAIN)[:-1], "cannot be read as a JSON array"),
        ("a.json", '[{"text": "a"}, ', "cannot be read as a JSON array"),
        ("a.csv", "text\na\nb,c\n", "line 3: 2 fields, and the header names 1"),
        ("a.csv", "", "holds 0 tokens"),
        ("a.json", "", "holds 0 tokens"),
        ("a.json", "[]", "holds 0 tokens"),
    ],
)
def test_what_is_refused_further_on_is_refused_when_it_is_read(
    model: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)

    corpus.check_text(str(tmp_path / name))
    with pytest.raises(CalibrationError, match=message):
        load_windows(model, [str(tmp_path / name)], 1, 16, seed=0)


def test_a_file_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    for name in (str(tmp_path / "none.txt"), "./none.txt", "none.txt"):
        with pytest.raises(CalibrationError, match=r"none\.txt: no such file or folder"):
            load_windows(model, [name], 1, 16, seed=0)


def test_a_folder_without_text_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()

    with pytest.raises(CalibrationError, match=r"holds no text file \(\.txt, \.md"):
        load_windows(model, [str(tmp_path)], 1, 16, seed=0)


def test_a_hub_dataset_without_network_is_refused(model: Path) -> None:
    with pytest.raises(CalibrationError, match="nobody/nothing is no file here, and as a hub"):
        load_windows(model, ["nobody/nothing"], 1, 16, seed=0)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_pico(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()

    with pytest.raises(CalibrationError, match="has no tokenizer .*: fetch it"):
        load_windows(folder, [REFERENCE], 1, 16, seed=0)


def test_the_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    folder, marker = save_pico(tmp_path / "model"), tmp_path / "marker"
    (folder / "tokenization_custom.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    edit_config(folder, model_type="custom")
    path = folder / "tokenizer_config.json"
    settings = {
        **json.loads(path.read_text()),
        "tokenizer_class": "CustomTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_custom.CustomTokenizer", None]},
    }
    path.write_text(json.dumps(settings))

    with pytest.raises(CalibrationError, match="cannot be loaded"):
        load_windows(folder, [REFERENCE], 1, 16, seed=0)

    assert not marker.exists()


# -- the reference that comes with Python


def paragraphs(texts: list[str]) -> set[str]:
    return {p.strip() for text in texts for p in text.split("\n\n")} - {""}


def test_the_held_out_reference_shares_no_paragraph_with_the_other_part() -> None:
    kept, held_out = (paragraphs(reference_text(held_out)) for held_out in (False, True))

    assert kept and held_out
    assert not kept & held_out


def test_both_parts_of_the_reference_are_large_enough_to_be_of_use() -> None:
    kept, held_out = (sum(map(len, reference_text(part))) for part in (False, True))

    assert kept > 200_000
    assert 30_000 < held_out < kept


def test_the_reference_is_the_default(model: Path) -> None:
    default = load_windows(model, [], 10, 32, seed=0)

    assert torch.equal(default.tokens, load_windows(model, [REFERENCE], 10, 32, seed=0).tokens)
    assert not torch.equal(default.tokens, load_windows(model, [HELD_OUT], 10, 32, seed=0).tokens)


def test_no_window_is_in_both_parts(model: Path) -> None:
    kept, held_out = (
        {tuple(window) for window in load_windows(model, [part], 0, 64, None).tokens.tolist()}
        for part in (REFERENCE, HELD_OUT)
    )

    assert len(kept) > 1000
    assert not kept & held_out
