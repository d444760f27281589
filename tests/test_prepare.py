"""The data tool: its recipe, its files, running it again, the user's own text, and what it refuses."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

import prepare
import train_gpt_mlx as tg
from conftest import PAIRS
from helpers import REPO, WORDS, one_line_error, snapshot, tokens_of


def write_texts(folder: Path, count: int = 12) -> Path:
    """`count` small files in a folder with a sub-folder, a hidden file and an empty one."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        lines = [f"{WORDS[(i + j) % 19]} {WORDS[(i * j + 3) % 19]} {a}{b} {j * i}" for j, (a, b) in enumerate(PAIRS)]
        path = folder / ("sub" if i % 3 == 0 else ".") / f"text_{i}.txt"
        path.write_text("\n".join([*lines, f"number {i}: naïve 東京\n"]), encoding="utf-8")
    (folder / ".hidden").write_bytes(b"never read, and not UTF-8: \xff")
    (folder / "empty.txt").write_text(" \n\n")
    return folder


SMALL = ("--vocab-size", "300", "--val-tokens", "200")


def build(texts: Path, *arguments: str) -> int:
    return prepare.main(["--text", str(texts), *SMALL, *arguments])


def test_shards_hold_the_documents_in_order(root, tmp_path):
    texts = write_texts(tmp_path / "texts")
    assert build(texts) == 0
    tokenizer = spm.SentencePieceProcessor(model_file=str(root / "tokenizers/mytext_300_bpe.model"))
    all_tokens = [tokens_of(root, "val").tolist(), tokens_of(root, "train").tolist()]
    documents = []
    for tokens in all_tokens:
        starts = [i for i, token in enumerate(tokens) if token == 1]
        assert starts[0] == 0
        documents.append([tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)])
        assert 2 not in tokens
    val, train = documents
    files = [path for path in texts.rglob("*.txt") if path.name != "empty.txt"]
    expected = {tuple(tokenizer.encode(path.read_text())) for path in files}
    assert {tuple(document) for document in val + train} == expected
    assert len(val + train) == len(files) == 12
    # Validation is the first documents, as many as come closest to 200 tokens.
    lengths = np.cumsum([len(document) + 1 for document in val + train])
    assert len(val) == 1 + np.argmin(np.abs(lengths - 200))
    order = [int(tokenizer.decode(document).split("number ")[1].split(":")[0]) for document in val + train]
    assert order != sorted(order)


def test_recipe_of_the_tokenizer(root, tmp_path):
    assert build(write_texts(tmp_path / "texts")) == 0
    sp = spm.SentencePieceProcessor(model_file=str(root / "tokenizers/mytext_300_bpe.model"))
    assert sp.vocab_size() == 300
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert all(sp.is_byte(i) for i in range(4, 260))  # byte fallback
    assert sp.decode(sp.encode("🦉")) == "🦉"
    assert [sp.id_to_piece(i) for i in sp.encode("1987")][-4:] == ["1", "9", "8", "7"]  # split digits
    assert not sp.id_to_piece(sp.encode("alpha")[0]).startswith("▁")  # no dummy prefix
    assert sp.decode(sp.encode("ﬁne \n\n\t  ½")) == "fine 1⁄2"  # nmt_nfkc, white space folded


def test_running_again_gives_the_same_bytes_and_leaves_nothing_else(root, tmp_path):
    texts = write_texts(tmp_path / "texts")
    assert build(texts) == 0
    first = snapshot(root)
    assert sorted(first) == ["datasets/mytext_sp300/fineweb_train_000000.bin",
                             "datasets/mytext_sp300/fineweb_val_000000.bin", "manifest.json",
                             "tokenizers/mytext_300_bpe.model"]  # fmt: skip
    assert build(texts) == 0
    assert snapshot(root) == first
    moved = shutil.move(texts, tmp_path / "elsewhere")  # the order does not depend on where the text lies
    assert build(moved) == 0
    assert snapshot(root) == first


def test_order_is_kept_when_a_file_is_added(tmp_path):
    texts = write_texts(tmp_path / "texts")
    before = list(prepare.documents(prepare.text_source([texts]), prepare.LeftOut(), skip_bad=False))
    (texts / "new.txt").write_text("something new")
    after = list(prepare.documents(prepare.text_source([texts]), prepare.LeftOut(), skip_bad=False))
    assert len(before) == 12
    assert [document for document in after if document != "something new"] == before


def test_order_is_the_same_on_every_machine():
    """By the hash of "1337" and the name: what a published score was made with must be found again."""
    names = dict.fromkeys(f"{i}.txt" for i in range(6))
    assert list(prepare.shuffled(names)) == ["3.txt", "0.txt", "1.txt", "4.txt", "2.txt", "5.txt"]


def test_small_shards_and_a_rebuild_with_fewer(root, tmp_path):
    texts = write_texts(tmp_path / "texts")
    assert build(texts) == 0
    whole = {kind: tokens_of(root, kind).tolist() for kind in ("train", "val")}
    assert build(texts, "--shard-tokens", "100") == 0
    folder = root / "datasets/mytext_sp300"
    for kind, tokens in whole.items():
        files = sorted(folder.glob(f"fineweb_{kind}_*.bin"))
        assert [path.name for path in files] == [f"fineweb_{kind}_{i:06d}.bin" for i in range(-(-len(tokens) // 100))]
        assert [len(tg.load_data_shard(path)) for path in files[:-1]] == [100] * (len(files) - 1)
        assert tokens_of(root, kind).tolist() == tokens
    assert build(texts) == 0
    assert len(list(folder.iterdir())) == 2


def test_manifest_entry_suits_the_training_script_and_spares_others(root, tmp_path):
    root.mkdir()
    other = {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024", "stats": {"files_train": 80}}
    manifest = {"note": "kept", "datasets": [other], "tokenizers": [{"name": "sp_bpe_1024", "path": "x.model"}]}
    (root / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):
        assert build(write_texts(tmp_path / "texts"), "--shard-tokens", "1000") == 0
    written = json.loads((root / "manifest.json").read_text())
    assert written["note"] == "kept"
    assert [entry["name"] for entry in written["datasets"]] == ["fineweb10B_sp1024", "mytext_sp300"]
    assert written["datasets"][0] == other
    assert written["tokenizers"] == [
        {"name": "sp_bpe_1024", "path": "x.model"},
        {"name": "mytext_300_bpe", "model_path": "tokenizers/mytext_300_bpe.model"},
    ]
    stats = written["datasets"][1]["stats"]
    train, val = tokens_of(root, "train"), tokens_of(root, "val")
    assert (stats["tokens_train"], stats["tokens_val"], stats["documents"]) == (len(train), len(val), 12)
    assert stats["files_train"] == -(-len(train) // 1000)
    dataset = root / "datasets/mytext_sp300"
    right = str(root / "tokenizers/mytext_300_bpe.model")
    count = stats["files_train"]
    assert tg.validate_dataset_tokenizer_pair(str(dataset), right) == ("mytext_sp300", count, count)
    with pytest.raises(ValueError, match="mytext_300_bpe"):
        tg.validate_dataset_tokenizer_pair(str(dataset), "wrong.model")


def test_files_of_the_same_name_and_single_files(root, tmp_path):
    a, b = write_texts(tmp_path / "a"), write_texts(tmp_path / "b")
    files = prepare.text_source([a, b, a / "text_1.txt"]).files
    assert len(files) == 13 + 13 + 1
    assert len(set(files.values())) == 26
    (tmp_path / "c/1").mkdir(parents=True)
    for path in ("c/x.txt", "c/1/x.txt", "d/x.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    assert len(prepare.text_source([tmp_path / "c", tmp_path / "d"]).files) == 3  # though "1/x.txt" is taken
    for path in ("e/a/.x", "e/a/.git/y", "e/a/z"):  # hidden ones at any depth
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    assert list(prepare.text_source([tmp_path / "e"]).files) == ["a/z"]
    assert not any(".hidden" in name for name in files)


def test_name_and_default_name(root, tmp_path):
    assert build(write_texts(tmp_path / "texts"), "--name", "my.set-1_x") == 0
    assert (root / "datasets/my.set-1_x_sp300").is_dir()
    assert (root / "tokenizers/my.set-1_x_300_bpe.model").is_file()


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", ".x", "é"])
def test_name_that_is_no_folder_name(root, tmp_path, capsys, name):
    assert build(write_texts(tmp_path / "texts"), f"--name={name}") == 2
    one_line_error(capsys, "--name")


def test_unusable_texts_are_told_in_one_line_and_nothing_is_lost(root, tmp_path, capsys):
    texts = write_texts(tmp_path / "texts")
    assert build(texts) == 0
    before = snapshot(root)
    capsys.readouterr()

    assert build(tmp_path / "absent") == 2
    one_line_error(capsys, "absent", "no such file")
    (tmp_path / "blank").mkdir()
    assert build(tmp_path / "blank") == 2
    one_line_error(capsys, "blank", "no files")
    for name in ("a.txt", "b.txt"):
        (tmp_path / "blank" / name).write_text("\n \t\n")
    assert build(tmp_path / "blank") == 2
    one_line_error(capsys, "empty")
    (texts / "binary.txt").write_bytes(b"abc\xff\xfe")
    assert build(texts) == 2
    one_line_error(capsys, "binary.txt", "not UTF-8", "byte 3", "--skip-bad")
    (texts / "binary.txt").unlink()
    assert build(texts, "--vocab-size", "5000") == 2
    one_line_error(capsys, "--vocab-size 5000")
    assert build(texts, "--vocab-size", "20") == 2
    one_line_error(capsys, "--vocab-size 20")
    assert build(texts, "--vocab-size", "65537") == 2
    one_line_error(capsys, "--vocab-size 65537", "65536")
    assert build(texts, "--val-tokens", "100000") == 2
    one_line_error(capsys, "--val-tokens")
    assert build(texts / "text_1.txt") == 2
    one_line_error(capsys, "one file is one document")
    for content in ("[]", '{"datasets": ["x"]}', '{"tokenizers": 3}', "{"):
        (root / "manifest.json").write_text(content)
        assert build(texts) == 2
        one_line_error(capsys, "manifest.json")
    (root / "manifest.json").write_bytes(before["manifest.json"])
    assert snapshot(root) == before


def test_unreadable_file(root, tmp_path, capsys, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    texts = write_texts(tmp_path / "texts")
    monkeypatch.setattr(Path, "read_bytes", refuse)  # taking the permission away would not stop the superuser
    assert build(texts) == 2
    one_line_error(capsys, ".txt", "cannot be read (Permission denied)")


def test_a_data_set_of_another_origin_is_never_replaced(root, tmp_path, capsys):
    precious = root / "datasets/fineweb10B_sp300/fineweb_train_000000.bin"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"16 GB of it")
    assert build(write_texts(tmp_path / "texts"), "--name", "fineweb10B") == 2
    one_line_error(capsys, "fineweb10B_sp300", "another name")
    assert precious.read_bytes() == b"16 GB of it"
    (root / "manifest.json").write_text(json.dumps({"datasets": [{"name": "fineweb10B_sp300"}], "tokenizers": []}))
    assert build(write_texts(tmp_path / "texts"), "--name", "fineweb10B") == 2  # listed, as what was fetched is
    assert precious.read_bytes() == b"16 GB of it"


def test_a_tokenizer_of_another_origin_is_never_replaced(root, tmp_path, capsys):
    """By its name: prepare.py --name fineweb would write the file that fetched FineWeb goes with."""
    fetched = root / "tokenizers/fineweb_300_bpe.model"
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(b"FineWeb's")
    assert build(write_texts(tmp_path / "texts"), "--name", "fineweb") == 2
    one_line_error(capsys, str(fetched), "another name")
    assert snapshot(root) == {"tokenizers/fineweb_300_bpe.model": b"FineWeb's"}


@pytest.mark.parametrize(
    "argument", [("--vocab-size", "0"), ("--val-tokens", "x"), ("--shard-tokens", "-1"), ("surplus",)]
)
def test_command_line_errors(root, argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(list(argument))
    assert argument[0] in capsys.readouterr().err


def test_defaults():
    args = prepare.build_parser().parse_args([])
    assert (args.val_tokens, args.val_docs, args.shard_tokens, args.skip_bad) == (100_000, None, 100_000_000, False)
    prepare.check_settings("x", 65_536)


def test_what_a_killed_build_left_is_not_mixed_in(root, tmp_path):
    left = root / ".prepare_mytext_sp300/new/datasets/mytext_sp300/fineweb_train_000009.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of another text")
    assert build(write_texts(tmp_path / "texts")) == 0
    assert len(list((root / "datasets/mytext_sp300").iterdir())) == 2


SHARDS, MODEL = "datasets/mytext_sp300", "tokenizers/mytext_300_bpe.model"
IN_SHARDS = ("--shard-tokens", "1000")  # three of training tokens in the new data set, two in the old one


@pytest.fixture
def old_and_new(root, tmp_path) -> tuple[Path, dict, dict]:
    """Other text to rebuild the data set from, and the files before that and after it. The ones from before are there.

    A copy of them lies in tmp_path/old.
    """
    texts = write_texts(tmp_path / "new_texts", count=8)
    assert build(texts, *IN_SHARDS) == 0
    new = snapshot(root)
    shutil.rmtree(root)
    assert build(write_texts(tmp_path / "old_texts", count=4), *IN_SHARDS) == 0
    old = snapshot(root)
    assert old.keys() != new.keys()
    assert all(old[name] != new[name] for name in (MODEL, "manifest.json"))
    shutil.copytree(root, tmp_path / "old")
    return texts, old, new


def fail(real, *args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(real, *args, **kwargs):
    raise KeyboardInterrupt


def press_ctrl_c(real, *args, **kwargs):
    result = real(*args, **kwargs)
    signal.raise_signal(signal.SIGINT)
    return result


@pytest.mark.parametrize(("fault", "rebuild"), [(fail, True), (fail, False), (interrupt, True), (press_ctrl_c, True)])
def test_a_build_that_stops_half_way_changes_nothing(root, tmp_path, monkeypatch, capsys, old_and_new, fault, rebuild):
    """Stop a first build, or a rebuild with other text, at each file that it writes and at each move.

    A Ctrl-C during the last four, the moves, has no effect: the build is as good as done.
    """
    texts, before, after = old_and_new if rebuild else (old_and_new[0], {}, old_and_new[2])
    codes = []
    for stop_at in itertools.count(1):
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "old", root) if rebuild else root.mkdir()
        calls = itertools.count(1)

        def faulty(real, calls=calls, stop_at=stop_at):
            return lambda *args, **kwargs: (
                fault(real, *args, **kwargs) if next(calls) == stop_at else real(*args, **kwargs)
            )

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(os, name, faulty(getattr(os, name)))
            capsys.readouterr()
            code = build(texts, *IN_SHARDS)
        assert snapshot(root) == (before if code else after)
        assert not list(root.glob(".prepare*"))
        if next(calls) <= stop_at:
            assert code == 0
            break
        codes.append(code)
        if code == 1:
            one_line_error(capsys, str(root), ": cannot be written: No space left on device; what was there before")
        elif code == 130:
            assert "interrupted" in capsys.readouterr().err
    assert len(codes) == (12 if rebuild else 9)  # 3 + 1 shards, 4 files with the copies, 4 moves; without old ones less
    ends_well = 4 if fault is press_ctrl_c else 0
    assert codes == [1 if fault is fail else 130] * (len(codes) - ends_well) + [0] * ends_well


def test_every_file_is_on_the_disk_before_the_first_move(root, tmp_path, monkeypatch, old_and_new):
    texts, _, new = old_and_new
    events = []

    def fsync(number, real=os.fsync):
        real(number)
        state = os.fstat(number)  # a file keeps its inode when it is moved
        events.append((state.st_ino, state.st_size))

    def replace(*args, real=os.replace):
        events.append("move")
        real(*args)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    assert build(texts, *IN_SHARDS) == 0
    states = [(root / name).stat() for name in new]
    assert len(states) > 4
    assert {(state.st_ino, state.st_size) for state in states} <= set(events[: events.index("move")])
    assert events[-4:] == ["move"] * 4


KILLED_AT_A_MOVE = """
import itertools, os, signal, sys
from pathlib import Path
import prepare

moves, last = itertools.count(), int(sys.argv[2])

def replace(*args, real=os.replace):
    move = next(moves)
    if move == last:
        os.kill(os.getpid(), signal.SIGKILL)
    if move == 3:
        raise OSError
    real(*args)

prepare.ROOT, os.replace = Path(sys.argv[1]), replace
prepare.main(sys.argv[3:])
"""


@pytest.mark.parametrize("move", [1, 2, 3, 5])
def test_a_kill_between_two_moves_never_mixes_old_and_new(root, old_and_new, move):
    """The moves: 0 the old shards away, 1 to 3 the new tokenizer, manifest and shards there; 4 to 6 undo 2 to 0."""
    texts, old, new = old_and_new
    arguments = [str(root), str(move), "--text", str(texts), *SMALL, *IN_SHARDS]
    done = subprocess.run([sys.executable, "-c", KILLED_AT_A_MOVE, *arguments], stdout=subprocess.DEVNULL, check=False,
                          env={**os.environ, "PYTHONPATH": str(REPO / "data")})  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    found = {name: data for name, data in snapshot(root).items() if not name.startswith(".prepare")}
    assert found == {MODEL: (new if move > 1 else old)[MODEL],
                     "manifest.json": (new if move == 3 else old)["manifest.json"]}  # fmt: skip
    assert build(texts, *IN_SHARDS) == 0
    assert snapshot(root) == new


@pytest.mark.parametrize(
    ("limit", "padding", "file"),
    [
        (50_000, "", MODEL),
        (270_000, "", f"{SHARDS}/fineweb_val_000000.bin"),
        (350_000, '"note": "%s", ' % ("x" * 400_000), "manifest.json"),
        (350_000, " " * 400_000, "manifest.json"),  # which the new one is without, but the old one is copied
    ],
    ids=["tokenizer", "shard", "manifest", "copy"],
)
def test_a_size_limit_is_told_in_one_line_and_nothing_is_lost(root, tmp_path, limit, padding, file):
    texts = write_texts(tmp_path / "texts")
    assert build(texts) == 0
    manifest = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(manifest[0] + padding + manifest[1:])
    shutil.copy(REPO / "data/prepare.py", root)
    (texts / "long.txt").write_text("0 " * 75_000)  # 300 kB of tokens; the tokenizer has 245 kB
    before = snapshot(root)
    done = subprocess.run(
        [sys.executable, str(root / "prepare.py"), "--text", str(texts), *SMALL], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"error: {root / file}: cannot be written: File too large; what was there before still is\n"
    assert snapshot(root) == before
    assert not list(root.glob(".prepare*"))


def test_a_full_disk_is_told_in_one_line_and_nothing_is_lost(small_disk, tmp_path, monkeypatch, capsys, old_and_new):
    """Rebuild with room for all files but one, for each in the order of writing, then with room for all."""
    texts, old, new = old_and_new
    root = small_disk / "data"
    monkeypatch.setattr(prepare, "ROOT", root)
    shutil.copytree(tmp_path / "old", root)
    block = os.statvfs(small_disk).f_bsize
    shards = sorted((name for name in new if name.startswith("datasets/")), key=lambda name: ("val" not in name, name))
    in_order = [MODEL, *shards, "manifest.json"]
    sizes = [(name, len(new[name])) for name in in_order]
    sizes += [(name, len(old[name])) for name in (MODEL, "manifest.json")]  # the copies, to be put back
    room = 0
    for name, size in sizes:
        room += -(-size // block)
        filler = small_disk / "filler"
        filler.write_bytes(bytes((os.statvfs(small_disk).f_bavail - (room - 1)) * block))
        capsys.readouterr()
        assert build(texts, *IN_SHARDS) == 1
        one_line_error(capsys, f"{root / name}: cannot be written: No space left on device; what was there before")
        assert snapshot(root) == old
        assert not list(root.glob(".prepare*"))
        filler.unlink()
    filler.write_bytes(bytes((os.statvfs(small_disk).f_bavail - room) * block))
    assert build(texts, *IN_SHARDS) == 0
    assert snapshot(root) == new


def test_a_read_only_disk_is_told_in_one_line(small_disk, tmp_path, monkeypatch, capsys, old_and_new):
    root = small_disk / "data"
    monkeypatch.setattr(prepare, "ROOT", root)
    shutil.copytree(tmp_path / "old", root)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert build(old_and_new[0]) == 1
    one_line_error(capsys, f"error: {root}: cannot be written: Read-only file system; what was there before still is")
    assert snapshot(root) == old_and_new[1]


@pytest.mark.parametrize("folder", ["datasets", "tokenizers"])
def test_a_folder_on_another_disk_is_told_of_before_the_work(root, tmp_path, capsys, old_and_new, folder):
    """A file cannot be moved there as a whole."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    texts, old, _ = old_and_new
    with tempfile.TemporaryDirectory(dir=elsewhere) as other:
        (root / folder).rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", other, dirs_exist_ok=True)
        (root / folder).symlink_to(other)
        files = {name: root / name for name in old}
        capsys.readouterr()
        assert build(texts, *IN_SHARDS) == 2
        one_line_error(capsys, f"{root / folder} is on another disk than {root}")
        assert {name: path.read_bytes() for name, path in files.items()} == old
        assert not list(root.glob(".prepare*"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """The data folder after the tool ran as the README starts it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "data").mkdir()
    shutil.copy(REPO / "data/prepare.py", folder / "data/prepare.py")
    done = subprocess.run([sys.executable, "data/prepare.py"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    settings = "DATA_PATH=data/datasets/sample_sp1024 TOKENIZER_PATH=data/tokenizers/sample_1024_bpe.model"
    assert done.stdout.splitlines()[-1].strip() == f"{settings} VOCAB_SIZE=1024 {sys.executable} train_gpt_mlx.py"
    return folder / "data"


@pytest.mark.slow
class TestSample:
    """A data set from the standard library's source."""

    def test_sizes(self, sample):
        names = {path.relative_to(sample).as_posix() for path in sample.rglob("*") if path.is_file()}
        assert names == {"prepare.py", "manifest.json", "tokenizers/sample_1024_bpe.model",
                         "datasets/sample_sp1024/fineweb_train_000000.bin",
                         "datasets/sample_sp1024/fineweb_val_000000.bin"}  # fmt: skip
        train, val = tokens_of(sample, "train", "sample_sp1024"), tokens_of(sample, "val", "sample_sp1024")
        assert 2e6 < len(train) < 8e6
        assert 5e4 < len(val) < 2e5
        assert max(train.max(), val.max()) < 1024

    def test_manifest_records_the_interpreter(self, sample):
        (entry,) = json.loads((sample / "manifest.json").read_text())["datasets"]
        assert sys.version.split()[0] in entry["source"]
        assert entry["stats"]["files_train"] == 1
        pair = str(sample / "datasets/sample_sp1024"), str(sample / "tokenizers/sample_1024_bpe.model")
        assert tg.validate_dataset_tokenizer_pair(*pair) == ("sample_sp1024", 1, 1)

    def test_text_is_the_standard_library_without_tests_and_packages(self):
        files = prepare.library_source().files
        assert {"os.py", "json/decoder.py", "collections/__init__.py"} <= files.keys()
        assert not [name for name in files if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]

    def test_killed_rebuild_leaves_whole_files_and_the_next_one_cleans_up(self, sample):
        before = snapshot(sample)
        staging = sample / ".prepare_sample_sp1024"
        process = subprocess.Popen([sys.executable, "data/prepare.py"], cwd=sample.parent, stdout=subprocess.DEVNULL)
        while not staging.exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = snapshot(sample)
        shards = [name for name in found if name.startswith("datasets/")]
        assert all(found[name] == before[name] for name in found if not name.startswith(".prepare"))
        assert len(shards) in (0, 2)
        subprocess.run([sys.executable, "data/prepare.py"], cwd=sample.parent, check=True, stdout=subprocess.DEVNULL)
        assert snapshot(sample) == before
