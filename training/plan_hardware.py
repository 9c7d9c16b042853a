"""GPUs that a run can be planned for, by their data sheets, and clusters of them.

Speeds are dense bfloat16 (without structured sparsity) with float32 accumulation. Data sheets are the vendors' own;
nothing here was measured by this project. memory_gib is what a driver of that card typically leaves to programs, which
is a little less than the name says.
"""

from __future__ import annotations

from dataclasses import dataclass

from errors import InputError, nearest, require, require_number


@dataclass(frozen=True)
class GPU:
    name: str
    memory_gib: float
    tflops: float  # dense bf16 peak
    memory_gbps: float  # GB/s of its own memory
    link_gbps: float  # GB/s to its neighbours in the node, one direction
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA H100 data sheet, SXM column: 1,979 TFLOP/s with sparsity, 3.35 TB/s, NVLink 900 GB/s both directions
        GPU("h100-80gb", 79.1, 989.4, 3350, 450, "NVIDIA H100 SXM data sheet"),
        # the PCIe column of the same sheet: 1,513 TFLOP/s with sparsity, 2 TB/s, PCIe 5 x16 64 GB/s one direction
        GPU("h100-pcie-80gb", 79.1, 756.5, 2000, 64, "NVIDIA H100 PCIe data sheet"),
        # NVIDIA H200 data sheet, SXM: speed of the H100, 141 GB at 4.8 TB/s
        GPU("h200-141gb", 139.8, 989.4, 4800, 450, "NVIDIA H200 SXM data sheet"),
        # NVIDIA DGX B200 data sheet, an eighth of it: 18 PFLOP/s dense bf16, 64 TB/s, NVLink 1.8 TB/s both directions
        GPU("b200-180gb", 178.0, 2250.0, 8000, 900, "NVIDIA DGX B200 data sheet / 8"),
        # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both directions
        GPU("a100-80gb", 79.1, 312.0, 2039, 300, "NVIDIA A100 80GB SXM data sheet"),
        # the 40 GB column: 1,555 GB/s
        GPU("a100-40gb", 39.4, 312.0, 1555, 300, "NVIDIA A100 40GB SXM data sheet"),
        # NVIDIA L40S data sheet: 362 TFLOP/s dense, 864 GB/s, PCIe 4 x16 32 GB/s one direction
        GPU("l40s-48gb", 44.4, 362.0, 864, 32, "NVIDIA L40S data sheet"),
        # NVIDIA L4 data sheet: 121 TFLOP/s dense, 300 GB/s, PCIe 4 x16
        GPU("l4-24gb", 22.0, 121.0, 300, 32, "NVIDIA L4 data sheet"),
        # NVIDIA Ada GPU architecture paper, RTX 4090: 165.2 TFLOP/s with float32 accumulation, 1,008 GB/s, PCIe 4 x16
        GPU("rtx4090-24gb", 23.5, 165.2, 1008, 32, "NVIDIA Ada architecture paper"),
        # AMD Instinct MI300X data sheet: 1,307.4 TFLOP/s dense, 5.3 TB/s, 7 links of 64 GB/s one direction
        GPU(
            "mi300x-192gb", 191.0, 1307.4, 5300, 448, "AMD MI300X data sheet; our GPU kernels are written for NVIDIA's"
        ),
    )
}


@dataclass(frozen=True)
class Cluster:
    """network_gbps: GB/s between nodes per GPU, one direction."""

    gpu: GPU
    gpus: int
    gpus_per_node: int
    network_gbps: float

    @classmethod
    def of(cls, gpu: str, gpus: int, gpus_per_node: int, network_gbit: float) -> Cluster:
        """Raises InputError: no such GPU, or nodes that do not come out even."""
        if gpu not in GPUS:
            raise InputError(f"--gpu: unknown GPU {gpu!r}{nearest(gpu, GPUS)}; expected one of {', '.join(GPUS)}")
        require_number("--gpus", gpus, 1)
        require_number("--gpus-per-node", gpus_per_node, 1)
        require_number("--network-gbit", network_gbit, 0, exclusive=True)
        per_node = min(gpus, gpus_per_node)
        problem = f"{gpus} GPUs do not fill nodes of {per_node}; nearest is {max(1, round(gpus / per_node)) * per_node}"
        require(gpus % per_node == 0, "--gpus", problem)
        return cls(GPUS[gpu], gpus, per_node, network_gbit / 8)

    @property
    def nodes(self) -> int:
        return self.gpus // self.gpus_per_node

    def ring_seconds(self, size: float, ranks: int, efficiency: float) -> float:
        """One all-gather or reduce-scatter of `size` bytes in all, over that many neighbouring ranks: a ring, striped
        over a node's network cards where it leaves the node. An all-reduce takes two of them."""
        if ranks == 1:
            return 0.0
        volume = size * (ranks - 1) / ranks / 1e9 / efficiency  # GB through every rank
        inside = volume / self.gpu.link_gbps if self.gpus_per_node > 1 else 0.0
        crosses = ranks > self.gpus_per_node
        return max(inside, volume / (self.network_gbps * self.gpus_per_node) if crosses else 0.0)

    def exchange_seconds(self, size: float, groups: int, efficiency: float) -> float:
        """One all-gather or reduce-scatter among ranks of different nodes, every rank over its own network card."""
        return size * (groups - 1) / groups / 1e9 / efficiency / self.network_gbps
