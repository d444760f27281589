#!/usr/bin/env python3
"""Make a data set for train_gpt_mlx.py from text: a SentencePiece tokenizer, and shards of its tokens.

Without arguments the text is the source code of Python's own standard library, which every machine has:
about 12 MB, 4.4 million tokens, nothing downloaded. `--text` takes files and folders of your own, `--docs-jsonl` files
of one JSON object a line, as the challenge publishes its documents.

The recipe is the challenge's: BPE with byte fallback, split digits and nmt_nfkc normalization (which folds
whitespace, so bits per byte are over the normalized text). A document's tokens follow a begin-of-document token. The
first documents are for validation, the rest for training. The same text, settings and SentencePiece version give the
same bytes, on however many cores.

Text streams through in batches, so memory does not grow with it: while SentencePiece encodes one on all cores, the next
is read and the last one written.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import textwrap
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

try:
    import numpy as np
    import sentencepiece as spm
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error.name} is not installed for {sys.executable}: use .venv/bin/python, which README.md makes, "
             "or install requirements.txt there")  # fmt: skip

ROOT = Path(__file__).resolve().parent  # the data folder: datasets/, tokenizers/ and manifest.json live in it
SHARD_HEADER_INTS = 256  # little-endian int32: magic, version, token count, then zeros
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
NOT_LIBRARY_TEXT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
MADE_BY = "data/prepare.py"
SHUFFLE_SEED = "1337"
BATCH_CHARACTERS = 2_000_000  # of text that is encoded at once; three batches are in memory
SENTENCE_CHARACTERS = 1000  # of a line to train on, at most: at 4 bytes each less than SentencePiece's bound
TOKENIZER_TEXT_BYTES = 100_000_000  # most text to train a tokenizer on, which takes ten times as much memory
BAD_ONES_TOLD = 5
ONE_DOCUMENT = "one file is one document, and it cannot be both validation and training text: give several"


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where and what to do."""


class WriteError(Exception):
    """A file cannot be written. The message says which and why; everything is as it was before."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    parser = argparse.ArgumentParser(
        description="Make a data set for train_gpt_mlx.py from text. Without --text or --docs-jsonl: from Python's "
        "standard library."
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="UTF-8 text files, and folders of them (every file in a folder, but for hidden ones); a file is a "
        "document, and they are shuffled by a fixed rule",
    )
    source.add_argument(
        "--docs-jsonl",
        nargs="+",
        type=Path,
        metavar="FILE",
        help='files of one JSON object a line, its "text" a document, gzip or not; the order is kept',
    )
    parser.add_argument("--name", help='name of the data set (default "mytext", without your own text "sample")')
    parser.add_argument("--vocab-size", type=positive, metavar="N", help="tokens (default 1024, or the --tokenizer's)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="MODEL", help="a SentencePiece model to use, instead of training one"
    )
    parser.add_argument(
        "--tokenizer-train-docs",
        type=positive,
        default=20_000,
        metavar="N",
        help="train the tokenizer on the first N documents, with --val-docs on the first after those, and on 100 MB of "
        "them at most (default %(default)s)",
    )
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--val-tokens",
        type=positive,
        default=100_000,
        metavar="N",
        help="about so many validation tokens, in whole documents (default %(default)s)",
    )
    split.add_argument("--val-docs", type=positive, metavar="N", help="the first N documents are validation")
    parser.add_argument(
        "--shard-tokens",
        type=positive,
        default=100_000_000,
        metavar="N",
        help="tokens in one shard file (default %(default)s)",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="count lines and files that cannot be used, instead of stopping"
    )
    parser.add_argument(
        "--workers", type=positive, default=cores(), metavar="N", help="threads that encode (default all cores)"
    )
    return parser


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_settings(name: str, vocab_size: int) -> None:
    """Raise InputError for a name that is no plain folder name, or a vocabulary too large for uint16."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"--name {name}: use letters, digits, '.', '_' and '-' only")
    if vocab_size > 65_536:
        raise InputError(f"--vocab-size {vocab_size}: shards store tokens in 16 bits, so 65536 is the most")


# ---------------------------------------------------------------------------------------------------------------------
# Where documents come from: a source gives records, bytes that hold one document each, and `parse` makes text of one.


@dataclass
class Source:
    """Files of documents: one a file, or, of kind "jsonl", one a line."""

    kind: str  # "text" or "jsonl"
    description: str
    files: dict[str, Path]  # by names that do not depend on where they lie, in the order of reading
    digests: dict[str, str] = field(default_factory=dict)  # sha256 of each, once it has been read to its end

    def records(self, task: str | None) -> Iterator[tuple[str, bytes]]:
        """Where a record comes from (file, or file and line number) and its bytes; for a task with a bar of progress.

        Raises InputError for a file that cannot be read.
        """
        total = sum(path.stat().st_size for path in self.files.values() if path.exists())
        with tqdm(total=total, desc=task, unit="B", unit_scale=True, disable=None if task else True) as bar:
            for name, path in self.files.items():
                try:
                    if self.kind == "text":
                        data = path.read_bytes()
                        self.digests[name] = hashlib.sha256(data).hexdigest()
                        bar.update(len(data))
                        yield str(path), data
                    else:
                        yield from self.lines(name, path, bar)
                except OSError as error:
                    raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None

    def lines(self, name: str, path: Path, bar: tqdm) -> Iterator[tuple[str, bytes]]:
        """The lines of a file that are not blank, unpacked if it is gzip, by path and number."""
        with path.open("rb", buffering=0) as raw:
            watched = Watched(raw, bar)
            buffered = io.BufferedReader(watched, 1 << 20)
            is_gzip = buffered.peek(2)[:2] == b"\x1f\x8b"
            try:
                for number, line in enumerate(gzip.GzipFile(fileobj=buffered) if is_gzip else buffered, start=1):
                    if not line.isspace():
                        yield f"{path}:{number}", line.rstrip(b"\r\n")
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{path}: damaged gzip data: {error}") from None
            self.digests[name] = watched.digest.hexdigest()

    def fingerprint(self) -> dict:
        """What was read, to be recognized: the sha256 of each file of lines, in their order; of text files that of the
        list that sha256sum prints of them in the order of their names."""
        if self.kind == "jsonl":
            return {"files": [{"file": name, "sha256": digest} for name, digest in self.digests.items()]}
        listed = "".join(f"{self.digests[name]}  {name}\n" for name in sorted(self.digests, key=encoded))
        return {"files": len(self.digests), "sha256": hashlib.sha256(encoded(listed)).hexdigest()}


class Watched(io.RawIOBase):
    """A file whose bytes are hashed, and shown in the bar of progress, as they are read."""

    def __init__(self, raw: io.RawIOBase, bar: tqdm) -> None:
        self.raw, self.bar, self.digest = raw, bar, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.raw.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        self.bar.update(count)
        return count


@dataclass
class LeftOut:
    """How many records gave no document."""

    blank: int = 0
    bad: int = 0
    first_bad: str = ""  # where, and what is wrong with it


def documents(
    source: Source, left_out: LeftOut, skip_bad: bool, task: str | None = None, say: Callable[[str], None] | None = None
) -> Iterator[str]:
    """The source's documents that are not blank. Raises InputError, with file and line, for a bad record, unless those
    are skipped; then the first ones are told of, if somebody listens. A task has a bar of progress.
    """
    for place, record in source.records(task):
        try:
            text = parse(source.kind, record)
        except ValueError as error:
            if not skip_bad:
                raise InputError(f"{place}: {error}; --skip-bad leaves such out") from None
            left_out.bad += 1
            left_out.first_bad = left_out.first_bad or f"{place}: {error}"
            if say is not None and left_out.bad <= BAD_ONES_TOLD:
                say(f"skipped {place}: {error}")
            continue
        if text.strip():
            yield text
        else:
            left_out.blank += 1


def parse(kind: str, record: bytes) -> str:
    """A record's text. Raises ValueError, saying what is wrong with it."""
    if kind == "text":
        try:
            text = record.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
        return text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        document = json.loads(record.decode("utf-8-sig"))
        text = document.get("text") if isinstance(document, dict) else None
        if not isinstance(text, str):
            raise ValueError('not a JSON object with a string "text"')
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except UnicodeEncodeError:
        raise ValueError('"text" has half a surrogate pair in it') from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}: character {error.pos})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (too deep)") from None
    return text


def library_source() -> Source:
    """The running interpreter's own .py files by relative name, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    files = {name: path for name, path in files.items() if not NOT_LIBRARY_TEXT & set(Path(name).parts)}
    return Source("text", f"standard library of Python {platform.python_version()}", shuffled(files))


def text_source(paths: Iterable[Path]) -> Source:
    """The files under the user's paths, by a name that does not depend on where the path lies."""
    files: dict[str, Path] = {}
    for number, path in enumerate(paths):
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.is_file()]
            names = {file.relative_to(path).as_posix(): file for file in found}
            names = {name: file for name, file in names.items() if not re.search(r"(^|/)\.", name)}
            if not names:
                raise InputError(f"--text {path}: no files in this folder")
        elif path.exists():
            names = {path.name: path}
        else:
            raise InputError(f"--text {path}: no such file or folder")
        for name, file in names.items():
            files[free_name(name, number, files)] = file
    return Source("text", "--text", shuffled(files))


def free_name(name: str, number: int, files: dict[str, Path]) -> str:
    """The name, or, if another of the user's paths has given it already, one with this path's number before it."""
    while name in files:
        name = f"{number}/{name}"
    return name


def encoded(name: str) -> bytes:
    """A file's name in UTF-8; on Linux it can have other bytes in it, which stay."""
    return name.encode("utf-8", "surrogateescape")


def shuffled(files: dict[str, Path]) -> dict[str, Path]:
    """The files in the order of a hash of seed and name.

    That order is as good as random, the same on every machine, and keeps when a file is added or edited.
    """
    order = sorted(files, key=lambda name: hashlib.sha256(encoded(SHUFFLE_SEED + name)).digest())
    return {name: files[name] for name in order}


def jsonl_source(paths: Iterable[Path]) -> Source:
    """The user's files of one JSON object a line, in the order given."""
    files: dict[str, Path] = {}
    for number, path in enumerate(paths):
        if not path.is_file():
            what = "a folder, which --text takes" if path.is_dir() else "not a regular file" if path.exists() else None
            raise InputError(f"--docs-jsonl {path}: {what or 'no such file'}")
        files[free_name(path.name, number, files)] = path
    return Source("jsonl", "--docs-jsonl", files)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer, and documents to tokens.


def train_tokenizer(source: Source, args: argparse.Namespace, say: Callable[[str], None]) -> bytes:
    """A SentencePiece model, serialized, with the challenge's recipe. Raises InputError for too little text.

    It is trained in a thread, so that Ctrl-C ends the tool at once (SentencePiece 0.2.3 lets it, 0.1.99 does not).
    """
    model = io.BytesIO()
    stopped: list[BaseException] = []  # SentencePiece makes an error of its own of what ends the iterator
    failed: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            yield from lines_to_train_on(source, args, say)
        except BaseException as error:
            stopped.append(error)
            raise

    def train() -> None:
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=lines(),
                model_writer=model,
                model_type="bpe",
                vocab_size=args.vocab_size,
                character_coverage=0.999,
                byte_fallback=True,
                split_digits=True,
                add_dummy_prefix=False,
                normalization_rule_name="nmt_nfkc",
                hard_vocab_limit=False,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                minloglevel=2,
            )
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    with tqdm(desc="training the tokenizer", bar_format="{desc}: {elapsed}", disable=None) as clock:
        while thread.is_alive():
            thread.join(0.2)
            clock.refresh()
    if stopped:
        raise stopped[0]
    if failed:
        if not isinstance(failed[0], (RuntimeError, OSError)):
            raise failed[0]
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(failed[0]))
        why = f"this text needs at least {least[1]}" if least else f"SentencePiece cannot train on it ({failed[0]})"
        raise InputError(f"--vocab-size {args.vocab_size}: {why}")
    pieces = spm.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != args.vocab_size:  # without the hard limit, a small text silently gives fewer
        raise InputError(
            f"--vocab-size {args.vocab_size}: this text yields only {pieces} pieces: ask for at most that, "
            "or give more text"
        )
    return model.getvalue()


def lines_to_train_on(source: Source, args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[str]:
    """The lines of the first documents, with --val-docs of the first after those. Raises InputError for none.

    Lines, and pieces of long ones: SentencePiece skips "sentences" of more than 4,192 bytes, so most whole documents.
    """
    count = num_bytes = 0
    skip, left_out = args.val_docs or 0, LeftOut()
    for text in documents(source, left_out, args.skip_bad):
        if skip > 0:
            skip -= 1
            continue
        count, num_bytes = count + 1, num_bytes + len(text.encode("utf-8"))
        for line in text.splitlines():
            if len(line) > SENTENCE_CHARACTERS:
                yield from textwrap.wrap(line, SENTENCE_CHARACTERS, expand_tabs=False, drop_whitespace=False,
                                         break_on_hyphens=False)  # fmt: skip
            elif line.strip():
                yield line
        if count == args.tokenizer_train_docs or num_bytes >= TOKENIZER_TEXT_BYTES:
            break
    if count == 0:
        few = f"--val-docs {args.val_docs}: the text has no more documents, which leaves none to train on"
        raise InputError(few if args.val_docs and skip < args.val_docs else no_text(left_out))
    say(f"tokenizer: training {args.vocab_size} pieces on {count} documents, {num_bytes:,} bytes")


def read_tokenizer(path: Path, wanted: int | None) -> bytes:
    """A SentencePiece model of the user's, with the number of pieces that is wanted, if one is. Raises InputError for
    what is none, or none that data can be made with.
    """
    try:
        model = path.read_bytes()
        if not model:  # SentencePiece takes it, and older versions crash when it is used
            raise RuntimeError
        tokenizer = spm.SentencePieceProcessor(model_proto=model)
    except OSError as error:
        raise InputError(f"--tokenizer {path}: cannot be read ({error.strerror})") from None
    except RuntimeError:
        raise InputError(f"--tokenizer {path}: not a SentencePiece model") from None
    vocab_size, bos = tokenizer.vocab_size(), tokenizer.bos_id()
    if bos < 0 or vocab_size > 65_536:
        raise InputError(f"--tokenizer {path}: {vocab_size} pieces, {'with' if bos >= 0 else 'without'} one to begin a "
                         "document (bos): it must have that, and at most 65536")  # fmt: skip
    if wanted not in (None, vocab_size):
        raise InputError(f"--vocab-size {wanted}: --tokenizer {path} has {vocab_size} pieces")
    return model


@dataclass
class Encoded:
    """A batch of documents as tokens."""

    tokens: np.ndarray  # (tokens,) uint16: each document's, after the begin-of-document token; no end-of-document token
    lengths: list[int]  # tokens of each document
    num_bytes: int  # of their text in UTF-8


def encode_batch(tokenizer: spm.SentencePieceProcessor, texts: list[str], workers: int) -> Encoded:
    """Encode documents in so many threads."""
    to_ids = getattr(tokenizer, "encode_as_numpy", tokenizer.encode_as_ids)  # a tenth faster, where there is that
    documents_ids = to_ids(texts, num_threads=workers)
    lengths = [1 + len(ids) for ids in documents_ids]
    tokens, end = np.full(sum(lengths), tokenizer.bos_id(), dtype="<u2"), 0
    for ids in documents_ids:
        tokens[end + 1 : end + 1 + len(ids)] = ids
        end += 1 + len(ids)
    return Encoded(tokens, lengths, sum(len(text.encode("utf-8")) for text in texts))


def encode(texts: Iterable[str], model: bytes, workers: int) -> Iterator[Encoded]:
    """Batches of the documents, encoded, in order.

    While SentencePiece encodes, whoever takes these batches reads the next documents and writes the last ones (with
    0.2.3; 0.1.99 lets no other Python thread run).
    """
    tokenizer = spm.SentencePieceProcessor(model_proto=model)
    pool = ThreadPoolExecutor(1)
    under_way: deque[Future[Encoded]] = deque()
    try:
        for batch in batches(texts):
            under_way.append(pool.submit(encode_batch, tokenizer, batch, workers))
            if len(under_way) == 2:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, as many at once as have BATCH_CHARACTERS together."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to shards.


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError names the file; by itself that of a failed write does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write a file, and its folder, as far as the disk: a rename after this cannot show a part of it."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


class ShardWriter:
    """Writes folder/fineweb_{kind}_000000.bin and so on, of at most shard_tokens tokens, as they come."""

    def __init__(self, folder: Path, kind: str, shard_tokens: int) -> None:
        self.folder, self.kind, self.shard_tokens = folder, kind, shard_tokens
        self.files = self.tokens = self.documents = 0
        self.file: io.BufferedWriter | None = None  # the shard that is not full
        self.in_file = 0

    @property
    def path(self) -> Path:
        return self.folder / f"fineweb_{self.kind}_{self.files - 1:06d}.bin"

    def write(self, tokens: np.ndarray, documents: int) -> None:
        """Add the (tokens,) uint16 of so many documents."""
        self.documents += documents
        self.tokens += len(tokens)
        while len(tokens) > 0:
            if self.file is None:
                self.files, self.in_file = self.files + 1, 0
                with naming(self.path):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self.file = self.path.open("wb")
                    self.file.write(bytes(4 * SHARD_HEADER_INTS))
            part, tokens = np.split(tokens, [self.shard_tokens - self.in_file])
            with naming(self.path):
                self.file.write(part.tobytes())
            self.in_file += len(part)
            if self.in_file == self.shard_tokens:
                self.finish()

    def finish(self) -> None:
        """Complete the last shard: now the number of its tokens is known."""
        if self.file is None:
            return
        header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self.in_file
        with naming(self.path), self.file as file:
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.file = None


def to_validation(lengths: list[int], val: ShardWriter, args: argparse.Namespace) -> int:
    """How many of the next documents, of so many tokens each, are still for validation.

    The first --val-docs are, or those that come closest to --val-tokens, but at least one.
    """
    if args.val_docs:
        return max(min(args.val_docs - val.documents, len(lengths)), 0)
    count, total = 0, val.tokens
    for length in lengths:
        if val.documents + count > 0 and abs(total + length - args.val_tokens) >= abs(total - args.val_tokens):
            break
        count, total = count + 1, total + length
    return count


def write_shards(
    source: Source, model: bytes, folder: Path, args: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, int]:
    """Encode the source into shards in the folder; returns the manifest's counts.

    Raises InputError for a bad record, unless those are skipped, and when there is nothing to train on.
    """
    val, train = (ShardWriter(folder, kind, args.shard_tokens) for kind in ("val", "train"))
    left_out, num_bytes = LeftOut(), 0
    texts = documents(source, left_out, args.skip_bad, "encoding", say)
    with closing(encode(texts, model, args.workers)) as results:
        for batch in results:
            num_bytes += batch.num_bytes
            count = to_validation(batch.lengths, val, args) if train.documents == 0 else 0
            boundary = sum(batch.lengths[:count])
            val.write(batch.tokens[:boundary], count)
            if count < len(batch.lengths):
                val.finish()
            train.write(batch.tokens[boundary:], len(batch.lengths) - count)
    train.finish()
    if train.documents == 0:
        raise InputError(nothing_to_train_on(source, left_out, val, args))
    counts = {"documents": val.documents + train.documents, "bytes": num_bytes, "blank": left_out.blank,
              "bad": left_out.bad}  # fmt: skip
    for writer in (train, val):
        counts |= {f"files_{writer.kind}": writer.files, f"documents_{writer.kind}": writer.documents,
                   f"tokens_{writer.kind}": writer.tokens}  # fmt: skip
    return counts


def no_text(left_out: LeftOut) -> str:
    """What to tell the user when there are no documents."""
    if left_out.bad:
        return f"there is no text in it: {left_out.bad} bad, {left_out.blank} blank; {left_out.first_bad}"
    return "the text is empty: there is nothing but white space in it"


def nothing_to_train_on(source: Source, left_out: LeftOut, val: ShardWriter, args: argparse.Namespace) -> str:
    """What to tell the user when there are no documents, or all went to validation."""
    if val.documents == 0:
        return no_text(left_out)
    if source.kind == "text" and val.documents == 1:
        return ONE_DOCUMENT
    setting = f"--val-docs {args.val_docs}" if args.val_docs else f"--val-tokens {args.val_tokens}"
    return (f"{setting}: the text's {val.documents} documents have {val.tokens} tokens, which leaves none to train on: "
            "give more text, or a smaller number")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Into the data folder.


def read_manifest(path: Path) -> dict:
    """The manifest, or a new one. Raises InputError for a file that is none."""
    if not path.exists():
        return {"tokenizers": [], "datasets": []}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = [*manifest.get("tokenizers", []), *manifest.get("datasets", [])]
        if all(isinstance(entry, dict) for entry in entries):
            return manifest
    except (ValueError, AttributeError, TypeError):
        pass
    raise InputError(f"{path}: not a manifest: mend it or move it away")


def with_entry(entries: list[dict], entry: dict) -> list[dict]:
    """The entries with the one of that name replaced in its place, or added."""
    position = next((i for i, other in enumerate(entries) if other.get("name") == entry["name"]), len(entries))
    return [*entries[:position], entry, *entries[position + 1 :]]


def install(staging: Path, dataset: dict, tokenizer: dict) -> None:
    """Put the finished files under staging/new in the place of the ones there were, and enter them in the manifest.

    Everything that needs room on the disk is written before anything is moved: also copies of the old tokenizer
    and manifest, to be put back if the move fails.
    """
    manifest = read_manifest(ROOT / "manifest.json")
    manifest["tokenizers"] = with_entry(manifest.get("tokenizers", []), tokenizer)
    manifest["datasets"] = with_entry(manifest.get("datasets", []), dataset)
    write_file(staging / "new" / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    shards, files = f"datasets/{dataset['name']}", (tokenizer["model_path"], "manifest.json")
    for name in files:
        if (ROOT / name).exists():
            write_file(staging / "old" / name, (ROOT / name).read_bytes())
    for path in (ROOT / shards, ROOT / tokenizer["model_path"], staging / "old" / shards):
        path.parent.mkdir(parents=True, exist_ok=True)
    move_into_place(staging, shards, files)


def move_into_place(staging: Path, shards: str, files: Iterable[str]) -> None:
    """Move the folder of shards and the files from staging/new to ROOT: all of them, or none if one move fails.

    The old shards go first and the new ones come last, each by a rename of the whole folder. Whenever this is
    killed, a data set is either whole or absent, never old shards with a new tokenizer.
    """
    new, old = staging / "new", staging / "old"
    done: list[str] = []
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C could fall between a move and its record
    try:
        if (ROOT / shards).exists():
            os.replace(ROOT / shards, old / shards)
            done.append(shards)
        for name in files:
            os.replace(new / name, ROOT / name)
            done.append(name)
        os.replace(new / shards, ROOT / shards)
    except BaseException:
        for name in reversed(done):  # no others: a folder that refused the new file would refuse the old one, too
            if (old / name).exists():
                os.replace(old / name, ROOT / name)
            else:
                (ROOT / name).unlink()
        raise
    finally:
        signal.signal(signal.SIGINT, on_interrupt)


def prepare(args: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    """Build the data set that the command line asks for.

    Raises InputError for what the user can mend, and WriteError for a full disk and the like.
    """
    model = read_tokenizer(args.tokenizer, args.vocab_size) if args.tokenizer else None
    args.vocab_size = spm.SentencePieceProcessor(model_proto=model).vocab_size() if model else args.vocab_size or 1024
    name = args.name if args.name is not None else "mytext" if args.text or args.docs_jsonl else "sample"
    check_settings(name, args.vocab_size)
    dataset_name, tokenizer_name = f"{name}_sp{args.vocab_size}", f"{name}_{args.vocab_size}_bpe"
    listed = read_manifest(ROOT / "manifest.json").get("datasets", [])
    made_here = any(entry.get("name") == dataset_name and entry.get("made_by") == MADE_BY for entry in listed)
    for place in (ROOT / "datasets" / dataset_name, ROOT / "tokenizers" / f"{tokenizer_name}.model"):
        if place.exists() and not made_here:
            raise InputError(f"--name {name}: {place} is not this tool's; choose another name")
        if place.parent.exists() and place.parent.stat().st_dev != ROOT.stat().st_dev:
            raise InputError(f"{place.parent} is on another disk than {ROOT}, and files are moved there as a whole: "
                             f"have all of {ROOT} on that disk")  # fmt: skip

    if args.docs_jsonl:
        source = jsonl_source(args.docs_jsonl)
    else:
        source = text_source(args.text) if args.text else library_source()
    if source.kind == "text" and len(source.files) == 1:
        raise InputError(ONE_DOCUMENT)
    model = model or train_tokenizer(source, args, say)
    staging = ROOT / f".prepare_{dataset_name}"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        tokenizer = {"name": tokenizer_name, "model_path": f"tokenizers/{tokenizer_name}.model"}
        write_file(staging / "new" / tokenizer["model_path"], model)
        stats = write_shards(source, model, staging / "new" / "datasets" / dataset_name, args, say)
        dataset = {"name": dataset_name, "tokenizer_name": tokenizer_name, "made_by": MADE_BY,
                   "source": source.description, "input": source.fingerprint(), "settings": settings(args, model),
                   "stats": stats}  # fmt: skip
        install(staging, dataset, tokenizer)
    except OSError as error:
        place = Path(error.filename or ROOT)
        if place.is_relative_to(staging):  # the user knows it by the name that it was to have
            place = ROOT.joinpath(*place.relative_to(staging).parts[1:])
        raise WriteError(f"{place}: cannot be written: {error.strerror}; what was there before still is") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)

    left_out = "".join(f", {stats[kind]} {kind} left out" for kind in ("blank", "bad") if stats[kind])
    say(f"text: {stats['documents']} documents, {stats['bytes']:,} bytes{left_out}")
    for kind in ("train", "val"):
        say(
            f"{kind}: {stats[f'documents_{kind}']} documents, {stats[f'tokens_{kind}']:,} tokens, "
            f"{stats[f'files_{kind}']} shard(s)"
        )
    if stats["tokens_val"] > stats["tokens_train"] / 4:
        say("that is much validation for so little training: --val-tokens or --val-docs takes less")
    say("train on it with (default settings suit a GPU; for a CPU, add the small ones of the README's first command):")
    say(
        f"  DATA_PATH={shown(ROOT / 'datasets' / dataset_name)} TOKENIZER_PATH={shown(ROOT / tokenizer['model_path'])} "
        f"VOCAB_SIZE={args.vocab_size} {shown(Path(sys.executable))} train_gpt_mlx.py"
    )


def settings(args: argparse.Namespace, model: bytes) -> dict:
    """What the manifest records, to build the data set again from the same text."""
    found = {"val_docs": args.val_docs} if args.val_docs else {"val_tokens": args.val_tokens}
    found |= {"vocab_size": args.vocab_size, "shard_tokens": args.shard_tokens, "skip_bad": args.skip_bad}
    if args.tokenizer:
        found["tokenizer"] = args.tokenizer.name
    else:
        found["tokenizer_train_docs"] = args.tokenizer_train_docs
    return found | {"tokenizer_sha256": hashlib.sha256(model).hexdigest(), "sentencepiece": spm.__version__}


def shown(path: Path) -> str:
    """The path relative to the current folder where it lies in it, for commands to copy."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when the data set is there, 1 when it cannot be written, 2 for what the user can mend, 130 when
    interrupted.
    """
    try:
        prepare(build_parser().parse_args(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the data set was not built; run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # and not sys.exit, at which a thread that SentencePiece calls Python from would abort
