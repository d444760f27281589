"""The model: initial values bit for bit, the forward pass against NumPy, the loss, and what is refused."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import train_gpt_mlx as tg
from helpers import build_model, settings, stir, to_numpy


def redraw(args) -> dict[str, mx.array]:
    """The initial parameters, drawn again with MLX's own layers in the order the baseline draws them."""
    mx.random.seed(args.seed)
    dim, kv_dim = args.model_dim, args.model_dim // args.num_heads * args.num_kv_heads
    nn.Embedding(args.vocab_size, dim)
    params = {}
    for i in range(args.num_layers):
        for name, rows, cols in (
            ("attn.c_q", dim, dim), ("attn.c_k", kv_dim, dim), ("attn.c_v", kv_dim, dim), ("attn.proj", dim, dim),
            ("mlp.fc", dim * args.mlp_mult, dim), ("mlp.proj", dim, dim * args.mlp_mult),
        ):  # fmt: skip
            weight = nn.Linear(cols, rows, bias=False).weight
            params[f"blocks.{i}.{name}.weight"] = mx.zeros((rows, cols)) if name.endswith("proj") else weight
        params[f"blocks.{i}.attn.q_gain"] = mx.full((args.num_heads,), args.qk_gain_init)
        params[f"blocks.{i}.attn_scale"] = params[f"blocks.{i}.mlp_scale"] = mx.ones((dim,))
        params[f"blocks.{i}.resid_mix"] = mx.concatenate([mx.ones((1, dim)), mx.zeros((1, dim))])
    params["skip_weights"] = mx.ones((args.num_layers // 2, dim))
    embedding = mx.random.normal((args.vocab_size, dim), dtype=mx.float32) * args.tied_embed_init_std
    params["tok_emb.weight"] = embedding.astype(tg.COMPUTE_DTYPE)
    return params


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_layers": 1}, {"num_layers": 2}, {"num_layers": 4, "seed": 7, "mlp_mult": 3, "num_kv_heads": 4},
     {"num_kv_heads": 1, "qk_gain_init": 0.7, "tied_embed_init_std": 0.1}],
    ids=str,
)  # fmt: skip
def test_initial_parameters_bit_for_bit(monkeypatch, dtype, changes):
    monkeypatch.setattr(tg, "COMPUTE_DTYPE", dtype)
    args = settings(**changes)
    actual, expected = dict(tree_flatten(build_model(args).parameters())), redraw(args)
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        assert array.dtype == expected[name].dtype, name
        assert array.shape == expected[name].shape, name
        assert mx.array_equal(array, expected[name]), name


def test_state_holds_the_parameters_and_nothing_else():
    model = build_model(settings())
    assert {key for key, _ in tree_flatten(model.state)} == redraw(settings()).keys()


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder", "skips"), [(1, 0, 1, 0), (2, 1, 1, 1), (3, 1, 2, 1), (9, 4, 5, 4)]
)
def test_layer_counts(layers, encoder, decoder, skips):
    model = build_model(settings(num_layers=layers))
    assert (model.num_encoder_layers, model.num_decoder_layers, model.num_skip_weights) == (encoder, decoder, skips)
    assert len(model.blocks) == layers
    assert model.skip_weights.shape == (skips, 16)
    assert isinstance(model.blocks, list)


# --- the forward pass in NumPy, float64, written from the description


def np_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def np_rope(x, base):  # (batch, heads, seq, head_dim): channel i turns with channel i + head_dim / 2
    seq, half = x.shape[-2], x.shape[-1] // 2
    angle = np.arange(seq)[:, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * np.cos(angle) - second * np.sin(angle),
                           first * np.sin(angle) + second * np.cos(angle)], -1)  # fmt: skip


def np_attention(p, x, args):
    batch, seq, dim = x.shape
    head_dim = dim // args.num_heads

    def heads(weight, count):
        return (x @ weight.T).reshape(batch, seq, count, head_dim).transpose(0, 2, 1, 3)

    q = np_rope(np_norm(heads(p["attn.c_q.weight"], args.num_heads)), args.rope_base)
    k = np_rope(np_norm(heads(p["attn.c_k.weight"], args.num_kv_heads)), args.rope_base)
    v = heads(p["attn.c_v.weight"], args.num_kv_heads)
    q = q * p["attn.q_gain"][:, None, None]
    out = np.zeros_like(q)
    for h in range(args.num_heads):
        shared = h // (args.num_heads // args.num_kv_heads)
        scores = q[:, h] @ k[:, shared].transpose(0, 2, 1) / math.sqrt(head_dim)
        scores = np.where(np.tril(np.ones((seq, seq), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
    return out.transpose(0, 2, 1, 3).reshape(batch, seq, dim) @ p["attn.proj.weight"].T


def np_block(p, x, x0, args):
    x = p["resid_mix"][0] * x + p["resid_mix"][1] * x0
    x = x + p["attn_scale"] * np_attention(p, np_norm(x), args)
    hidden = np.maximum(np_norm(x) @ p["mlp.fc.weight"].T, 0) ** 2
    return x + p["mlp_scale"] * (hidden @ p["mlp.proj.weight"].T)


def np_hidden(params, ids, args):
    blocks = [{k.split(".", 2)[2]: v for k, v in params.items() if k.startswith(f"blocks.{i}.")}
              for i in range(args.num_layers)]  # fmt: skip
    x = x0 = np_norm(params["tok_emb.weight"][ids])
    outputs = []
    for i, p in enumerate(blocks):
        decoder = i - args.num_layers // 2
        if 0 <= decoder < args.num_layers // 2:
            x = x + params["skip_weights"][decoder] * outputs[args.num_layers // 2 - 1 - decoder]
        x = np_block(p, x, x0, args)
        outputs.append(x)
    return np_norm(x)


def np_loss(params, ids, targets, args):
    logits = np_hidden(params, ids, args) @ params["tok_emb.weight"].T
    logits = args.logit_softcap * np.tanh(logits / args.logit_softcap)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, targets[..., None], -1).mean()


MODELS = [
    {}, {"num_layers": 1}, {"num_layers": 2}, {"num_layers": 5}, {"num_kv_heads": 4}, {"num_kv_heads": 1},
    {"rope_base": 50.0, "mlp_mult": 3, "logit_softcap": 2.0},
]  # fmt: skip


@pytest.fixture(params=MODELS, ids=str)
def stirred(request):
    args = settings(**request.param)
    model = build_model(args)
    stir(model)
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, 64, (2, 11)), rng.integers(0, 64, (2, 11))
    return args, model, {k: to_numpy(v) for k, v in tree_flatten(model.parameters())}, ids, targets


def test_hidden_states_equal_numpys(stirred):
    args, model, params, ids, _ = stirred
    hidden = model(mx.array(ids))
    assert hidden.shape == (2, 11, 16)
    np.testing.assert_allclose(to_numpy(hidden), np_hidden(params, ids, args), rtol=2e-4, atol=2e-5)


def test_loss_equals_numpys(stirred):
    args, model, params, ids, targets = stirred
    loss = model.loss(mx.array(ids), mx.array(targets))
    assert loss.dtype == mx.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(np_loss(params, ids, targets, args), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 7, 21, 22, 100])
def test_logit_chunks_change_nothing(chunk):
    args = settings()
    ids, targets = mx.array(np.arange(22).reshape(2, 11)), mx.array(np.arange(22).reshape(2, 11) * 2)
    results = []
    for logit_chunk_tokens in (0, chunk):
        args.logit_chunk_tokens = logit_chunk_tokens
        model = build_model(args)
        stir(model)
        seen = []
        softcap = model.softcap
        model.softcap = lambda logits, seen=seen, softcap=softcap: seen.append(logits.shape) or softcap(logits)
        results.append((model.loss(ids, targets).item(), seen))
    (whole, whole_seen), (parts, parts_seen) = results
    assert parts == pytest.approx(whole, rel=1e-6)
    assert whole_seen == [(22, 64)]
    assert parts_seen == [(min(chunk, 22 - start), 64) for start in range(0, 22, chunk)]


def test_gradient_equals_a_finite_difference():
    args = settings(num_layers=2)
    model = build_model(args)
    stir(model)
    ids, targets = mx.array(np.arange(8)[None]), mx.array((np.arange(8)[None] * 5) % 64)
    _, grads = nn.value_and_grad(model, model.loss)(ids, targets)
    params = {k: to_numpy(v) for k, v in tree_flatten(model.parameters())}
    for name, grad in tree_flatten(grads):
        index = tuple(size // 2 for size in grad.shape)
        losses = []
        for delta in (-1e-5, 1e-5):
            moved = {**params, name: params[name].copy()}
            moved[name][index] += delta
            losses.append(np_loss(moved, np.array(ids), np.array(targets), args))
        assert grad[index].item() == pytest.approx((losses[1] - losses[0]) / 2e-5, rel=2e-3, abs=1e-5), name


def test_no_position_sees_a_later_token():
    model = build_model(settings())
    stir(model)
    ids = np.arange(12)[None]
    changed = ids.copy()
    changed[0, 7] = 40
    before, after = to_numpy(model(mx.array(ids))), to_numpy(model(mx.array(changed)))
    np.testing.assert_array_equal(before[0, :7], after[0, :7])
    assert np.abs(before[0, 7:] - after[0, 7:]).max(-1).min() > 1e-6


def test_untrained_model_is_its_bare_embedding():
    args = settings(vocab_size=64)
    model = build_model(args)
    ids = mx.array(np.arange(16).reshape(2, 8))
    x = np_norm(to_numpy(model.tok_emb.weight)[np.array(ids)])
    # With every projection zero, blocks add nothing, and the one skip connection doubles x.
    np.testing.assert_allclose(to_numpy(model(ids)), np_norm(2 * x), rtol=1e-4, atol=1e-5)
    assert model.loss(ids, ids).item() == pytest.approx(math.log(64), rel=0.02)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_activations_are_in_the_compute_dtype_and_weights_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(tg, "COMPUTE_DTYPE", dtype)
    model = build_model(settings())
    ids = mx.array(np.arange(8)[None])
    assert model(ids).dtype == dtype
    assert model.loss(ids, ids).dtype == mx.float32
    for name, param in tree_flatten(model.parameters()):
        assert param.dtype == (dtype if name == "tok_emb.weight" else mx.float32), name
    _, grads = nn.value_and_grad(model, model.loss)(ids, ids)
    assert grads["tok_emb"]["weight"].dtype == dtype


def test_compute_dtype_assigned_later_wins(monkeypatch):
    model = build_model(settings())
    ids = mx.array(np.arange(8)[None])
    monkeypatch.setattr(tg, "COMPUTE_DTYPE", mx.bfloat16)
    assert model(ids).dtype == mx.bfloat16
    softcap, seen = model.softcap, []
    model.softcap = lambda logits: seen.append(logits.dtype) or softcap(logits)
    assert model.loss(ids, ids).dtype == mx.float32
    assert seen == [mx.bfloat16]  # though the embedding is still float32


def test_bfloat16_forward_stays_near_float32(monkeypatch):
    model = build_model(settings())
    stir(model)
    ids, targets = mx.array(np.arange(16)[None]), mx.array(np.arange(16)[None] + 7)
    exact = model.loss(ids, targets).item()
    monkeypatch.setattr(tg, "COMPUTE_DTYPE", mx.bfloat16)
    assert model.loss(ids, targets).item() == pytest.approx(exact, rel=3e-2)
    assert model.loss(ids, targets).item() != exact


# --- the parts


def test_rms_norm_by_hand():
    x = mx.array([[3.0, 4.0], [0.0, 0.0]])
    expected = [[3 / math.sqrt(12.5 + 1e-6), 4 / math.sqrt(12.5 + 1e-6)], [0.0, 0.0]]
    np.testing.assert_allclose(np.array(tg.rms_norm(x)), expected, rtol=1e-6)
    np.testing.assert_allclose(np.array(tg.RMSNormNoWeight()(x)), expected, rtol=1e-6)
    assert tg.rms_norm(x, 1.0)[0, 0].item() == pytest.approx(3 / math.sqrt(13.5))
    assert tg.rms_norm(mx.full((4,), 1e-3))[0].item() == pytest.approx(1e-3 / math.sqrt(2e-6), rel=1e-5)
    assert tg.rms_norm(x.astype(mx.bfloat16)).dtype == mx.bfloat16
    assert tree_flatten(tg.RMSNormNoWeight().parameters()) == []


def test_casted_linear():
    layer = tg.CastedLinear(3, 2)
    assert layer.weight.shape == (2, 3)
    assert [key for key, _ in tree_flatten(layer.parameters())] == ["weight"]
    layer.weight = mx.array([[1.0, 2.0, 3.0], [0.0, -1.0, 256.5]])
    x = mx.array([[1.0, 1.0, 1.0]])
    assert layer(x).tolist() == [[6.0, 255.5]]
    y = layer(x.astype(mx.bfloat16))
    assert y.dtype == mx.bfloat16
    assert layer.weight.dtype == mx.float32
    assert y.tolist()[0][1] == 255.0  # 256.5 is 256 in bfloat16


def test_mlp_is_relu_squared():
    mlp = tg.MLP(2, 2)
    mlp.fc.weight = mx.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])
    mlp.proj.weight = mx.array([[1.0, 10.0, 100.0, 1000.0], [0.0, 0.0, 0.0, 1.0]])
    assert mlp(mx.array([[2.0, -3.0]])).tolist() == [[4.0, 0.0]]  # relu gives 2, 0, 0, 0
    assert mlp(mx.array([[1.0, 2.0]])).tolist() == [[1 + 40 + 9000, 9.0]]


def test_softcap():
    model = build_model(settings(logit_softcap=5.0))
    values = model.softcap(mx.array([0.0, 1.0, -1000.0, 1000.0]))
    np.testing.assert_allclose(np.array(values), [0.0, 5 * math.tanh(0.2), -5.0, 5.0], rtol=1e-6)


def test_replacing_a_part_reaches_the_whole_model(monkeypatch):
    model = build_model(settings())
    stir(model)
    ids = mx.array(np.arange(8)[None])
    before = model(ids)
    monkeypatch.setattr(tg.MLP, "__call__", lambda self, x: mx.zeros_like(x))
    assert not mx.allclose(before, model(ids))


def test_parts_can_be_called_one_by_one():
    model = build_model(settings(num_layers=1))
    stir(model)
    ids = mx.array(np.arange(8)[None])
    x = tg.rms_norm(model.tok_emb(ids))
    assert mx.allclose(model.final_norm(model.blocks[0](x, x)), model(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_dim": 18}, "MODEL_DIM=18.*NUM_HEADS=4"), ({"num_kv_heads": 3}, "NUM_HEADS=4.*NUM_KV_HEADS=3"),
     ({"model_dim": 12}, "even"), ({"logit_softcap": 0.0}, "LOGIT_SOFTCAP=0.0"),
     ({"logit_softcap": -1.0}, "LOGIT_SOFTCAP=-1.0")],
)  # fmt: skip
def test_impossible_dimensions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(settings(**changes))


def test_constructors_take_the_names_other_scripts_use():
    attention = tg.CausalSelfAttention(dim=16, num_heads=4, num_kv_heads=2, rope_base=1e4, qk_gain_init=1.5)
    assert attention.c_k.weight.shape == attention.c_v.weight.shape == (8, 16)
    assert attention.q_gain.tolist() == [1.5] * 4
    block = tg.Block(dim=16, num_heads=4, num_kv_heads=2, mlp_mult=2, rope_base=1e4, qk_gain_init=1.5)
    assert block.mlp.fc.weight.shape == (32, 16)
    assert tg.MLP(dim=4, mlp_mult=3).proj.weight.shape == (4, 12)
    assert tg.CastedLinear(in_dim=4, out_dim=2).weight.shape == (2, 4)


def attention_inputs(seq, heads=4, kv_heads=2, head_dim=6, dtype=mx.float32):
    rng = np.random.default_rng(seq)
    shapes = ((2, heads, seq, head_dim), (2, kv_heads, seq, head_dim), (2, kv_heads, seq, head_dim))
    return [mx.array((3 * rng.standard_normal(shape)).astype(np.float32)).astype(dtype) for shape in shapes]


def np_scores_attention(q, k, v, scale):
    q, k, v = (to_numpy(x) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.where(np.tri(q.shape[2], dtype=bool), q @ k.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


@pytest.mark.parametrize("where", ["cpu linux", "cpu darwin", "metal darwin", "cuda linux"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seq", [1, 127, 128, 129, 300])
def test_attention_of_every_backend_equals_numpys(monkeypatch, where, training, seq):
    """Each platform's way through the function, run here; blocks that end within, at and after the sequence's end."""
    monkeypatch.setattr(tg, "backend", lambda: where.split()[0])
    monkeypatch.setattr(tg.sys, "platform", where.split()[1])
    q, k, v = attention_inputs(seq)
    y = tg.causal_attention(q, k, v, 0.3, training)
    np.testing.assert_allclose(to_numpy(y), np_scores_attention(q, k, v, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "training", "lengths"),
    [("cuda bfloat16", True, [300]), ("cuda bfloat16", False, [300]), ("cuda float32", True, [128, 128, 44]),
     ("metal bfloat16", False, [300]), ("metal float32", False, [300]), ("metal bfloat16", True, [128, 128, 44]),
     ("cpu float32", True, [128, 128, 44]), ("cpu float32", False, [128, 128, 44])],
)  # fmt: skip
def test_queries_are_cut_into_blocks_where_scores_are_stored(monkeypatch, where, training, lengths):
    calls, fused = [], mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(tg, "backend", lambda: where.split()[0])
    monkeypatch.setattr(tg.sys, "platform", "darwin")
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention",
                        lambda *qkv, **settings: calls.append([x.shape[2] for x in qkv]) or fused(*qkv, **settings))
    tg.causal_attention(*attention_inputs(300, dtype=getattr(mx, where.split()[1])), 0.3, training)
    assert [rows for rows, _, _ in calls] == lengths
    assert [keys for _, keys, _ in calls] == [values for _, _, values in calls] == list(np.cumsum(lengths))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gradients_of_attention_equal_mlxs(dtype):
    inputs = attention_inputs(150, dtype=dtype)
    weight = mx.array(np.random.default_rng(1).standard_normal(inputs[0].shape).astype(np.float32))

    def gradients(attend):
        return mx.grad(lambda *qkv: (attend(*qkv).astype(mx.float32) * weight).sum(), argnums=(0, 1, 2))(*inputs)

    ours = gradients(lambda q, k, v: tg.causal_attention(q, k, v, 0.3, True))
    mlxs = gradients(lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal"))
    for a, b in zip(ours, mlxs, strict=True):
        assert a.dtype == dtype
        size = np.abs(to_numpy(b)).max()
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=(1e-5 if dtype == mx.float32 else 3e-2) * size)


def test_attention_survives_large_scores():
    q, k, v = (50 * x for x in attention_inputs(140))
    assert mx.isfinite(tg.softmax_attention(q, k, v, 1.0)).all().item()


def test_exp_below_is_exp_and_has_its_gradient():
    x = mx.array(np.linspace(-80, 0, 200).astype(np.float32))
    top = mx.array(3.0)
    np.testing.assert_allclose(np.array(tg.exp_below(x, top)), np.exp(np.array(x, dtype=np.float64) - 3), rtol=1e-5)
    np.testing.assert_array_equal(tg.exp_below(mx.array([-mx.inf]), top), [0.0])
    grad = mx.grad(lambda x: (tg.exp_below(x, top) * 2.0).sum())(x)
    np.testing.assert_allclose(np.array(grad), 2 * np.exp(np.array(x, dtype=np.float64) - 3), rtol=1e-5)
    assert mx.grad(lambda top: tg.exp_below(x, top).sum())(top).item() == 0.0
