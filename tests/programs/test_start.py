"""serve/bench/start.py on a small export."""

import pytest
from small_exports import IMAGES, write

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def test_cold_and_warm_starts_of_a_foreign_family_are_measured(run_program, tmp_path):
    export = write(tmp_path / "export", IMAGES)
    done = run_program("serve/bench/start.py", export, "--batch-sizes", 1, "--warm", 1, "--foreign", json_file=True)
    assert done.json["foreign"]
    assert "a foreign family" in done.stdout
    assert done.json["executables"] > 0
    assert done.json["cache_bytes"] > 0
    for stages in (done.json["cold_s"], *done.json["warm_s"]):
        assert stages["ready"] == pytest.approx(sum(s for name, s in stages.items() if name != "ready"))
