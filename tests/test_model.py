"""The model: initial values bit for bit, the forward pass and the loss against NumPy, gradients, and attention."""

import functools
import math
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import train_gpt_mlx as tg
from helpers import build_model, settings, stir, to_numpy

MODELS = [
    {},
    {"num_layers": 1, "num_kv_heads": 1, "tied_embed_init_std": 0.1, "seed": 7},
    {"num_layers": 4, "mlp_mult": 3, "qk_gain_init": 0.7, "rope_base": 50.0, "logit_softcap": 2.0},
]


def redraw(args) -> dict[str, mx.array]:
    """The initial parameters, drawn with MLX's own layers in the order that the baseline draws them."""
    mx.random.seed(args.seed)
    dim, kv_dim = args.model_dim, args.model_dim // args.num_heads * args.num_kv_heads
    hidden = dim * args.mlp_mult
    nn.Embedding(args.vocab_size, dim)
    params = {"skip_weights": mx.ones((args.num_layers // 2, dim))}
    for block in (f"blocks.{i}" for i in range(args.num_layers)):
        params[f"{block}.attn.c_q.weight"] = nn.Linear(dim, dim, bias=False).weight
        params[f"{block}.attn.c_k.weight"] = nn.Linear(dim, kv_dim, bias=False).weight
        params[f"{block}.attn.c_v.weight"] = nn.Linear(dim, kv_dim, bias=False).weight
        params[f"{block}.attn.proj.weight"] = mx.zeros_like(nn.Linear(dim, dim, bias=False).weight)
        params[f"{block}.mlp.fc.weight"] = nn.Linear(dim, hidden, bias=False).weight
        params[f"{block}.mlp.proj.weight"] = mx.zeros_like(nn.Linear(hidden, dim, bias=False).weight)
        params[f"{block}.attn.q_gain"] = mx.full((args.num_heads,), args.qk_gain_init)
        params[f"{block}.attn_scale"] = params[f"{block}.mlp_scale"] = mx.ones((dim,))
        params[f"{block}.resid_mix"] = mx.concatenate([mx.ones((1, dim)), mx.zeros((1, dim))])
    embedding = mx.random.normal((args.vocab_size, dim)) * args.tied_embed_init_std
    return {**params, "tok_emb.weight": embedding.astype(tg.COMPUTE_DTYPE)}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_initial_parameters_bit_for_bit(monkeypatch, dtype, changes):
    monkeypatch.setattr(tg, "COMPUTE_DTYPE", dtype)
    args = settings(**changes)
    state, expected = dict(tree_flatten(build_model(args).state)), redraw(args)
    assert state.keys() == expected.keys()
    for name, array in state.items():
        assert array.dtype == (dtype if name == "tok_emb.weight" else mx.float32), name
        assert array.shape == expected[name].shape, name
        assert mx.array_equal(array, expected[name]), name


@pytest.mark.parametrize(("layers", "encoder", "decoder"), [(1, 0, 1), (2, 1, 1), (9, 4, 5)])
def test_the_first_half_of_the_layers_is_the_encoder(layers, encoder, decoder):
    model = build_model(settings(num_layers=layers))
    assert (model.num_encoder_layers, model.num_decoder_layers, model.num_skip_weights) == (encoder, decoder, encoder)
    assert (len(model.blocks), model.skip_weights.shape) == (layers, (encoder, 16))


# The forward pass in NumPy, float64, written from the description.


def np_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def np_rope(x, base):
    """Turn channel i with channel i + head_dim / 2 of x, (batch, heads, seq, head_dim)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def np_causal_attention(q, k, v, scale):
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.where(np.tri(q.shape[2], dtype=bool), q @ k.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def np_block(p, x, x0, args):
    x = p["resid_mix"][0] * x + p["resid_mix"][1] * x0
    batch, seq, dim = x.shape
    q, k, v = (
        (np_norm(x) @ p[f"attn.{name}.weight"].T).reshape(batch, seq, -1, dim // args.num_heads).swapaxes(1, 2)
        for name in ("c_q", "c_k", "c_v")
    )
    q = np_rope(np_norm(q), args.rope_base) * p["attn.q_gain"][:, None, None]
    y = np_causal_attention(q, np_rope(np_norm(k), args.rope_base), v, (dim // args.num_heads) ** -0.5)
    x = x + p["attn_scale"] * (y.swapaxes(1, 2).reshape(batch, seq, dim) @ p["attn.proj.weight"].T)
    hidden = np.maximum(np_norm(x) @ p["mlp.fc.weight"].T, 0) ** 2
    return x + p["mlp_scale"] * (hidden @ p["mlp.proj.weight"].T)


def np_loss(params, ids, targets, args):
    x = x0 = np_norm(params["tok_emb.weight"][ids])
    outputs, num_encoder = [], args.num_layers // 2
    for i in range(args.num_layers):
        if num_encoder <= i < 2 * num_encoder:
            x = x + params["skip_weights"][i - num_encoder] * outputs[2 * num_encoder - 1 - i]
        prefix = f"blocks.{i}."
        block = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
        x = np_block(block, x, x0, args)
        outputs.append(x)
    logits = args.logit_softcap * np.tanh(np_norm(x) @ params["tok_emb.weight"].T / args.logit_softcap)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, targets[..., None], -1).mean()


def stirred(**changes):
    """Settings, a model with arbitrary weights, these weights, and ids with targets, (2, 11) each."""
    args = settings(**changes)
    model = build_model(args)
    stir(model)
    ids, targets = np.random.default_rng(1).integers(0, 64, (2, 2, 11))
    return args, model, {key: to_numpy(value) for key, value in tree_flatten(model.parameters())}, ids, targets


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_the_loss_equals_numpys(changes):
    args, model, params, ids, targets = stirred(**changes)
    loss = model.loss(mx.array(ids), mx.array(targets))
    assert (loss.dtype, loss.shape) == (mx.float32, ())
    assert loss.item() == pytest.approx(np_loss(params, ids, targets, args), rel=1e-5)


def test_gradients_of_the_loss_equal_finite_differences():
    args, model, params, ids, targets = stirred(num_layers=2)
    _, grads = nn.value_and_grad(model, model.loss)(mx.array(ids), mx.array(targets))
    for name, grad in tree_flatten(grads):
        index = tuple(size // 2 for size in grad.shape)
        losses = []
        for delta in (-1e-5, 1e-5):
            moved = {**params, name: params[name].copy()}
            moved[name][index] += delta
            losses.append(np_loss(moved, ids, targets, args))
        assert grad[index].item() == pytest.approx((losses[1] - losses[0]) / 2e-5, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("chunk", [1, 5, 21, 22, 100])
def test_logits_in_chunks_give_the_same_loss(chunk):
    _, model, _, ids, targets = stirred()
    whole = model.loss(mx.array(ids), mx.array(targets)).item()
    softcap, sizes = model.softcap, []
    model.softcap = lambda logits: sizes.append(len(logits)) or softcap(logits)
    model.logit_chunk_tokens = chunk
    assert model.loss(mx.array(ids), mx.array(targets)).item() == pytest.approx(whole, rel=1e-6)
    assert sizes == [min(chunk, 22 - start) for start in range(0, 22, chunk)]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_activations_are_in_the_compute_dtype_even_if_assigned_later(monkeypatch, dtype):
    _, model, _, ids, targets = stirred()
    monkeypatch.setattr(tg, "COMPUTE_DTYPE", dtype)
    assert model(mx.array(ids)).dtype == dtype
    softcap, dtypes = model.softcap, []
    model.softcap = lambda logits: dtypes.append(logits.dtype) or softcap(logits)
    assert model.loss(mx.array(ids), mx.array(targets)).dtype == mx.float32
    assert dtypes == [dtype]


def test_rms_norm_divides_by_the_root_mean_square():
    x = mx.array([[3.0, 4.0], [1e-3, 1e-3], [0.0, 0.0]])
    expected = [[3 / math.sqrt(12.5), 4 / math.sqrt(12.5)], [1 / math.sqrt(2), 1 / math.sqrt(2)], [0.0, 0.0]]
    np.testing.assert_allclose(np.array(tg.rms_norm(x)), expected, rtol=1e-6)
    np.testing.assert_allclose(np.array(tg.RMSNormNoWeight()(x)), expected, rtol=1e-6)
    assert tg.rms_norm(x, 1.0)[0, 0].item() == pytest.approx(3 / math.sqrt(13.5))
    assert tg.rms_norm(x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_a_casted_linear_multiplies_in_the_dtype_of_its_input():
    layer = tg.CastedLinear(in_dim=3, out_dim=2)
    layer.weight = mx.array([[1.0, 2.0, 3.0], [0.0, -1.0, 256.5]])
    assert layer(mx.ones((1, 3))).tolist() == [[6.0, 255.5]]
    y = layer(mx.ones((1, 3), dtype=mx.bfloat16))
    assert (y.dtype, y.tolist()) == (mx.bfloat16, [[6.0, 255.0]])  # 256.5 is 256 in bfloat16


def test_an_mlp_squares_the_relu():
    mlp = tg.MLP(dim=2, mlp_mult=2)
    mlp.fc.weight = mx.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])
    mlp.proj.weight = mx.array([[1.0, 10.0, 100.0, 1000.0], [0.0, 0.0, 0.0, 1.0]])
    assert mlp(mx.array([[2.0, -3.0]])).tolist() == [[4.0, 0.0]]
    assert mlp(mx.array([[1.0, 2.0]])).tolist() == [[1 + 40 + 9000, 9.0]]


def test_a_block_takes_the_names_that_other_scripts_use():
    block = tg.Block(dim=16, num_heads=4, num_kv_heads=2, mlp_mult=2, rope_base=1e4, qk_gain_init=1.5)
    attention = tg.CausalSelfAttention(dim=16, num_heads=4, num_kv_heads=2, rope_base=1e4, qk_gain_init=1.5)
    x = mx.random.normal((2, 3, 16))
    assert block(x, x).shape == attention(x).shape == x.shape


def test_a_replaced_mlp_is_used_by_the_whole_model(monkeypatch):
    _, model, _, ids, _ = stirred()
    before = model(mx.array(ids))
    monkeypatch.setattr(tg.MLP, "__call__", lambda self, x: mx.zeros_like(x))
    assert not mx.allclose(before, model(mx.array(ids)))


def test_the_parts_can_be_called_one_by_one():
    _, model, _, ids, _ = stirred(num_layers=1)
    x = tg.rms_norm(model.tok_emb(mx.array(ids)))
    assert mx.allclose(model.final_norm(model.blocks[0](x, x)), model(mx.array(ids)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_dim", 18), ("model_dim", 12), ("num_kv_heads", 3), ("logit_softcap", 0.0), ("logit_softcap", -1.0)],
)
def test_impossible_dimensions_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name.upper()}={value}"):
        build_model(settings(**{name: value}))


def queries_keys_values(seq: int, dtype=mx.float32) -> list[mx.array]:
    rng = np.random.default_rng(seq)
    return [mx.array(3 * rng.standard_normal((2, heads, seq, 6))).astype(dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("where", ["cpu linux", "cpu darwin", "metal darwin", "cuda linux"])
@pytest.mark.parametrize("seq", [1, 127, 128, 129, 300])
def test_attention_of_every_backend_equals_numpys(monkeypatch, where, seq):
    backend, platform = where.split()
    monkeypatch.setattr(tg, "backend", lambda: backend)
    monkeypatch.setattr(sys, "platform", platform)
    q, k, v = queries_keys_values(seq)
    expected = np_causal_attention(to_numpy(q), to_numpy(k), to_numpy(v), 0.3)
    np.testing.assert_allclose(to_numpy(tg.causal_attention(q, k, v, 0.3)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("cuda bfloat16", [300]),
        ("cuda float32", [128, 256, 300]),
        ("metal bfloat16", [128, 256, 300]),
        ("cpu float32", [128, 256, 300]),
    ],
)
def test_queries_come_in_blocks_unless_mlx_stores_no_scores(monkeypatch, where, keys):
    backend, dtype = where.split()
    calls = []
    monkeypatch.setattr(tg, "backend", lambda: backend)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **_: calls.append(k.shape[2]) or q)
    tg.causal_attention(*queries_keys_values(300, getattr(mx, dtype)), 0.3)
    assert calls == keys


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_gradients_of_attention_equal_mlxs(dtype):
    inputs = queries_keys_values(150, dtype)
    cotangent = mx.random.normal(inputs[0].shape, key=mx.random.key(1)).astype(dtype)
    _, ours = mx.vjp(lambda q, k, v: tg.causal_attention(q, k, v, 0.3), inputs, [cotangent])
    attend = functools.partial(mx.fast.scaled_dot_product_attention, scale=0.3, mask="causal")
    _, mlxs = mx.vjp(attend, inputs, [cotangent])
    for found, expected in zip(ours, mlxs, strict=True):
        tolerance = (1e-5 if dtype == mx.float32 else 3e-2) * np.abs(to_numpy(expected)).max()
        np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=tolerance)


def test_attention_survives_large_scores():
    q, k, v = (50 * x for x in queries_keys_values(140))
    assert mx.isfinite(tg.causal_attention(q, k, v, 1.0)).all()
