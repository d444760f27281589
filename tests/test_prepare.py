"""Making a data set: what text is read, how it becomes tokens, what appears in the data folder, what is refused."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

import train_gpt_mlx as tg
from conftest import train_tokenizer
from helpers import REPO, WORDS, check_one_line_error, snapshot, tokens_of
from programs import ON_CPU

pytestmark = pytest.mark.slow
TEXTS = []
for i in range(60):
    words = [WORDS[(i * j + j // 3) % 19] for j in range(40)]
    TEXTS.append(f"document {i} " + " ".join(words) + " naïve 東京")
SMALL = ("--vocab-size", "300", "--val-tokens", "200")
README_COMMANDS = re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), flags=re.S)


class Clone:
    """A folder like the repository's, with its own data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir(parents=True)
        shutil.copy(REPO / "data/prepare.py", self.data)
        shutil.copy(REPO / "train_gpt_mlx.py", folder)

    def start(self, *arguments: object, code: str = "", **options) -> subprocess.Popen:
        script = ["-c", f"{code}\nimport prepare\nprepare.run(prepare.main)"] if code else ["data/prepare.py"]
        command = [sys.executable, *script, *map(str, arguments)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        environment = {**os.environ, "PYTHONPATH": str(self.data)}
        return subprocess.Popen(command, cwd=self.folder, env=environment, **pipes, **options)

    def run(self, *arguments: object, **options) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def make(self, *arguments: object) -> str:
        """Run it, expect success, and return what it printed."""
        done = self.run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def refuse(self, *arguments: object, error: tuple[str, ...], **options) -> None:
        """Run it, and expect one line of error and that nothing has changed."""
        before = self.files()
        done = self.run(*arguments, **options)
        assert done.returncode == 1
        check_one_line_error(done.stderr, *error)
        assert self.files() == before

    def files(self) -> dict[str, bytes]:
        """All files in the data folder, but the tool."""
        return {name: data for name, data in snapshot(self.data).items() if ".py" not in name}

    def entry(self) -> dict:
        return json.loads((self.data / "manifest.json").read_text())["datasets"][-1]

    def tokenizer(self, name: str = "mytext_300_bpe") -> spm.SentencePieceProcessor:
        return spm.SentencePieceProcessor(model_file=str(self.data / f"tokenizers/{name}.model"))

    def documents(self, kind: str, name: str = "mytext_sp300") -> list[list[int]]:
        """The tokens of each document, without the token that begins it."""
        tokens = tokens_of(self.data, kind, name).tolist()
        starts = [i for i, token in enumerate(tokens) if token == 1]
        assert starts[0] == 0
        return [tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path / "clone")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def docs(tmp_path) -> Path:
    return write_jsonl(tmp_path / "docs.jsonl", TEXTS)


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder of 60 text files, half of them in a folder below it."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / ("sub" if i % 2 else ".") / f"{i}.txt").write_text(text.replace(" naïve", "\nnaïve"))
    return folder


@pytest.fixture
def tokenizer_file(tmp_path, tokenizer_proto) -> Path:
    path = tmp_path / "some.model"
    path.write_bytes(tokenizer_proto)
    return path


class TestTokens:
    def test_documents_keep_their_order_and_the_first_are_for_validation(self, clone, docs):
        clone.make("--docs-jsonl", docs, "--vocab-size", 300, "--val-docs", 7)
        tokenizer = clone.tokenizer()
        assert clone.documents("val") == [tokenizer.encode(text) for text in TEXTS[:7]]
        assert clone.documents("train") == [tokenizer.encode(text) for text in TEXTS[7:]]

    def test_megabytes_of_documents_keep_their_order(self, clone, tmp_path, tokenizer_file):
        texts = [f"{i} " + " ".join(TEXTS[:30]) for i in range(800)]
        docs = write_jsonl(tmp_path / "many.jsonl", texts)
        assert docs.stat().st_size > 5e6
        clone.make("--docs-jsonl", docs, "--tokenizer", tokenizer_file, "--val-docs", 400)
        tokenizer = clone.tokenizer("mytext_320_bpe")
        assert clone.documents("val", "mytext_sp320") == tokenizer.encode(texts[:400])
        assert clone.documents("train", "mytext_sp320") == tokenizer.encode(texts[400:])

    def test_val_tokens_takes_as_many_documents_as_come_closest(self, clone, docs):
        clone.make("--docs-jsonl", docs, *SMALL)
        lengths = np.cumsum([1 + len(clone.tokenizer().encode(text)) for text in TEXTS])
        assert len(clone.documents("val")) == 1 + np.argmin(np.abs(lengths - 200))
        clone.make("--docs-jsonl", docs, "--vocab-size", 300, "--val-tokens", 1)
        assert len(clone.documents("val")) == 1

    def test_validation_never_resumes_after_training_began(self, clone, tmp_path, tokenizer_file):
        """Not even with a document so short that it would come closer to --val-tokens."""
        docs = write_jsonl(tmp_path / "docs.jsonl", [TEXTS[0], " ".join(TEXTS[1:9]), "a", TEXTS[9]])
        length = 1 + len(spm.SentencePieceProcessor(model_file=str(tokenizer_file)).encode(TEXTS[0]))
        clone.make("--docs-jsonl", docs, "--tokenizer", tokenizer_file, "--val-tokens", length + 2)
        assert len(clone.documents("val", "mytext_sp320")) == 1

    def test_the_tokenizer_follows_the_challenges_recipe(self, clone, tmp_path):
        docs = write_jsonl(tmp_path / "docs.jsonl", [*TEXTS, "1987 " * 500])
        clone.make("--docs-jsonl", docs, *SMALL)
        sp = clone.tokenizer()
        assert sp.vocab_size() == 300
        assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
        assert all(sp.is_byte(i) for i in range(4, 260))  # byte fallback
        assert sp.decode(sp.encode("🦉")) == "🦉"
        assert not any(re.search(r"\d\d", sp.id_to_piece(i)) for i in range(260, 300))  # split digits
        assert not sp.id_to_piece(sp.encode("alpha")[0]).startswith("▁")  # no dummy prefix
        assert sp.decode(sp.encode("ﬁne \n\n\t  ½")) == "fine 1⁄2"  # nmt_nfkc, white space folded

    def test_the_tokenizer_is_not_trained_on_val_docs(self, clone, tmp_path):
        docs = write_jsonl(tmp_path / "docs.jsonl", ["zyzzyva zyzzyva " * 99, *TEXTS])
        clone.make("--docs-jsonl", docs, "--vocab-size", 300, "--val-docs", 1)
        pieces = [clone.tokenizer().id_to_piece(i) for i in range(300)]
        assert not any("zy" in piece for piece in pieces)

    def test_the_tokenizer_is_trained_on_long_lines_too(self, clone, tmp_path):
        docs = write_jsonl(tmp_path / "docs.jsonl", ["a b c", " ".join(TEXTS)])
        clone.make("--docs-jsonl", docs, "--vocab-size", 300, "--val-docs", 1)
        assert len(clone.tokenizer().encode("epsilon")) < len("epsilon")

    def test_an_existing_tokenizer_is_used_as_it_is(self, clone, docs, tokenizer_file):
        clone.make("--docs-jsonl", docs, "--tokenizer", tokenizer_file, "--val-docs", 5)
        tokenizer = spm.SentencePieceProcessor(model_file=str(tokenizer_file))
        assert clone.documents("val", "mytext_sp320") == [tokenizer.encode(text) for text in TEXTS[:5]]
        assert (clone.data / "tokenizers/mytext_320_bpe.model").read_bytes() == tokenizer_file.read_bytes()

    def test_shard_tokens_sets_the_size_of_files(self, clone, docs):
        clone.make("--docs-jsonl", docs, *SMALL)
        whole = tokens_of(clone.data, "train").tolist()
        clone.make("--docs-jsonl", docs, *SMALL, "--shard-tokens", 100)
        files = sorted((clone.data / "datasets/mytext_sp300").glob("fineweb_train_*.bin"))
        assert [path.name for path in files] == [f"fineweb_train_{i:06d}.bin" for i in range(-(-len(whole) // 100))]
        assert {len(tg.load_data_shard(path)) for path in files[:-1]} == {100}
        assert tokens_of(clone.data, "train").tolist() == whole


class TestText:
    def test_each_file_is_a_document(self, clone, texts):
        clone.make("--text", texts, *SMALL)
        decoded = [clone.tokenizer().decode(tokens) for kind in ("val", "train") for tokens in clone.documents(kind)]
        assert sorted(decoded) == sorted(TEXTS)

    def test_files_are_shuffled_by_their_names_alike_everywhere(self, clone, tmp_path):
        """By the SHA-256 of "1337" and the name. A published score needs the same split."""
        for i in range(6):
            (tmp_path / f"{i}.txt").write_text(f"document {i} " + " ".join(WORDS) * 9)
        files = [tmp_path / f"{i}.txt" for i in range(6)]
        clone.make("--text", *files, "--val-docs", 1, "--vocab-size", 300)
        decoded = [clone.tokenizer().decode(tokens) for kind in ("val", "train") for tokens in clone.documents(kind)]
        assert [text.split()[1] for text in decoded] == ["3", "0", "1", "4", "2", "5"]

    def test_blank_and_hidden_files_and_those_that_are_not_text_are_passed_over_in_folders(self, clone, texts):
        (texts / "blank.txt").write_text(" \n\n")
        (texts / ".hidden.txt").write_text("a secret")
        (texts / "sub/.git").mkdir()
        (texts / "sub/.git/config").write_text("a secret")
        (texts / "picture.png").write_bytes(b"\x89PNG\xff")
        (texts / "notes.gz").write_bytes(gzip.compress(b"text"))
        out = clone.make("--text", texts, *SMALL)
        assert "2 non-UTF-8 files skipped" in out
        assert clone.entry()["stats"]["documents_train"] + clone.entry()["stats"]["documents_val"] == 60

    def test_glob_chooses_files_in_folders(self, clone, texts):
        (texts / "sub/code.py").write_text("a program")
        clone.make("--text", texts, *SMALL, "--glob", "*.txt")
        assert not any("program" in clone.tokenizer().decode(tokens) for tokens in clone.documents("train"))

    def test_files_of_the_same_name_in_two_folders_are_both_taken(self, clone, texts):
        shutil.copytree(texts, texts.parent / "copy")
        clone.make("--text", texts, texts.parent / "copy", *SMALL)
        assert clone.entry()["stats"]["documents_train"] + clone.entry()["stats"]["documents_val"] == 120

    def test_the_same_text_gives_the_same_bytes_wherever_it_is_and_however_its_lines_end(self, clone, texts, tmp_path):
        clone.make("--text", texts, *SMALL)
        first = clone.files()
        moved = Path(shutil.move(texts, tmp_path / "elsewhere"))
        for path in moved.rglob("*.txt"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        clone.make("--text", moved, *SMALL)
        again = clone.files()
        del first["manifest.json"], again["manifest.json"]  # they record the arguments
        assert again == first

    @pytest.mark.parametrize("change", ["gzip", "crlf", "bom", "blank lines"])
    def test_jsonl_may_be_written_in_other_ways(self, clone, docs, change, tmp_path):
        clone.make("--docs-jsonl", docs, *SMALL)
        expected = tokens_of(clone.data, "train").tolist()
        data = docs.read_bytes()
        ways = {"gzip": gzip.compress(data), "crlf": data.replace(b"\n", b"\r\n"), "bom": b"\xef\xbb\xbf" + data}
        other = tmp_path / ("docs.jsonl.gz" if change == "gzip" else "other.jsonl")
        other.write_bytes(ways.get(change, data.replace(b"\n", b"\n \t\n\n")))
        clone.make("--docs-jsonl", other, *SMALL)
        assert tokens_of(clone.data, "train").tolist() == expected

    def test_several_jsonl_files_are_read_in_the_order_given(self, clone, tmp_path):
        parts = [write_jsonl(tmp_path / "z.jsonl", TEXTS[:20]), write_jsonl(tmp_path / "a.jsonl", TEXTS[20:])]
        clone.make("--docs-jsonl", *parts, "--val-docs", 30, "--vocab-size", 300)
        assert clone.documents("val") == [clone.tokenizer().encode(text) for text in TEXTS[:30]]

    def test_memory_does_not_grow_with_the_text(self, clone, tmp_path, tokenizer_file):
        line = json.dumps({"text": "\n".join(TEXTS) * 10}) + "\n"
        peaks = []
        for count in (50, 200):
            docs = tmp_path / "docs.jsonl"
            docs.write_text(line * count)
            code = "import resource, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True);"
            code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
            arguments = ["data/prepare.py", "--docs-jsonl", docs, "--tokenizer", tokenizer_file]
            out = subprocess.check_output([sys.executable, "-c", code, *arguments], cwd=clone.folder, text=True)
            peaks.append(int(out.splitlines()[-1]) * (1 if sys.platform == "darwin" else 1024))
        assert peaks[1] - peaks[0] < 10e6, peaks


class TestDataFolder:
    def test_the_manifest_suits_the_training_script_and_keeps_other_entries(self, clone, docs):
        other = {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024", "stats": {"files_train": 80}}
        manifest = {"note": "kept", "datasets": [other], "tokenizers": [{"name": "sp_bpe_1024", "path": "x.model"}]}
        (clone.data / "manifest.json").write_text(json.dumps(manifest))
        for _ in range(2):
            clone.make("--docs-jsonl", docs, *SMALL, "--shard-tokens", 1000)
        written = json.loads((clone.data / "manifest.json").read_text())
        assert written["note"] == "kept"
        assert [entry["name"] for entry in written["datasets"]] == ["fineweb10B_sp1024", "mytext_sp300"]
        stats = clone.entry()["stats"]
        assert stats["tokens_train"] == len(tokens_of(clone.data, "train"))
        assert stats["tokens_val"] == len(tokens_of(clone.data, "val"))
        pair = [str(clone.data / path) for path in ("datasets/mytext_sp300", "tokenizers/mytext_300_bpe.model")]
        shards = -(-stats["tokens_train"] // 1000)
        assert tg.validate_dataset_tokenizer_pair(*pair) == ("mytext_sp300", shards, shards)

    def test_it_replaces_its_own_data_set_as_a_whole(self, clone, docs):
        clone.make("--docs-jsonl", docs, *SMALL, "--shard-tokens", 100)
        clone.make("--docs-jsonl", docs, *SMALL)
        assert sorted(clone.files()) == [
            "datasets/mytext_sp300/fineweb_train_000000.bin",
            "datasets/mytext_sp300/fineweb_val_000000.bin",
            "manifest.json",
            "tokenizers/mytext_300_bpe.model",
        ]

    @pytest.mark.parametrize("path", ["datasets/fineweb_sp300/shard.bin", "tokenizers/fineweb_300_bpe.model"])
    def test_it_does_not_replace_what_it_has_not_made(self, clone, docs, path):
        precious = clone.data / path
        precious.parent.mkdir(parents=True)
        precious.write_bytes(b"16 GB of it")
        clone.refuse("--docs-jsonl", docs, *SMALL, "--name", "fineweb", error=(str(clone.data), "--name"))

    @pytest.mark.parametrize("move", [1, 2])
    def test_killed_at_the_end_it_leaves_no_data_set_and_the_same_command_makes_it(self, clone, docs, texts, move):
        """Never old shards with a new tokenizer."""
        clone.make("--text", texts, *SMALL)
        code = f"""
import itertools, os, shutil
moves, real = itertools.count(1), shutil.move
def move(*paths):
    if next(moves) == {move}:
        os.kill(os.getpid(), {signal.SIGKILL})
    real(*paths)
shutil.move = move"""
        assert clone.run("--docs-jsonl", docs, *SMALL, code=code).returncode == -signal.SIGKILL
        assert not (clone.data / "datasets/mytext_sp300").exists()
        clone.make("--docs-jsonl", docs, *SMALL)
        assert len(clone.files()) == 4

    def test_ctrl_c_ends_it_at_once_and_the_old_data_set_stays(self, clone, docs, tmp_path):
        clone.make("--docs-jsonl", docs, *SMALL)
        before = clone.files()
        long = write_jsonl(tmp_path / "long.jsonl", ["\n".join(TEXTS)] * 500)
        process = clone.start("--docs-jsonl", long, *SMALL)
        assert process.stdout.readline().startswith("training a tokenizer")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[1] == ""
        assert process.returncode == -signal.SIGINT
        assert clone.files() == before

    def test_a_full_disk_is_told_in_one_line_and_the_old_data_set_stays(self, clone, docs, texts, small_disk):
        (clone.data / "datasets").symlink_to(small_disk)
        clone.make("--docs-jsonl", docs, *SMALL)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        (small_disk / "filler").write_bytes(bytes(free - 250_000))
        clone.refuse("--text", texts, *SMALL, error=("No space left on device",))
        (small_disk / "filler").unlink()
        clone.make("--text", texts, *SMALL)


class TestErrors:
    """Each is one line that names the file or the option, and changes nothing."""

    @pytest.mark.parametrize(
        "line", ["no json", '{"text": "cut', '["text"]', '{"txt": "a"}', '{"text": null}', '{"text": "\\ud800"}']
    )
    def test_a_bad_line_is_named_by_file_and_number_or_skipped(self, clone, docs, tmp_path, line):
        clone.make("--docs-jsonl", docs, *SMALL)
        bad = tmp_path / "bad.jsonl"
        bad.write_text("".join([*docs.read_text().splitlines(keepends=True)[:20], line, "\n", docs.read_text()]))
        clone.refuse("--docs-jsonl", bad, *SMALL, error=(f"{bad}:21: not JSON",))
        out = clone.make("--docs-jsonl", bad, "--skip-bad", "--val-docs", 20, "--vocab-size", 300)
        assert "1 bad lines skipped" in out
        assert len(clone.documents("train")) == 60

    def test_a_damaged_gzip_file(self, clone, docs, tmp_path):
        for name, change in (("cut", lambda data: data[:-200]), ("not", lambda data: b"no gzip")):
            path = tmp_path / f"{name}.jsonl.gz"
            path.write_bytes(change(gzip.compress(docs.read_bytes())))
            clone.refuse("--docs-jsonl", path, *SMALL, error=(f"{path}: damaged gzip",))

    def test_a_file_named_on_the_command_line_that_is_not_text(self, clone, texts, tmp_path):
        picture = tmp_path / "picture.png"
        picture.write_bytes(b"\x89PNG\xff")
        clone.refuse("--text", texts, picture, *SMALL, error=(f"{picture}: not UTF-8",))
        assert "1 non-UTF-8 files skipped" in clone.make("--text", texts, picture, *SMALL, "--skip-bad")

    def test_a_file_that_is_not_there(self, clone, docs):
        for option in ("--text", "--docs-jsonl", "--tokenizer"):
            source = ("--docs-jsonl", docs) if option == "--tokenizer" else ()
            clone.refuse(option, "absent", *source, "--val-tokens", 200, error=("absent", "No such file"))

    def test_a_vocabulary_too_large_for_the_text(self, clone, docs):
        clone.refuse("--docs-jsonl", docs, "--vocab-size", 5000, error=("--vocab-size 5000",))

    def test_a_tokenizer_with_too_many_pieces_for_16_bits(self, clone, docs, tokenizer_file):
        model = bytearray(tokenizer_file.read_bytes())
        for i in range(65_300):
            piece = b"x%d" % i
            model += b"\x0a%c\x0a%c%s" % (len(piece) + 2, len(piece), piece)  # protobuf: one more in the list of pieces
        tokenizer_file.write_bytes(model)
        clone.refuse("--docs-jsonl", docs, "--tokenizer", tokenizer_file, error=("65620", "16 bits"))

    def test_a_tokenizer_that_cannot_be_used(self, clone, docs, tmp_path):
        for content in (b"a text", train_tokenizer(bos_id=-1)):
            path = tmp_path / "some.model"
            path.write_bytes(content)
            clone.refuse("--docs-jsonl", docs, "--tokenizer", path, error=(f"--tokenizer {path}",))

    def test_text_that_leaves_nothing_to_train_on(self, clone, docs, texts, tokenizer_file):
        for more in (("--vocab-size", 300), ("--tokenizer", tokenizer_file)):
            clone.refuse("--docs-jsonl", docs, "--val-docs", 60, *more, error=("left to train", "give more"))
            clone.refuse("--text", texts / "0.txt", *more, error=("left to train", "a file is one"))

    def test_text_that_is_empty(self, clone, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty/blank.txt").write_text(" \n")
        clone.refuse("--text", tmp_path / "empty", error=("no text",))

    def test_a_damaged_manifest(self, clone, docs):
        (clone.data / "manifest.json").write_text("{")
        clone.refuse("--docs-jsonl", docs, *SMALL, error=("manifest.json",))

    def test_packages_that_are_not_installed(self, clone):
        (clone.data / "numpy.py").write_text("raise ModuleNotFoundError(name='numpy')")
        done = clone.run()
        check_one_line_error(done.stderr, "numpy is not installed", "requirements.txt")


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Clone:
    """The sample, made from two folders above it, one of which has a space in its name."""
    clone = Clone(tmp_path_factory.mktemp("sample") / "with a space/clone")
    clone.above = clone.folder.parent.parent
    command = [sys.executable, str(clone.data / "prepare.py"), "--name", "the sample"]
    clone.out = subprocess.check_output(command, cwd=clone.above, text=True)
    return clone


class TestSample:
    """The data set that is made without arguments, from the standard library."""

    def test_it_is_the_source_of_the_standard_library_without_tests_and_packages(self, sample):
        train, val = (
            tokens_of(sample.data, "train", "the sample_sp1024"),
            tokens_of(sample.data, "val", "the sample_sp1024"),
        )
        assert 2e6 < len(train) < 8e6
        assert 5e4 < len(val) < 2e5
        assert sample.entry()["versions"]["python"] == sys.version.split()[0]

    def test_the_command_it_prints_is_the_readmes_first_run(self, sample):
        """On a CPU the README's first command, on a GPU the settings of its small first run."""
        number = 0 if ON_CPU else next(i for i, command in enumerate(README_COMMANDS) if "RUN_ID=first" in command)
        printed, expected = (dict(re.findall(r"(\w+)=(\S+)", text)) for text in (sample.out, README_COMMANDS[number]))
        for name in ("RUN_ID", "DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE"):
            expected.pop(name, None)
        assert expected.items() <= printed.items()

    def test_the_command_it_prints_works_as_printed(self, sample):
        command = sample.out.partition("train on it with:\n")[2].replace("ITERATIONS=100", "ITERATIONS=3")
        command = command.replace("VAL_MAX_TOKENS=1000000", "VAL_MAX_TOKENS=1000")
        done = subprocess.run(["bash", "-c", command], cwd=sample.above, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "final_int8_zlib_roundtrip_exact" in done.stdout
