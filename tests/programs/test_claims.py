"""serve/bench/claims.py: the claims that do not depend on time hold, and a claim that does not hold ends it with status 1."""

import json
import math
import pathlib
import re

import claims
import pytest

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "claims.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, claim in claims.CLAIMS.items() if not claim.timed])
def test_a_claim_holds(name):
    [found] = claims.check([name], claims.Options())
    assert found["holds"], f"{found['what']}: {found['measured']}, but {found['sign']} {found['bound']} is claimed"


def claim(value, sign="at least", timed=False):
    return claims.Claim("made up", sign, 0.5, lambda _: value, timed)


def test_a_claim_that_fails_ends_the_program_with_status_1_and_only_chosen_claims_count(run_program):
    patches = {"CLAIMS": {"good": claim(0.5), "bad": claim(0.4), "unknown": claim(math.nan, "at most")}}
    done = run_program("serve/bench/claims.py", json_file=True, status=1, patches=patches)
    assert [(r["name"], r["holds"]) for r in done.json] == [("good", True), ("bad", False), ("unknown", False)]
    assert "1 of 3 claims hold; not bad, unknown" in done.stdout
    done = run_program("serve/bench/claims.py", "--only", "good", patches=patches)
    assert "1 of 1 claims hold\n" in done.stdout
    assert "did you mean 'good'" in run_program("serve/bench/claims.py", "--only", "god", status=2, patches=patches).stderr


def fails(_):
    raise RuntimeError("broken")


def test_a_measurement_that_fails_gives_its_reason_and_the_next_claims_are_checked(run_program):
    patches = {"CLAIMS": {"bad": claims.Claim("made up", "at least", 0.5, fails), "good": claim(0.5)}}
    done = run_program("serve/bench/claims.py", json_file=True, status=1, patches=patches)
    assert [(r["name"], r["holds"], r["reason"]) for r in done.json] == [
        ("bad", False, "RuntimeError: broken"),
        ("good", True, ""),
    ]
    assert "bad: RuntimeError: broken, at least 0.5" in done.stdout
    assert "1 of 2 claims hold; not bad" in done.stdout


def test_the_export_is_checked_before_the_first_claim(run_program, tmp_path):
    patches = {"CLAIMS": {"bad": claim(0.4), "policy-gain": claims.CLAIMS["policy-gain"]}}
    done = run_program("serve/bench/claims.py", "--export", str(tmp_path / "none"), status=2, patches=patches)
    assert (
        "policy-gain cannot be checked without a trained export: run `make demo`, give --export PATH, or choose other claims"
        in done.stderr
    )
    assert "bad:" not in done.stdout


REPLAY = """
import json, pathlib, sys
if sys.argv[1] == "none":
    sys.exit("error: no export")
pathlib.Path(sys.argv[-1]).write_text(json.dumps({"verdict": json.loads(sys.argv[1])}))
"""


@pytest.mark.parametrize(
    ("verdict", "gain_holds", "attainment_holds", "reason"),
    [
        ({}, True, True, ""),
        ({"gain": 0.0}, False, True, ""),
        ({"policy": {"attainment": 0.98}}, True, False, ""),
        ({"disturbed": ["fixed:1"]}, False, False, "the machine was disturbed during fixed:1"),
        ({"best": None, "gain": None}, False, False, "no fixed model keeps up"),
        (None, False, False, "the replay failed: error: no export"),
    ],
)
def test_only_an_undisturbed_replay_with_a_gain_and_few_misses_proves_the_claims(
    tmp_path, monkeypatch, verdict, gain_holds, attainment_holds, reason
):
    (tmp_path / "replay.py").write_text(REPLAY)
    monkeypatch.setattr(claims, "REPLAY", tmp_path / "replay.py")
    whole = {"policy": {"attainment": 1.0}, "best": {"name": "fixed:0"}, "gain": 2.0, "disturbed": []}
    export = pathlib.Path("none" if verdict is None else json.dumps(whole | verdict))
    gain, attainment = claims.check(["policy-gain", "policy-attainment"], claims.Options(export=export))
    assert (gain["holds"], attainment["holds"]) == (gain_holds, attainment_holds)
    assert reason in gain["reason"]
    assert reason in attainment["reason"]


def test_the_docs_list_every_claim_with_its_bound():
    rows = {cells[0].strip("` "): cells for cells in (line.split("|")[1:-1] for line in DOCS.splitlines() if "|" in line)}
    for name, each in claims.CLAIMS.items():
        [bound] = re.findall(r"[\d.]+", rows[name][2])
        assert (rows[name][2].split(" " + bound)[0].strip(), float(bound)) == (each.sign, each.bound), name
