"""The profile of the paper's simulations, reconstructed from its text and plots (RTX 2080 Ti, OFA-ResNet50). No jax.

The latencies are linear in GFLOPs and in the batch size. They agree with the paper's Figure 6 for the smallest and the largest
subnet and batch size. The GFLOPs, the third accuracy, and the latency of the largest subnet and batch were read off plots.
"""

from superserve_jax.profile import Profile, Row
from superserve_jax.subnet import Subnet

BATCH_SIZES = (1, 2, 4, 8, 16)
GFLOPS = (0.9, 2.05, 3.6, 3.95, 5.05, 7.55)
CNN_ACCURACIES = (0.7382, 0.7669, 0.7764, 0.7825, 0.7944, 0.8016)


def paper_profile() -> Profile:
    """Six subnets of OFA-ResNet50 at batch sizes 1 to 16. The subnets are placeholders with one axis, `gflops`.

    >>> profile = paper_profile()
    >>> [round(ms, 1) for row in (profile.rows[0], profile.rows[-1]) for ms in (row.latency_ms[0], row.latency_ms[-1])]
    [1.4, 7.4, 4.6, 30.7]
    """
    rows = tuple(
        Row(Subnet((1,), (("gflops", (g,)),)), a, tuple(_latency_ms(g, b) for b in BATCH_SIZES))
        for g, a in zip(GFLOPS, CNN_ACCURACIES, strict=True)
    )
    return Profile(BATCH_SIZES, rows, device="RTX 2080 Ti (reconstructed from the paper)")


def _latency_ms(gflops: float, batch: int) -> float:
    return 0.973 + 0.4857 * gflops + (batch - 1) * (0.2146 + 0.2016 * gflops)
