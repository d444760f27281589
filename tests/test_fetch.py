"""Fetching FineWeb: the real client of the hub, against a small hub on loopback that has faults on order."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import hub as hubs
import train_gpt_mlx as tg
from helpers import REPO, learnable_tokens
from runs import MODEL

SCRIPT = REPO / "data/cached_challenge_fineweb.py"
NAME = "fineweb10B_sp320"
SHARDS = "datasets/" + NAME
MODEL_FILE = "tokenizers/some_320"
MANIFEST = {
    "tokenizers": [{"name": "sp_bpe_320", "model_path": f"{MODEL_FILE}.model", "vocab_path": f"{MODEL_FILE}.vocab"},
                   {"name": "bytes", "path": "tokenizers/bytes.json"}],
    "datasets": [
        {"name": NAME, "tokenizer_name": "sp_bpe_320", "stats": {"files_train": 12, "files_val": 2}},
        {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {"files_train": 1, "files_val": 1}},
    ],
}  # fmt: skip
# The script, for which a full shard is as large as the hub's here: the free space for twelve real ones is not needed.
SMALL_SHARDS = "import sys, cached_challenge_fineweb as f; f.FULL_SHARD_BYTES = 9000; sys.exit(f.command_line())"


def shard(count: int, salt: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, count
    return header.tobytes() + learnable_tokens(count, 320, salt).astype("<u2").tobytes()


def shard_name(kind: str, number: int) -> str:
    return f"{SHARDS}/fineweb_{kind}_{number:06d}.bin"


@pytest.fixture(scope="module")
def published(tokenizer_proto) -> dict[str, bytes]:
    """What the hub has, without the prefix."""
    files = {"manifest.json": json.dumps(MANIFEST).encode(), "tokenizers/some_320.model": tokenizer_proto,
             "tokenizers/some_320.vocab": b"some\t0\n" * 50, "tokenizers/bytes.json": b"{}",
             "docs_selected.jsonl": b'{"text": "a"}\n' * 9, "docs_selected.source_manifest.json": b"{}",
             "datasets/fineweb10B_byte260/fineweb_train_000000.bin": shard(10, 1),
             "datasets/fineweb10B_byte260/fineweb_val_000000.bin": shard(10, 1)}  # fmt: skip
    files |= {shard_name("train", i): shard(3000 + i, i) for i in range(12)}
    return files | {shard_name("val", i): shard(1000 + i, 50 + i) for i in range(2)}


@pytest.fixture
def hub(published):
    with hubs.serving() as served:
        served.files = {f"datasets/{path}": data for path, data in published.items()}
        yield served


@dataclass
class Clone:
    """A folder with a copy of the script in data/, and how to run it there."""

    folder: Path
    hub: hubs.Hub
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MATCHED_", "PYTHON"))}
        return {**kept, "HF_ENDPOINT": self.hub.url, "MATCHED_FINEWEB_REPO_ID": self.hub.repo, "PYTHONPATH": "data",
                "HF_HOME": str(self.folder / "hf_home"), **self.settings}  # fmt: skip

    def run(self, *arguments: str, code: str = SMALL_SHARDS) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, "--variant", "sp320", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, text=True,
                              timeout=120, check=False)  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, SCRIPT.relative_to(REPO), "--variant", "sp320", *arguments], text=True,
                                cwd=self.folder, env=self.environment(), stderr=subprocess.PIPE)  # fmt: skip

    def files(self) -> dict[str, bytes]:
        """Everything in the data folder, but the script."""
        found = {p.relative_to(self.data).as_posix(): p.read_bytes() for p in self.data.rglob("*") if p.is_file()}
        return {name: data for name, data in found.items() if not name.endswith((".py", ".pyc"))}


@pytest.fixture
def clone(tmp_path, hub) -> Clone:
    (tmp_path / "data").mkdir()
    shutil.copy(SCRIPT, tmp_path / "data")
    return Clone(tmp_path, hub)


def expected(published: dict[str, bytes], train: int, *more: str) -> dict[str, bytes]:
    shards = [*(shard_name("val", i) for i in range(2)), *(shard_name("train", i) for i in range(train))]
    return {name: published[name] for name in (f"{MODEL_FILE}.model", f"{MODEL_FILE}.vocab", *shards, *more)}


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "manifest.json"}


def assert_error_line(done: subprocess.CompletedProcess, code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


class TestPieces:
    """The functions that other people's tools and tests call."""

    @pytest.fixture
    def fetch(self, tmp_path, monkeypatch):
        """The module, loaded by its path, while huggingface_hub is a module that has hf_hub_download and nothing else.

        `calls` has its arguments; `cache` is the folder that it finds files in.
        """
        client = types.ModuleType("huggingface_hub")
        calls, cache = [], tmp_path / "cache"

        def hf_hub_download(*, repo_id, filename, subfolder=None, repo_type=None):
            calls.append((repo_id, subfolder, filename, repo_type))
            return str(cache / (subfolder or "") / filename)

        client.hf_hub_download = hf_hub_download
        monkeypatch.setitem(sys.modules, "huggingface_hub", client)
        spec = importlib.util.spec_from_file_location("fetched_by_path", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.hf_hub_download is hf_hub_download
        folders = {"ROOT": "", "DATASETS_DIR": "datasets", "TOKENIZERS_DIR": "tokenizers"}
        assert all(getattr(module, name) == SCRIPT.parent / folder for name, folder in folders.items())
        for name, path in {"ROOT": "", "DATASETS_DIR": "sets", "TOKENIZERS_DIR": "toks"}.items():
            monkeypatch.setattr(module, name, tmp_path / "here" / path)
        monkeypatch.setattr(module, "REMOTE_ROOT_PREFIX", "datasets")
        module.calls, module.cache = calls, cache
        return module

    def test_defaults(self, fetch):
        code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import cached_challenge_fineweb as f; "
        code += "print(f.REPO_ID, f.REMOTE_ROOT_PREFIX)"
        plain = {key: value for key, value in os.environ.items() if not key.startswith("MATCHED_")}
        changed = {**plain, "MATCHED_FINEWEB_REPO_ID": "me/mine", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "a/b"}
        for env, told in ((plain, "willdepueoai/parameter-golf datasets"), (changed, "me/mine a/b")):
            assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == told
        args = fetch.build_parser().parse_args([])
        assert (args.variant, args.train_shards, args.skip_manifest, args.with_docs) == ("sp1024", 80, False, False)

    @pytest.mark.parametrize(("line", "count"), [("7", 7), ("--train-shards 7", 7), ("--variant sp512 7", 7), ("0", 0),
                                                 ("7 --with-docs", 7), ("--train-shards 3 7", 7)])  # fmt: skip
    def test_number_of_shards(self, fetch, line, count):
        assert fetch.build_parser().parse_args(line.split()).train_shards == count

    @pytest.mark.parametrize("line", ["-1", "--train-shards -1", "x", "--train-shards 1.5", "1 2"])
    def test_what_is_no_number_of_shards(self, fetch, line, capsys):
        with pytest.raises(SystemExit, match="2"):
            fetch.build_parser().parse_args(line.split())
        assert "error: " in capsys.readouterr().err

    def test_variants(self, fetch):
        assert fetch.dataset_dir_for_variant("sp1024") == "fineweb10B_sp1024"
        assert fetch.dataset_dir_for_variant("byte260") == "fineweb10B_byte260"
        for name in ("", "sp", "sp0", "1024", "byte256", "sp1024/../x", "sp10 "):
            with pytest.raises(ValueError, match="--variant"):
                fetch.dataset_dir_for_variant(name)

    @pytest.mark.parametrize("prefix", ["datasets", "a/b", "a/b/c", "", "datasets/"])
    def test_places(self, fetch, monkeypatch, prefix):
        monkeypatch.setattr(fetch, "REMOTE_ROOT_PREFIX", prefix)
        start, here = f"{prefix.rstrip('/')}/" if prefix else "", fetch.ROOT
        assert fetch.local_path_for_remote(f"{start}datasets/x/y.bin") == here / "sets/x/y.bin"
        assert fetch.local_path_for_remote(f"{start}tokenizers/t.model") == here / "toks/t.model"
        assert fetch.local_path_for_remote(f"{start}docs_selected.jsonl") == here / "docs_selected.jsonl"
        assert fetch.local_path_for_remote(f"{start}other/deep/file") == here / "other/deep/file"
        assert fetch.manifest_path() == here / "manifest.json"
        assert isinstance(fetch.manifest_path(), Path)

    @pytest.mark.parametrize("path", ["datasets/../x", "datasets/datasets/../../../x", "/etc/x", "datasets", ""])
    def test_paths_that_lead_elsewhere(self, fetch, path):
        with pytest.raises(ValueError, match="not the path of a file"):
            fetch.local_path_for_remote(path)

    def test_files_of_a_tokenizer(self, fetch):
        both = {"name": "t", "model_path": "tokenizers/a.model", "vocab_path": "tokenizers/a.vocab"}
        assert fetch.artifact_paths_for_tokenizer(both) == ["tokenizers/a.model", "tokenizers/a.vocab"]
        assert fetch.artifact_paths_for_tokenizer({"path": "tokenizers/b.json"}) == ["tokenizers/b.json"]
        with pytest.raises(ValueError, match="'t'"):
            fetch.artifact_paths_for_tokenizer({"name": "t", "path": ""})

    @pytest.mark.parametrize(("prefix", "repo"), [("datasets", "a/b"), ("deep/down", "c/d"), ("", "e/f")])
    def test_get_with_a_client_of_one_function(self, fetch, monkeypatch, prefix, repo):
        """Prefix and repository are read when it runs; what lies in somebody's cache stays there."""
        monkeypatch.setattr(fetch, "REMOTE_ROOT_PREFIX", prefix)
        monkeypatch.setattr(fetch, "REPO_ID", repo)
        folder = f"{prefix}/tokenizers" if prefix else "tokenizers"
        source = fetch.cache / folder / "t.model"
        source.parent.mkdir(parents=True)
        source.write_bytes(b"some model")
        for _ in range(2):
            fetch.get(f"{folder}/t.model")
        assert (fetch.ROOT / "toks/t.model").read_bytes() == source.read_bytes() == b"some model"
        assert fetch.calls == [(repo, folder, "t.model", "dataset")]
        assert [path.name for path in (fetch.ROOT / "toks").iterdir()] == ["t.model"]

    def test_manifest_with_a_client_of_one_function(self, fetch):
        (fetch.cache / "datasets").mkdir(parents=True)
        (fetch.cache / "datasets/manifest.json").write_text(json.dumps(MANIFEST))
        with pytest.raises(FileNotFoundError, match=r"manifest\.json.*--skip-manifest"):
            fetch.load_manifest(skip_manifest_download=True)
        assert fetch.load_manifest(skip_manifest_download=False) == MANIFEST
        assert fetch.load_manifest(skip_manifest_download=True) == MANIFEST
        assert len(fetch.calls) == 1

    def test_main_gets_each_file_once(self, fetch, monkeypatch, published):
        asked = []
        monkeypatch.setattr(fetch, "get", asked.append)
        monkeypatch.setattr(fetch, "load_manifest", lambda *, skip_manifest_download: MANIFEST)
        monkeypatch.setattr(sys, "argv", ["x", "--variant", "sp320", "--train-shards", "3", "--with-docs"])
        fetch.main()
        names = expected(published, 3, "docs_selected.jsonl", "docs_selected.source_manifest.json")
        assert sorted(asked) == sorted(f"datasets/{name}" for name in names)

    def test_only_the_client_itself_gets_more_than_its_basic_arguments(self, fetch, monkeypatch):
        """A folder to put the file in, and a bar that is counted in the one bar of all."""
        given = []

        def real(**options):
            given.append(options)
            source = Path(options["local_dir"]) / "source"
            source.write_bytes(b"some model")
            return str(source)

        real.__module__ = "huggingface_hub.file_download"
        monkeypatch.setattr(fetch, "hf_hub_download", real)
        fetch.get("datasets/tokenizers/t.model")
        assert given[0]["tqdm_class"] is fetch.Received
        assert (fetch.ROOT / "toks/t.model").read_bytes() == b"some model"

    def test_files_are_on_the_disk_before_they_take_their_name(self, fetch, monkeypatch, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a").write_bytes(b"x" * 9)
        synced, inode = [], (tmp_path / "in/a").stat().st_ino
        monkeypatch.setattr(fetch.os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
        fetch.install(tmp_path / "in/a", tmp_path / "a", tmp_path / "in", merge=False)
        assert synced == [inode] == [(tmp_path / "a").stat().st_ino]

    def test_a_second_ctrl_c_is_ignored(self, fetch, monkeypatch):
        set_to = []
        monkeypatch.setattr(fetch.signal, "signal", lambda *arguments: set_to.append(arguments))
        with pytest.raises(KeyboardInterrupt):
            fetch.interrupt_once(signal.SIGINT, None)
        assert set_to == [(signal.SIGINT, signal.SIG_IGN)]

    def test_what_is_tried_again(self, fetch):
        class Answer(Exception):
            def __init__(self, status):
                self.response = types.SimpleNamespace(status_code=status)

        statuses = {403: False, 404: False, 408: True, 429: True, 500: True, 503: True}
        assert {status: fetch.explain(Answer(status), "f")[1] for status in statuses} == statuses
        nobody = type("ConnectError", (Exception,), {})
        missing = type("EntryNotFoundError", (Exception,), {})
        assert [fetch.explain(error("x"), "f")[1] for error in (nobody, missing)] == [False, False]
        assert len(fetch.SECONDS_BETWEEN_ATTEMPTS) == 3

    def test_a_manifest_of_the_same_size_is_fetched_too(self, fetch):
        for text in ('{"datasets": [{"name": "a"}]}', '{"datasets": [{"name": "b"}]}'):
            (fetch.cache / "datasets").mkdir(parents=True, exist_ok=True)
            (fetch.cache / "datasets/manifest.json").write_text(text)
            fetch.load_manifest(skip_manifest_download=False)
        assert [entry["name"] for entry in fetch.read_manifest(fetch.manifest_path())["datasets"]] == ["b", "a"]

    def test_an_empty_file_is_never_good(self, fetch, tmp_path):
        (tmp_path / "t.model").write_bytes(b"")
        assert not fetch.is_good(tmp_path / "t.model", "t.model")

    def test_free_space_is_that_of_where_files_go(self, fetch, monkeypatch, tmp_path):
        asked = []
        plenty = types.SimpleNamespace(free=10**12)
        monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: asked.append(path) or plenty)
        fetch.DATASETS_DIR.mkdir(parents=True)
        assert fetch.sizes_to_fetch(["datasets/datasets/x/fineweb_val_000000.bin"])
        assert asked == [fetch.DATASETS_DIR]

    def test_merging_manifests(self, fetch):
        """The hub's entries are the newer ones, but for those of what was built here, whatever its name."""
        b = {"name": "b", "made_by": "x", "tokenizer_name": "t"}
        local = {"note": "mine", "datasets": [{"name": "sample", "made_by": "x"}, {"name": "a", "old": 1}, b],
                 "tokenizers": [{"name": "own"}, {"name": "t", "of": "b"}, {"name": "u", "old": 1}]}  # fmt: skip
        fetched = {"datasets": [{"name": "a", "new": 1}, {"name": "b", "new": 1}],
                   "tokenizers": [{"name": "theirs"}, {"name": "t"}, {"name": "u"}]}  # fmt: skip
        assert fetch.merged(local, fetched) == {
            "note": "mine", "datasets": [{"name": "a", "new": 1}, b, {"name": "sample", "made_by": "x"}],
            "tokenizers": [{"name": "theirs"}, {"name": "t", "of": "b"}, {"name": "u"}, {"name": "own"}],
        }  # fmt: skip
        assert fetch.merged({}, fetched) == fetched

    @pytest.mark.parametrize(("size", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1024, "1.024 kB"),
                                                 (200_001_024, "200 MB"), (16_200_000_000, "16.2 GB")])  # fmt: skip
    def test_sizes_in_words(self, fetch, size, words):
        assert fetch.in_words(size) == words


@pytest.mark.slow
def test_everything_comes_and_the_second_time_only_the_manifest(clone, hub, published):
    done = clone.run("--train-shards", "10")
    assert (done.returncode, done.stderr) == (0, "")
    assert without_manifest(clone.files()) == expected(published, 10)
    assert json.loads(clone.files()["manifest.json"]) == MANIFEST
    assert "2 of 2 validation shards, 10 of 10 training shards" in done.stdout
    assert "TOKENIZER_PATH=data/tokenizers/some_320.model VOCAB_SIZE=320" in done.stdout
    for count in (10, 12):  # those that are good are left alone, the next ones are added
        hub.requests.clear()
        assert clone.run(str(count)).returncode == 0
        new = [f"datasets/{shard_name('train', i)}" for i in range(10, count)]
        assert sorted(hub.fetched()) == [*new, "datasets/manifest.json"]
        assert without_manifest(clone.files()) == expected(published, count)


@pytest.mark.slow
def test_as_a_script_into_a_pipe(clone):
    """What it says is not lost when it ends."""
    (clone.data / ".incoming_left").mkdir()
    code = SMALL_SHARDS.split("f.FULL")[0] + FREE.replace("AMOUNT", "10**12") + "; import runpy; sys.argv.pop(0); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, "data/cached_challenge_fineweb.py", "--variant", "sp320", "0"]
    done = subprocess.run(command, cwd=clone.folder, env=clone.environment(), capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 2 validation shards" in done.stdout
    assert not (clone.data / ".incoming_left").exists()


@pytest.mark.slow
def test_several_at_a_time_and_in_order(clone, hub, published):
    hub.delay = 0.2
    assert clone.run("12").returncode == 0
    assert 4 <= hub.most_at_once <= 8
    order = [hub.fetched().index(f"datasets/{shard_name('train', i)}") for i in range(12)]
    assert max(order[:4]) < min(order[8:])
    assert without_manifest(clone.files()) == expected(published, 12)


@pytest.mark.slow
def test_documents_come_when_asked_for(clone, published):
    done = clone.run("0", "--with-docs")
    assert done.returncode == 0
    assert "EVAL_ARTIFACT" in done.stdout
    assert "train_gpt_mlx.py" not in done.stdout
    more = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
    assert without_manifest(clone.files()) == expected(published, 0, *more)


@pytest.mark.parametrize("prefix", ["", "some/where/deep"])
@pytest.mark.slow
def test_another_prefix(clone, hub, published, prefix):
    hub.files = {f"{prefix}/{path}".lstrip("/"): data for path, data in published.items()}
    clone.settings["MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"] = prefix
    assert clone.run("1").returncode == 0
    assert without_manifest(clone.files()) == expected(published, 1)


@pytest.mark.slow
def test_bytes_are_fetched_with_a_warning(clone, published):
    done = clone.run("1", "--variant", "byte260")
    assert done.returncode == 0
    assert "train_gpt_mlx.py cannot train on it" in done.stdout
    assert "train on it with" not in done.stdout
    assert "datasets/fineweb10B_byte260/fineweb_train_000000.bin" in clone.files()


FAULTY = shard_name("train", 1)


@pytest.mark.parametrize(("name", "faults"), [
    (FAULTY, [500]), (FAULTY, [503, 429]), (FAULTY, [("HEAD", 500)]), (FAULTY, [("drop", 2000)]),
    (FAULTY, [("drop", 0), ("drop", 100), ("drop", 3000)]), (FAULTY, [("short", 1024)]), (FAULTY, [("short", 5)]),
    ("manifest.json", [("HEAD", 500)]), ("manifest.json", [500]), (f"{MODEL_FILE}.model", [("HEAD", 503)]),
], ids=str)  # fmt: skip
@pytest.mark.slow
def test_what_goes_wrong_for_a_while(clone, hub, published, name, faults):
    """The client resumes what it can, and the script tries again."""
    hub.faults[f"datasets/{name}"] = list(faults)
    done = clone.run("3")
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.faults[f"datasets/{name}"] == []
    assert without_manifest(clone.files()) == expected(published, 3)


FREE = "f.shutil.disk_usage = lambda path: f.argparse.Namespace(free=AMOUNT)"
NO_WAIT = SMALL_SHARDS.replace("sys.exit", "f.SECONDS_BETWEEN_ATTEMPTS = (0, 0); sys.exit")


@pytest.mark.parametrize("damage", [
    lambda data: data[:-2], lambda data: data + b"\0\0", lambda data: data[:1000], lambda data: b"",
    lambda data: b"\0" * 1024 + data[1024:], lambda data: data[:4] + b"\2" + data[5:], lambda data: b"<html>not found",
], ids=["short", "long", "no header", "empty", "magic", "version", "page"])  # fmt: skip
@pytest.mark.slow
def test_a_shard_that_is_none_is_never_used(clone, hub, published, damage):
    """Not when it comes so from the hub, nor when it lies here: then a whole one takes its place."""
    good, hub.files[f"datasets/{FAULTY}"] = published[FAULTY], damage(published[FAULTY])
    assert_error_line(clone.run("3", code=NO_WAIT), 1, FAULTY, "2 of 3 training shards")
    assert hub.fetched().count(f"datasets/{FAULTY}") == 3 or not damage(good)  # nothing of it need be asked for
    assert without_manifest(clone.files()) == {k: v for k, v in expected(published, 3).items() if k != FAULTY}

    (clone.data / FAULTY).write_bytes(damage(good))
    assert_error_line(clone.run("3", code=NO_WAIT), 1, FAULTY, "2 of 3 training shards")
    hub.files[f"datasets/{FAULTY}"] = good
    done = clone.run("3")
    assert done.returncode == 0
    assert re.search(rf"{FAULTY} .*: fetching it anew", done.stdout)
    assert without_manifest(clone.files()) == expected(published, 3)


@pytest.mark.parametrize("half", [b"", b"half a model"])
@pytest.mark.slow
def test_half_a_tokenizer_is_fetched_anew(clone, published, half):
    (clone.data / "tokenizers").mkdir()
    (clone.data / "tokenizers/some_320.model").write_bytes(half)
    done = clone.run("0")
    assert "some_320.model has" in done.stdout
    assert without_manifest(clone.files()) == expected(published, 0)


@pytest.mark.slow
class TestWhatCannotBeHad:
    """One line, a status that is not 0, and what is here already."""

    def test_missing_file(self, clone, hub):
        del hub.files[f"datasets/{FAULTY}"]
        done = clone.run("3")
        assert_error_line(done, 1, f"has no datasets/{FAULTY} (", "2 of 2 tokenizer files", "2 of 3 training shards")
        assert "again" not in done.stderr  # it would not help
        clone.settings["MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"] = "elsewhere"
        assert_error_line(clone.run("3"), 1, "has no elsewhere/manifest.json", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX")

    def test_server_that_does_not_recover(self, clone, hub):
        hub.faults[f"datasets/{FAULTY}"] = [500] * 9
        assert_error_line(clone.run("3", code=NO_WAIT), 1, FAULTY, "status 500; run the same command again",
                   "2 of 3 training shards")  # fmt: skip
        assert len(hub.faults[f"datasets/{FAULTY}"]) == 6

    def test_after_the_first_error_no_more_are_begun(self, clone, hub):
        hub.delay = 0.1
        del hub.files[f"datasets/{shard_name('val', 0)}"]
        assert_error_line(clone.run("12"), 1, "has no datasets/")
        assert len(hub.fetched()) < 12

    def test_gated(self, clone, hub):
        hub.status, hub.error_code = 403, "GatedRepo"
        assert_error_line(clone.run(), 1, "is gated", "hf auth login")

    @pytest.mark.parametrize("status", [401, 404])
    def test_no_such_repository(self, clone, hub, status):
        hub.status, hub.error_code = status, "RepoNotFound" if status == 404 else ""
        assert_error_line(clone.run(), 1, hub.repo, "no such data set", "MATCHED_FINEWEB_REPO_ID")

    def test_name_that_no_repository_can_have(self, clone):
        clone.settings["MATCHED_FINEWEB_REPO_ID"] = "not/a/name"
        assert_error_line(clone.run(), 1, "MATCHED_FINEWEB_REPO_ID=not/a/name")

    def test_token_that_is_refused(self, clone, hub):
        hub.status = 401
        clone.settings["HF_TOKEN"] = "hf_stale"
        assert_error_line(clone.run(), 1, "bad token (HF_TOKEN")

    def test_hub_that_does_not_answer(self, clone, hub):
        hub.faults["datasets/manifest.json"] = [("HEAD", ("wait", threading.Event()))]
        assert_error_line(clone.run(code=SMALL_SHARDS.replace("f.FULL", "f.ANSWER_SECONDS = 0.5; f.FULL")), 1, hub.url,
                   "cannot be reached")  # fmt: skip

    def test_address_that_is_none(self, clone):
        clone.settings["HF_ENDPOINT"] = "localhost:99"
        assert_error_line(clone.run(), 1, "HF_ENDPOINT=localhost:99: not an address")

    def test_all_is_here_and_nobody_is_asked(self, clone):
        assert clone.run("2").returncode == 0
        clone.settings["HF_ENDPOINT"] = "http://127.0.0.1:9"
        assert clone.run("2", "--skip-manifest").returncode == 0

    @pytest.mark.parametrize("arguments", [(), ("--skip-manifest",)])
    def test_nobody_there(self, clone, arguments):
        assert clone.run("2").returncode == 0
        clone.settings["HF_ENDPOINT"] = "http://127.0.0.1:9"
        start = time.monotonic()
        assert_error_line(clone.run("4", *arguments), 1, "http://127.0.0.1:9 cannot be reached")
        assert time.monotonic() - start < 10
        clone.settings["HF_HUB_OFFLINE"] = "1"
        assert_error_line(clone.run("4", *arguments), 1, "cannot be reached", "HF_HUB_OFFLINE")

    def test_hub_that_goes_away(self, clone, hub):
        hub.faults[f"datasets/{FAULTY}"] = [("drop", 100)] * 50
        assert_error_line(clone.run("3", code=NO_WAIT.replace("(0, 0)", "()")), 1, FAULTY, "2 of 3 training shards")

    def test_more_shards_than_there_are(self, clone, hub):
        assert_error_line(clone.run("13"), 2, "--train-shards 13", f"{NAME} has only 12")
        assert_error_line(clone.run(), 2, "--train-shards 80")
        assert set(hub.fetched()) == {"datasets/manifest.json"}

    def test_unknown_variant(self, clone):
        assert_error_line(clone.run("--variant", "sp999"), 2, "fineweb10B_sp999; it has byte260, sp320\n")
        assert_error_line(clone.run("--variant", "gpt2"), 2, "--variant gpt2", "sp<N>")

    @pytest.mark.parametrize("content", [
        b"[]", b"no json", b'{"datasets": [1]}', b'{"datasets": 5}', b"\xff", b'{"datasets": [{}]}',
        b'{"tokenizers": [{"name": "t", "path": ["a"]}]}',
    ])  # fmt: skip
    def test_manifest_that_is_none(self, clone, hub, content):
        hub.files["datasets/manifest.json"] = content
        assert_error_line(clone.run(), 2, "manifest.json")
        assert clone.files() == {}
        hub.files["datasets/manifest.json"] = json.dumps(MANIFEST).encode()
        (clone.data / "manifest.json").write_bytes(content)
        assert_error_line(clone.run(), 2, "data/manifest.json: not a manifest")
        assert clone.files() == {"manifest.json": content}

    @pytest.mark.parametrize("change", [
        {"stats": {"files_train": 1}}, {"stats": {"files_train": "1", "files_val": 1}}, {"stats": None},
        {"stats": [1]}, {"stats": {"files_train": 1, "files_val": -1}}, {"tokenizer_name": "other"},
    ], ids=str)  # fmt: skip
    def test_entry_that_lacks_something(self, clone, hub, change):
        manifest = {**MANIFEST, "datasets": [{**MANIFEST["datasets"][0], **change}]}
        hub.files["datasets/manifest.json"] = json.dumps(manifest).encode()
        assert_error_line(clone.run("1"), 2, NAME, "lacks")

    def test_no_room(self, clone, hub):
        code = SMALL_SHARDS.replace("sys.exit", f"{FREE}; sys.exit")
        needed = 9000 * 6 + sum(len(hub.files[f"datasets/tokenizers/some_320.{end}"]) for end in ("model", "vocab"))
        assert_error_line(clone.run("4", code=code.replace("AMOUNT", f"{needed - 1}")), 1, "are free", "are needed",
                   "6 shards of 9 kB", "some_320.model of", "--train-shards (one is 9 kB)")  # fmt: skip
        assert set(clone.files()) == {"manifest.json"}
        assert clone.run("4", code=code.replace("AMOUNT", f"{needed}")).returncode == 0
        assert clone.run("4", code=code.replace("AMOUNT", "0")).returncode == 0  # all is there
        (clone.data / FAULTY).write_bytes(b"half")
        assert_error_line(clone.run("4", code=code.replace("AMOUNT", "8999")), 1, "1 shard of 9 kB",
                   "2 of 2 tokenizer files, 2 of 2 validation shards, 3 of 4 training shards")  # fmt: skip

    def test_a_full_shard_is_200_megabytes(self, clone):
        code = SMALL_SHARDS.replace("f.FULL_SHARD_BYTES = 9000", FREE.replace("AMOUNT", "10**9"))
        assert_error_line(clone.run("12", code=code), 1, "1 GB are free, and 2.8 GB are needed", "14 shards of 200 MB")

    def test_disk_that_fills_up(self, clone, small_disk, published):
        (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 3 * 8192))
        (clone.data / "datasets").symlink_to(small_disk)
        code = SMALL_SHARDS.replace("9000", "1")
        assert_error_line(clone.run("12", code=code), 1, "cannot be written: No space left on device")
        there = {name: data for name, data in clone.files().items() if name.endswith(".bin")}
        assert all(published[name] == data for name, data in there.items())
        (small_disk / "filler").unlink()
        assert clone.run("12", code=code).returncode == 0
        assert sorted(path.name for path in small_disk.iterdir()) == [NAME]


@pytest.mark.slow
def test_what_was_built_here_survives(clone, published):
    """In the manifest and on the disk; and a data set of the same name is not mixed with the hub's."""
    sample = {"name": "sample_sp1024", "tokenizer_name": "s", "made_by": "data/prepare.py", "stats": {"files_train": 1}}
    local = {"datasets": [sample], "tokenizers": [{"name": "s", "model_path": "tokenizers/s.model"}]}
    (clone.data / "manifest.json").write_text(json.dumps(local))
    assert clone.run("1").returncode == 0
    manifest = json.loads(clone.files()["manifest.json"])
    assert manifest["datasets"] == [*MANIFEST["datasets"], sample]
    assert manifest["tokenizers"] == [*MANIFEST["tokenizers"], *local["tokenizers"]]
    pair = str(clone.data / SHARDS), str(clone.data / "tokenizers/some_320.model")
    assert tg.validate_dataset_tokenizer_pair(*pair) == (NAME, 1, 12)

    their_place = {"name": "s", "model_path": f"{MODEL_FILE}.model"}  # by chance a name that the hub uses, too
    (clone.data / "manifest.json").write_text(json.dumps({"datasets": [sample], "tokenizers": [their_place]}))
    before = clone.files()
    assert_error_line(clone.run("2"), 2, f"{MODEL_FILE}.model was built here, for sample_sp1024")
    assert without_manifest(clone.files()) == without_manifest(before)

    shutil.rmtree(clone.data / "datasets")
    own = {**sample, "name": NAME}
    (clone.data / "manifest.json").write_text(json.dumps({**local, "datasets": [own]}))
    assert_error_line(clone.run("1"), 2, NAME, "was built here by data/prepare.py")
    assert own in json.loads(clone.files()["manifest.json"])["datasets"]
    assert not (clone.data / "datasets").exists()


@pytest.mark.slow
def test_no_manifest_can_overwrite_the_tools(clone, hub):
    hub.files["datasets/prepare.py"] = b"import evil"
    tokenizer = {"name": "sp_bpe_320", "model_path": "prepare.py"}
    hub.files["datasets/manifest.json"] = json.dumps({**MANIFEST, "tokenizers": [tokenizer]}).encode()
    assert_error_line(clone.run("1"), 2, "'prepare.py': not under tokenizers/")
    assert not (clone.data / "prepare.py").exists()


@pytest.mark.slow
def test_defaults_need_no_settings(clone, hub):
    """What fetched FineWeb is trained with is printed in full, unless the defaults say the same."""
    names = {"fineweb10B_sp320": "fineweb10B_sp1024", "some_320": "fineweb_1024_bpe"}
    for old, new in names.items():
        hub.files = {path.replace(old, new): data.replace(old.encode(), new.encode()) if "manifest" in path else data
                     for path, data in hub.files.items()}  # fmt: skip
    done = clone.run("1", "--variant", "sp1024")
    assert done.stdout.splitlines()[-1] == f"  {sys.executable} train_gpt_mlx.py"
    clone.folder, clone.settings["PYTHONPATH"] = clone.folder.parent, str(clone.data)
    done = clone.run("1", "--variant", "sp1024")
    assert re.match(r"  DATA_PATH=\S+/datasets/fineweb10B_sp1024 TOKENIZER_PATH=\S+ VOCAB_SIZE=1024 ",
                    done.stdout.splitlines()[-1])  # fmt: skip


@pytest.mark.slow
def test_manifest_as_it_is(clone, hub):
    assert_error_line(clone.run("1", "--skip-manifest"), 2, "data/manifest.json: no such file")
    fewer = {**MANIFEST, "datasets": [{**MANIFEST["datasets"][0], "stats": {"files_train": 2, "files_val": 1}}]}
    (clone.data / "manifest.json").write_text(json.dumps(fewer))
    assert_error_line(clone.run("3", "--skip-manifest"), 2, "has only 2")
    del hub.files["datasets/manifest.json"]
    assert clone.run("2", "--skip-manifest").returncode == 0
    assert "datasets/manifest.json" not in [path for _, path in hub.requests]
    assert sorted(path.name for path in (clone.data / SHARDS).iterdir()) == [
        f"fineweb_{kind}_{i:06d}.bin" for kind, i in (("train", 0), ("train", 1), ("val", 0))]  # fmt: skip


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_interrupted(clone, hub, published, signal_sent):
    """Only whole files are left, and the next run goes on; after SIGKILL it also removes what was left half."""
    go_on = threading.Event()
    for i in (1, 4):
        hub.faults[f"datasets/{shard_name('train', i)}"] = [("wait", go_on)]
    clone.run("0")
    hub.requests.clear()
    process = clone.start("--train-shards", "6")
    while not all((clone.data / shard_name("train", i)).exists() for i in (0, 2, 3, 5)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    start = time.monotonic()
    process.send_signal(signal_sent)
    if signal_sent == signal.SIGINT:
        process.send_signal(signal_sent)  # again: it may not disturb the clearing up
    err = process.communicate(timeout=10)[1]
    assert time.monotonic() - start < 3
    go_on.set()
    half = {shard_name("train", i) for i in (1, 4)}
    whole = {name: data for name, data in expected(published, 6).items() if name not in half}
    if signal_sent == signal.SIGINT:
        assert process.returncode == 130
        assert err == ("interrupted; here and whole: 2 of 2 tokenizer files, 2 of 2 validation shards, "
                       "4 of 6 training shards; run the same command again to go on\n")  # fmt: skip
        assert without_manifest(clone.files()) == whole
        assert not list(clone.data.rglob(".incoming_*"))
    else:
        assert {name: data for name, data in clone.files().items() if name.startswith(SHARDS + "/fineweb")} == {
            name: data for name, data in whole.items() if name.startswith(SHARDS)}  # fmt: skip
    hub.requests.clear()
    assert clone.run("6").returncode == 0
    assert sorted(hub.fetched()) == sorted(f"datasets/{name}" for name in {*half, "manifest.json"})
    assert without_manifest(clone.files()) == expected(published, 6)
    assert not list(clone.data.rglob(".incoming_*"))


@pytest.mark.slow
def test_interrupted_before_anything_is_here(clone, hub):
    hub.faults["datasets/manifest.json"] = [("HEAD", ("wait", threading.Event()))]
    process = clone.start()
    while not hub.requests:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1].startswith("interrupted; nothing new is here")
    assert process.returncode == 130


@pytest.mark.slow
def test_without_the_client_it_says_what_to_install(clone):
    (clone.data / "huggingface_hub.py").write_text("raise ModuleNotFoundError(name='huggingface_hub')")
    done = subprocess.run([sys.executable, "data/cached_challenge_fineweb.py"], cwd=clone.folder, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert_error_line(done, 1, "huggingface_hub is not installed for", "install requirements.txt")


def test_shards_are_checked_as_the_training_script_does(tmp_path):
    import cached_challenge_fineweb as fetch

    path, good = tmp_path / "fineweb_train_000000.bin", shard(20, 1)
    for data in (good, good[:-1], good + b"\0", good[:1023], b"", b"\1" + good[1:], good[:4] + b"\7" + good[5:]):
        path.write_bytes(data)
        problem = fetch.problem_with_shard(path)
        if data == good:
            assert problem is None
            assert len(tg.load_data_shard(path)) == 20
        else:
            assert problem
            with pytest.raises(ValueError, match="fineweb_train"):
                tg.load_data_shard(path)


@pytest.mark.slow
def test_train_on_what_came(clone):
    done = clone.run("2")
    place = dict(setting.split("=") for setting in done.stdout.splitlines()[-1].split()[:3])
    assert set(place) == {"DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE"}
    settings = {name.upper(): str(value) for name, value in MODEL.items()} | place
    settings |= {"ITERATIONS": "3", "WARMUP_STEPS": "1", "MAX_WALLCLOCK_SECONDS": "0"}
    ran = subprocess.run([sys.executable, REPO / "train_gpt_mlx.py"], cwd=clone.folder, env={**os.environ, **settings},
                         capture_output=True, text=True, timeout=240, check=False)  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"WARNING: train_loader:subset dataset:{NAME} train_shards:2/12" in ran.stdout
    assert "val_loader:shards pattern=data/datasets/fineweb10B_sp320/fineweb_val_*.bin tokens:2000" in ran.stdout
    assert "final_int8_zlib_roundtrip_exact val_loss:" in ran.stdout
