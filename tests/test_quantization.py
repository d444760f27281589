"""The int8 format: recorded arrays, a NumPy computation of its own, thresholds, dtypes and the way back."""

from __future__ import annotations

import hashlib
import pickle
import zlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import train_gpt_mlx as tg
from helpers import RECORDED, wave

f32 = np.float32


def recorded_state() -> dict[str, mx.array]:
    rows = np.linspace(0.001, 300, 512, dtype=f32)[:, None]
    return {
        "tok_emb.weight": mx.array(f32(0.02) * wave((300, 256), 0.37, 0.011)).astype(mx.bfloat16),
        "blocks.0.attn.c_q.weight": mx.array(f32(1.7) * wave((260, 256), 0.13, 0.73)),
        "blocks.0.attn.c_k.weight": mx.array(f32(0.5) * wave((128, 256), 0.29, 0.41)),
        "blocks.0.mlp.fc.weight": mx.array(wave((512, 256), 0.051, 0.2) * rows),
        "blocks.0.attn.q_gain": mx.array(f32(1.5) + wave((8,), 0.9, 0.1)),
        "blocks.0.resid_mix": mx.array(wave((2, 256), 0.9, 0.1)),
        "skip_weights": mx.array(wave((2, 40000), 0.013, 0.07)),
        "big_vector": mx.array(f32(3.0) * wave((70000,), 0.017, 0.0)),
        "zeros": mx.zeros((300, 300)),
        "half": mx.array(wave((33, 5), 0.2, 0.3)).astype(mx.float16),
        "cube": mx.array(wave((41, 41, 41), 0.2, 0.3)),
        "steps": mx.array([3, 1, 4], dtype=mx.int32),
    }


def fingerprint(array: np.ndarray) -> list:
    return [str(array.dtype), list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


def test_recorded_object_array_for_array():
    recorded = RECORDED["quant"]
    obj, stats = tg.quantize_state_dict_int8(recorded_state())
    assert stats == recorded["stats"]
    assert sorted(obj) == recorded["keys"]
    assert obj["__quant_format__"] == recorded["format"]
    for part in ("quantized", "scales", "passthrough"):
        assert all(type(array) is np.ndarray for array in obj[part].values())
        assert {name: fingerprint(array) for name, array in obj[part].items()} == recorded[part]
    for part in ("dtypes", "qmeta", "passthrough_orig_dtypes"):
        assert obj[part] == recorded[part]


def test_recorded_way_back_through_pickle_and_zlib():
    obj, _ = tg.quantize_state_dict_int8(recorded_state())
    obj = pickle.loads(zlib.decompress(zlib.compress(pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL), 9)))
    state = tg.dequantize_state_dict_int8(obj)
    assert state.keys() == RECORDED["quant"]["dequantized"].keys()
    for name, (dtype, shape, total) in RECORDED["quant"]["dequantized"].items():
        assert str(state[name].dtype) == f"mlx.core.{dtype}", name
        assert list(state[name].shape) == shape, name
        assert state[name].astype(mx.float32).sum().item() == pytest.approx(total, rel=1e-5, abs=1e-3), name


def by_hand(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The format's rule for one float32 array, element by element and in float64 but where it says float32."""

    def clip_of(values):
        ordered = np.sort(np.abs(values).astype(np.float64).ravel())
        if ordered.size == 0:
            return f32(0)
        position = 0.9999984 * (ordered.size - 1)
        low = int(position)
        high = min(low + 1, ordered.size - 1)
        return f32(ordered[low] + (position - low) * (ordered[high] - ordered[low]))

    if w.ndim == 2:
        clips = [clip_of(row) for row in w]
        scales = [max(f32(clip / f32(127)), f32(1 / 127)) for clip in clips]
        rows = [np.round(np.clip(row, -c, c) / s) for row, c, s in zip(w, clips, scales, strict=True)]
        q = np.array(rows).reshape(w.shape)
        scale = np.array(scales, dtype=np.float16)
    else:
        clip = clip_of(w)
        scale = np.array(clip / f32(127) if clip > 0 else 1.0, dtype=f32)
        q = np.round(np.clip(w, -clip, clip) / scale)
    return np.clip(q, -127, 127).astype(np.int8), scale


@settings(deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9),
                  elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)))  # fmt: skip
def test_quantized_arrays_follow_the_rule(w):
    q, scale = tg.quantize_float_array(mx.array(w))
    expected_q, expected_scale = by_hand(w)
    assert q.dtype == np.int8
    assert scale.dtype == expected_scale.dtype
    assert scale.shape == expected_scale.shape
    np.testing.assert_allclose(scale.astype(f32), expected_scale.astype(f32), rtol=2e-3 if w.ndim == 2 else 1e-6)
    # The quantile's last bit may differ, and move a value across a rounding boundary.
    assert np.abs(q.astype(int) - expected_q.astype(int)).max(initial=0) <= 1


def test_row_scales_have_a_floor_and_whole_tensor_scales_do_not():
    small = np.full((2, 4), 0.01, f32)
    q, scale = tg.quantize_float_array(mx.array(small))
    assert scale.dtype == np.float16
    assert scale.tolist() == [np.float16(1 / 127)] * 2
    assert q.tolist() == [[1] * 4] * 2  # 0.01 / (1/127) = 1.27
    q, scale = tg.quantize_float_array(mx.array(small.ravel()))
    assert (scale.dtype, scale.shape) == (f32, ())
    assert scale == pytest.approx(0.01 / 127)
    assert q.tolist() == [127] * 8


def test_rows_round_by_the_float32_scale_not_the_stored_one():
    w = np.zeros((1, 1000), f32)
    w[0, :2] = 200.0, 99.6  # scale 1.5748032, stored as 1.5751953
    q, scale = tg.quantize_float_array(mx.array(w))
    clip = np.quantile(np.abs(w[0]).astype(np.float64), 0.9999984)
    assert q[0, 0] == 127
    assert q[0, 1] == round(99.6 / (clip / 127))
    assert scale[0] == np.float16(clip / 127)


def test_outliers_are_clipped_at_the_quantile():
    w = np.ones((1, 2_000_000), f32)
    w[0, 0] = -1000.0  # one in two million is beyond the quantile 0.9999984, which interpolates between 1 and 1
    q, scale = tg.quantize_float_array(mx.array(w))
    assert scale[0] == np.float16(1 / 127)
    assert (q[0, 0], q[0, 1]) == (-127, 127)


def test_zero_and_empty_arrays():
    q, scale = tg.quantize_float_array(mx.zeros((5,)))
    assert (q.tolist(), scale.dtype, scale.tolist()) == ([0] * 5, f32, 1.0)
    for shape, scales in (((0,), 1.0), ((0, 3), []), ((2, 0), [np.float16(1 / 127)] * 2), ((2, 0, 2), 1.0)):
        q, scale = tg.quantize_float_array(mx.zeros(shape))
        assert (q.shape, q.dtype, scale.tolist()) == (shape, np.int8, scales)


@pytest.mark.parametrize(("size", "quantized"), [(65_535, False), (65_536, False), (65_537, True)])
def test_threshold_on_either_side(size, quantized):
    obj, stats = tg.quantize_state_dict_int8({"w": mx.ones((size,))})
    assert ("w" in obj["quantized"]) == quantized
    assert ("w" in obj["passthrough"]) != quantized
    assert stats["num_float_tensors"] == int(quantized)
    assert stats["int8_payload_bytes"] == (size + 4 if quantized else 2 * size)
    assert stats["baseline_tensor_bytes"] == 4 * size


def test_optional_keys_are_left_out_when_empty():
    obj, stats = tg.quantize_state_dict_int8({"q_gain": mx.ones((3,)), "n": mx.array([1], dtype=mx.int64)})
    assert sorted(obj) == ["__quant_format__", "dtypes", "passthrough", "quantized", "scales"]
    assert stats["num_nonfloat_tensors"] == 1
    obj, _ = tg.quantize_state_dict_int8({"v": mx.ones((70_000,))})
    assert "qmeta" not in obj


def test_small_arrays_keep_their_place_and_dtype():
    names = {"a.weight": mx.float32, "b.weight": mx.bfloat16, "c.weight": mx.float16, "x.q_gain": mx.bfloat16,
             "y.attn_scale": mx.float16}  # fmt: skip
    state = {name: mx.array([1.5, 0.1]).astype(dtype) for name, dtype in names.items()}
    state["mask"], state["big"] = mx.array([True, False]), mx.array([2**40], dtype=mx.int64)
    obj, _ = tg.quantize_state_dict_int8(state)
    stored = {name: str(array.dtype) for name, array in obj["passthrough"].items()}
    assert stored == {"a.weight": "float16", "b.weight": "float16", "c.weight": "float16", "x.q_gain": "float32",
                      "y.attn_scale": "float32", "mask": "bool", "big": "int64"}  # fmt: skip
    assert obj["passthrough_orig_dtypes"] == {"a.weight": "float32", "b.weight": "bfloat16"}
    back = tg.dequantize_state_dict_int8(obj)
    dtypes = {name: str(array.dtype).split(".")[-1] for name, array in back.items()}
    assert dtypes == {"a.weight": "float32", "b.weight": "bfloat16", "c.weight": "float16", "x.q_gain": "float32",
                      "y.attn_scale": "float32", "mask": "bool", "big": "int64"}  # fmt: skip
    assert back["mask"].tolist() == [True, False]
    assert back["big"].item() == 2**40
    assert back["a.weight"].tolist() == [1.5, float(np.float16(f32(0.1)))]


def test_keep_float_array_by_name(monkeypatch):
    noted = {}
    assert tg.keep_float_array("w", mx.array([0.1]), noted).dtype == np.float16
    monkeypatch.setattr(tg, "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS", ("w",))
    assert tg.keep_float_array("w", mx.array([0.1]), noted).dtype == np.float32
    assert noted == {"w": "float32"}


def test_way_back_multiplies_by_the_stored_scale_in_float32():
    obj = {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {"m": np.array([[1, -2], [3, 127]], np.int8), "t": np.array([[[5]], [[-7]]], np.int8)},
        "scales": {"m": np.array([0.5, 0.1], np.float16), "t": np.array(0.3, np.float32)},
        "dtypes": {"m": "float32", "t": "bfloat16"},
        "passthrough": {},
    }
    state = tg.dequantize_state_dict_int8(obj)
    tenth = float(f32(np.float16(0.1)))
    np.testing.assert_allclose(np.array(state["m"]), [[0.5, -1.0], [3 * tenth, 127 * tenth]], rtol=1e-6)
    assert state["t"].dtype == mx.bfloat16
    assert state["t"].shape == (2, 1, 1)
    np.testing.assert_allclose(np.array(state["t"].astype(mx.float32)).ravel(), [1.5, -2.1], rtol=1e-2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_large_arrays_come_back_in_their_dtype_within_half_a_step(dtype):
    w = mx.array(wave((300, 300), 0.7, 0.3)).astype(dtype)
    obj, _ = tg.quantize_state_dict_int8({"w": w})
    assert obj["dtypes"]["w"] == str(dtype).split(".")[-1]
    assert obj["qmeta"] == {"w": {"scheme": "per_row", "axis": 0}}
    back = tg.dequantize_state_dict_int8(obj)["w"]
    assert back.dtype == dtype
    assert mx.abs(back.astype(mx.float32) - w.astype(mx.float32)).max().item() < 0.55 / 127 + 0.01


def test_constants_of_the_format():
    assert tg.INT8_KEEP_FLOAT_MAX_NUMEL == 65_536
    assert tg.INT8_KEEP_FLOAT_STORE_DTYPE is np.float16
    assert tg.INT8_PER_ROW_SCALE_DTYPE is np.float16
    assert tg.INT8_CLIP_PERCENTILE == 99.99984
    assert tg.INT8_CLIP_Q == 99.99984 / 100.0
    assert {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16} == tg.MX_DTYPE_FROM_NAME
