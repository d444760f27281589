"""Newton-Schulz, Muon, the split between Muon and Adam, and gradient clipping, against NumPy."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import train_gpt_mlx as tg
from helpers import RECORDED, build_model, needs_compiler, settings, stir, to_numpy, wave


def np_newton_schulz(g, steps, eps=1e-7):
    x = g / (np.sqrt((g**2).sum()) + eps)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


@pytest.mark.parametrize("case", RECORDED["ns"], ids=lambda case: f"{case['shape']}-{case['steps']}")
def test_recorded_newton_schulz(case):
    x = to_numpy(tg.zeropower_newtonschulz5(mx.array(wave(case["shape"], 1.3, 0.7)), case["steps"]))
    found = [x.sum(), (x**2).sum(), x.flat[0], x.flat[-1]]
    assert found == pytest.approx([case["sum"], case["sumsq"], case["first"], case["last"]], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 5), (5, 1)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_equals_numpys(shape, steps):
    g = np.random.default_rng(3).standard_normal(shape)
    x = tg.zeropower_newtonschulz5(mx.array(g.astype(np.float32)), steps)
    assert x.dtype == mx.float32
    np.testing.assert_allclose(to_numpy(x), np_newton_schulz(g, steps), rtol=1e-3, atol=1e-5)


def test_newton_schulz_moves_singular_values_near_one():
    g = np.random.default_rng(4).standard_normal((16, 48)).astype(np.float32)
    values = np.linalg.svd(np.array(tg.zeropower_newtonschulz5(mx.array(g), 5)), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_newton_schulz_keeps_the_dtype_computes_in_float32_and_survives_zero():
    g = mx.array(wave((8, 12), 1.3, 0.7)).astype(mx.bfloat16)
    x = tg.zeropower_newtonschulz5(g, 5)
    assert x.dtype == mx.bfloat16
    exact = tg.zeropower_newtonschulz5(g.astype(mx.float32), 5).astype(mx.bfloat16)
    assert mx.array_equal(x, exact)
    assert tg.zeropower_newtonschulz5(mx.zeros((3, 4)), 5).tolist() == [[0.0] * 4] * 3
    assert tg.zeropower_newtonschulz5(mx.array([[1.0]]), 0, eps=1.0).item() == 0.5


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muon_equals_numpys(shape, warmup):
    args = settings(matrix_lr=0.3, muon_momentum=0.9, muon_momentum_warmup_start=0.5, muon_momentum_warmup_steps=warmup)
    rng = np.random.default_rng(5)
    param, buffer = rng.standard_normal(shape), np.zeros(shape)
    muon = tg.Muon(["w"], {"w": mx.array(param.astype(np.float32)), "other": mx.zeros((2,))}, args)
    current = mx.array(param.astype(np.float32))
    for step in range(6):
        g, lr_mul = rng.standard_normal(shape), 1.0 - 0.1 * step
        momentum = 0.9 if step >= warmup else 0.5 + 0.4 * step / warmup
        buffer = momentum * buffer + g
        update = np_newton_schulz(g + momentum * buffer, args.muon_backend_steps)
        param = param - 0.3 * lr_mul * math.sqrt(max(1.0, shape[0] / shape[1])) * update
        updated = muon.step({"w": current}, {"w": mx.array(g.astype(np.float32))}, step, lr_mul)
        assert list(updated) == ["w"]
        current = updated["w"]
        np.testing.assert_allclose(to_numpy(current), param, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(to_numpy(muon.buffers["w"]), buffer, rtol=1e-5, atol=1e-6)


def test_backend_steps_and_learning_rate_are_settings():
    args = settings(muon_backend_steps=2, matrix_lr=0.5, muon_momentum_warmup_steps=0, muon_momentum=0.0)
    g = wave((5, 5), 1.3, 0.7)
    muon = tg.Muon(["w"], {"w": mx.zeros((5, 5))}, args)
    updated = muon.step({"w": mx.zeros((5, 5))}, {"w": mx.array(g)}, 0, 1.0)["w"]
    np.testing.assert_allclose(to_numpy(updated), -0.5 * np_newton_schulz(g, 2), rtol=1e-3, atol=1e-5)


def test_stacks_of_a_gpu_and_single_matrices_of_a_cpu_are_updated_alike(monkeypatch):
    args = settings(num_layers=2)
    params = {k: v for k, v in tree_flatten(build_model(args).parameters()) if v.ndim == 2 and "blocks" in k}
    rng = np.random.default_rng(8)
    grads = {key: mx.array(rng.standard_normal(value.shape).astype(np.float32)) for key, value in params.items()}
    results, real = [], tg.zeropower_newtonschulz5
    for where in ("cpu", "cuda", "metal"):
        shapes = []
        monkeypatch.setattr(tg, "backend", lambda where=where: where)
        monkeypatch.setattr(tg, "zeropower_newtonschulz5", lambda g, *a, s=shapes: s.append(g.shape) or real(g, *a))
        results.append(tg.Muon(list(params), params, args).step(params, grads, 1, 1.0))
        # In each block: c_q, proj and resid_mix of other shapes, c_k and c_v, fc, mlp.proj.
        assert len(shapes) == (len(params) if where == "cpu" else len({value.shape for value in params.values()}))
        assert sum(shape[0] for shape in shapes) == len(params)
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        for key in params:
            np.testing.assert_allclose(to_numpy(results[0][key]), to_numpy(other[key]), rtol=1e-5, atol=1e-6)


def test_newton_schulz_of_a_stack_is_that_of_each():
    for shape in ((3, 8, 8), (2, 6, 20), (4, 20, 6)):
        g = mx.array(np.random.default_rng(9).standard_normal(shape).astype(np.float32))
        stack = tg.zeropower_newtonschulz5(g, 5)
        for i in range(shape[0]):
            np.testing.assert_allclose(to_numpy(stack[i]), to_numpy(tg.zeropower_newtonschulz5(g[i], 5)), atol=1e-6)


@needs_compiler
def test_step_is_traced_once_and_sees_momentum_rates_and_state_change(monkeypatch):
    """Compiled, it must not take for constants what changes from step to step."""
    args = settings(num_layers=1)
    traced, real = [], tg.Muon.step
    monkeypatch.setattr(tg.Muon, "step", lambda *a: traced.append(1) or real(*a))
    model, plain = build_model(args), build_model(args)
    compiled, uncompiled = tg.SplitOptimizers(model, args), tg.SplitOptimizers(plain, args)
    uncompiled.compiled_update = uncompiled.update
    rng = np.random.default_rng(10)
    for step, lr_mul in enumerate((1.0, 0.5, 0.1)):
        grads = tree_map(lambda p: mx.array(rng.standard_normal(p.shape).astype(np.float32)), model.parameters())
        compiled.step(model, grads, 200 * step, lr_mul)
        uncompiled.step(plain, grads, 200 * step, lr_mul)
        mx.eval(model.parameters(), plain.parameters())
    assert len(traced) == 1 + 3
    for (key, a), (_, b) in zip(tree_flatten(model.parameters()), tree_flatten(plain.parameters()), strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-5, err_msg=key)


def test_what_is_assigned_between_steps_is_not_ignored():
    """A rate, and before the first step an optimizer."""
    args = settings(num_layers=1)
    model = build_model(args)
    optimizers = tg.SplitOptimizers(model, args)
    optimizers.muon = tg.Muon(optimizers.matrix_keys, dict(tree_flatten(model.parameters())), args)
    grads = tree_map(mx.ones_like, model.parameters())
    optimizers.step(model, grads, 0, 1.0)
    assert mx.array_equal(optimizers.muon.buffers["blocks.0.mlp.fc.weight"], grads["blocks"][0]["mlp"]["fc"]["weight"])
    args.matrix_lr = args.scalar_lr = args.tied_embed_lr = 0.0
    before = dict(tree_flatten(model.parameters()))
    optimizers.step(model, grads, 1, 1.0)
    assert all(mx.array_equal(before[key], value) for key, value in tree_flatten(model.parameters()))
    args.matrix_lr = 0.1
    optimizers.step(model, grads, 2, 1.0)
    after = dict(tree_flatten(model.parameters()))
    moved = {key for key in before if not mx.array_equal(before[key], after[key])}
    assert moved == set(optimizers.matrix_keys)


def test_split_of_the_parameters():
    model = build_model(settings())
    optimizers = tg.SplitOptimizers(model, settings())
    assert optimizers.embed_key == "tok_emb.weight"
    matrices = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    assert optimizers.matrix_keys == [f"blocks.{i}.{name}.weight" for i in range(3) for name in matrices]
    vectors = ("attn.q_gain", "attn_scale", "mlp_scale", "resid_mix")
    assert optimizers.scalar_keys == ["skip_weights", *[f"blocks.{i}.{name}" for i in range(3) for name in vectors]]


def test_control_patterns_decide_between_muon_and_adam(monkeypatch):
    monkeypatch.setattr(tg, "CONTROL_TENSOR_NAME_PATTERNS", ("fc",))
    optimizers = tg.SplitOptimizers(build_model(settings(num_layers=1)), settings())
    assert "blocks.0.mlp.fc.weight" in optimizers.scalar_keys
    assert "blocks.0.resid_mix" in optimizers.matrix_keys  # 2-D, and no pattern keeps it from Muon any more
    assert "blocks.0.attn_scale" in optimizers.scalar_keys


def test_a_parameter_that_nobody_trains_is_refused():
    model = build_model(settings())
    model.my_head = mx.zeros((4, 4))
    model.blocks[1].conv = mx.zeros((2, 2, 2))
    with pytest.raises(ValueError, match=r"blocks\.1\.conv, my_head"):
        tg.SplitOptimizers(model, settings())


def np_adam(param, grads, rates, beta1, beta2, eps):
    m = v = np.zeros_like(param)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        param = param - rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return param


def test_split_step_equals_muon_and_adam():
    args = settings(num_layers=2, tied_embed_lr=0.07, scalar_lr=0.02, matrix_lr=0.03, beta1=0.8, beta2=0.7,
                    adam_eps=1e-3)  # fmt: skip
    model = build_model(args)
    stir(model)
    optimizers = tg.SplitOptimizers(model, args)
    start = {key: to_numpy(value) for key, value in tree_flatten(model.parameters())}
    muon = tg.Muon(optimizers.matrix_keys, dict(tree_flatten(model.parameters())), args)
    rng = np.random.default_rng(6)
    grads = [{key: rng.standard_normal(value.shape) for key, value in start.items()} for _ in range(3)]
    muls = [1.0, 0.5, 0.25]
    expected = dict(tree_flatten(model.parameters()))
    for step, (flat, lr_mul) in enumerate(zip(grads, muls, strict=True)):
        flat = {key: mx.array(g.astype(np.float32)) for key, g in flat.items()}
        expected.update(muon.step(expected, flat, step, lr_mul))
        optimizers.step(model, tree_unflatten(list(flat.items())), step, lr_mul)
    for key, value in tree_flatten(model.parameters()):
        if key in optimizers.matrix_keys:
            reference = to_numpy(expected[key])
        else:
            rate = 0.07 if key == "tok_emb.weight" else 0.02
            reference = np_adam(start[key], [g[key] for g in grads], [rate * m for m in muls], 0.8, 0.7, 1e-3)
        np.testing.assert_allclose(to_numpy(value), reference, rtol=1e-3, atol=1e-5, err_msg=key)
        assert not np.allclose(reference, start[key]), key


def test_step_takes_the_calls_that_other_scripts_make():
    args = settings()
    model = build_model(args)
    optimizers = tg.SplitOptimizers(model, args)
    grads = tree_map(mx.ones_like, model.parameters())
    optimizers.step(model, grads, step=0, lr_mul=1.0)
    assert all(mx.isfinite(value).all().item() for _, value in tree_flatten(model.parameters()))


def clip_input():
    return {"a": mx.array(wave((4, 5), 0.3, 0.2)), "b": {"c": mx.array(wave((7,), 0.5, 0.1)).astype(mx.bfloat16)}}


@pytest.mark.parametrize(("max_norm", "sums"), RECORDED["clip"], ids=str)
def test_recorded_clipping(max_norm, sums):
    clipped = dict(tree_flatten(tg.clip_grad_tree(clip_input(), max_norm)))
    assert {key: to_numpy(g).sum() for key, g in clipped.items()} == pytest.approx(sums, rel=1e-5)
    assert (clipped["a"].dtype, clipped["b.c"].dtype) == (mx.float32, mx.bfloat16)


def test_clipping_reaches_just_the_given_norm():
    grads = {"x": mx.array([3.0]), "y": [mx.array([[4.0, 0.0]])]}
    clipped = tg.clip_grad_tree(grads, 1.0)
    assert clipped["x"].item() == pytest.approx(0.6)
    assert clipped["y"][0].tolist()[0] == pytest.approx([0.8, 0.0])
    for max_norm in (5.0, 5.1, 0.0, -1.0):
        unchanged = tg.clip_grad_tree(grads, max_norm)
        assert (unchanged["x"].item(), unchanged["y"][0].tolist()) == (3.0, [[4.0, 0.0]])


def test_norm_is_summed_in_float64():
    # 2^24 + many ones: in float32 each one would be lost.
    grads = {"x": mx.array(np.concatenate([[4096.0], np.ones(4096)]).astype(np.float32))}
    clipped = tg.clip_grad_tree(grads, 4096.0)["x"][0].item()
    assert clipped == pytest.approx(4096.0**2 / math.sqrt(4096.0**2 + 4096), rel=1e-7)
