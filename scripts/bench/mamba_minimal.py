"""M against the mixer that people build around mamba-ssm's minimal reference, `ssd_minimal_discrete`."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blocks.mblock import Mamba2, Mamba2Config
from model.context import SequenceContext
from scripts.bench.harness import Row, forward_backward, interleave, print_row, random_input

CHUNK = 64


def ssd_minimal() -> Callable[..., Any]:
    """mamba-ssm's function, also where the CUDA extensions that its package imports were not built."""
    for name in ("mamba_ssm", "causal_conv1d"):
        found = importlib.util.find_spec(name)
        package = types.ModuleType(name)
        package.__path__ = list(found.submodule_search_locations or []) if found else []
        sys.modules[name] = package
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        extension = types.ModuleType(name)
        extension.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = extension
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete

    return ssd_minimal_discrete


class MinimalMixer(nn.Module):
    """The parameters of ours, with torch's convolution and the minimal scan between the projections."""

    def __init__(self, mixer: Mamba2) -> None:
        super().__init__()
        self.mixer, self.scan = mixer, ssd_minimal()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D); one document per row."""
        m = self.mixer
        z, channels, dt = m.in_proj(x).split(m.splits, dim=-1)
        length = x.shape[1]
        channels = F.conv1d(channels.mT, m.conv1d.weight, m.conv1d.bias, padding=3, groups=m.conv_dim)[..., :length]
        values, b, c = F.silu(channels).mT.split([m.d_inner, 64, 64], dim=-1)
        values = rearrange(values, "b t (h p) -> b t h p", p=64)
        dt = F.softplus(dt + m.dt_bias)
        b, c = (rearrange(t, "b t n -> b t 1 n").expand(-1, -1, m.n_heads, -1) for t in (b, c))
        y = self.scan(values * dt[..., None], -m.A_log.exp() * dt, b, c, CHUNK)[0] + values * m.D[:, None]
        gated = rearrange(y, "b t h p -> b t (h p)") * F.silu(z)
        return m.out_proj(F.rms_norm(gated, gated.shape[-1:], m.norm.weight, m.norm.eps))


def main() -> None:
    torch.manual_seed(0)
    ours = Mamba2(256, Mamba2Config())
    peer = MinimalMixer(ours)
    x, gradient = random_input(8, 512, 256)
    context = SequenceContext.single_documents(x[..., 0])
    torch.testing.assert_close(ours(x, context), peer(x), rtol=1e-4, atol=1e-4)
    own = forward_backward(ours, x, gradient, context)
    timing = interleave({"ours": own, "peer": forward_backward(peer, x, gradient)}, rounds=7)
    ratio = timing.ratio("peer", "ours")
    print_row(Row("M fp32 T 512, scan", "mamba-ssm ssd_minimal_discrete", ratio, None, figures=timing.figures()))
