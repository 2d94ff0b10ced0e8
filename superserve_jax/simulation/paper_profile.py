"""A stand-in for the latency profile of the paper's GPU: from memory, unverified, about twice the paper's throughput. No jax.

Nobody read these numbers off the paper's plots. They were recalled, and a formula was fitted to them:

    latency(subnet, batch) = 0.973 + 0.4857 GFLOPs + (batch - 1) (0.2146 + 0.2016 GFLOPs)   milliseconds

- From the paper's text: the GPU, the SuperNet, the batch sizes, five of the six accuracies, and the throughput of eight GPUs,
  about 2,000 (largest subnet) to 8,000 queries/s (smallest).
- From memory, unverified: the accuracy 77.64 %, the GFLOPs, and the four latencies to which the formula was fitted: 1.41 and
  7.35 ms (smallest subnet, batch 1 and 16), 4.64 and 30.7 ms (largest subnet).
- With the formula, eight GPUs serve 4,200 to 17,400 queries/s, about twice what the text says. So the experiments also run on
  a device that is 1.9 times slower.
"""

from superserve_jax.profile import Profile, Row
from superserve_jax.subnet import Subnet

PROVENANCE = "from memory, unverified, about twice the paper's throughput"
BATCH_SIZES = (1, 2, 4, 8, 16)
GFLOPS = (0.9, 2.05, 3.6, 3.95, 5.05, 7.55)
CNN_ACCURACIES = (0.7382, 0.7669, 0.7764, 0.7825, 0.7944, 0.8016)


def paper_profile() -> Profile:
    """Six subnets of OFA-ResNet50 at batch sizes 1 to 16: `PROVENANCE`. The subnets are placeholders with one axis, `gflops`.

    >>> profile = paper_profile()
    >>> [round(ms, 1) for row in (profile.rows[0], profile.rows[-1]) for ms in (row.latency_ms[0], row.latency_ms[-1])]
    [1.4, 7.4, 4.6, 30.7]
    """
    rows = tuple(
        Row(Subnet((1,), (("gflops", (g,)),)), a, tuple(_latency_ms(g, b) for b in BATCH_SIZES))
        for g, a in zip(GFLOPS, CNN_ACCURACIES, strict=True)
    )
    return Profile(BATCH_SIZES, rows, device=f"RTX 2080 Ti ({PROVENANCE})")


def _latency_ms(gflops: float, batch: int) -> float:
    return 0.973 + 0.4857 * gflops + (batch - 1) * (0.2146 + 0.2016 * gflops)
