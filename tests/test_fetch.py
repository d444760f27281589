"""Fetching FineWeb as a user does: the tool and the real client of the hub, against a small hub on loopback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers import REPO, learnable_tokens, snapshot, write_shard
from hub import Hub, serving

pytestmark = pytest.mark.slow

TOKENIZER = ["tokenizers/some_1024.model", "tokenizers/some_1024.vocab"]
VAL = [f"datasets/fineweb10B_sp1024/fineweb_val_{i:06d}.bin" for i in range(2)]
TRAIN = [f"datasets/fineweb10B_sp1024/fineweb_train_{i:06d}.bin" for i in range(6)]
DOCS = ["docs_selected.jsonl", "docs_selected.source_manifest.json"]
SMALL_TOKENIZER = "tokenizers/some_320.model"
SMALL_SHARDS = [f"datasets/fineweb10B_sp320/fineweb_{kind}_000000.bin" for kind in ("val", "train")]
BYTE_TOKENIZER = "tokenizers/bytes.json"
BYTE_SHARDS = [f"datasets/fineweb10B_byte260/fineweb_{kind}_000000.bin" for kind in ("val", "train")]
MANIFEST = {
    "tokenizers": [
        {"name": "pieces", "model_path": TOKENIZER[0], "vocab_path": TOKENIZER[1]},
        {"name": "few pieces", "model_path": SMALL_TOKENIZER},
        {"name": "bytes", "path": BYTE_TOKENIZER},
    ],
    "datasets": [
        {"name": "fineweb10B_sp1024", "tokenizer_name": "pieces", "stats": {"files_train": 6, "files_val": 2}},
        {"name": "fineweb10B_sp320", "tokenizer_name": "few pieces", "stats": {"files_train": 12, "files_val": 1}},
        {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {"files_train": 1, "files_val": 1}},
    ],
}
NO_WAITING = "import time; time.sleep = lambda seconds: None"
LITTLE_ROOM = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**8)"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer_proto) -> dict[str, bytes]:
    """The files in the repository's folder."""
    folder = tmp_path_factory.mktemp("published")
    for i, path in enumerate([*VAL, *TRAIN, *SMALL_SHARDS, *BYTE_SHARDS]):
        write_shard(folder / path, learnable_tokens(1000 + i, 320, i))
    files = {path: path.encode() * 9 for path in (*TOKENIZER, BYTE_TOKENIZER, *DOCS)}
    manifest = json.dumps(MANIFEST).encode()
    return files | snapshot(folder) | {SMALL_TOKENIZER: tokenizer_proto, "manifest.json": manifest}


@pytest.fixture
def hub(published):
    with serving() as hub:
        hub.files |= published
        yield hub


class Clone:
    """A folder with those files of the project that the tool needs."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.data = folder / "data"
        self.manifest = folder / "data/manifest.json"
        self.hub = hub
        settings = dict(HF_ENDPOINT=hub.url, HF_HOME="home", MATCHED_FINEWEB_REPO_ID=hub.repo, PYTHONPATH="data")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MATCHED_"))} | settings
        self.data.mkdir()
        for path in ("data/cached_challenge_fineweb.py", "data/prepare.py", "train_gpt_mlx.py"):
            shutil.copy(REPO / path, folder / path)

    def start(self, *arguments: str, patch: str = "") -> subprocess.Popen:
        """Start the tool, if need be after Python code that changes its surroundings."""
        code = f"{patch}\nimport cached_challenge_fineweb as f\nf.run(f.main)"
        command = [sys.executable, *(["-c", code] if patch else ["data/cached_challenge_fineweb.py"]), *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, cwd=self.data.parent, env=self.environment, **pipes)

    def run(self, *arguments: str, patch: str = "") -> tuple[int, str, str]:
        """The tool's exit status, output and errors. The hub's record of requests begins anew."""
        self.hub.requests.clear()
        process = self.start(*arguments, patch=patch)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def fetch(self, *arguments: str, patch: str = "") -> str:
        """Run the tool. It succeeds, and leaves nothing unfinished. Returns what it prints."""
        status, out, err = self.run(*arguments, patch=patch)
        assert status == 0, err
        assert not (self.data / "datasets/.incoming").exists()
        return out

    def refuse(self, *arguments: str, patch: str = "") -> str:
        """Run the tool. It fails, and says why in its last line. Returns the line."""
        status, _, err = self.run(*arguments, patch=patch)
        line = err.splitlines()[-1]
        assert (status, line.startswith("error: "), "Traceback" in err) == (1, True, False), err
        return line

    def files(self) -> dict[str, bytes]:
        """What is in the data folder, but for the manifest, the tools, and what is still incoming."""
        left_out = r"manifest\.json|.*\.pyc?|datasets/\.incoming/.*"
        return {path: data for path, data in snapshot(self.data).items() if not re.fullmatch(left_out, path)}


@pytest.fixture
def clone(tmp_path, hub) -> Clone:
    return Clone(tmp_path, hub)


@pytest.fixture
def chosen(published):
    """The files that come with a number of training shards."""
    return lambda number: {path: published[path] for path in (*TOKENIZER, *VAL, *TRAIN[:number])}


@pytest.mark.parametrize("arguments", [["3"], ["--train-shards", "3"]], ids=str)
def test_the_tokenizer_the_validation_shards_and_the_first_training_shards_come(clone, chosen, arguments):
    clone.fetch(*arguments)
    assert clone.files() == chosen(3)
    assert json.loads(clone.manifest.read_text()) == MANIFEST


def test_several_files_come_at_once(clone, hub):
    hub.delay = 0.1
    clone.fetch("6")
    assert hub.most_at_once > 1


@pytest.mark.parametrize("number", [2, 4])
def test_the_same_command_again_or_a_larger_number_fetches_only_what_is_not_here(clone, hub, chosen, number):
    clone.fetch("2")
    clone.fetch(str(number))
    assert hub.fetched() == {"manifest.json", *TRAIN[2:number]}
    assert clone.files() == chosen(number)
    assert json.loads(clone.manifest.read_text()) == MANIFEST


def test_a_damaged_shard_that_is_here_is_fetched_anew(clone, hub, chosen):
    clone.fetch("2")
    good = (clone.data / TRAIN[1]).read_bytes()
    for damaged in (good[: len(good) // 2], bytes(1024) + good[1024:]):
        (clone.data / TRAIN[1]).write_bytes(damaged)
        clone.fetch("2")
        assert hub.fetched() == {"manifest.json", TRAIN[1]}
        assert clone.files() == chosen(2)


def test_a_shard_that_arrives_damaged_never_takes_its_name(clone, hub, chosen, tmp_path):
    hub.files[TRAIN[1]] = write_shard(tmp_path / "short", learnable_tokens(10, 320, 1), count=11).read_bytes()
    assert TRAIN[1] in clone.refuse("2")
    assert clone.files() == chosen(1)


@pytest.mark.parametrize("faults", [[500, 503], [("HEAD", 502)], [("drop", 100), ("drop", 50)]], ids=str)
def test_faults_of_the_hub_that_pass_are_overcome(clone, hub, chosen, faults):
    hub.faults = {path: list(faults) for path in ("manifest.json", TOKENIZER[0], TRAIN[1])}
    clone.fetch("2", patch=NO_WAITING)
    assert not any(hub.faults.values())
    assert clone.files() == chosen(2)


def test_after_an_error_the_same_command_continues(clone, hub, chosen):
    hub.faults[TRAIN[2]] = [500] * 1000
    assert TRAIN[2] in clone.refuse("3", patch=NO_WAITING)
    assert clone.files() == chosen(2)
    hub.faults.clear()
    clone.fetch("3")
    assert hub.fetched() == {"manifest.json", TRAIN[2]}
    assert clone.files() == chosen(3)


def test_ctrl_c_ends_it_at_once_and_the_same_command_continues(clone, hub, chosen):
    go_on = threading.Event()
    hub.faults = {path: [("wait", go_on)] for path in TRAIN[2:4]}
    process = clone.start("4")
    while not (hub.fetched() >= {*TRAIN[2:4]} and all((clone.data / path).exists() for path in chosen(2))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert clone.files() == chosen(2)
    go_on.set()
    clone.fetch("4")
    assert hub.fetched() == {"manifest.json", *TRAIN[2:4]}
    assert clone.files() == chosen(4)


@pytest.mark.parametrize("folder", ["", "a/b"])
def test_another_repository_and_another_folder_in_it_can_be_chosen(clone, hub, chosen, folder):
    hub.repo = clone.environment["MATCHED_FINEWEB_REPO_ID"] = "me/mine"
    hub.folder = clone.environment["MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"] = folder
    clone.fetch("1")
    assert clone.files() == chosen(1)


def test_the_data_set_of_another_tokenizer_can_be_chosen(clone, published):
    clone.fetch("1", "--variant", "sp320")
    assert clone.files() == {path: published[path] for path in (SMALL_TOKENIZER, *SMALL_SHARDS)}


def test_bytes_come_with_a_warning_that_the_script_cannot_train_on_them(clone, published):
    out = clone.fetch("1", "--variant", "byte260")
    assert clone.files() == {path: published[path] for path in (BYTE_TOKENIZER, *BYTE_SHARDS)}
    assert "train_gpt_mlx.py cannot train on it" in out
    assert "train on it with" not in out


def test_an_unknown_variant_is_refused_with_those_that_there_are(clone):
    line = clone.refuse("1", "--variant", "sp999")
    assert all(name in line for name in ("sp999", "sp1024", "sp320", "byte260"))


@pytest.mark.parametrize("variant", ["gpt2", "sp320/../x"])
def test_a_malformed_variant_is_refused_with_what_is_allowed(clone, variant):
    line = clone.refuse("1", "--variant", variant)
    assert all(part in line for part in (variant, "sp<N>", "byte260"))


@pytest.mark.parametrize(("arguments", "number"), [(["7"], 7), ([], 80)], ids=["7", "80 by default"])
def test_more_shards_than_there_are_are_refused(clone, hub, arguments, number):
    assert f"--train-shards {number}: fineweb10B_sp1024 has only 6" in clone.refuse(*arguments)
    assert hub.fetched() == {"manifest.json"}


def test_the_text_comes_when_asked_for(clone, published, chosen):
    clone.fetch("1", "--with-docs")
    assert clone.files() == chosen(1) | {path: published[path] for path in DOCS}


def test_skip_manifest_uses_the_one_that_is_here(clone, hub):
    text = json.dumps(MANIFEST).replace('"files_val": 2', '"files_val": 1')
    clone.manifest.write_text(text)
    clone.fetch("2", "--skip-manifest")
    assert hub.fetched() == {*TOKENIZER, VAL[0], *TRAIN[:2]}
    assert clone.manifest.read_text() == text


def test_skip_manifest_without_a_manifest_is_refused(clone):
    assert "manifest.json: no such file" in clone.refuse("1", "--skip-manifest")


def test_no_hub_is_needed_when_everything_is_here(clone):
    clone.fetch("2")
    clone.environment["HF_ENDPOINT"] = NOBODY
    clone.fetch("2", "--skip-manifest")


def test_data_sets_made_here_stay_in_the_manifest(clone):
    tokenizer = {"name": "mytext_300_bpe", "model_path": "tokenizers/mytext_300_bpe.model"}
    dataset = {"name": "mytext_sp300", "tokenizer_name": "mytext_300_bpe", "made_by": "data/prepare.py"}
    own = {"tokenizers": [tokenizer], "datasets": [dataset]}
    clone.manifest.write_text(json.dumps(own))
    clone.fetch("1")
    assert json.loads(clone.manifest.read_text()) == {kind: MANIFEST[kind] + own[kind] for kind in own}


@pytest.mark.parametrize("path", ["prepare.py", "tokenizers/../x"])
def test_a_tokenizer_outside_its_folder_is_refused(clone, hub, path):
    manifest = {**MANIFEST, "tokenizers": [{"name": "pieces", "model_path": path}]}
    hub.files |= {"manifest.json": json.dumps(manifest).encode(), path: b"evil"}
    assert f"outside tokenizers/: {path}" in clone.refuse("1")
    assert hub.fetched() == {"manifest.json"}
    assert clone.files() == {}


@pytest.mark.parametrize(("status", "code"), [(404, "RepoNotFound"), (403, "GatedRepo")])
def test_a_repository_that_is_missing_or_closed_is_an_error(clone, hub, status, code):
    hub.status, hub.error_code = status, code
    assert "manifest.json" in clone.refuse("1")


def test_no_connection_is_an_error(clone):
    clone.environment["HF_ENDPOINT"] = NOBODY
    assert "manifest.json" in clone.refuse("1", patch=NO_WAITING)


def test_too_little_room_is_an_error_before_anything_is_downloaded(clone, hub):
    hub.files[DOCS[0]] = bytes(2 * 10**8)
    assert "0.2 GB are needed, 0.1 GB are free" in clone.refuse("1", "--with-docs", patch=LITTLE_ROOM)
    assert hub.fetched() == {"manifest.json"}


def test_without_training_shards_no_command_is_printed(clone):
    assert "train on it with" not in clone.fetch("0")


def test_the_printed_command_trains_on_what_came(clone):
    command = clone.fetch("1", "--variant", "sp320").partition("train on it with:\n")[2]
    short = re.sub(r"\bITERATIONS=\d+", "ITERATIONS=2", command)
    done = subprocess.run(["bash", "-c", short], cwd=clone.data.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "WARNING: train_loader:subset dataset:fineweb10B_sp320 train_shards:1/12" in done.stdout
    assert "final_int8_zlib_roundtrip_exact" in done.stdout
