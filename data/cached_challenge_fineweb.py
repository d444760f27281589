#!/usr/bin/env python3
"""Fetch the challenge's data, FineWeb already cut into tokens, from the Hugging Face hub.

    python data/cached_challenge_fineweb.py                    # all 80 training shards, 16 GB
    python data/cached_challenge_fineweb.py --train-shards 1   # the first one, 200 MB: enough to begin with

All validation shards and the tokenizer come with them. Files take their names when they are complete, and complete
files stay. So the same command continues after Ctrl-C or an error, and a larger number adds shards.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there yet if a script loads this file by its path

from prepare import ROOT, first_run, read_manifest, run, tg  # first: it says what is not installed

# isort: split
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

REPO_ID = os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
REMOTE_ROOT_PREFIX = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")  # all files are below it
INCOMING = ROOT / "datasets" / ".incoming"  # the files' folder until they are complete
FILES_AT_A_TIME = 8
SECONDS_BEFORE_RETRIES = (1, 2, 4)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fetch FineWeb, already cut into tokens, from the Hugging Face hub.")
    parser.add_argument("N", nargs="?", type=int, help="the same as --train-shards N")
    parser.add_argument("--train-shards", type=int, default=80, metavar="N", help="200 MB each (default: %(default)s)")
    parser.add_argument("--variant", default="sp1024", help="tokenizer: sp<N> or byte260 (default: %(default)s)")
    parser.add_argument("--skip-manifest", action="store_true", help="use the manifest.json that is here, as it is")
    parser.add_argument("--with-docs", action="store_true", help="also fetch the text, for prepare.py --docs-jsonl")
    return parser


def dataset_dir_for_variant(name: str) -> str:
    """sp1024 -> fineweb10B_sp1024, the name of a data set. Raises InputError."""
    if name != "byte260" and not re.fullmatch(r"sp\d+", name):
        raise tg.InputError(f"--variant {name}: must be sp<N>, such as sp1024, or byte260")
    return f"fineweb10B_{name}"


def is_complete(path: Path) -> bool:
    """Whether a file is here. A shard is also checked by its header and size."""
    if path.suffix == ".bin" and path.is_file():
        try:
            tg.map_data_shard(path)
        except tg.InputError as error:
            print(error)
            return False
    return path.is_file()


def ask_hub(path: str, **options):
    """Call `hf_hub_download` for a file, by its path in the data folder. If the hub answers 5xx, ask again. Raises
    RunError."""
    for seconds in (*SECONDS_BEFORE_RETRIES, None):
        try:
            remote_path = str(PurePosixPath(REMOTE_ROOT_PREFIX.strip("/")) / path)
            return hf_hub_download(REPO_ID, remote_path, repo_type="dataset", local_dir=INCOMING, **options)
        except Exception as error:  # of the client, of its network library, or of the disk
            if seconds is None or not isinstance(error, HfHubHTTPError) or error.response.status_code < 500:
                raise tg.RunError(f"{path}: {' '.join(str(error).split())}") from None
        time.sleep(seconds)


def get(path: str) -> None:
    """Fetch a file to its place. Raises RunError."""
    arrived = Path(ask_hub(path))
    if not is_complete(arrived):
        raise tg.RunError(f"{path}: arrived damaged")
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(arrived, ROOT / path)


def load_manifest(skip_download: bool) -> dict:
    """The list of data sets: the hub's, with those that were made here added to it. Raises InputError, RunError."""
    path = ROOT / "manifest.json"
    if skip_download:
        if not path.exists():
            raise tg.InputError(f"{path}: no such file: leave out --skip-manifest")
        return read_manifest(path)
    arrived = Path(ask_hub("manifest.json"))
    manifest = read_manifest(arrived)
    here = read_manifest(path)
    for kind in ("datasets", "tokenizers"):
        names = [entry["name"] for entry in manifest[kind]]
        manifest[kind] += [entry for entry in here[kind] if entry["name"] not in names]
    arrived.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.move(arrived, path)
    return manifest


def artifact_paths_for_tokenizer(entry: dict) -> list[str]:
    """The files of a tokenizer in the manifest. Raises InputError for those that would be put elsewhere."""
    paths = [entry[key] for key in ("model_path", "vocab_path", "path") if entry.get(key)]
    for path in paths:
        if not path.startswith("tokenizers/") or ".." in path:
            raise tg.InputError(f"the manifest's tokenizer {entry['name']} has a file outside tokenizers/: {path}")
    return paths


def select(manifest: dict, args: argparse.Namespace) -> list[str]:
    """The files to have, by their paths in the data folder. Raises InputError."""
    name = dataset_dir_for_variant(args.variant)
    datasets = {entry["name"]: entry for entry in manifest["datasets"]}
    if name not in datasets:
        raise tg.InputError(f"--variant {args.variant}: there is no {name}, but {', '.join(sorted(datasets))}")
    stats = datasets[name]["stats"]
    if args.train_shards > stats["files_train"]:
        raise tg.InputError(f"--train-shards {args.train_shards}: {name} has only {stats['files_train']}")
    tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
    paths = artifact_paths_for_tokenizer(tokenizers[datasets[name]["tokenizer_name"]])
    paths += [f"datasets/{name}/fineweb_val_{i:06d}.bin" for i in range(stats["files_val"])]
    paths += [f"datasets/{name}/fineweb_train_{i:06d}.bin" for i in range(args.train_shards)]
    if args.with_docs:
        paths += ["docs_selected.jsonl", "docs_selected.source_manifest.json"]
    return paths


def fetch(paths: list[str]) -> None:
    """Get what is not here, several files at a time. Raises InputError if there is no room for it, RunError."""
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        needed = sum(pool.map(lambda path: ask_hub(path, dry_run=True).file_size or 0, paths))
        free = shutil.disk_usage(INCOMING).free
        if needed > free:
            raise tg.InputError(f"{ROOT}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        for _ in pool.map(get, paths):  # the first error cancels what has not begun
            pass


def main() -> None:
    """Fetch what the command line asks for. Raises InputError, RunError."""
    args = build_parser().parse_args()
    if args.N is not None:
        args.train_shards = args.N
    shutil.rmtree(INCOMING, ignore_errors=True)  # of an interrupted run
    INCOMING.mkdir(parents=True)
    paths = select(load_manifest(args.skip_manifest), args)
    fetch([path for path in paths if not is_complete(ROOT / path)])
    shutil.rmtree(INCOMING)
    shards = ROOT / "datasets" / dataset_dir_for_variant(args.variant)
    print(f"{shards}: complete, with {args.train_shards} training shards")
    if args.variant == "byte260":
        print("train_gpt_mlx.py cannot train on it: it has no SentencePiece tokenizer")
    elif args.train_shards > 0:
        command = first_run("first", shards, ROOT / paths[0], int(args.variant[2:]))
        print(f"train on it with:\n{command}")


if __name__ == "__main__":
    run(main)
