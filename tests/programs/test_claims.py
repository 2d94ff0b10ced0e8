"""serve/bench/claims.py: the claims that do not depend on time hold, and a claim that does not hold ends it with status 1."""

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


def test_the_docs_list_every_claim_with_its_bound():
    rows = {cells[0].strip("` "): cells for cells in (line.split("|")[1:-1] for line in DOCS.splitlines() if "|" in line)}
    for name, each in claims.CLAIMS.items():
        [bound] = re.findall(r"[\d.]+", rows[name][2])
        assert (rows[name][2].split(" " + bound)[0].strip(), float(bound)) == (each.sign, each.bound), name
