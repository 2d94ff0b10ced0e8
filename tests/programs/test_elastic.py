"""serve/bench/elastic.py on small images."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def test_the_subnet_and_the_small_network_agree(run_program):
    done = run_program("serve/bench/elastic.py", "--image-size", "32", "--repeats", "2", json_file=True)
    assert done.json["difference"] < 1e-5
    assert 0.9 < done.json["operations"] < 1.1
    assert len(done.json["latency"]) == 2
    assert "sliced / small: operations" in done.stdout
