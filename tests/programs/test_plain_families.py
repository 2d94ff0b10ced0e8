"""serve/bench/plain_families.py on small networks."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.mark.parametrize("family", ["ofa_resnet", "dynabert"])
def test_the_plain_and_the_hand_written_network_agree(run_program, family):
    done = run_program("serve/bench/plain_families.py", "--small", "--family", family, "--repeats", "2", json_file=True)
    assert done.json["difference"] < 1e-5
    assert 0.8 < done.json["operations"] < 1.1
    assert len(done.json["latency"]) == len(done.json["seconds"]) == 2
    assert "plain / hand-written: operations" in done.stdout
