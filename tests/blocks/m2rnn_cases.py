"""Random inputs of the M2RNN kernel, and a literal loop that shares nothing with it."""

import numba
import torch

# Numba's first kernel sets the OpenMP threads of the whole process, torch's too. Launch it here, at collection,
# before conftest asks torch for one thread.
numba.set_num_threads(1)

NAMES = ("q", "k", "v", "weight", "forget", "skip", "initial_state")


def make_inputs(batch=2, length=21, n_heads=4, n_q=1, n_k=2, key_dim=5, value_dim=3, dtype=torch.float64, seed=0):
    """q, k, v, weight, forget, skip, initial_state; weights near the identity, forget gates in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        normal(batch, length, n_q, key_dim),
        normal(batch, length, n_k, key_dim),
        normal(batch, length, n_heads, value_dim),
        torch.eye(value_dim, dtype=torch.float64) + 0.2 * normal(n_heads, value_dim, value_dim),
        torch.rand(batch, length, n_heads, generator=generator, dtype=torch.float64),
        normal(n_heads, value_dim),
        normal(batch, n_heads, key_dim, value_dim),
    )
    wide = torch.promote_types(dtype, torch.float32)
    return [t.to(dtype if i < 3 else wide) for i, t in enumerate(tensors)]


def random_starts(batch, length, share, seed=0):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def literal_loop(q, k, v, weight, forget, skip, initial_state, starts):
    """The recurrence as it is written in the paper, one row and one head at a time."""
    rows = []
    for b in range(v.shape[0]):
        heads, lasts = [], []
        for n in range(v.shape[2]):
            state, outputs = initial_state[b, n], []
            nq, nk = n * q.shape[2] // v.shape[2], n * k.shape[2] // v.shape[2]
            for t in range(v.shape[1]):
                state = state * 0 if starts[b, t] else state
                candidate = torch.tanh(state @ weight[n] + torch.outer(k[b, t, nk], v[b, t, n]))
                state = forget[b, t, n] * state + (1 - forget[b, t, n]) * candidate
                outputs.append(q[b, t, nq] @ state + skip[n] * v[b, t, n])
            heads.append(torch.stack(outputs))
            lasts.append(state)
        rows.append((torch.stack(heads, dim=1), torch.stack(lasts)))
    return torch.stack([y for y, _ in rows]), torch.stack([last for _, last in rows])


def run(kernel, inputs, starts, seed=1, **options):
    """y, last state and the gradients of all inputs under fixed random cotangents, in the order of NAMES."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y, last = kernel(*leaves[:6], starts, leaves[6], **options)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, last)]
    return [y.detach(), last.detach(), *torch.autograd.grad((y, last), leaves, cotangents)]


def relative_errors(found, expected):
    """Frobenius error of each tensor over its norm, by name. Inputs are of order one, and a gradient may be a small
    difference of such: the norm is never taken as less than an element of one would give."""
    names = ("y", "last", *NAMES)
    pairs = zip(names, found, expected, strict=True)
    return {
        n: float((a.double() - b.double()).norm() / b.double().norm().clamp(min=b.numel() ** 0.5)) for n, a, b in pairs
    }
