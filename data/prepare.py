#!/usr/bin/env python3
"""Make a data set for train_gpt_mlx.py from text: a SentencePiece tokenizer, and shards of its tokens.

    python data/prepare.py                              # Python's standard library: 12 MB of source code
    python data/prepare.py --text ~/notes ~/book.md     # files, and the files in folders: each is a document
    python data/prepare.py --docs-jsonl docs.jsonl.gz   # one {"text": ...} per line: each is a document

Each document follows a begin-of-document token. The first documents are for validation, the rest for training. The same
text gives the same bytes. Memory does not grow with the text. The data set appears only once it is complete. Ctrl-C
ends the tool at once, and the same command starts over.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent  # the data folder
sys.path.insert(0, str(ROOT.parent))

try:
    import numpy as np
    import sentencepiece as spm
    from tqdm import tqdm

    import train_gpt_mlx as tg
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: run `pip install -r requirements.txt`, or use .venv/bin/python")

MADE_BY = "data/prepare.py"
LIBRARY = Path(os.__file__).parent
NOT_LIBRARY_TEXT = r"(^|/)(\..*|site-packages|dist-packages|__pycache__|tests?|idle_test)/"
BATCH_MB = 2  # of text to encode at once; three batches are in memory

# The challenge's recipe. nmt_nfkc folds white space, for example, so bits per byte are over the normalized text.
RECIPE = dict(model_type="bpe", character_coverage=0.999, byte_fallback=True, split_digits=True)
NORMALIZATION = dict(normalization_rule_name="nmt_nfkc", add_dummy_prefix=False)
SPECIAL_PIECES = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
TOKENIZER_DOCUMENTS = 20_000  # the most to train a tokenizer on
TOKENIZER_BYTES = 100_000_000  # likewise; training takes ten times as much memory
LINE_SPLITTER = textwrap.TextWrapper(1000, expand_tabs=False, drop_whitespace=False, break_on_hyphens=False)

# Settings of a first run, as in README.md. The default model is too slow for a CPU.
FIRST_RUN_ON_GPU = """ITERATIONS=200 TRAIN_BATCH_TOKENS=8192 MAX_WALLCLOCK_SECONDS=0 WARMDOWN_ITERS=100 WARMUP_STEPS=2
    VAL_MAX_TOKENS=1000000"""
FIRST_RUN_ON_CPU = """NUM_LAYERS=2 MODEL_DIM=96 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=1024
    GRAD_ACCUM_STEPS=1 VAL_BATCH_SIZE=8192 VAL_MAX_TOKENS=1000000 ITERATIONS=100 WARMUP_STEPS=1 WARMDOWN_ITERS=100
    MAX_WALLCLOCK_SECONDS=0 TRAIN_LOG_EVERY=20"""


def command_line() -> argparse.Namespace:
    """The parsed arguments."""
    parser = argparse.ArgumentParser(description="Make a data set from text: by default, Python's standard library.")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--text", nargs="+", type=Path, default=(), metavar="PATH", help="UTF-8 files, and folders of them"
    )
    text.add_argument("--docs-jsonl", nargs="+", type=Path, metavar="FILE", help='lines of {"text": ...}, also .gz')
    parser.add_argument("--glob", default="*", metavar="PATTERN", help="files to take from folders, such as '*.md'")
    parser.add_argument("--skip-bad", action="store_true", help="pass over files and lines that cannot be used")
    parser.add_argument("--name", help="name of the data set (default: mytext, or sample without text)")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--vocab-size", type=int, default=1024, metavar="N", help="(default: %(default)s)")
    tokenizer.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model, instead of a new one")
    val = parser.add_mutually_exclusive_group()
    val.add_argument("--val-tokens", type=int, default=100_000, metavar="N", help="about (default: %(default)s)")
    val.add_argument("--val-docs", type=int, default=0, metavar="N", help="validation documents, instead of tokens")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="(default: %(default)s)")
    return parser.parse_args()


def documents(args: argparse.Namespace, seen: Counter) -> Iterator[list[str]]:
    """All documents but blank ones, in batches. `seen` counts what is read and skipped. Raises InputError, OSError."""
    texts = json_lines(args, seen) if args.docs_jsonl else text_files(args, seen)
    batch: list[str] = []
    batch_end = 1_000_000 * BATCH_MB
    for text in texts:
        if text.strip():
            batch.append(text)
            seen["bytes"] += len(text.encode("utf-8"))
        if seen["bytes"] >= batch_end:
            yield batch
            batch = []
            batch_end = seen["bytes"] + 1_000_000 * BATCH_MB
    yield batch


def text_files(args: argparse.Namespace, seen: Counter) -> Iterator[str]:
    """Each file is a document. Folders may also hold files that are not text."""
    files = find_files(args.text, args.glob) if args.text else find_files([LIBRARY], "*.py", NOT_LIBRARY_TEXT)
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            if path in args.text and not args.skip_bad:
                raise tg.InputError(f"{path}: not UTF-8 text") from None
            seen["non-UTF-8 files skipped"] += 1


def json_lines(args: argparse.Namespace, seen: Counter) -> Iterator[str]:
    """Each line is a document."""
    for path in args.docs_jsonl:
        for number, line in enumerate(unpacked_lines(path), start=1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
                text.encode("utf-8")  # fails for half of a surrogate pair
            except (ValueError, LookupError, TypeError, AttributeError):
                if not args.skip_bad:
                    raise tg.InputError(f'{path}:{number}: not JSON with a string "text"') from None
                seen["bad lines skipped"] += 1
                continue
            yield text


def unpacked_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, gzip or not. Raises InputError, OSError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise tg.InputError(f"{path}: damaged gzip file") from None


def find_files(paths: list[Path], pattern: str, leave_out: str = r"(^|/)\.") -> list[Path]:
    """Files, and those of folders that match a pattern and are not left out (hidden ones), in the order of a hash of
    their names. The order is the same on every machine, and stays when text is added."""
    files: dict[str, Path] = {}  # by names that do not depend on where the text is
    for number, path in enumerate(paths):
        found = {path.name: path}
        if path.is_dir():
            below = {file.relative_to(path).as_posix(): file for file in path.rglob(pattern) if file.is_file()}
            found = {name: file for name, file in below.items() if not re.search(leave_out, name)}
        for name, file in found.items():
            while name in files:
                name = f"{number}/{name}"
            files[name] = file
    order = sorted(files, key=lambda name: hashlib.sha256(os.fsencode("1337" + name)).digest())
    return [files[name] for name in order]


def train_tokenizer(args: argparse.Namespace) -> spm.SentencePieceProcessor:
    """A new tokenizer. Raises InputError if there is too little text for --vocab-size, OSError."""
    lines = lines_to_train_on(args)
    if not lines:
        raise tg.InputError("no text is left to train a tokenizer on: give more, or lower --val-docs")
    model = io.BytesIO()
    options = dict(vocab_size=args.vocab_size, minloglevel=2, **RECIPE, **NORMALIZATION, **SPECIAL_PIECES)
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]  # without SentencePiece's file, line and condition
        raise tg.InputError(f"--vocab-size {args.vocab_size}: {reason}") from None
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def lines_to_train_on(args: argparse.Namespace) -> list[str]:
    """Lines of the first documents after --val-docs, split where SentencePiece would skip them (over 4,192 bytes)."""
    lines: list[str] = []
    num_bytes = 0
    texts = chain.from_iterable(documents(args, Counter()))
    for text in islice(texts, args.val_docs, args.val_docs + TOKENIZER_DOCUMENTS):
        for line in filter(str.strip, text.splitlines()):
            if len(line) > LINE_SPLITTER.width:
                lines += LINE_SPLITTER.wrap(line)
            else:
                lines.append(line)
        num_bytes += len(text.encode("utf-8"))
        if num_bytes >= TOKENIZER_BYTES:
            break
    print(f"training a tokenizer on {num_bytes:,} bytes of text", flush=True)
    return lines


def read_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """The tokenizer in a file. Raises InputError, OSError."""
    model = path.read_bytes()
    try:
        tokenizer = spm.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise tg.InputError(f"--tokenizer {path}: not a SentencePiece model") from None
    if tokenizer.bos_id() < 0:
        raise tg.InputError(f"--tokenizer {path}: has no begin-of-document token (bos)")
    return tokenizer


def encode(tokenizer: spm.SentencePieceProcessor, batches: Iterable[list[str]]) -> Iterator[np.ndarray]:
    """The tokens of each document, (tokens,) int32. SentencePiece encodes a batch on all cores while the caller reads
    the next one and writes the last one."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(list)  # nothing yet
        for batch in batches:
            following = pool.submit(tokenizer.encode_as_numpy, batch, add_bos=True)
            yield from pending.result()
            pending = following
        yield from pending.result()


class ShardWriter:
    """Writes documents to folder/fineweb_{kind}_000000.bin and so on, with at most shard_tokens tokens a file."""

    def __init__(self, folder: Path, kind: str, shard_tokens: int) -> None:
        self.folder = folder
        self.kind = kind
        self.shard_tokens = shard_tokens
        self.num_files = self.num_documents = self.num_tokens = 0
        self.file: io.BufferedWriter | None = None

    def write(self, tokens: np.ndarray) -> None:
        """Add a document, (tokens,) of any integer dtype."""
        self.num_documents += 1
        while len(tokens) > 0:
            in_shard = self.num_tokens % self.shard_tokens
            if in_shard == 0:
                if self.file is not None:
                    self.finish()
                self.file = (self.folder / f"fineweb_{self.kind}_{self.num_files:06d}.bin").open("wb")
                self.file.write(bytes(1024))
                self.num_files += 1
            part = tokens[: self.shard_tokens - in_shard]
            self.file.write(part.astype("<u2"))
            self.num_tokens += len(part)
            tokens = tokens[len(part) :]

    def finish(self) -> None:
        """Write the last shard's header, now that its number of tokens is known."""
        with self.file as file:
            count = (file.tell() - 1024) // 2
            file.seek(0)
            file.write(np.array([20240520, 1, count], dtype="<i4"))


def write_shards(args: argparse.Namespace, tokenizer: spm.SentencePieceProcessor, folder: Path) -> dict:
    """Encode all documents. Returns the manifest's figures. Raises InputError if none is left to train on, OSError."""
    val = ShardWriter(folder, "val", args.shard_tokens)
    train = ShardWriter(folder, "train", args.shard_tokens)
    seen = Counter()
    digest = hashlib.sha256()
    batches = tqdm(documents(args, seen), "encoding", unit=" MB", unit_scale=BATCH_MB, disable=None)
    for tokens in encode(tokenizer, batches):
        digest.update(tokens)
        if args.val_docs:
            is_val = val.num_documents < args.val_docs
        else:  # as many as come closest to --val-tokens, but at least one
            missing = args.val_tokens - val.num_tokens
            is_val = val.num_documents == 0 or abs(missing - len(tokens)) < abs(missing)
        writer = val if is_val and train.num_documents == 0 else train
        writer.write(tokens)
    if train.num_documents == 0:
        raise tg.InputError("nothing is left to train on: give more documents (a file is one), or fewer to validation")

    stats = {"sha256": digest.hexdigest()}
    print("text: " + ", ".join(f"{count:,} {what}" for what, count in seen.items()))
    for writer in (train, val):
        writer.finish()
        print(f"{writer.kind}: {writer.num_documents:,} document(s), {writer.num_tokens:,} tokens")
        stats[f"files_{writer.kind}"] = writer.num_files
        stats[f"documents_{writer.kind}"] = writer.num_documents
        stats[f"tokens_{writer.kind}"] = writer.num_tokens
    return stats


def read_manifest(path: Path = ROOT / "manifest.json") -> dict:
    """The list of data sets and tokenizers in the data folder. Raises InputError."""
    if not path.exists():
        return {"tokenizers": [], "datasets": []}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise tg.InputError(f"{path}: not JSON: remove it") from None


def main() -> None:
    """Make the data set, in the place of an older one when all is done. Raises InputError, OSError."""
    args = command_line()
    name = args.name or ("mytext" if args.text or args.docs_jsonl else "sample")
    tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(args)
    vocab_size = tokenizer.vocab_size()
    if vocab_size > 65536:
        raise tg.InputError(f"{vocab_size} pieces are too many: shards store tokens in 16 bits")
    dataset = {"name": f"{name}_sp{vocab_size}", "tokenizer_name": f"{name}_{vocab_size}_bpe", "made_by": MADE_BY}
    shards = ROOT / "datasets" / dataset["name"]
    model = ROOT / "tokenizers" / f"{dataset['tokenizer_name']}.model"
    manifest = read_manifest()
    made_here = [entry["name"] for entry in manifest["datasets"] if entry.get("made_by") == MADE_BY]
    for place in (shards, model):
        if place.exists() and dataset["name"] not in made_here:
            raise tg.InputError(f"{place} is not listed as made by this tool: choose another --name, or remove it")

    staging = ROOT / "datasets" / ".unfinished"
    shutil.rmtree(staging, ignore_errors=True)  # of a build that was killed
    try:
        (staging / "shards").mkdir(parents=True)
        (staging / "model").write_bytes(tokenizer.serialized_model_proto())
        dataset["stats"] = write_shards(args, tokenizer, staging / "shards")
        dataset["arguments"] = sys.argv[1:]
        dataset["versions"] = {"python": sys.version.split()[0], "sentencepiece": spm.__version__}
        listed = {"name": dataset["tokenizer_name"], "model_path": f"tokenizers/{model.name}"}
        for kind, entry in (("tokenizers", listed), ("datasets", dataset)):
            manifest[kind] = [other for other in manifest[kind] if other["name"] != entry["name"]] + [entry]
        (staging / "manifest").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

        # The old shards go first and the new ones come last. If this is killed in between, there is no data set, and
        # never one with another's tokenizer.
        if shards.exists():
            shards.rename(staging / "old")
        model.parent.mkdir(exist_ok=True)
        shutil.move(staging / "manifest", ROOT / "manifest.json")
        shutil.move(staging / "model", model)
        (staging / "shards").rename(shards)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

    print(f"train on it with:\n{first_run(name, shards, model, vocab_size)}")


def first_run(name: str, shards: Path, model: Path, vocab_size: int) -> str:
    """A command for a shell in the current folder. It trains on a data set in minutes, on this machine."""
    files = [shlex.quote(os.path.relpath(path)) for path in (shards, model, sys.executable, tg.__file__)]
    where = f"env RUN_ID={shlex.quote(name)} DATA_PATH={files[0]} TOKENIZER_PATH={files[1]} VOCAB_SIZE={vocab_size}"
    settings = FIRST_RUN_ON_CPU if tg.backend() == "cpu" else FIRST_RUN_ON_GPU
    return f"  {where}\n    {settings}\n    {files[2]} {files[3]}".replace("\n", " \\\n")


def run(main: Callable[[], None]) -> None:
    """Run a tool. What goes wrong is told in one line, and Ctrl-C ends it at once, whatever its threads do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main()
    except (tg.InputError, tg.RunError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or ROOT}: {error.strerror}")


if __name__ == "__main__":
    run(main)
