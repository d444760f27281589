"""Fixtures that several test files share."""

import io
import shutil
import signal
import subprocess
from pathlib import Path

import hypothesis
import mlx.core as mx
import pytest
import sentencepiece as spm

import train_gpt_mlx as tg
from helpers import learnable_tokens, write_shard
from programs import Outcome, Process, command, environment

hypothesis.settings.register_profile("busy", deadline=None)  # an example may take as long as a busy machine makes it
hypothesis.settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="session")
def signals_are_not_ignored():
    """As they are under nohup or in the background of a script: each run would inherit that. A handler, it does not."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    """A developer's own ITERATIONS must not change what the tests see; the compute dtype is float32 everywhere."""
    names = {*tg.settings_of(tg.Hyperparameters), *tg.settings_of(tg.ModuleSettings), "train_max_seq_len"}
    for name in names - {"mlx_preload_blas"}:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(tg, "COMPUTE_DTYPE", mx.float32)


PAIRS = [(a, b) for a in ("cat", "dog", "fox", "owl") for b in ("tree", "house", "river", "stone")]
TEXT = "\n".join(
    f"the {a} {b} says that {a}s and {b}s met {n} times in 19{n:02d}; «naïve café» and 東京 are words too."
    for n, (a, b) in enumerate(PAIRS)
)


def train_tokenizer(**changes) -> bytes:
    """A serialized SentencePiece model of 320 pieces in the challenge's recipe."""
    model = io.BytesIO()
    kind = dict(model_type="bpe", vocab_size=320, character_coverage=0.999, byte_fallback=True, split_digits=True)
    text = dict(add_dummy_prefix=False, normalization_rule_name="nmt_nfkc", minloglevel=2)
    recipe = {**kind, **text, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, **changes}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(TEXT.split("\n")), model_writer=model, **recipe)
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer_proto() -> bytes:
    return train_tokenizer()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_proto) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=tokenizer_proto)


@pytest.fixture(scope="session")
def data(tmp_path_factory, tokenizer_proto) -> Path:
    """A data folder of two training shards, a validation shard of 25 sequences of 16, and a tokenizer."""
    root = tmp_path_factory.mktemp("data")
    tokens = learnable_tokens(6000, 320, 7)
    write_shard(root / "datasets/tiny/fineweb_train_000000.bin", tokens[:1000])
    write_shard(root / "datasets/tiny/fineweb_train_000001.bin", tokens[1000:])
    write_shard(root / "datasets/tiny/fineweb_val_000000.bin", learnable_tokens(409, 320, 9))
    (root / "tokenizers").mkdir()
    (root / "tokenizers/tiny.model").write_bytes(tokenizer_proto)
    return root


@pytest.fixture
def run(data, tmp_path):
    """Run the script with the tiny data and model and the given settings, to its end; returns its Outcome."""

    def whole(*arguments: str, script: tuple[str, ...] = (), options: dict | None = None, **changes) -> Outcome:
        options = dict(cwd=tmp_path, capture_output=True, text=True, timeout=240) | (options or {})
        done = subprocess.run(command(*arguments, script=script), env=environment(data, tmp_path, **changes), **options)
        return Outcome(done.returncode, done.stdout.splitlines(), done.stderr, tmp_path / "out")

    return whole


@pytest.fixture
def start(data, tmp_path):
    """Start such a run, and go on while it is under way; what is still running at the end of the test is killed."""
    processes: list[Process] = []

    def under_way(options: dict | None = None, **changes) -> Process:
        processes.append(Process(command(), tmp_path, environment(data, tmp_path, **changes), **(options or {})))
        return processes[-1]

    yield under_way
    for process in processes:
        process.kill()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small disk")
    yield path
    subprocess.run(["umount", str(path)], check=True)
