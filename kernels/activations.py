"""The activations that kernels know, by name, with their first and second derivatives.

The formulas stand in triton_deq/reference/activations.py.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(a):
    """`1 / (1 + exp(−a))`"""
    return 1 / (1 + tl.exp(-a))


@triton.jit
def tanh(a):
    """By a polynomial near 0, where `1 − exp(−2|a|)` would cancel; the coefficients are those of Cephes."""
    size = tl.abs(a)
    e = tl.exp(-2 * size)
    far = (1 - e) / (1 + e)
    far = tl.where(a < 0, -far, far)
    if a.dtype == tl.float64:
        return far
    square = a * a
    series = 2.06390887954e-2 + square * -5.70498872745e-3
    series = -3.33332819422e-1 + square * (1.33314422036e-1 + square * (-5.37397155531e-2 + square * series))
    return tl.where(size < 0.625, a + a * square * series, far)


@triton.jit
def softplus(a):
    """`log(1 + exp(a))`, with Kahan's correction of log for the part of the sum that was rounded off."""
    e = tl.exp(-tl.abs(a))
    sum = 1 + e
    rest = sum - 1
    return tl.maximum(a, 0) + tl.where(rest == 0, e, tl.log(sum) * (e / tl.where(rest == 0, 1, rest)))


@triton.jit
def normal_cdf(a):
    """Φ(a)"""
    return 0.5 * (1 + tl.erf(a * 0.7071067811865476))


@triton.jit
def normal_density(a):
    """φ(a)"""
    return 0.3989422804014327 * tl.exp(-0.5 * a * a)


@triton.jit
def activate(a, ACTIVATION: tl.constexpr):
    """`act(a)`; the names are those of triton_deq/reference/mlp.py."""
    if ACTIVATION == "tanh":
        return tanh(a)
    elif ACTIVATION == "relu":
        return tl.where(a < 0, 0, a)  # NaN stays
    elif ACTIVATION == "gelu":
        return a * normal_cdf(a)
    elif ACTIVATION == "silu":
        return a * sigmoid(a)
    else:
        tl.static_assert(ACTIVATION == "softplus")
        return softplus(a)


@triton.jit
def activation_slope(a, ACTIVATION: tl.constexpr):
    """`act′(a)`"""
    if ACTIVATION == "tanh":
        value = tanh(a)
        return 1 - value * value
    elif ACTIVATION == "relu":
        return tl.where(a > 0, 1.0, 0.0).to(a.dtype)
    elif ACTIVATION == "gelu":
        return normal_cdf(a) + a * normal_density(a)
    elif ACTIVATION == "silu":
        logistic = sigmoid(a)
        return logistic * (1 + a * (1 - logistic))
    else:
        tl.static_assert(ACTIVATION == "softplus")
        return sigmoid(a)


@triton.jit
def activation_curvature(a, ACTIVATION: tl.constexpr):
    """`act″(a)`"""
    if ACTIVATION == "tanh":
        value = tanh(a)
        return -2 * value * (1 - value * value)
    elif ACTIVATION == "relu":
        return tl.zeros_like(a)
    elif ACTIVATION == "gelu":
        return normal_density(a) * (2 - a * a)
    elif ACTIVATION == "silu":
        logistic = sigmoid(a)
        return logistic * (1 - logistic) * (2 + a * (1 - 2 * logistic))
    else:
        tl.static_assert(ACTIVATION == "softplus")
        logistic = sigmoid(a)
        return logistic * (1 - logistic)
