"""logs/score.py: a saved model gets its run's score, and a stranger's file does no harm."""

import os
import pickle
import subprocess
import sys
import tracemalloc
import zlib

import mlx.core as mx
import numpy as np
import pytest

import score
import train_gpt_mlx as tg
from helpers import REPO, snapshot
from programs import MODEL, SCRIPT, environment

pytestmark = pytest.mark.slow
SCORE = (str(REPO / "logs/score.py"),)
SIZES = dict(num_layers=1, model_dim=256, mlp_mult=1, iterations=2)  # the embedding is large enough to be quantized
UNSET = dict.fromkeys([*MODEL, *SIZES, "data_path", "tokenizer_path", "run_id", "out_dir", "compute_dtype"])
INT8, NPZ, GAIN, F4 = "r_mlx_model.int8.ptz", "r_mlx_model.npz", "blocks.0.attn.q_gain", np.dtype("f4")


def scores(lines: list[str]) -> list[str]:
    return [word for line in lines for word in line.split() if word.startswith(("final_", "val_"))]


class TestRuns:
    def test_scores_have_the_digits_of_the_run(self, run):
        done = run(**SIZES)
        int8, npz = (run(str(done.folder / name), script=SCORE, **SIZES) for name in (INT8, NPZ))
        assert (int8.code, int8.err, len(int8.out)) == (0, "", 2)
        assert scores(int8.out) == scores(done.lines("^final_"))
        assert scores(npz.out)[:4] == ["final_npz", *scores(done.lines("^step:2/2 val_loss")), "final_npz_exact"]

    def test_settings_come_from_the_environment_or_the_log_beside_the_model(self, run):
        done = run(logit_softcap=7.5, val_max_tokens=70, **SIZES)
        again = run(str(done.folder / INT8), script=SCORE, **UNSET)
        assert scores(again.out) == scores(done.lines("^final_"))
        again = run(str(done.folder / INT8), script=SCORE, val_max_tokens=32, **UNSET)
        assert [line.split()[-1] for line in again.out] == ["val_tokens:32/400"] * 2

    def test_the_log_is_found_from_a_link_and_for_a_model_that_was_moved_aside(self, run, tmp_path):
        first, second = (run(**SIZES, logit_softcap=cap) for cap in (7.5, 8))
        (tmp_path / "x.int8.ptz").symlink_to(second.folder / INT8)
        for path, done in [(f"out/{INT8}.1", first), ("x.int8.ptz", second)]:
            assert run(path, script=SCORE, **UNSET).out[1] == done.lines("^final_.*_exact")[0]
        npz = scores(run(f"out/{NPZ}.1", script=SCORE, **UNSET).out)
        assert npz[1:3] == scores(first.lines("^step:2/2 val_loss"))

    def test_log_counts_below_its_last_source_and_for_declared_settings(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "environ", {})
        head = 'overrides:{overrides(args)}"""\n' + "=" * 100 + "\nPython 3\nMLX 1\n" + "=" * 100 + "\niterations:1\n"
        (log := tmp_path / "r.txt").write_text(f"{head}overrides:SEED=4\n{head}overrides:PATH=/x SEED=2 RUN_ID='a b'\n")
        score.import_script(SCRIPT, log)
        assert os.environ == {"SEED": "2", "RUN_ID": "a b"}

    def test_fork_is_scored_by_its_own_script_and_nothing_is_written(self, run, tmp_path):
        source = SCRIPT.read_text(encoding="utf-8").replace("    # memory\n", "    shift: float = 0.0\n    # memory\n")
        (fork := tmp_path / "my-fork.py").write_text(source.replace("loss_sum / num_tokens\n", "args.shift\n"))
        done = run(script=(str(fork),), shift=3.0, **SIZES)
        before = sorted(tmp_path.rglob("*")), snapshot(tmp_path)
        again = run(str(done.folder / INT8), "--script", str(fork), script=SCORE, pythondontwritebytecode=None, **UNSET)
        assert again.out[1] == done.lines("^final_.*_exact val_loss:3.00000000")[0]
        assert (sorted(tmp_path.rglob("*")), snapshot(tmp_path)) == before

    def test_ctrl_c_ends_it(self, run, tmp_path):
        (tmp_path / "fork.py").write_text("raise KeyboardInterrupt")
        for tool in (SCORE, (str(REPO / "logs/sample.py"),)):
            assert run("fork.py", "--script", "fork.py", script=tool).code == 130


@pytest.fixture
def path(data, tmp_path, monkeypatch):
    """Where a test puts its int8 file. The environment has the settings of its model."""
    monkeypatch.setattr(os, "environ", environment(data, tmp_path, **SIZES))
    return tmp_path / INT8


def weights() -> dict[str, mx.array]:
    return dict(tg.tree_flatten(tg.build_model(tg.Hyperparameters()).state))


def stored(**passthrough) -> dict:
    """What a run pickles, with some arrays replaced."""
    obj = tg.quantize_state_dict_int8(weights())[0]
    return obj | {"passthrough": obj["passthrough"] | passthrough}


def written(path, obj):
    """The path of a new int8 file. Bytes are taken for a pickle."""
    path.write_bytes(zlib.compress(obj if isinstance(obj, bytes) else pickle.dumps(obj, 5), 1))
    return path


def outcome(capsys, path) -> str:
    """What is printed for a file: a score, or one line of error."""
    code, shown = score.main([str(path)]), capsys.readouterr()
    assert (code, shown.out.count("\n")) in ((0, 2), (2, 0))
    assert code == 0 or (shown.err.startswith(f"error: {path}: ") and shown.err[:-1].isprintable())
    return shown.out + shown.err


def call(*reduced) -> object:
    """What is pickled as a call: the function, its arguments, and perhaps a state for the result."""
    return type("Call", (), {"__reduce__": lambda self: reduced})()


def array(buffer=b"\0\0\0?" * 2, dtype=F4, shape=(2,), order="C") -> object:
    """An array as NumPy pickles it, of whatever parts."""
    return call(np._core.numeric._frombuffer, (buffer, dtype, shape, order))


class TestFiles:
    def test_float64_and_the_names_of_numpy_1_are_read(self, path):
        raw = pickle.dumps(stored(**{GAIN: np.full(2, 1.25)}), 5).replace(b"\x13numpy._core", b"\x12numpy.core")
        assert score.read_model(tg, written(path, raw), weights())[GAIN].tolist() == [1.25, 1.25]

    def test_plain_data_is_read(self):
        data = {"a": [1, -(2**20), 2.5, "é", b"", None, True, False, []], "b": {"c": {}}}
        assert score.unpickle(pickle.dumps(data, 5)) == data

    def test_bfloat16_in_an_npz_is_read(self, path):
        mx.savez(str(path.with_name(NPZ)), **{name: array.astype(mx.bfloat16) for name, array in weights().items()})
        state = score.read_model(tg, path.with_name(NPZ), weights())
        assert all(mx.array_equal(state[name], array.astype(mx.bfloat16)) for name, array in weights().items())

    def test_another_model_is_refused_by_what_differs(self, path, capsys):
        mx.savez(str(path.with_name(NPZ)), **weights())
        written(path, stored())
        os.environ.update(NUM_HEADS="4", NUM_KV_HEADS="2")
        for file, part in ((path, "passthrough"), (path.with_name(NPZ), "weights")):
            assert f"has {part} {GAIN} float (2,), lacks {part} {GAIN} float (4,)" in outcome(capsys, file)

    def test_what_is_no_model_is_refused(self, path, capsys):
        assert "format tag" in outcome(capsys, written(path, stored() | {"__quant_format__": "int8_v2"}))
        shown = outcome(capsys, written(path, stored(**{"x\x1b\n" * 999: np.ones(1)})))
        assert "has passthrough x\\x1b" in shown and len(shown) < 1200
        assert "AttributeError: " in outcome(capsys, written(path, 3))
        assert "val_loss is nan" in outcome(capsys, written(path, stored(**{GAIN: np.full(2, np.nan)})))
        np.savez(path.with_name(NPZ), **{name: np.array([call(os.abort, ())], object) for name in weights()})
        assert "allow_pickle=False" in outcome(capsys, path.with_name(NPZ))
        np.savez_compressed(path.with_name(NPZ), x=np.zeros(10**8, np.float32))
        assert "larger than a model of these settings" in outcome(capsys, path.with_name(NPZ))
        os.environ.update(SEED="-1", ITERATIONS="-1")
        assert "ITERATIONS=-1: must be at least 0; SEED=-1: must be at least 0" in outcome(capsys, path)
        assert "No such file" in outcome(capsys, path.with_name("none.npz"))

    @pytest.mark.parametrize("protocol", range(6))
    def test_code_is_not_run(self, path, capsys, tmp_path, protocol):
        raw = pickle.dumps(call(os.mkdir, (str(tmp_path / "it ran"),)), protocol)
        assert ("it would run posix.mkdir" if protocol >= 4 else "no run writes") in outcome(capsys, written(path, raw))
        assert not (tmp_path / "it ran").exists()
        pickle.loads(raw)
        assert (tmp_path / "it ran").exists(), "the attack would not have worked"

    @pytest.mark.parametrize("name", ["builtins.eval", "numpy.ndarray", "xnumpy.dtype", "numpy.core.x._frombuffer"])
    def test_other_names_are_refused(self, path, capsys, name):
        names = b"".join(b"\x8c%c%s" % (len(part), part.encode()) for part in name.rsplit(".", 1))
        assert f"it would run {name}" in outcome(capsys, written(path, b"\x80\x05" + names + b"\x93)R."))

    def test_crafted_pickles_are_refused_without_a_crash(self, path):
        dtypes = [np.dtype(code) for code in ("O", ">f4", "c8", "S4", "M8[s]", "i4")] + [None, ["f4"]]
        for state in (None, {"x": 1}, (3,), (3, "|"), (3, "|", None, None, None, -1, -1, 63)):  # flags of pointers
            dtypes += [call(np.dtype, (code, False, True), state) for code in ("O", "V4", "f3")]
        items = [array(dtype=dtype) for dtype in dtypes]
        items += [array(shape=shape) for shape in ("x", (3,), (), (10**12,), (2**62, 4), ((2,),), (1,) * 100)]
        items += [array(buffer) for buffer in ("12345678", [1], None, b"", b"123")] + [array(order="x"), "x", [0.5] * 2]
        unfolded = [1.0]
        for _ in range(60):
            unfolded = [unfolded, unfolded]
        nested = b"})" + b"\x85" * 500_000 + b"Ns."  # a key that crashes Python
        raws = [nested, b"", b".", b"N.", b"(.", b"s.", b"R.", b"h\x05.", b"\x94.", b"b.", b"]K\x01b.", b"}(K\x01u."]
        objects = [stored(**{GAIN: item}) for item in (array(), *items)] + [stored(x=unfolded), *raws, [1], 3, {}]
        paths = [str(written(path.with_name(f"{i}.int8.ptz"), obj)) for i, obj in enumerate(objects)]
        code = "import score, sys; print([score.main([path]) for path in sys.argv[1:]])"
        options = dict(cwd=REPO / "logs", env=os.environ, capture_output=True, text=True, timeout=120)
        done = subprocess.run([sys.executable, "-c", code, *paths], **options)
        assert done.stdout.splitlines()[-1] == f"{[0] + [2] * (len(paths) - 1)}", done.stderr  # only the first is whole
        assert [line.split(": ")[:2] for line in done.stderr.splitlines()] == [["error", path] for path in paths[1:]]

    @pytest.mark.parametrize("unit", [b"\0", b"]", b"(", b"]q\1", b""])
    def test_bombs_take_little_memory(self, path, capsys, unit):
        unit = unit or pickle.dumps(array(dtype=[np.ones((20000, 1)), 0, 0, [0, np.ones((1, 20000))]]), 5)  # 3 GB
        path.write_bytes(zlib.compress(unit * (10 ** (8 if unit == b"\0" else 7) // len(unit)), 1))
        tracemalloc.start()
        assert outcome(capsys, path).startswith("error: ")
        assert tracemalloc.get_traced_memory()[1] < 2e8
        tracemalloc.stop()

    @pytest.mark.parametrize("kind", ["int8", "pickle", "npz"])
    def test_damaged_files_are_refused_or_scored(self, path, capsys, kind):
        raw, rng = pickle.dumps(stored(), 5), np.random.default_rng(0)
        file = path.with_name(NPZ) if kind == "npz" else written(path, raw)
        mx.savez(str(path.with_name(NPZ)), **weights())
        whole, start = (raw, raw.index(b"scales")) if kind == "pickle" else (file.read_bytes(), 0)
        for position in [start, len(whole) - 1, *rng.integers(start, len(whole), size=25).tolist()]:
            for damaged in (whole[:position], whole[:position] + rng.bytes(1) + whole[position + 1 :]):
                file.write_bytes(zlib.compress(damaged, 1) if kind == "pickle" else damaged)
                assert outcome(capsys, file).startswith("error: ") or len(damaged) == len(whole)
