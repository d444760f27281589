"""The data tool on many documents: JSONL, existing tokenizers, workers, bounded memory, and what it records."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import train_gpt_mlx as tg
from helpers import REPO, WORDS, check_one_line_error, one_line_error, snapshot, tokens_of
from runs import MODEL


def document(number: int, words: int = 40) -> str:
    return " ".join([f"document {number}", *(WORDS[(number * i + i // 3) % 19] for i in range(words)), "naïve 東京"])


TEXTS = [document(i) for i in range(60)]


def jsonl(documents) -> bytes:
    return b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(documents))


@pytest.fixture
def docs(tmp_path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(jsonl(TEXTS))
    return path


def build(path: Path, *arguments: str, option: str = "--docs-jsonl") -> int:
    """With 300 pieces and about 200 tokens of validation, if the arguments say nothing else."""
    size = () if {"--vocab-size", "--tokenizer"} & set(arguments) else ("--vocab-size", "300")
    val = () if {"--val-tokens", "--val-docs"} & set(arguments) else ("--val-tokens", "200")
    return prepare.main([option, str(path), *size, *val, *arguments])


def documents_of(root: Path, kind: str, name: str = "mytext_sp300") -> list[list[int]]:
    """The token ids of each document in the shards, without the token they begin with."""
    tokens = tokens_of(root, kind, name).tolist()
    starts = [i for i, token in enumerate(tokens) if token == 1]
    assert starts[:1] == [0]
    return [tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def tokenizer_of(root: Path) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(root / "tokenizers/mytext_300_bpe.model"))


def entry_of(root: Path) -> dict:
    (entry,) = json.loads((root / "manifest.json").read_text())["datasets"]
    return entry


def model_proto(**changes) -> bytes:
    model, options = io.BytesIO(), dict(model_type="bpe", vocab_size=300, byte_fallback=True, bos_id=1, minloglevel=2)
    spm.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **{**options, **changes})
    return model.getvalue()


def test_documents_keep_their_order(root, docs):
    assert build(docs, "--val-docs", "7") == 0
    tokenizer = tokenizer_of(root)
    assert documents_of(root, "val") == [tokenizer.encode(text) for text in TEXTS[:7]]
    assert documents_of(root, "train") == [tokenizer.encode(text) for text in TEXTS[7:]]
    stats = entry_of(root)["stats"]
    assert (stats["documents"], stats["documents_val"], stats["documents_train"]) == (60, 7, 53)
    assert (stats["tokens_val"], stats["tokens_train"]) == tuple(len(tokens_of(root, k)) for k in ("val", "train"))
    assert stats["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert (stats["blank"], stats["bad"]) == (0, 0)


def test_val_tokens_takes_the_documents_that_come_closest(root, docs):
    assert build(docs) == 0
    lengths = np.cumsum([1 + len(tokenizer_of(root).encode(text)) for text in TEXTS])
    assert len(documents_of(root, "val")) == 1 + np.argmin(np.abs(lengths - 200))


@pytest.mark.parametrize("change", [
    lambda data: gzip.compress(data), lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
    lambda data: data.replace(b"\n", b"\r\n"), lambda data: b"\xef\xbb\xbf" + data, lambda data: data[:-1],
    lambda data: data.replace(b"\n", b"\n \t\n\n"), lambda data: data.replace(b'{"id": 3', b'{"text": 5, "id": 3'),
    lambda data: data.decode("unicode_escape").encode().replace(b"\x00", b""),
], ids=["gzip", "gzips", "crlf", "bom", "no end", "blank lines", "twice", "not escaped"])  # fmt: skip
def test_ways_to_write_the_same_documents(root, docs, change):
    assert build(docs) == 0
    expected = {name: data for name, data in snapshot(root).items() if name != "manifest.json"}
    changed = change(docs.read_bytes())
    docs.write_bytes(changed)
    assert build(docs) == 0
    assert {name: data for name, data in snapshot(root).items() if name != "manifest.json"} == expected
    digest = hashlib.sha256(changed).hexdigest()
    assert entry_of(root)["input"] == {"files": [{"file": "docs.jsonl", "sha256": digest}]}


def test_several_files_in_the_order_given(root, docs, tmp_path):
    assert build(docs, "--val-docs", "9") == 0
    expected = tokens_of(root, "val").tolist(), tokens_of(root, "train").tolist()
    (tmp_path / "other").mkdir()
    parts = [tmp_path / "z.jsonl", tmp_path / "a.jsonl.gz", tmp_path / "other/z.jsonl"]
    parts[0].write_bytes(jsonl(TEXTS[:20]))
    parts[1].write_bytes(gzip.compress(jsonl(TEXTS[20:50])))
    parts[2].write_bytes(jsonl(TEXTS[50:]))
    assert build(parts[0], *map(str, parts[1:]), "--val-docs", "9", "--vocab-size", "300") == 0
    assert (tokens_of(root, "val").tolist(), tokens_of(root, "train").tolist()) == expected
    names = ("z.jsonl", "a.jsonl.gz", "2/z.jsonl")
    assert entry_of(root)["input"] == {"files": [
        {"file": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path, name in zip(parts, names, strict=True)]}  # fmt: skip


def test_fingerprint_of_a_folder_is_what_sha256sum_prints(root, tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / ("sub" if i % 2 else ".") / f"{i}.txt").write_text(text)
    assert build(folder, option="--text") == 0
    command = "find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    if "sha256sum" in done.stderr:
        pytest.skip("no sha256sum on this system")
    assert entry_of(root)["input"] == {"files": 60, "sha256": done.stdout.split()[0]}


def test_blank_documents_are_left_out(root, docs):
    docs.write_bytes(jsonl(["", *TEXTS[:10], " \n", *TEXTS[10:]]))
    assert build(docs, "--val-docs", "10") == 0
    assert len(documents_of(root, "val")) == 10
    assert documents_of(root, "val")[9] == tokenizer_of(root).encode(TEXTS[9])
    assert entry_of(root)["stats"]["blank"] == 2


BAD = {
    b"no json": "not JSON (Expecting value: character 0)",
    b'{"text": "cut': "not JSON (Unterminated string starting at: character 9)",
    b'["text"]': 'not a JSON object with a string "text"',
    b'"text"': 'not a JSON object with a string "text"',
    b'{"txt": "a"}': 'not a JSON object with a string "text"',
    b'{"text": null}': 'not a JSON object with a string "text"',
    b'{"text": ["a"]}': 'not a JSON object with a string "text"',
    b'{"text": "\xff"}': "not UTF-8 text (invalid start byte at byte 10)",
    b'{"text": "\\ud800"}': '"text" has half a surrogate pair in it',
    b'{"text": "a", "x": ' + b"[" * 100_000 + b"}": "not JSON that can be read (too deep)",
}


@pytest.mark.parametrize("line", BAD, ids=BAD.values())
@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_a_bad_line_is_told_by_file_and_number(root, docs, tmp_path, capsys, line, own_tokenizer):
    """Whether the tokenizer's training meets it or the encoding. Nothing of an earlier build is lost."""
    assert build(docs) == 0
    before = snapshot(root)
    (tmp_path / "some.model").write_bytes(model_proto())
    docs.write_bytes(jsonl(TEXTS[:20]) + b"\n" + line + b"\n" + jsonl(TEXTS[20:]))
    more = ("--tokenizer", str(tmp_path / "some.model")) if own_tokenizer else ()
    capsys.readouterr()
    assert build(docs, *more) == 2
    one_line_error(capsys, f"error: {docs}:22: {BAD[line]}")
    assert snapshot(root) == before

    assert build(docs, *more, "--skip-bad", "--val-docs", "20") == 0
    assert f"skipped {docs}:22: {BAD[line]}\n" in capsys.readouterr().out
    assert entry_of(root)["stats"]["bad"] == 1
    assert documents_of(root, "train") == [tokenizer_of(root).encode(text) for text in TEXTS[20:]]


def test_many_bad_lines_are_counted(root, docs, capsys):
    docs.write_bytes(b"".join(b"bad\n" + line for line in jsonl(TEXTS).splitlines(keepends=True)))
    assert build(docs, "--skip-bad") == 0
    out = capsys.readouterr().out
    assert [line.split(":")[1] for line in out.splitlines() if line.startswith("skipped")] == ["1", "3", "5", "7", "9"]
    assert "60 documents" in out
    assert "60 bad left out" in out
    assert entry_of(root)["stats"]["bad"] == 60
    assert entry_of(root)["settings"]["skip_bad"] is True


def test_when_all_are_bad_the_first_is_told(root, docs, capsys):
    docs.write_bytes(b'{"content": "a"}\n' * 9)
    assert build(docs, "--skip-bad") == 2
    one_line_error(capsys, "no text in it: 9 bad, 0 blank", f'{docs}:1: not a JSON object with a string "text"')


def test_file_names_that_are_not_utf8(root, tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"texts/{i}").mkdir(parents=True)
        try:
            Path(os.fsdecode(os.fsencode(tmp_path / f"texts/{i}/") + b"/\xff.txt")).write_text(text)
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    assert build(tmp_path / "texts", option="--text") == 0
    assert entry_of(root)["stats"]["documents"] == 60


def test_text_files_can_be_skipped_too(root, tmp_path, capsys):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "binary").write_bytes(b"abc\xff")
    assert build(tmp_path, "--skip-bad", option="--text") == 0
    assert f"skipped {tmp_path / 'binary'}: not UTF-8 text (invalid start byte at byte 3)" in capsys.readouterr().out
    assert entry_of(root)["stats"]["bad"] == 1
    assert entry_of(root)["input"]["files"] == 61


def test_line_ends_of_text_files_do_not_count(root, tmp_path):
    made = []
    for end in ("\n", "\r\n", "\r"):
        for i in range(4):
            (tmp_path / "texts").mkdir(exist_ok=True)
            (tmp_path / f"texts/{i}.txt").write_bytes(end.join(TEXTS[i::4]).encode())
        assert build(tmp_path / "texts", option="--text") == 0
        made.append({name: data for name, data in snapshot(root).items() if name != "manifest.json"})
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(("content", "parts"), [
    (b"", ["the text is empty"]), (b"\n\n", ["the text is empty"]), (b'{"text": " "}\n', ["the text is empty"]),
    (jsonl(TEXTS[:1]), ["--val-tokens 200", "1 documents", "none to train on"]),
    (gzip.compress(jsonl(TEXTS * 9))[:-200], ["docs.jsonl: damaged gzip data"]),
    (gzip.compress(jsonl(TEXTS * 9))[:300] + b"garbage" * 99, ["docs.jsonl: damaged gzip data"]),
], ids=["empty", "blank lines", "blank text", "one", "half a gzip", "damaged gzip"])  # fmt: skip
def test_files_without_anything_to_train_on(root, docs, tmp_path, capsys, content, parts):
    (tmp_path / "some.model").write_bytes(model_proto())
    docs.write_bytes(content)
    for more in (("--tokenizer", str(tmp_path / "some.model")), ()):
        assert build(docs, *more) == 2
        err = capsys.readouterr().err
        if parts[0].startswith("--val-tokens") and not more:
            continue  # too little for 300 pieces, which comes first
        check_one_line_error(err, *parts)
    assert not root.exists() or not snapshot(root)


def test_val_docs_must_leave_some(root, docs, tmp_path, capsys):
    (tmp_path / "some.model").write_bytes(model_proto())
    for count in ("60", "61"):
        for more in (("--tokenizer", str(tmp_path / "some.model")), ()):
            assert build(docs, "--val-docs", count, *more) == 2
            one_line_error(capsys, f"--val-docs {count}", "none to train on")
    assert build(docs, "--val-docs", "59", "--tokenizer", str(tmp_path / "some.model")) == 0
    assert len(documents_of(root, "train")) == 1


@pytest.mark.parametrize(("arguments", "part"), [
    (("--docs-jsonl", "absent.jsonl"), "absent.jsonl: no such file"),
    (("--docs-jsonl", "."), ".: a folder, which --text takes"),
    (("--tokenizer", "absent.model"), "--tokenizer absent.model: cannot be read (No such file or directory)"),
    (("--tokenizer", "text.txt"), "--tokenizer text.txt: not a SentencePiece model"),
    (("--tokenizer", "empty.model"), "--tokenizer empty.model: not a SentencePiece model"),
    (("--tokenizer", "no_bos.model"), "--tokenizer no_bos.model: 300 pieces, without one to begin a document (bos)"),
    (("--tokenizer", "some.model", "--vocab-size", "299"), "--vocab-size 299: --tokenizer some.model has 300 pieces"),
])  # fmt: skip
def test_arguments_that_cannot_be_used(root, docs, tmp_path, monkeypatch, capsys, arguments, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "some.model").write_bytes(model_proto())
    (tmp_path / "no_bos.model").write_bytes(model_proto(bos_id=-1))
    assert prepare.main(["--docs-jsonl", "docs.jsonl", *arguments]) == 2
    one_line_error(capsys, part)
    assert not root.exists()


@pytest.mark.parametrize("line", ["--text a --docs-jsonl b", "--val-docs 3 --val-tokens 3", "--workers 0",
                                  "--val-docs 0", "--tokenizer-train-docs 0"])  # fmt: skip
def test_command_line_errors(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(line.split())
    assert "error: argument" in capsys.readouterr().err


def test_an_existing_tokenizer_is_used_as_it_is(root, docs, tmp_path):
    proto = model_proto(vocab_size=304, model_type="unigram")
    (tmp_path / "mine.model").write_bytes(proto)
    assert build(docs, "--tokenizer", str(tmp_path / "mine.model"), "--val-docs", "5") == 0
    tokenizer = spm.SentencePieceProcessor(model_proto=proto)
    assert documents_of(root, "val", "mytext_sp304") == [tokenizer.encode(text) for text in TEXTS[:5]]
    assert (root / "tokenizers/mytext_304_bpe.model").read_bytes() == proto
    pair = str(root / "datasets/mytext_sp304"), str(root / "tokenizers/mytext_304_bpe.model")
    assert tg.validate_dataset_tokenizer_pair(*pair) == ("mytext_sp304", 1, 1)
    recorded = entry_of(root)["settings"]
    assert (recorded["tokenizer"], recorded["tokenizer_sha256"]) == ("mine.model", hashlib.sha256(proto).hexdigest())
    # From where this tool itself put it, too; with its size, which is no contradiction.
    again = ("--tokenizer", str(root / "tokenizers/mytext_304_bpe.model"), "--vocab-size", "304", "--val-docs", "5")
    before = tokens_of(root, "train", "mytext_sp304").tolist()
    assert build(docs, *again) == 0
    assert tokens_of(root, "train", "mytext_sp304").tolist() == before


def lines_trained_on(monkeypatch) -> list[str]:
    seen: list[str] = []
    real = spm.SentencePieceTrainer.train

    def train(sentence_iterator, **options):
        lines = list(sentence_iterator)
        seen[:] = lines
        return real(sentence_iterator=iter(lines), **options)

    monkeypatch.setattr(prepare.spm.SentencePieceTrainer, "train", train)
    return seen


def test_what_the_tokenizer_is_trained_on(root, docs, monkeypatch, capsys):
    """The first documents; never validation where that is known beforehand; not more than the bound."""
    seen = lines_trained_on(monkeypatch)
    assert build(docs) == 0
    assert seen == TEXTS
    assert build(docs, "--tokenizer-train-docs", "30") == 0
    assert seen == TEXTS[:30]
    assert "training 300 pieces on 30 documents" in capsys.readouterr().out
    assert build(docs, "--tokenizer-train-docs", "30", "--val-docs", "12") == 0
    assert seen == TEXTS[12:42]
    assert entry_of(root)["settings"]["tokenizer_train_docs"] == 30
    monkeypatch.setattr(prepare, "TOKENIZER_TEXT_BYTES", sum(len(text.encode()) for text in TEXTS[:40]))
    assert build(docs) == 0
    assert seen == TEXTS[:40]
    assert prepare.build_parser().parse_args([]).tokenizer_train_docs == 20_000


def test_long_lines_are_trained_on_in_pieces(root, docs, monkeypatch):
    """SentencePiece leaves out what is longer than 4,192 bytes."""
    seen = lines_trained_on(monkeypatch)
    text = " ".join([document(i) for i in range(200)] + ["東" * 3000])
    docs.write_bytes(jsonl([text, text]))
    assert build(docs) == 0
    assert "".join(seen) == text * 2
    assert max(len(line.encode()) for line in seen) < 4192
    assert len(seen) < len(text) // 400


def test_settings_in_the_manifest_build_it_again(root, docs, tmp_path):
    assert build(docs, "--shard-tokens", "500", "--tokenizer-train-docs", "50") == 0
    first, entry = snapshot(root), entry_of(root)
    assert entry["settings"] == {
        "val_tokens": 200, "vocab_size": 300, "shard_tokens": 500, "skip_bad": False, "tokenizer_train_docs": 50,
        "tokenizer_sha256": hashlib.sha256(first["tokenizers/mytext_300_bpe.model"]).hexdigest(),
        "sentencepiece": spm.__version__,
    }  # fmt: skip
    assert (entry["source"], entry["made_by"]) == ("--docs-jsonl", "data/prepare.py")
    options = {"val_tokens": "--val-tokens", "vocab_size": "--vocab-size", "shard_tokens": "--shard-tokens",
               "tokenizer_train_docs": "--tokenizer-train-docs"}  # fmt: skip
    again = [part for key, option in options.items() for part in (option, str(entry["settings"][key]))]
    moved = docs.rename(tmp_path / "elsewhere").rename(tmp_path / "docs.jsonl")
    assert build(moved, *again) == 0
    assert snapshot(root) == first


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=12), st.integers(1, 60), st.none() | st.integers(1, 15)
)
def test_validation_is_the_same_however_batches_fall(batches, val_tokens, val_docs):
    lengths = [length for batch in batches for length in batch]
    args = argparse.Namespace(val_tokens=val_tokens, val_docs=val_docs)
    val, train = argparse.Namespace(documents=0, tokens=0), 0
    for batch in batches:
        count = prepare.to_validation(batch, val, args) if train == 0 else 0
        val.documents, val.tokens = val.documents + count, val.tokens + sum(batch[:count])
        train += len(batch) - count
    if val_docs:
        assert val.documents == min(val_docs, len(lengths))
    elif lengths:
        assert val.documents == 1 + np.argmin(np.abs(np.cumsum(lengths) - val_tokens))


@settings(deadline=None)  # a disk may be slow
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 25))
def test_shards_are_the_same_however_tokens_come(tmp_path_factory, parts, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    writer = prepare.ShardWriter(folder, "train", shard_tokens)
    tokens = np.arange(sum(parts), dtype="<u2")
    for part in np.split(tokens, np.cumsum(parts)):
        writer.write(part, 1)
    writer.finish()
    files = sorted(folder.iterdir())
    assert len(files) == writer.files == -(-len(tokens) // shard_tokens)
    assert [path.name for path in files] == [f"fineweb_train_{i:06d}.bin" for i in range(len(files))]
    for i, path in enumerate(files):
        assert tg.load_data_shard(path).tolist() == tokens[i * shard_tokens : (i + 1) * shard_tokens].tolist()


def test_validation_over_several_batches_is_one_shard(root, docs, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1_000)
    assert build(docs, "--val-docs", "20") == 0
    shards = sorted(path.name for path in (root / "datasets/mytext_sp300").iterdir())
    assert shards == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    assert len(documents_of(root, "val")) == 20
    assert entry_of(root)["settings"]["val_docs"] == 20
    assert "val_tokens" not in entry_of(root)["settings"]


def test_validation_does_not_resume_after_training_began(root, docs, tmp_path, monkeypatch):
    """Not even by a document short enough to come closer to --val-tokens than the long one before it."""
    (tmp_path / "some.model").write_bytes(model_proto())
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1)
    docs.write_bytes(jsonl([TEXTS[0], " ".join(TEXTS[1:9]), "a", *TEXTS[9:]]))
    first = 1 + len(spm.SentencePieceProcessor(model_proto=model_proto()).encode(TEXTS[0]))
    assert build(docs, "--val-tokens", str(first + 2), "--tokenizer", str(tmp_path / "some.model")) == 0
    assert len(documents_of(root, "val")) == 1


def test_too_small_a_vocabulary_is_told_the_least(root, docs, capsys):
    assert build(docs, "--vocab-size", "265") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --vocab-size 265: this text needs at least ")
    assert build(docs, "--vocab-size", told.split()[-1]) == 0


def test_recipe(root, docs, monkeypatch):
    given, real = {}, spm.SentencePieceTrainer.train

    def train(**options):
        given.update(options)
        return real(**options)

    monkeypatch.setattr(prepare.spm.SentencePieceTrainer, "train", train)
    assert build(docs) == 0
    assert (given["model_type"], given["character_coverage"], given["byte_fallback"]) == ("bpe", 0.999, True)
    assert given["normalization_rule_name"] == "nmt_nfkc"


def test_a_tokenizer_that_counts_from_its_begin_of_document(root, docs, tmp_path):
    (tmp_path / "some.model").write_bytes(model_proto(bos_id=0, unk_id=1, eos_id=2))
    assert build(docs, "--tokenizer", str(tmp_path / "some.model")) == 0
    assert tokens_of(root, "val")[0] == 0


def test_parsing_text():
    assert prepare.parse("text", b"a\rb\r\nc\n") == "a\nb\nc\n"


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_output_is_the_same_for_any_number_of_workers(root, docs, monkeypatch, workers):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1_000)
    assert build(docs, "--workers", str(workers)) == 0
    tokenizer = tokenizer_of(root)
    assert documents_of(root, "val") + documents_of(root, "train") == [tokenizer.encode(text) for text in TEXTS]
    assert len(list(prepare.batches(TEXTS))) > 10


def test_the_first_bad_line_is_told(root, docs, monkeypatch, capsys, tmp_path):
    (tmp_path / "some.model").write_bytes(model_proto())
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1_000)
    docs.write_bytes(jsonl(TEXTS) + b"bad\n" + jsonl(TEXTS) + b"worse\n")
    assert build(docs, "--workers", "2", "--tokenizer", str(tmp_path / "some.model")) == 2
    one_line_error(capsys, f"error: {docs}:61: not JSON")
    assert not snapshot(root)


def test_all_cores_are_used_unless_told_otherwise():
    expected = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert prepare.build_parser().parse_args([]).workers == expected


@pytest.fixture
def copied(tmp_path) -> Path:
    """A folder with a copy of the tool, a tokenizer, and JSONL that takes it some seconds to encode."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/prepare.py").write_bytes((REPO / "data/prepare.py").read_bytes())
    (tmp_path / "some.model").write_bytes(model_proto())
    (tmp_path / "docs.jsonl").write_bytes(jsonl(document(i, 400) for i in range(6000)))
    return tmp_path


@pytest.mark.slow
class TestWhileItWorks:
    """The tool as a process, on some megabytes."""

    @pytest.mark.parametrize("stage", ["reading", "training", "encoding"])
    def test_ctrl_c_ends_it_with_one_line(self, copied, stage):
        more = ["--tokenizer", "some.model"] if stage == "encoding" else ["--vocab-size", "5000"]
        command = [sys.executable, "-u", "data/prepare.py", "--docs-jsonl", "docs.jsonl", *more]
        process = subprocess.Popen(command, cwd=copied, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if stage == "reading":
            opened = Path(f"/proc/{process.pid}/fd")
            while opened.exists() and str(copied / "docs.jsonl") not in map(os.path.realpath, opened.iterdir()):
                time.sleep(0.01)
            time.sleep(0.01 if opened.exists() else 0.7)
        elif stage == "training":
            assert process.stdout.readline().startswith("tokenizer: training 5000 pieces on 6000 documents")
        else:
            shard = copied / "data/.prepare_mytext_sp300/new/datasets/mytext_sp300/fineweb_train_000000.bin"
            while process.poll() is None and not (shard.exists() and shard.stat().st_size > 0):
                time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        assert time.monotonic() - start < (3 if hasattr(spm.SentencePieceProcessor, "encode_as_numpy") else 60)
        assert process.returncode == 130
        assert err == "interrupted: the data set was not built; run the same command again\n"
        assert [path.name for path in (copied / "data").iterdir()] == ["prepare.py"]

    def test_memory_does_not_grow_with_the_input(self, copied):
        """For one and for four times as much text."""
        code = (
            "import subprocess, sys, resource\n"
            "subprocess.run([sys.executable, 'data/prepare.py', *sys.argv[1:]], check=True)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        peaks = []
        for factor in (1, 4):
            data = (copied / "docs.jsonl").read_bytes()
            (copied / "more.jsonl").write_bytes(data * factor)
            done = subprocess.run([sys.executable, "-c", code, "--docs-jsonl", "more.jsonl", "--vocab-size", "300",
                                   "--tokenizer-train-docs", "500"], cwd=copied, capture_output=True, text=True,
                                  timeout=200, check=False)  # fmt: skip
            assert done.returncode == 0, done.stderr
            unit = 1 if sys.platform == "darwin" else 1024
            peaks.append(int(done.stdout.splitlines()[-1]) * unit)
        assert len(data) > 10e6
        assert peaks[1] - peaks[0] < 10e6, peaks


@pytest.mark.slow
def test_train_on_documents_of_ones_own(copied):
    """The whole way, with a vocabulary that is not the default: documents, data set, training, score."""
    done = subprocess.run([sys.executable, "data/prepare.py", "--docs-jsonl", "docs.jsonl", "--vocab-size", "301",
                           "--val-docs", "10"], cwd=copied, capture_output=True, text=True, check=True)  # fmt: skip
    place = dict(setting.split("=") for setting in done.stdout.splitlines()[-1].split()[:3])
    assert place["VOCAB_SIZE"] == "301"
    settings = {name.upper(): str(value) for name, value in MODEL.items()} | place
    settings |= {"ITERATIONS": "30", "WARMUP_STEPS": "1", "MAX_WALLCLOCK_SECONDS": "0", "WARMDOWN_ITERS": "0"}
    scores = []
    for steps in ("0", "30"):
        ran = subprocess.run([sys.executable, REPO / "train_gpt_mlx.py"], cwd=copied, capture_output=True, text=True,
                             env={**os.environ, **settings, "ITERATIONS": steps}, timeout=240, check=False)  # fmt: skip
        assert (ran.returncode, ran.stderr) == (0, "")
        (line,) = [line for line in ran.stdout.splitlines() if line.startswith("final_int8_zlib_roundtrip_exact")]
        scores.append(float(line.split("val_bpb:")[1]))
    assert scores[1] < scores[0] - 0.5
