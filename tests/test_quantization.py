"""The int8 format: arrays by hand, thresholds, dtypes, the way back, and the recorded arrays."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest

import train_gpt_mlx as tg
from helpers import RECORDED, wave


def test_constants_of_the_format():
    assert tg.INT8_KEEP_FLOAT_MAX_NUMEL == 65_536
    assert tg.INT8_KEEP_FLOAT_STORE_DTYPE is tg.INT8_PER_ROW_SCALE_DTYPE is np.float16
    assert (tg.INT8_CLIP_PERCENTILE, tg.INT8_CLIP_Q) == (99.99984, 99.99984 / 100.0)
    assert {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16} == tg.MX_DTYPE_FROM_NAME


def test_each_row_of_a_matrix_has_its_own_scale():
    q, scale = tg.quantize_float_array(mx.array([[254.0, -100.6, 2.0], [-12.7, 6.5, 0.0]]))
    assert (q.tolist(), q.dtype) == ([[127, -50, 1], [-127, 65, 0]], np.int8)
    assert (scale.tolist(), scale.dtype) == ([np.float16(2.0), np.float16(0.1)], np.float16)


@pytest.mark.parametrize("shape", [(6,), (3, 1, 2)])
def test_any_other_array_has_one_scale(shape):
    q, scale = tg.quantize_float_array(mx.array([254.0, -100.6, 2.0, -12.7, 6.5, 0.0]).reshape(shape))
    assert (q.ravel().tolist(), q.shape) == ([127, -50, 1, -6, 3, 0], shape)
    assert (scale.shape, scale.dtype) == ((), np.float32)
    assert scale == pytest.approx(2.0, rel=1e-5)


def test_only_the_scales_of_rows_have_a_floor():
    q, scale = tg.quantize_float_array(mx.full((2, 4), 0.01))
    assert (q.tolist(), scale.tolist()) == ([[1] * 4] * 2, [np.float16(1 / 127)] * 2)  # 0.01 / (1 / 127) = 1.27
    q, scale = tg.quantize_float_array(mx.full((8,), 0.01))
    assert (q.tolist(), scale) == ([127] * 8, pytest.approx(0.01 / 127))


def test_rows_round_by_the_scale_in_float32_not_the_stored_one():
    q, scale = tg.quantize_float_array(mx.array([[200.0, 200.0, 100.01]]))
    assert scale.tolist() == [1.5751953125]  # from 1.5748
    assert q.tolist() == [[127, 127, 64]]  # 100.01 / 1.5748 = 63.506, but 100.01 / 1.5752 = 63.490


def test_outliers_are_clipped_to_the_quantile():
    w = np.full((1, 2_000_000), 0.5, np.float32)
    w[0, 0] = -1000.0  # one in two million is beyond the quantile 0.9999984
    q, scale = tg.quantize_float_array(mx.array(w))
    assert scale.tolist() == [np.float16(1 / 127)]
    assert q[0, :2].tolist() == [-64, 64]


@pytest.mark.parametrize(
    ("shape", "scales"), [((5,), 1.0), ((0,), 1.0), ((2, 0, 2), 1.0), ((0, 3), []), ((2, 0), [np.float16(1 / 127)] * 2)]
)
def test_zero_and_empty_arrays(shape, scales):
    q, scale = tg.quantize_float_array(mx.zeros(shape))
    assert (q.shape, q.dtype, q.any(), scale.tolist()) == (shape, np.int8, False, scales)


@pytest.mark.parametrize(("size", "is_quantized", "payload"), [(65_536, False, 2 * 65_536), (65_537, True, 65_537 + 4)])
def test_only_arrays_of_more_than_65536_elements_are_quantized(size, is_quantized, payload):
    obj, stats = tg.quantize_state_dict_int8({"w": mx.ones((size,))})
    assert ("w" in obj["quantized"], "w" in obj["passthrough"]) == (is_quantized, not is_quantized)
    assert (stats["num_float_tensors"], stats["int8_payload_bytes"]) == (int(is_quantized), payload)


def test_optional_keys_are_left_out_when_empty():
    obj, _ = tg.quantize_state_dict_int8({"q_gain": mx.ones((3,)), "big_vector": mx.ones((70_000,))})
    assert sorted(obj) == ["__quant_format__", "dtypes", "passthrough", "quantized", "scales"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_small_arrays_are_stored_in_float16_and_control_tensors_in_float32(dtype):
    array, noted = mx.array([1.5, 0.1]).astype(tg.MX_DTYPE_FROM_NAME[dtype]), {}
    assert tg.keep_float_array("fc.weight", array, noted).dtype == np.float16
    assert tg.keep_float_array("q_gain", array, noted).dtype == np.float32
    assert noted == ({} if dtype == "float16" else {"fc.weight": dtype})


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_large_arrays_come_back_in_their_dtype_within_half_a_step(dtype):
    w = mx.array(wave((300, 300), 0.7, 0.3)).astype(dtype)
    back = tg.dequantize_state_dict_int8(tg.quantize_state_dict_int8({"w": w})[0])["w"]
    assert back.dtype == dtype
    assert mx.abs(back.astype(mx.float32) - w.astype(mx.float32)).max().item() < 0.5 / 127 + 2**-8


def test_the_way_back_multiplies_by_the_stored_scale_in_float32():
    obj = {"__quant_format__": "int8_clean_per_row_v1", "dtypes": {"m": "float32"}, "passthrough": {}}
    obj["quantized"] = {"m": np.array([[1, -2], [3, 127]], np.int8)}
    obj["scales"] = {"m": np.array([0.5, 0.1], np.float16)}
    tenth = float(np.float16(0.1))
    expected = [[0.5, -1.0], [3 * tenth, 127 * tenth]]
    np.testing.assert_allclose(np.array(tg.dequantize_state_dict_int8(obj)["m"]), expected, rtol=1e-6)


def recorded_state() -> dict[str, mx.array]:
    rows = np.linspace(0.001, 300, 512, dtype=np.float32)[:, None]
    arrays = {
        "tok_emb.weight": np.float32(0.02) * wave((300, 256), 0.37, 0.011),
        "blocks.0.attn.c_q.weight": np.float32(1.7) * wave((260, 256), 0.13, 0.73),
        "blocks.0.attn.c_k.weight": np.float32(0.5) * wave((128, 256), 0.29, 0.41),
        "blocks.0.mlp.fc.weight": wave((512, 256), 0.051, 0.2) * rows,
        "blocks.0.attn.q_gain": np.float32(1.5) + wave((8,), 0.9, 0.1),
        "blocks.0.resid_mix": wave((2, 256), 0.9, 0.1),
        "skip_weights": wave((2, 40000), 0.013, 0.07),
        "big_vector": np.float32(3.0) * wave((70000,), 0.017, 0.0),
        "zeros": np.zeros((300, 300), np.float32),
        "half": wave((33, 5), 0.2, 0.3).astype(np.float16),
        "cube": wave((41, 41, 41), 0.2, 0.3),
        "steps": np.array([3, 1, 4], np.int32),
    }
    state = {name: mx.array(array) for name, array in arrays.items()}
    return {**state, "tok_emb.weight": state["tok_emb.weight"].astype(mx.bfloat16)}


def fingerprint(array: np.ndarray) -> list:
    return [str(array.dtype), list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


def test_recorded_object_array_for_array():
    recorded = RECORDED["quant"]
    obj, stats = tg.quantize_state_dict_int8(recorded_state())
    assert stats == recorded["stats"]
    assert (obj["__quant_format__"], sorted(obj)) == (recorded["format"], recorded["keys"])
    for part in ("quantized", "scales", "passthrough"):
        assert {name: fingerprint(array) for name, array in obj[part].items()} == recorded[part]
    for part in ("dtypes", "qmeta", "passthrough_orig_dtypes"):
        assert obj[part] == recorded[part]


def test_recorded_way_back():
    state = tg.dequantize_state_dict_int8(tg.quantize_state_dict_int8(recorded_state())[0])
    assert state.keys() == RECORDED["quant"]["dequantized"].keys()
    for name, (dtype, shape, total) in RECORDED["quant"]["dequantized"].items():
        assert [str(state[name].dtype), list(state[name].shape)] == [f"mlx.core.{dtype}", shape], name
        assert state[name].astype(mx.float32).sum().item() == pytest.approx(total, rel=1e-5, abs=1e-3), name
