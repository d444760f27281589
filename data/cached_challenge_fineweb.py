#!/usr/bin/env python3
"""Fetch the challenge's data, FineWeb already cut into tokens, from the Hugging Face hub.

    python data/cached_challenge_fineweb.py                    # all 80 training shards, 16 GB
    python data/cached_challenge_fineweb.py --train-shards 1   # the first one, 200 MB: enough to begin with

With them come all validation shards and the tokenizer. What is here already is looked at, and fetched again only if
it is damaged, so the same command goes on where it was interrupted, or adds more shards to the first ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

import numpy as np

try:
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error.name} is not installed for {sys.executable}: use .venv/bin/python, which README.md makes, "
             "or install requirements.txt there")  # fmt: skip

ROOT = Path(__file__).resolve().parent  # the data folder
DATASETS_DIR = ROOT / "datasets"
TOKENIZERS_DIR = ROOT / "tokenizers"
REPO_ID = os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
REMOTE_ROOT_PREFIX = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")  # all files are under it

SHARD_HEADER_INTS = 256  # little-endian int32: magic, version, token count, then zeros
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
FULL_SHARD_BYTES = 4 * SHARD_HEADER_INTS + 2 * 100_000_000  # the challenge's shards hold up to 100 million tokens
FILES_AT_A_TIME = 8
ANSWER_SECONDS = 10
SECONDS_BETWEEN_ATTEMPTS = (1, 2, 4)
TOKENIZER_FILES = ("model_path", "vocab_path", "path")  # keys of a tokenizer's entry in the manifest
INCOMING = ".incoming_"  # how the folders begin in which files arrive


DEFAULTS = {"DATA_PATH": "data/datasets/fineweb10B_sp1024", "TOKENIZER_PATH": "data/tokenizers/fineweb_1024_bpe.model",
            "VOCAB_SIZE": "1024"}  # the training script's, in the folder where it lies  # fmt: skip


# Classes of the client's errors, and of its network library's, that say so.
NOBODY_THERE = {
    "ConnectError", "ConnectionError", "TimeoutException", "OfflineModeIsEnabled", "LocalEntryNotFoundError",
}  # fmt: skip


class FetchError(Exception):
    """Something cannot be fetched or stored. The message says what, and what to do."""


GO_ON = "; run the same command again to go on"


def dataset_dir_for_variant(name: str) -> str:
    """sp1024 -> fineweb10B_sp1024: the name of the folder and of the manifest's entry. Raises ValueError."""
    if name != "byte260" and not re.fullmatch(r"sp[1-9]\d*", name):
        raise ValueError(f"--variant {name}: must be sp<N>, as sp1024, or byte260")
    return f"fineweb10B_{name}"


def remote(path: str) -> str:
    """The name in the repository of a path that the manifest gives."""
    return str(PurePosixPath(REMOTE_ROOT_PREFIX.strip("/")) / path)


def local_path_for_remote(relative_path: str) -> Path:
    """Where a file of the repository belongs: without the prefix, datasets/… and tokenizers/… in their folders,
    anything else in ROOT. Raises ValueError for a path that leads out of them.
    """
    parts, prefix = PurePosixPath(relative_path).parts, PurePosixPath(REMOTE_ROOT_PREFIX.strip("/")).parts
    if parts[: len(prefix)] == prefix:
        parts = parts[len(prefix) :]
    if not parts or ".." in parts or parts[0] == "/":
        raise ValueError(f"{relative_path!r}: not the path of a file under {REMOTE_ROOT_PREFIX!r}")
    folder = {"datasets": DATASETS_DIR, "tokenizers": TOKENIZERS_DIR}.get(parts[0])
    return ROOT.joinpath(*parts) if folder is None else folder.joinpath(*parts[1:])


def manifest_path() -> Path:
    """The list of data sets and tokenizers, which the training script reads, too."""
    return local_path_for_remote(remote("manifest.json"))


def read_manifest(path: Path, name: str | None = None) -> dict:
    """Raises ValueError, naming the file, for one that is no manifest."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = [*manifest.get("datasets", []), *manifest.get("tokenizers", [])]
        paths = [entry.get(key) or "" for entry in entries for key in TOKENIZER_FILES]
        if all(isinstance(text, str) for text in (*paths, *(entry.get("name") for entry in entries))):
            return manifest
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(name or f"{path}: not a manifest: move it away")


def merged(local: dict, fetched: dict) -> dict:
    """The fetched manifest with those entries of the local one that it does not have, or that were built here."""
    built = [entry for entry in local.get("datasets", []) if "made_by" in entry]
    ours_to_keep = {"datasets": {entry["name"] for entry in built},
                    "tokenizers": {entry.get("tokenizer_name") for entry in built}}  # fmt: skip
    result = {**local, **fetched}
    for kind, names in ours_to_keep.items():
        theirs = {entry["name"]: entry for entry in fetched.get(kind, [])}
        ours = {entry["name"]: entry for entry in local.get(kind, [])}
        result[kind] = list((theirs | {n: e for n, e in ours.items() if n not in theirs or n in names}).values())
    return result


def load_manifest(*, skip_manifest_download: bool) -> dict:
    """The manifest, fetched and merged into the local one; or that as it is (FileNotFoundError where there is none)."""
    path = manifest_path()
    if not skip_manifest_download:
        get(remote("manifest.json"))
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: leave --skip-manifest out to fetch it")
    return read_manifest(path)


def artifact_paths_for_tokenizer(tokenizer_entry: dict) -> list[str]:
    """The files of a manifest's tokenizer entry, as it names them, under the prefix. Raises ValueError for none."""
    paths = [tokenizer_entry[key] for key in TOKENIZER_FILES if tokenizer_entry.get(key)]
    if not paths:
        raise ValueError(f"the manifest names no file of the tokenizer {tokenizer_entry.get('name')!r}")
    return paths


def hub() -> str:
    """The hub's address, for messages."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def explain(error: Exception, relative_path: str) -> tuple[str, bool]:
    """What to tell the user, in one line, of an error of the hub's client, and whether another attempt may help.

    By the names of the error's classes: the module they live in has changed, the client's network library, too.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    page = f"{hub()}/datasets/{REPO_ID}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "GatedRepoError" in kinds:
        return f"{page} is gated: accept its terms on that page, then log in with `hf auth login`", False
    if "RepositoryNotFoundError" in kinds:
        return f"{page}: no such data set; check MATCHED_FINEWEB_REPO_ID (a private one takes `hf auth login`)", False
    if status == 401:
        may_be = "no such data set (check MATCHED_FINEWEB_REPO_ID), or a bad token (HF_TOKEN, `hf auth login`)"
        return f"{page}: {may_be}", False
    if "HFValidationError" in kinds:
        return f"MATCHED_FINEWEB_REPO_ID={REPO_ID}: not the name of a repository, as user/name", False
    if "LocalEntryNotFoundError" in kinds and error.__cause__ is not None:  # the client has tried again by itself
        return explain(error.__cause__, relative_path)[0], False
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        is_manifest = relative_path == remote("manifest.json")
        return f"{page} has no {relative_path}" + "; check MATCHED_FINEWEB_REMOTE_ROOT_PREFIX" * is_manifest, False
    if status is not None:
        again = status in (408, 429) or status >= 500
        return f"{relative_path}: {hub()} answered with status {status}{GO_ON if again else ''}", again
    if kinds & {"UnsupportedProtocol", "InvalidURL"}:
        return f"HF_ENDPOINT={hub()}: not an address, as https://huggingface.co ({text})", False
    if kinds & NOBODY_THERE:
        return f"{hub()} cannot be reached ({text}): check the connection, or set HF_ENDPOINT to a mirror{GO_ON}", False
    if isinstance(error, OSError) and error.errno is not None:
        return f"{local_path_for_remote(relative_path)}: cannot be written: {error.strerror}{GO_ON}", False
    if isinstance(error, (TypeError, AttributeError)):
        raise error  # a client that this was not written for
    return f"{relative_path}: {text}{GO_ON}", True


class Received(tqdm):
    """The client's progress bar of one file: not shown, but counted in the one bar of all files."""

    of_all: tqdm | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(disable=True)

    def update(self, n: float | None = 1) -> None:
        if Received.of_all is not None:
            Received.of_all.update(n)

    def update_transfer(self, n: float) -> None:
        """Told, besides `update`, of compressed bytes: a class that has this gets one bar for both, and not two."""

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Told how fast those come."""


def size_on_hub(relative_path: str) -> int | None:
    """Bytes of a file in the repository, if the hub says. Raises FetchError when it cannot be asked."""
    if not client_is_whole():
        return None
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for wait in (*SECONDS_BETWEEN_ATTEMPTS, None):
        try:
            url = hf_hub_url(REPO_ID, relative_path, repo_type="dataset")
            return get_hf_file_metadata(url, timeout=ANSWER_SECONDS).size
        except Exception as error:
            text, again = explain(error, relative_path)
        if wait is None or not again:
            raise FetchError(text)
        time.sleep(wait)
    return None


def client_is_whole() -> bool:
    """Whether the hub's client is there, and not a function that stands in for it, as in other people's tests."""
    return (hf_hub_download.__module__ or "").startswith("huggingface_hub")


def problem_with_shard(path: Path) -> str | None:
    """What keeps the training script from using a shard, or None: its header is read, and its size compared with it."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        return "is no shard"
    expected, size = 4 * SHARD_HEADER_INTS + 2 * int(header[2]), path.stat().st_size
    return None if size == expected else f"has {size} bytes, and by its header {expected}"


def is_good(path: Path, relative_path: str) -> bool:
    """Whether a file is here and whole. A shard tells by itself; of others the hub is asked for the size."""
    if not path.is_file():
        return False
    size = path.stat().st_size
    if path.suffix == ".bin":
        problem = problem_with_shard(path)
    else:
        try:
            wanted = size_on_hub(relative_path) if size > 0 else None
        except FetchError:  # with nobody to ask: it was whole when it came
            wanted = size or None
        problem = None if size > 0 and wanted in (size, None) else f"has {size} bytes, the hub's not"
    if problem is not None:
        tqdm.write(f"{path} {problem}: fetching it anew")
    return problem is None


def get(relative_path: str) -> None:
    """Fetch a file of the repository to where it belongs, unless it is there and whole.

    It arrives in a folder beside its place and is moved when it is whole, so nothing else ever has its name. A manifest
    is merged into the local one. Raises FetchError when it does not arrive, or not whole, in four attempts.
    """
    path = local_path_for_remote(relative_path)
    is_manifest = path == manifest_path()
    if not is_manifest and is_good(path, relative_path):
        return
    name = PurePosixPath(relative_path)
    subfolder = None if name.parent == PurePosixPath() else str(name.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for wait in (*SECONDS_BETWEEN_ATTEMPTS, None):
            with tempfile.TemporaryDirectory(prefix=INCOMING, dir=path.parent, ignore_cleanup_errors=True) as folder:
                options = {"local_dir": folder, "tqdm_class": Received} if client_is_whole() else {}
                try:
                    arrived = Path(hf_hub_download(repo_id=REPO_ID, filename=name.name, subfolder=subfolder,
                                                   repo_type="dataset", **options))  # fmt: skip
                    problem, again = problem_with_shard(arrived) if path.suffix == ".bin" else None, True
                    text = f"{relative_path} {problem}, as it comes from {hub()}{GO_ON}"
                except Exception as error:
                    problem = error
                    text, again = explain(error, relative_path)
                if problem is None:
                    install(arrived, path, Path(folder), merge=is_manifest)
                    return
            if wait is None or not again:
                raise FetchError(text)
            time.sleep(wait)
    except OSError as error:
        raise FetchError(f"{error.filename or path}: cannot be written: {error.strerror}{GO_ON}") from None


def install(arrived: Path, path: Path, folder: Path, merge: bool) -> None:
    """Move a file that arrived in the folder to its place; one that lies elsewhere is somebody's cache, and copied."""
    if merge:
        fetched = read_manifest(arrived, f"what comes from {hub()} as manifest.json is none")
        arrived = folder / "merged"
        manifest = merged(read_manifest(path) if path.exists() else {}, fetched)
        arrived.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    elif not arrived.resolve().is_relative_to(folder.resolve()):
        arrived = Path(shutil.copyfile(arrived, folder / "copy"))
    with arrived.open("rb") as file:
        os.fsync(file.fileno())  # or a power cut could leave a shard of the right size with nothing in it
    os.replace(arrived, path)


def sizes_to_fetch(paths: list[str]) -> dict[str, int]:
    """Bytes of each file that is not here, shards taken as full. Raises FetchError when they do not fit on the disk."""
    sizes: dict[str, int] = {}
    folders: dict[int, Path] = {}  # by file system: data/datasets may be a link to another disk
    missing: dict[int, list[str]] = {}
    for relative_path in paths:
        place = local_path_for_remote(relative_path)
        is_shard = place.suffix == ".bin"
        if place.is_file() and not (is_shard and problem_with_shard(place)):
            continue
        if not is_shard or not sizes:  # the first shard, too, to hear at once whether the hub is there
            size = size_on_hub(relative_path) or 0
        sizes[relative_path] = FULL_SHARD_BYTES if is_shard else size
        folder = next(parent for parent in place.parents if parent.exists())
        folders[folder.stat().st_dev] = folder
        missing.setdefault(folder.stat().st_dev, []).append(relative_path)
    for device, there in missing.items():
        free, needed = shutil.disk_usage(folders[device]).free, sum(sizes[path] for path in there)
        if needed > free:
            shards = sum(path.endswith(".bin") for path in there)
            what = [f"{shards} shard{'s' if shards > 1 else ''} of {in_words(FULL_SHARD_BYTES)}"] if shards else []
            what += [f"{Path(path).name} of {in_words(sizes[path])}" for path in there if not path.endswith(".bin")]
            raise FetchError(
                f"{folders[device]}: {in_words(free)} are free, and {in_words(needed)} are needed: {', '.join(what)}; "
                f"make room, or ask for fewer --train-shards (one is {in_words(FULL_SHARD_BYTES)})"
            )
    return sizes


def in_words(size: int) -> str:
    """200001024 -> 200 MB."""
    unit = next((unit for unit in ("GB", "MB", "kB") if size >= {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]), "bytes")
    return f"{size / {'GB': 1e9, 'MB': 1e6, 'kB': 1e3, 'bytes': 1}[unit]:.4g} {unit}"


def fetch(paths: list[str], sizes: dict[str, int], whole: set[str]) -> None:
    """Get all of them, several at a time, and note which are whole. At the first that fails no more are begun; those
    under way are finished.
    """
    executor = ThreadPoolExecutor(FILES_AT_A_TIME, initializer=tqdm.set_lock, initargs=(tqdm.get_lock(),))
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="fetching", disable=None) as bar:
        Received.of_all = bar
        try:
            begun = {executor.submit(get, path): path for path in paths}
            for number, done in enumerate(as_completed(begun), start=1):
                done.result()
                whole.add(begun[done])
                place = local_path_for_remote(begun[done])
                if begun[done] in sizes and place.exists():  # a shard may not have been full
                    bar.total += place.stat().st_size - sizes[begun[done]]
                bar.set_postfix_str(f"{number} of {len(paths)} files")
        except Exception:
            executor.shutdown(wait=True, cancel_futures=True)
            ended = {path: done.exception() for done, path in begun.items() if not done.cancelled()}
            whole.difference_update(ended)
            whole.update(path for path, error in ended.items() if error is None)
            raise
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            Received.of_all = None


def sweep(paths: list[str]) -> None:
    """Remove what interrupted downloads left beside the places of these files."""
    for folder in {local_path_for_remote(path).parent for path in paths}:
        for left in folder.glob(f"{INCOMING}*"):
            shutil.rmtree(left, ignore_errors=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""

    def number(text: str) -> int:
        value = int(text)
        if value < 0:
            raise ValueError
        return value

    class BareNumber(argparse.Action):
        """A number by itself is the one of --train-shards."""

        def __call__(self, parser, namespace, value, option_string=None) -> None:
            if value is not None:
                namespace.train_shards = value

    parser = argparse.ArgumentParser(
        description="Fetch the challenge's FineWeb, already cut into tokens: all validation shards, the first N "
        "training shards and the tokenizer, into the folder of this file. Run it again to go on, or for more shards."
    )
    parser.add_argument("N", nargs="?", type=number, action=BareNumber, help="the same as --train-shards N")
    parser.add_argument(
        "--train-shards", type=number, default=80, metavar="N",
        help="training shards, the first N, of 200 MB each (default %(default)s: 16 GB)",
    )  # fmt: skip
    parser.add_argument(
        "--variant", default="sp1024",
        help="the tokenizer: sp<N> (default %(default)s), or byte260, which train_gpt_mlx.py cannot use",
    )  # fmt: skip
    parser.add_argument("--skip-manifest", action="store_true", help="use the manifest.json that is here, as it is")
    parser.add_argument(
        "--with-docs", action="store_true",
        help="also the documents that the tokens were made of (docs_selected.jsonl, for prepare.py --docs-jsonl)",
    )  # fmt: skip
    return parser


def select(manifest: dict, variant: str, train_shards: int) -> tuple[dict[str, list[str]], dict]:
    """The files of a variant, by kind, as names in the repository, and its tokenizer's entry in the manifest.

    Raises ValueError when the manifest does not have it, or not so many training shards.
    """
    name = dataset_dir_for_variant(variant)
    entries = {entry["name"]: entry for entry in manifest.get("datasets", [])}
    if name not in entries:
        there = sorted(other.removeprefix("fineweb10B_") for other in entries if other.startswith("fineweb10B_"))
        raise ValueError(f"--variant {variant}: the manifest has no {name}; it has {', '.join(there) or 'none'}")
    if "made_by" in entries[name]:
        raise ValueError(f"{DATASETS_DIR / name} was built here by {entries[name]['made_by']}: move it away, and its "
                         f"entry in {manifest_path()}, or build it under another name")  # fmt: skip
    stats, tokenizers = entries[name].get("stats"), {entry["name"]: entry for entry in manifest.get("tokenizers", [])}
    counts = {kind: stats.get(f"files_{kind}") if isinstance(stats, dict) else None for kind in ("val", "train")}
    tokenizer = tokenizers.get(entries[name].get("tokenizer_name"))
    if tokenizer is None or not all(isinstance(count, int) and count >= 0 for count in counts.values()):
        raise ValueError(f"the manifest's entry {name} lacks files_train or files_val, or its tokenizer is not listed")
    check_places(tokenizer, entries, tokenizers)
    if train_shards > counts["train"]:
        raise ValueError(f"--train-shards {train_shards}: {name} has only {counts['train']} of them")
    counts["train"] = train_shards
    files = {"tokenizer file": [remote(path) for path in artifact_paths_for_tokenizer(tokenizer)]}
    for kind, count in counts.items():
        label = "validation shard" if kind == "val" else "training shard"
        files[label] = [remote(f"datasets/{name}/fineweb_{kind}_{i:06d}.bin") for i in range(count)]
    return files, tokenizer


def check_places(tokenizer: dict, datasets: dict[str, dict], tokenizers: dict[str, dict]) -> None:
    """Raise ValueError when a tokenizer's files belong to a data set that was built here, or are not for its folder."""
    built = {}
    for name, entry in datasets.items():
        if "made_by" in entry:
            own = tokenizers.get(entry.get("tokenizer_name"), {})
            built |= {own[key]: name for key in TOKENIZER_FILES if own.get(key)}
    for path in artifact_paths_for_tokenizer(tokenizer):
        place = local_path_for_remote(remote(path))
        if path in built:
            raise ValueError(f"{place} was built here, for {built[path]}: build that under another name, and remove it")
        if not any(place.is_relative_to(folder) for folder in (DATASETS_DIR, TOKENIZERS_DIR)):
            raise ValueError(f"the manifest's tokenizer {tokenizer['name']} has a file {path!r}: not under tokenizers/")


def complete(files: dict[str, list[str]], whole: set[str]) -> str:
    """What is here and whole, in words: shards tell by themselves, of other files it is given."""

    def is_whole(path: str) -> bool:
        place = local_path_for_remote(path)
        return path in whole or (place.suffix == ".bin" and place.is_file() and problem_with_shard(place) is None)

    told = []
    for kind, paths in files.items():
        there = sum(map(is_whole, paths))
        told.append(f"{there} of {len(paths)} {kind}{'s' if len(paths) != 1 else ''}")
    return ", ".join(told)


def main() -> None:
    """Fetch what the command line asks for. Raises ValueError for what it cannot have, FileNotFoundError for a manifest
    that is not there, and FetchError for what went wrong on the way."""
    args = build_parser().parse_args()
    name = dataset_dir_for_variant(args.variant)
    if args.variant == "byte260":
        print("byte260 has no SentencePiece tokenizer: train_gpt_mlx.py cannot train on it", flush=True)
    quiet_client()
    if not args.skip_manifest:
        size_on_hub(remote("manifest.json"))  # the client would try for 23 seconds before it says that there is no hub
        sweep([remote("manifest.json")])
    files, tokenizer = select(load_manifest(skip_manifest_download=args.skip_manifest), args.variant, args.train_shards)
    if args.with_docs:
        files["document file"] = [remote("docs_selected.jsonl"), remote("docs_selected.source_manifest.json")]
    paths = [path for group in files.values() for path in group]
    sweep(paths)
    whole = {path for path in paths if not path.endswith(".bin") and local_path_for_remote(path).is_file()}
    try:
        fetch(paths, sizes_to_fetch(paths), whole)
    except FetchError as error:
        raise FetchError(f"{error} (here and whole: {complete(files, whole)})") from None
    except KeyboardInterrupt:
        sweep(paths)
        raise KeyboardInterrupt(f"here and whole: {complete(files, whole)}") from None
    print(f"{shown(DATASETS_DIR / name)}: {complete(files, whole)}")
    model = tokenizer.get("model_path") or ""
    if args.train_shards == 0:
        print("that is enough to score a model with EVAL_ARTIFACT; to train, --train-shards 1 fetches the first shard")
    elif model.endswith(".model"):
        place = {"DATA_PATH": shown(DATASETS_DIR / name), "TOKENIZER_PATH": shown(local_path_for_remote(remote(model))),
                 "VOCAB_SIZE": args.variant.removeprefix("sp")}  # fmt: skip
        settings = "" if place == DEFAULTS else "".join(f"{key}={value} " for key, value in place.items())
        print(f"train on it with:\n  {settings}{shown(Path(sys.executable))} {shown(ROOT.parent / 'train_gpt_mlx.py')}")


def quiet_client() -> None:
    """Have the hub's client leave telling what went wrong to this file."""
    if client_is_whole():
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()
        warnings.filterwarnings("ignore", module="huggingface_hub")


def shown(path: Path) -> str:
    """The path relative to the current folder where it lies in it, for commands to copy."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def interrupt_once(*_) -> None:
    """End at the first Ctrl-C; a second one must not keep it from clearing up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def command_line() -> int:
    """Exit status: 0 when all is here, 1 when something does not come, 2 for what the user can mend, 130 when
    interrupted. Each is told in one line."""
    signal.signal(signal.SIGINT, interrupt_once)
    try:
        main()
    except KeyboardInterrupt as interruption:
        text = f"{interruption}" or "nothing new is here"
        print(f"interrupted; {text}{GO_ON}", file=sys.stderr)
        return 130
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = command_line()
    sys.stdout.flush()
    os._exit(status)  # and not sys.exit, which would wait for downloads that were interrupted
