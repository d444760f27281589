"""Loading models that others made: what is let in, what is refused and why, and that nothing in a file is run."""

from __future__ import annotations

import io
import os
import pickle
import resource
import sys
import zipfile
import zlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt_mlx as tg

PARAMS = {
    "tok_emb.weight": mx.ones((300, 256)), "blocks.0.attn.q_gain": mx.ones((4,)), "skip_weights": mx.ones((2, 8)),
    "steps": mx.array([3], dtype=mx.int32),
}  # fmt: skip


def stored(**changes) -> dict:
    """An object of the format for PARAMS, with some keys changed."""
    rng = np.random.default_rng(0)
    state = {name: mx.array(rng.standard_normal(p.shape).astype(np.float32)).astype(p.dtype)
             for name, p in PARAMS.items()}  # fmt: skip
    return {**tg.quantize_state_dict_int8(state)[0], **changes}


class Named:
    """Stands for a function or class by a name that need not exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """A pickler asks for something that can be called."""


class Call:
    """Is pickled as a call of what has this name."""

    def __init__(self, module: str, name: str, *args) -> None:
        self.reduced = Named(module, name), args

    def __reduce__(self):
        return self.reduced


class Pickler(pickle._Pickler):  # the one written in Python, which can be told how to write a name
    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 - as in the class it extends

    def save_named(self, obj: Named) -> None:
        self.save(obj.module)
        self.save(obj.name)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)

    dispatch[Named] = save_named


def pickled(obj, protocol: int = pickle.HIGHEST_PROTOCOL) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(obj)
    return buffer.getvalue()


def written(path, obj, protocol: int = pickle.HIGHEST_PROTOCOL):
    """The path, with the object written to it as a run writes it."""
    path.write_bytes(zlib.compress(pickled(obj, protocol), 9))
    return path


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(mx.array_equal(state[name], other[name]) for name in state)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x_mlx_model.int8.ptz"


def refusal(path) -> str:
    """The one line that refuses a file."""
    with pytest.raises(tg.InputError) as caught:
        tg.load_flat_state(path, PARAMS)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_what_a_run_writes_is_read_back(path, protocol):
    obj = stored()
    assert same(tg.load_flat_state(written(path, obj, protocol), PARAMS), tg.dequantize_state_dict_int8(obj))


def test_every_kind_of_array_comes_back_as_numpy_would_bring_it(path):
    arrays = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(12, dtype=np.int16)[::2], "scalar": np.float32(1.5), "zero_d": np.array(2.5, np.float16),
        "bool": np.array([True, False]), "big_endian": np.arange(3, dtype=">i4"), "empty": np.zeros((0, 3), np.int8),
        "int64": np.array([2**40]), "uint8": np.arange(3, dtype=np.uint8), "plain": {"text": [1, (2.5, None)]}, "n": 3,
    }  # fmt: skip
    for protocol in (3, 4, 5):
        back = tg.unpickle(pickle.dumps(arrays, protocol=protocol))
        assert back.keys() == arrays.keys()
        for name, array in arrays.items():
            if isinstance(array, (np.ndarray, np.generic)):
                np.testing.assert_array_equal(back[name], array)
                assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape), name
            else:
                assert back[name] == array


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_both_names_that_numpy_gave_its_functions(core):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    made = [Call(f"{core}.numeric", "_frombuffer", array.tobytes(), array.dtype, array.shape, "C"),
            Call(f"{core}.multiarray", "scalar", array.dtype, array[:1, :1].tobytes())]  # fmt: skip
    data = pickled({"a": made[0], "b": made[1]})
    assert f"{core}.numeric".encode() in data
    back = tg.unpickle(data)
    np.testing.assert_array_equal(back["a"], array)
    assert back["b"] == 0.0


@pytest.mark.parametrize(
    ("module", "name"),
    [("posix", "system"), ("os", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"),
     ("subprocess", "Popen"), ("numpy", "load"), ("numpy", "fromfile"), ("numpy.core.multiarray", "frombuffer"),
     ("numpy.testing._private.utils", "runstring"), ("numpy", "ndarray_"), ("numpy", "ndarray.tofile"),
     ("xnumpy", "dtype"), ("copyreg", "_reconstructor"), ("numpy_core.multiarray", "_reconstruct"),
     ("collections", "OrderedDict"), ("mlx.core", "array")],
)  # fmt: skip
def test_anything_else_is_refused_by_name_and_not_run(path, tmp_path, module, name):
    marker = tmp_path / "it ran"
    obj = stored(extra=Call(module, name, f"touch '{marker}'"))
    assert f"it would run {module}.{name}: only NumPy arrays and plain containers" in refusal(written(path, obj))
    assert not marker.exists()


def test_what_a_file_says_reaches_the_terminal_as_plain_text(path):
    message = refusal(written(path, stored(extra=Call("x", "\n\x1b[31mé" + "y" * 10_000))))
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 3000


def test_a_real_attack_is_not_run(path, tmp_path):
    marker = tmp_path / "it ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    written(path, {"__quant_format__": tg.QUANT_FORMAT, "quantized": Attack()})
    assert "it would run posix.mkdir" in refusal(path)
    assert not marker.exists()
    pickle.loads(zlib.decompress(path.read_bytes()))
    assert marker.exists()  # it would have worked


@pytest.mark.parametrize("state", [(3, "|", None, None, None, -1, -1, 63), {"x": 1}, (None, {"code": "O"})], ids=str)
def test_dtypes_and_arrays_cannot_be_given_other_flags(path, state):
    """NumPy would take an object's flags from the file, and then the file's bytes for pointers."""

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("O", False, True), state

    array = Call("numpy.core.numeric", "_frombuffer", b"\1" * 8, Dtype(), (1,), "C")
    assert "is no model that can be scored" in refusal(written(path, stored(passthrough={"a": array})))


@pytest.mark.parametrize("dtype", ["O", "V8", "S4", "U2", "M8", "c8", "f16"])
def test_dtypes_that_are_no_numbers_of_a_model(dtype):
    with pytest.raises(tg.InputError, match="it has an array of dtype"):
        tg.unpickle(pickle.dumps({"a": np.zeros(2, dtype=dtype)}, protocol=4))


def peak_megabytes() -> float:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def test_bombs_take_no_memory(path, tmp_path):
    tg.load_flat_state(written(path, stored()), PARAMS)
    before = peak_megabytes()
    path.write_bytes(zlib.compress(bytes(300_000_000), 9))
    assert "it holds more than" in refusal(path)
    with path.open("wb") as file:
        file.truncate(5_000_000_000)  # sparse: it takes no room on the disk
    assert "it holds more than" in refusal(path)
    terabyte = (2**40).to_bytes(8, "little")
    for operation in (b"]r\x00\x00\x00\x01", b"]p16000000\n"):  # a memo table of 128 MB
        path.write_bytes(zlib.compress(b"\x80\x05" + operation + b"."))
        assert "it is a pickle bomb" in refusal(path)
    for operation in (b"]r\xff\xff\xff\x7f",  # and one of 34 GB
                      b"\x96" + terabyte, b"\x8e" + terabyte, b"\x8b\xff\xff\xff\x7f"):  # fmt: skip
        path.write_bytes(zlib.compress(b"\x80\x05" + operation + b"x."))
        refusal(path)
    huge = Call("numpy.core.numeric", "_frombuffer", b"1234", np.dtype("f4"), (10**12,), "C")
    refusal(written(path, stored(passthrough={"a": huge})))
    wide = {"quantized": {"tok_emb.weight": np.zeros((1, 40_000), np.int8)}, "dtypes": {"tok_emb.weight": "float32"},
            "scales": {"tok_emb.weight": np.zeros(40_000, np.float16)}}  # fmt: skip
    assert "scale for each row" in refusal(written(path, stored(**wide)))  # the product would have 1.6e9 elements
    shared: dict = {}
    for _ in range(60):  # 2**60 dicts, if each were made as often as it is named
        shared = {"a": shared, "b": shared}
    assert tg.load_flat_state(written(path, stored(extra=shared)), PARAMS).keys() == PARAMS.keys()
    many = dict.fromkeys(map(str, range(1000)), np.zeros((300, 256), np.int8))
    assert "it holds more than" in refusal(written(path, stored(quantized=many)))
    path.write_bytes(zlib.compress(b"\x80\x05" + b"]" * 600_000 + b"."))
    refusal(path)
    npz = tmp_path / "bomb.npz"
    with zipfile.ZipFile(npz, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(300_000_000))
    assert "it holds more than" in refusal(npz)
    assert peak_megabytes() - before < 330  # what the test itself compressed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"__quant_format__": "int6"}, "its format tag is not 'int8_clean_per_row_v1'"),
        ({"quantized": {}}, "tok_emb.weight is absent"),
        ({"passthrough": {}}, "and must be"),
        ({"scales": {}}, "tok_emb.weight"),
        ({"dtypes": {}}, "tok_emb.weight"),
        ({"dtypes": {"tok_emb.weight": "float8"}}, "float8"),
        ({"scales": {"tok_emb.weight": np.ones(299, np.float16)}}, "not an int8 array with a scale for each row"),
        ({"quantized": {"tok_emb.weight": np.ones((300, 256), np.int16)}}, "not an int8 array"),
        ({"quantized": {"tok_emb.weight": np.ones((256, 300), np.int8)}}, "not an int8 array"),
        ({"quantized": {"tok_emb.weight": 3}}, "int"),
        ({"quantized": 3}, "int"),
        ({"passthrough": "x"}, "str"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_object_that_is_not_of_this_model(path, change, message):
    assert message in refusal(written(path, stored(**change)))


def test_names_and_shapes_are_held_against_the_model(path):
    obj = stored()
    obj["passthrough"]["another"] = np.ones(3, np.float32)
    obj["passthrough"]["skip_weights"] = np.ones((2, 9), np.float16)
    obj["passthrough"]["steps"] = np.ones(1, np.float32)
    message = refusal(written(path, obj))
    assert "skip_weights is mlx.core.floating (2, 9) and must be mlx.core.floating (2, 8)" in message
    assert "steps is mlx.core.floating (1,) and must be mlx.core.int32 (1,)" in message
    assert "another is mlx.core.floating (3,) and must be absent" in message
    for name in list(obj["passthrough"]):
        del obj["passthrough"][name]
    assert "is absent and must be" in refusal(written(path, {**obj, "quantized": {}}))
    assert "; and 1 more" in refusal(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_float_type_is_welcome(path, dtype):
    """A bfloat16 model of a Mac is scored on Linux, where embeddings are float32."""
    obj = stored()
    obj["dtypes"]["tok_emb.weight"], obj["passthrough_orig_dtypes"] = dtype, {"skip_weights": dtype}
    obj["passthrough"]["blocks.0.attn.q_gain"] = obj["passthrough"]["blocks.0.attn.q_gain"].astype(np.float64)
    state = tg.load_flat_state(written(path, obj), PARAMS)
    assert state["tok_emb.weight"].dtype == state["skip_weights"].dtype == tg.MX_DTYPE_FROM_NAME[dtype]


def test_float64_fits_into_what_may_be_unpacked(path):
    rng = np.random.default_rng(0)  # does not compress
    obj = stored(quantized={}, scales={}, dtypes={})
    obj["passthrough"]["tok_emb.weight"] = rng.standard_normal((300, 256))
    assert tg.load_flat_state(written(path, obj), PARAMS)["tok_emb.weight"].dtype == mx.float32


def test_damaged_files(path, tmp_path):
    whole = written(path, stored()).read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "it is cut off" in refusal(path)
    path.write_bytes(b"hello")
    assert "incorrect header" in refusal(path)
    path.write_bytes(whole[:1000] + b"\0" * 50 + whole[1050:])
    refusal(path)
    written(path, [1, 2])
    refusal(path)
    assert "No such file" in refusal(tmp_path / "none.int8.ptz")
    assert "Is a directory" in refusal(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=8), st.booleans())
def test_damaged_pickles_are_refused_or_harmless(tmp_path_factory, position, patch, cut):
    raw = pickle.dumps(stored(), protocol=5)
    position %= len(raw)
    damaged = raw[:position] + patch + (b"" if cut else raw[position + len(patch) :])
    path = tmp_path_factory.mktemp("pickle", numbered=True) / "x.int8.ptz"
    path.write_bytes(zlib.compress(damaged, 1))
    try:
        state = tg.load_flat_state(path, PARAMS)
    except tg.InputError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert state.keys() == PARAMS.keys()


class TestNpz:
    """Weights as mlx.core.savez writes them."""

    @pytest.fixture
    def npz(self, tmp_path):
        return tmp_path / "x_mlx_model.npz"

    def test_is_read_back(self, npz):
        state = {name: (p * 2).astype(mx.bfloat16 if p.ndim == 2 else p.dtype) for name, p in PARAMS.items()}
        mx.savez(str(npz), **state)
        assert same(tg.load_flat_state(npz, PARAMS), state)

    def test_another_model(self, npz):
        mx.savez(str(npz), **{**PARAMS, "skip_weights": mx.ones((3, 8))})
        assert "skip_weights is mlx.core.floating (3, 8) and must be mlx.core.floating (2, 8)" in refusal(npz)

    def test_damaged(self, npz):
        mx.savez(str(npz), **PARAMS)
        whole = npz.read_bytes()
        for size in (0, 30, len(whole) // 2, len(whole) - 1):
            npz.write_bytes(whole[:size])
            refusal(npz)
        npz.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        assert "it is damaged" in refusal(npz)

    def test_entry_that_is_too_short(self, npz):
        mx.savez(str(npz), **PARAMS)
        with zipfile.ZipFile(npz) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(npz, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content[:-8])
        assert "is no model that can be scored" in refusal(npz)

    def test_pickled_objects_inside_are_not_run(self, npz):
        buffer = io.BytesIO()
        np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
        with zipfile.ZipFile(npz, "w") as archive:
            for name in PARAMS:
                archive.writestr(f"{name}.npy", buffer.getvalue())
        assert "is no model that can be scored" in refusal(npz)
