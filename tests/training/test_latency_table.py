"""Latency tables: files with the latencies of some subnets on one device."""

import dataclasses
import json

import pytest
from tiny import TINY, WIDE

from superserve_jax import errors, families
from superserve_jax.subnet import Subnet
from superserve_jax.training import latency
from superserve_jax.training.latency_table import LatencyTable


@pytest.fixture
def table():
    """A table in which each million multiply-adds takes a millisecond."""
    latencies = {s: 1.0 + WIDE.flops(s) / 1e6 for s in latency.spread(WIDE, 20, seed=0)}
    return LatencyTable("card", 1, json.loads(json.dumps(families.config_to_json(WIDE))), latencies)


def test_a_latency_table_is_the_same_after_writing_and_reading(table, tmp_path):
    table.write(tmp_path / "table.json")
    read = LatencyTable.read(tmp_path / "table.json")
    assert read == table
    assert json.loads((tmp_path / "table.json").read_text())["device"] == "card"
    unseen = WIDE.space().sample(5, 5)
    assert read.predictor(WIDE)(unseen) == pytest.approx(1.0 + WIDE.flops(unseen) / 1e6, rel=0.05)


def test_a_table_of_another_network_is_refused(table):
    with pytest.raises(errors.ConfigError, match="the latency table of 'card' is of another network than the run"):
        table.predictor(TINY)


@pytest.mark.parametrize("subnet", [TINY.space().smallest(), Subnet((1,)), Subnet((), (("width", (0.5,)),))])
def test_a_table_with_a_subnet_of_another_network_is_refused(subnet, table):
    odd = dataclasses.replace(table, latencies={**table.latencies, subnet: 1.0})
    with pytest.raises(errors.ConfigError, match=r"'card' has a subnet of another network than the run: .*; measure"):
        odd.predictor(WIDE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x"}'])
def test_a_file_that_is_no_latency_table_is_refused(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(errors.ConfigError, match=r"table\.json is not a latency table \(.*\); measure it again"):
        LatencyTable.read(path)
    with pytest.raises(errors.ConfigError, match="no latency table"):
        LatencyTable.read(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be a whole number from 1 up, got 0"),
        ({"batch": -4}, "got -4"),
        ({"batch": 1.5}, "got 1.5"),
        ({"batch": True}, "got True"),
        ({"device": 7}, "Expected `str`, got `int`"),
        ({"model": "x"}, "ValueError"),
        ({"latencies": []}, "three or more different subnets, each with milliseconds above 0, got 0 subnets"),
        ({"latencies": [{"subnet": {"gates": [1]}, "ms": 1.0}] * 5}, "got 1 subnets"),
        ({"latencies": [{"subnet": {"gates": [i, 1]}, "ms": i} for i in (0, 1)]}, "got 0.0 ms"),
        ({"latencies": [{"subnet": {"gates": [2]}, "ms": 1.0}]}, "gates are 0 or 1, got"),
    ],
)
def test_a_table_with_an_impossible_value_is_refused_with_the_file_and_the_value(change, message, table, tmp_path):
    path = tmp_path / "table.json"
    table.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(errors.ConfigError, match=rf"table\.json is not a latency table .*{message}"):
        LatencyTable.read(path)
