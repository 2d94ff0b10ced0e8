"""The background load that runs while a latency profile is measured."""

import time

from superserve_jax.serving import server
from superserve_jax.serving.server import Server


def test_the_load_submits_queries_and_no_more_than_are_due(monkeypatch):
    counted = []
    submit_many = Server.submit_many
    monkeypatch.setattr(Server, "submit_many", lambda self, xs: counted.append(len(xs)) or submit_many(self, xs))
    before_s = time.monotonic()
    with server.background_traffic(5000.0):
        time.sleep(0.2)
    lasted_s = time.monotonic() - before_s
    assert 0 < sum(counted) <= 5000.0 * lasted_s
