"""Newton-Schulz, Muon, the split between Muon and Adam, and gradient clipping, against NumPy."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import train_gpt_mlx as tg
from helpers import RECORDED, build_model, settings, stir, to_numpy, wave


def normal(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def np_newton_schulz(g: np.ndarray, steps: int, eps: float = 1e-7) -> np.ndarray:
    x = g.astype(np.float64) / (np.linalg.norm(g) + eps)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("case", RECORDED["ns"], ids=lambda case: f"{case['shape']}-{case['steps']}")
def test_recorded_newton_schulz(case):
    x = to_numpy(tg.zeropower_newtonschulz5(mx.array(wave(case["shape"], 1.3, 0.7)), case["steps"]))
    found = [x.sum(), (x**2).sum(), x.flat[0], x.flat[-1]]
    assert found == pytest.approx([case["sum"], case["sumsq"], case["first"], case["last"]], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 5)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_equals_numpys(shape, steps):
    g = normal(shape, 3)
    x = to_numpy(tg.zeropower_newtonschulz5(mx.array(g), steps))
    np.testing.assert_allclose(x, np_newton_schulz(g, steps), rtol=1e-3, atol=1e-5)


def test_newton_schulz_computes_in_float32_and_keeps_the_dtype():
    g = mx.array(wave((8, 12), 1.3, 0.7)).astype(mx.bfloat16)
    x = tg.zeropower_newtonschulz5(g, 5)
    assert x.dtype == mx.bfloat16
    assert mx.array_equal(x, tg.zeropower_newtonschulz5(g.astype(mx.float32), 5).astype(mx.bfloat16))


def test_newton_schulz_adds_eps_to_the_norm():
    assert tg.zeropower_newtonschulz5(mx.array([[1.0]]), 0, eps=1.0).item() == 0.5
    assert tg.zeropower_newtonschulz5(mx.array([[1e-7]]), 0).item() == pytest.approx(0.5)


@pytest.mark.parametrize("backend", ["cpu", "metal", "cuda"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_muon_equals_numpys(monkeypatch, backend, warmup):
    monkeypatch.setattr(tg, "backend", lambda: backend)
    args = settings(matrix_lr=0.3, muon_momentum=0.9, muon_momentum_warmup_start=0.5, muon_backend_steps=3)
    args.muon_momentum_warmup_steps = warmup
    shapes = {"tall": (6, 4), "wide": (4, 6), "also wide": (4, 6)}
    params = {key: normal(shape, i) for i, (key, shape) in enumerate(shapes.items())}
    buffers = {key: np.zeros(shape) for key, shape in shapes.items()}
    current = {key: mx.array(param) for key, param in params.items()}
    muon = tg.Muon([*shapes], current, args)
    for step in range(6):
        grads = {key: normal(shape, 10 * step + i) for i, (key, shape) in enumerate(shapes.items())}
        current = muon.step(current, {key: mx.array(g) for key, g in grads.items()}, step, 1.0 - 0.1 * step)
        momentum = 0.9 if step >= warmup else 0.5 + 0.4 * step / warmup
        for key, (rows, cols) in shapes.items():
            buffers[key] = momentum * buffers[key] + grads[key]
            update = np_newton_schulz(grads[key] + momentum * buffers[key], 3)
            params[key] = params[key] - 0.3 * (1.0 - 0.1 * step) * math.sqrt(max(1.0, rows / cols)) * update
            np.testing.assert_allclose(to_numpy(current[key]), params[key], rtol=1e-3, atol=1e-4)


def test_each_parameter_has_its_optimizer():
    split = tg.SplitOptimizers(build_model(settings()), settings())
    matrices = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj"]
    vectors = ["attn.q_gain", "attn_scale", "mlp_scale", "resid_mix"]
    assert split.embed_key == "tok_emb.weight"
    assert set(split.matrix_keys) == {f"blocks.{i}.{name}.weight" for i in range(3) for name in matrices}
    assert set(split.scalar_keys) == {"skip_weights", *(f"blocks.{i}.{name}" for i in range(3) for name in vectors)}


def test_control_patterns_move_matrices_from_muon_to_adam(monkeypatch):
    monkeypatch.setattr(tg, "CONTROL_TENSOR_NAME_PATTERNS", ("fc",))
    optimizers = tg.SplitOptimizers(build_model(settings(num_layers=1)), settings())
    assert "blocks.0.mlp.fc.weight" in optimizers.scalar_keys
    assert "blocks.0.resid_mix" in optimizers.matrix_keys
    assert "blocks.0.attn_scale" in optimizers.scalar_keys


def test_a_parameter_that_nobody_trains_is_refused():
    model = build_model(settings())
    model.my_head = mx.zeros((4, 4))
    with pytest.raises(ValueError, match="my_head"):
        tg.SplitOptimizers(model, settings())


def np_adam(param, grads, rates, beta1, beta2, eps):
    m = v = np.zeros_like(param)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        param = param - rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return param


def test_a_step_is_muons_for_matrices_and_adams_for_the_rest():
    args = settings(num_layers=2, tied_embed_lr=0.07, scalar_lr=0.02, beta1=0.8, beta2=0.7, adam_eps=1e-3)
    args.muon_momentum_warmup_steps = 2
    model = build_model(args)
    stir(model)
    optimizers = tg.SplitOptimizers(model, args)
    start = dict(tree_flatten(model.parameters()))
    grads = [{key: normal(p.shape, 100 * step + i) for i, (key, p) in enumerate(start.items())} for step in range(3)]
    muls = [1.0, 0.5, 0.25]
    muon, by_muon = tg.Muon(optimizers.matrix_keys, start, args), start
    for step, lr_mul in enumerate(muls):
        flat = {key: mx.array(g) for key, g in grads[step].items()}
        by_muon = muon.step(by_muon, flat, step, lr_mul)
        optimizers.step(model, tree_unflatten(list(flat.items())), step=step, lr_mul=lr_mul)
    for key, value in tree_flatten(model.parameters()):
        if key in optimizers.matrix_keys:
            expected = to_numpy(by_muon[key])
        else:
            rates = [(0.07 if key == "tok_emb.weight" else 0.02) * lr_mul for lr_mul in muls]
            expected = np_adam(to_numpy(start[key]), [g[key] for g in grads], rates, 0.8, 0.7, 1e-3)
        np.testing.assert_allclose(to_numpy(value), expected, rtol=1e-3, atol=1e-5, err_msg=key)


def test_what_is_replaced_before_the_first_step_counts():
    args = settings(num_layers=1)
    model = build_model(args)
    optimizers, before = tg.SplitOptimizers(model, args), dict(tree_flatten(model.parameters()))
    optimizers.muon = tg.Muon(optimizers.matrix_keys, before, args)
    args.tied_embed_lr = args.scalar_lr = 0.0
    optimizers.step(model, tree_map(mx.ones_like, model.parameters()), 0, 1.0)
    changed = {key for key, value in tree_flatten(model.parameters()) if not mx.array_equal(before[key], value)}
    assert changed == set(optimizers.matrix_keys)
    assert mx.array_equal(optimizers.muon.buffers["blocks.0.mlp.fc.weight"], mx.ones((32, 16)))


@pytest.mark.parametrize(("max_norm", "sums"), RECORDED["clip"], ids=str)
def test_recorded_clipping(max_norm, sums):
    bfloat16 = mx.array(wave((7,), 0.5, 0.1)).astype(mx.bfloat16)
    grads = {"a": mx.array(wave((4, 5), 0.3, 0.2)), "b": {"c": bfloat16}}
    clipped = dict(tree_flatten(tg.clip_grad_tree(grads, max_norm)))
    assert {key: to_numpy(g).sum() for key, g in clipped.items()} == pytest.approx(sums, rel=1e-5)
    assert (clipped["a"].dtype, clipped["b.c"].dtype) == (mx.float32, mx.bfloat16)


@pytest.mark.parametrize(("max_norm", "factor"), [(1.0, 0.2), (5.0, 1.0), (5.1, 1.0), (0.0, 1.0), (-1.0, 1.0)])
def test_gradients_are_scaled_down_to_the_largest_norm(max_norm, factor):
    clipped = tg.clip_grad_tree({"x": mx.array([3.0]), "y": [mx.array([[4.0, 0.0]])]}, max_norm)
    assert clipped["x"].item() == pytest.approx(3.0 * factor)
    assert clipped["y"][0].tolist()[0] == pytest.approx([4.0 * factor, 0.0])


def test_the_norm_is_summed_in_float64():
    grads = {"x": mx.array([4096.0] + [1.0] * 4096)}  # float32 would lose each 1 beside 2^24
    clipped = tg.clip_grad_tree(grads, 4096.0)["x"][0].item()
    assert clipped == pytest.approx(4096.0**2 / math.sqrt(4096.0**2 + 4096), rel=1e-7)
