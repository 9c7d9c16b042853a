"""The SIMD helpers against NumPy in float64."""

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from blocks.kernels.numba_vector import LANES, clamp, fma, load, load_splat, splat, store, store_sums, tanh


@njit
def _apply_tanh(x, out):
    for i in range(0, x.size, LANES):
        store(out, i, tanh(load(x, i)))


@njit
def _arithmetic(a, b, c, out):
    x, y, z = load(a, 0), load(b, 0), load(c, 0)
    store(out, 0, x + y)
    store(out, LANES, x - y)
    store(out, 2 * LANES, x * y)
    store(out, 3 * LANES, fma(x, y, z))
    store(out, 4 * LANES, clamp(x, splat(np.float32(0.5))))
    store(out, 5 * LANES, load_splat(a, 3))
    store_sums(out, 6 * LANES, x, y, z, x * y)


def test_tanh_is_exact_to_4e_7_and_keeps_nan():
    x = np.concatenate([np.linspace(-12, 12, 16 * 4000), np.geomspace(1e-30, 1, 16 * 100)]).astype(np.float32)
    out = np.empty_like(x)
    _apply_tanh(x, out)
    assert np.abs(out - np.tanh(x.astype(np.float64))).max() < 4e-7
    assert np.abs(out).max() <= 1
    special = np.array([np.nan, np.inf, -np.inf, 0.0] * 4, dtype=np.float32)
    out = np.empty_like(special)
    _apply_tanh(special, out)
    assert np.isnan(out[0]) and abs(out[1] - 1) < 4e-7 and abs(out[2] + 1) < 4e-7 and out[3] == 0


def test_arithmetic_lane_by_lane():
    generator = np.random.default_rng(0)
    a, b, c = generator.standard_normal((3, LANES)).astype(np.float32)
    out = np.empty(6 * LANES + 4, np.float32)
    _arithmetic(a, b, c, out)
    x, y, z = (t.astype(np.float64) for t in (a, b, c))
    expected = np.concatenate([x + y, x - y, x * y, x * y + z, x.clip(-0.5, 0.5), np.full(LANES, x[3])])
    np.testing.assert_allclose(out[: 6 * LANES], expected, rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(out[6 * LANES :], [x.sum(), y.sum(), z.sum(), (x * y).sum()], rtol=1e-5, atol=2e-6)


def test_only_flat_contiguous_float32_can_be_read():
    @njit
    def read(x):
        store(x, 0, load(x, 0))

    for array in (np.zeros(32, np.float64), np.zeros((2, 16), np.float32), np.zeros(32, np.float32)[::2]):
        with pytest.raises(TypingError):
            read(array)
