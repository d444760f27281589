#!/usr/bin/env python3
"""Make a data set for train_gpt_mlx.py from text: a SentencePiece tokenizer, and shards of its tokens.

Without arguments the text is the source code of Python's own standard library, which every machine has:
about 12 MB, 4.4 million tokens, nothing downloaded. `--text` takes files and folders of your own.

The recipe is the challenge's: BPE with byte fallback, split digits and nmt_nfkc normalization (which folds
whitespace, so bits per byte are over the normalized text). One file is one document; a document's tokens follow
a begin-of-document token. Documents are shuffled by a fixed rule; the first are for validation, the rest for
training. The same text, settings and SentencePiece version give the same bytes.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import sentencepiece as spm

ROOT = Path(__file__).resolve().parent  # the data folder: datasets/, tokenizers/ and manifest.json live in it
SHARD_HEADER_INTS = 256  # little-endian int32: magic, version, token count, then zeros
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
NOT_LIBRARY_TEXT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
MADE_BY = "data/prepare.py"
SHUFFLE_SEED = "1337"


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
        description="Make a data set for train_gpt_mlx.py from text. Without --text: from Python's standard library."
    )
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="PATH",
        help="UTF-8 text files, and folders of them (every file in a folder, but for hidden ones)",
    )
    parser.add_argument("--name", help='name of the data set (default "sample", with --text "mytext")')
    parser.add_argument("--vocab-size", type=positive, default=1024, metavar="N", help="tokens (default %(default)s)")
    parser.add_argument(
        "--val-tokens", type=positive, default=100_000, metavar="N",
        help="about so many validation tokens, in whole documents (default %(default)s)",
    )
    parser.add_argument(
        "--shard-tokens", type=positive, default=100_000_000, metavar="N",
        help="tokens in one shard file (default %(default)s)",
    )
    return parser


def check_settings(name: str, vocab_size: int) -> None:
    """Raise InputError for a name that is no plain folder name, or a vocabulary too large for uint16."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"--name {name}: use letters, digits, '.', '_' and '-' only")
    if vocab_size > 65_536:
        raise InputError(f"--vocab-size {vocab_size}: shards store tokens in 16 bits, so 65536 is the most")


def standard_library_files() -> dict[str, Path]:
    """The running interpreter's own .py files by relative name, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return {name: path for name, path in files.items() if not NOT_LIBRARY_TEXT & set(Path(name).parts)}


def text_files(paths: Iterable[Path]) -> dict[str, Path]:
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
            files[name if name not in files else f"{number}/{name}"] = file
    return files


def read_documents(files: dict[str, Path]) -> list[str]:
    """The files' texts, blank ones left out, in the order of a hash of seed and name.

    That order is as good as random, the same on every machine, and keeps when a file is added or edited.
    Raises InputError, naming the file, for one that cannot be read or is not UTF-8.
    """
    documents = []
    for name in sorted(files, key=lambda name: hashlib.sha256((SHUFFLE_SEED + name).encode()).digest()):
        try:
            text = files[name].read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{files[name]}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise InputError(f"{files[name]}: cannot be read ({error.strerror})") from None
        if text.strip():
            documents.append(text)
    if not documents:
        raise InputError("the text is empty: none of its files has anything but white space in it")
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> bytes:
    """A SentencePiece model, serialized, with the challenge's recipe. Raises InputError for too little text.

    It is trained on lines: SentencePiece skips "sentences" of more than 4,192 bytes, so most whole documents.
    """
    lines = (line for document in documents for line in document.splitlines() if line.strip())
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
            normalization_rule_name="nmt_nfkc", hard_vocab_limit=False,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(f"--vocab-size {vocab_size}: SentencePiece cannot train on this text ({error})") from None
    pieces = spm.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != vocab_size:  # without the hard limit, a small text silently gives fewer
        raise InputError(
            f"--vocab-size {vocab_size}: this text yields only {pieces} pieces: ask for at most that, or give more text"
        )
    return model.getvalue()


def encode(model: bytes, documents: list[str]) -> list[np.ndarray]:
    """Each document's tokens, uint16, after the begin-of-document token; there is no end-of-document token."""
    tokenizer = spm.SentencePieceProcessor(model_proto=model)
    bos = [tokenizer.bos_id()]
    return [np.array(bos + ids, dtype="<u2") for ids in tokenizer.encode(documents, out_type=int)]


def split(encoded: list[np.ndarray], val_tokens: int) -> int:
    """How many documents, from the first on, are validation: those that come closest to val_tokens tokens.

    Raises InputError when that leaves nothing to train on.
    """
    totals = np.cumsum([len(document) for document in encoded])
    count = int(np.argmin(np.abs(totals - val_tokens))) + 1
    if count < len(encoded):
        return count
    if len(encoded) == 1:
        raise InputError("one file is one document, and it cannot be both validation and training text: give several")
    raise InputError(
        f"--val-tokens {val_tokens}: the text's {len(encoded)} documents have {totals[-1]} tokens, which leaves none "
        "to train on: give more text, or a smaller number"
    )


def write_file(path: Path, data: bytes) -> None:
    """Write a file, and its folder, as far as the disk: a rename after this cannot show a part of it.

    An OSError names the file; by itself that of a failed write does not.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or path
        raise


def write_shards(folder: Path, kind: str, encoded: list[np.ndarray], shard_tokens: int) -> int:
    """Write folder/fineweb_{kind}_000000.bin and so on, of at most shard_tokens tokens; returns how many."""
    tokens = np.concatenate(encoded)
    starts = range(0, len(tokens), shard_tokens)
    for number, start in enumerate(starts):
        part = tokens[start : start + shard_tokens]
        header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, len(part)
        write_file(folder / f"fineweb_{kind}_{number:06d}.bin", header.tobytes() + part.tobytes())
    return len(starts)


def read_manifest(path: Path) -> dict:
    """The manifest, or a new one. Raises InputError for a file that is none."""
    if not path.exists():
        return {"tokenizers": [], "datasets": []}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(manifest.get(key, []), list) for key in ("tokenizers", "datasets")):
            return manifest
    except (ValueError, AttributeError):
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
    name = args.name if args.name is not None else "mytext" if args.text else "sample"
    check_settings(name, args.vocab_size)
    dataset_name, tokenizer_name = f"{name}_sp{args.vocab_size}", f"{name}_{args.vocab_size}_bpe"
    listed = read_manifest(ROOT / "manifest.json").get("datasets", [])
    made_here = any(entry.get("name") == dataset_name and entry.get("made_by") == MADE_BY for entry in listed)
    if (ROOT / "datasets" / dataset_name).exists() and not made_here:
        raise InputError(f"--name {name}: {ROOT / 'datasets' / dataset_name} is not this tool's; choose another name")

    documents = read_documents(text_files(args.text) if args.text else standard_library_files())
    num_bytes = sum(len(document.encode("utf-8")) for document in documents)
    say(f"text: {len(documents)} documents, {num_bytes:,} bytes")
    model = train_tokenizer(documents, args.vocab_size)
    say(f"tokenizer: {args.vocab_size} pieces")
    encoded = encode(model, documents)
    num_val = split(encoded, args.val_tokens)
    parts = {"train": encoded[num_val:], "val": encoded[:num_val]}

    staging = ROOT / f".prepare_{dataset_name}"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        tokenizer = {"name": tokenizer_name, "model_path": f"tokenizers/{tokenizer_name}.model"}
        write_file(staging / "new" / tokenizer["model_path"], model)
        stats = {"documents": len(documents), "bytes": num_bytes}
        for kind, part in parts.items():
            folder = staging / "new" / "datasets" / dataset_name
            stats[f"files_{kind}"] = write_shards(folder, kind, part, args.shard_tokens)
            stats[f"tokens_{kind}"] = sum(len(document) for document in part)
        source = "--text" if args.text else f"standard library of Python {platform.python_version()}"
        dataset = {"name": dataset_name, "tokenizer_name": tokenizer_name, "made_by": MADE_BY, "source": source,
                   "stats": stats}
        install(staging, dataset, tokenizer)
    except OSError as error:
        place = Path(error.filename or ROOT)
        if place.is_relative_to(staging):  # the user knows it by the name that it was to have
            place = ROOT.joinpath(*place.relative_to(staging).parts[1:])
        raise WriteError(f"{place}: cannot be written: {error.strerror}; what was there before still is") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)

    for kind, part in parts.items():
        say(f"{kind}: {len(part)} documents, {stats[f'tokens_{kind}']:,} tokens, {stats[f'files_{kind}']} shard(s)")
    say("train on it with (default settings suit a GPU; for a CPU, add the small ones of the README's first command):")
    say(f"  DATA_PATH={shown(ROOT / 'datasets' / dataset_name)} TOKENIZER_PATH={shown(ROOT / tokenizer['model_path'])} "
        f"VOCAB_SIZE={args.vocab_size} {shown(Path(sys.executable))} train_gpt_mlx.py")


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
    sys.exit(main())
