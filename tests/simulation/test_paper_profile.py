"""The stand-in for the paper's profile, against what can be checked."""

import pathlib

import pytest

from superserve_jax.simulation import paper_profile
from superserve_jax.training.config import load_config

OFA_RESNET50 = pathlib.Path(__file__).parents[2] / "configs" / "ofa_resnet50.py"


def test_it_says_that_it_is_from_memory_and_how_far_it_is_from_the_papers_throughput():
    profile = paper_profile.paper_profile()
    assert paper_profile.PROVENANCE == "from memory, unverified, about twice the paper's throughput"
    assert paper_profile.PROVENANCE in profile.device
    fastest, slowest = (8 * profile.throughput_qps(row.subnet) for row in (profile.rows[0], profile.rows[-1]))
    assert fastest / 8000 == pytest.approx(2, rel=0.1)  # the paper's text: about 8,000 and 2,000 queries/s
    assert slowest / 2000 == pytest.approx(2, rel=0.1)


def test_the_recalled_gflops_span_about_those_of_the_published_supernet():
    model = load_config(OFA_RESNET50).model
    smallest, largest = (model.flops(s) / 1e9 for s in (model.space().smallest(), model.space().largest()))
    assert paper_profile.GFLOPS[0] == pytest.approx(smallest, rel=0.07)  # 0.9, really 0.96
    assert paper_profile.GFLOPS[-1] == pytest.approx(largest, rel=0.01)  # 7.55, really 7.49
