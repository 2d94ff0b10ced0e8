"""The programs that load the gateway, send it malformed requests, and end it, in short forms."""

import json

import pytest
from gateway_load import attempts, malformed
from small_exports import IMAGES, write

ONLY = ("HTTP binary, image", "in process, number, smallest, 8199")


@pytest.mark.slow
def test_the_gateway_is_measured_and_a_later_call_goes_on_from_the_file(run_program, tmp_path):
    options = ("--quick", "--parts", "bounds", "--only", *ONLY, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    first = run_program("serve/bench/gateway.py", *options)
    found = json.loads((tmp_path / "a.json").read_text())
    assert [*found["runs"]] == [name for name in found["results"]]
    assert len(found["runs"]) == len(ONLY)
    for name, result in found["results"].items():
        assert 0 <= result["attainment"] <= 1
        assert (result["wrong"], result["lost"], result["runs"]) == (0, 0, 1), name
    assert found["results"]["HTTP binary, image, smallest, 8199/s"]["server_us"] > 0
    assert "at least 0.99" in first.stdout
    assert "not measured" in first.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    again = run_program("serve/bench/gateway.py", *options)
    assert json.loads((tmp_path / "a.json").read_text())["runs"] == found["runs"]
    assert again.stdout.count("at least 0.99") == first.stdout.count("at least 0.99")
    error = run_program("serve/bench/gateway.py", *options, "--seed", "1", status=2).stderr
    assert "has results of other options" in error


def test_a_peer_that_is_not_installed_is_named(run_program):
    error = run_program("serve/bench/gateway.py", "--peer", "mosec", "--peer-python", "/bin/false", status=2).stderr
    assert "mosec is not installed in /bin/false: pip install" in error


@pytest.mark.slow
def test_malformed_requests_get_errors_and_nothing_breaks(run_program):
    done = run_program(
        "serve/bench/malformed_requests.py", "--requests", 2_000, "--rate", 200, "--rate-s", 0.5, json_file=True
    )
    assert done.json["findings"] == []
    assert done.json["attempts"] >= 2_000
    assert all(done.json["statuses"][kind] for kind in malformed.KINDS)
    assert done.json["statuses"]["pipelines"]["200"] > 100
    assert done.json["statuses"]["values"]["400"] > 50


def test_a_stream_of_events_is_an_answer_and_other_answers_need_a_length():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nconnection: close\r\n\r\n"
    responses = attempts.Responses(is_head=False)
    for part in (head % b"text/event-stream" + b"data: 1\r\n\r\n", b"data: 2\r\n\r\n"):
        responses.feed(part)
    assert ([each.status for each in responses.found], responses.rest) == ([200], b"")
    with pytest.raises(attempts.BrokenRuleError, match="no length"):
        attempts.Responses(is_head=False).feed(head % b"application/json")


@pytest.mark.parametrize("kind", malformed.KINDS)
def test_an_attempt_is_the_same_whenever_it_is_made(kind):
    assert malformed.make(kind, 3, 0) == malformed.make(kind, 3, 0)
    assert len({str(malformed.make(kind, i, 0).steps) for i in range(20)}) > 3


def test_one_attempt_is_repeated_and_printed(run_program):
    printed = run_program("serve/bench/malformed_requests.py", "--case", "values", 112).stdout
    assert "send " in printed
    assert "received 400" in printed


@pytest.mark.slow
def test_after_sigterm_every_accepted_request_is_answered(run_program):
    done = run_program("serve/bench/gateway_stops.py", "--times", 2, json_file=True)
    assert done.json["findings"] == []
    assert done.json["counts"]["200"] > 20
    assert "2 stops under load" in done.stdout


@pytest.mark.slow
def test_two_models_are_measured_alone_and_at_once(run_program, tmp_path):
    export = write(tmp_path / "export", IMAGES)
    options = ("--share", 0.01, "--seconds", 1, "--repeats", 1, "--connections", 16)
    done = run_program("serve/bench/two_models.py", export, export, *options, json_file=True)
    assert [*done.json["runs"]] == ["first, alone", "second, alone", "first, both at once", "second, both at once"]
    for name, [run] in done.json["runs"].items():
        assert (run["wrong"], run["lost"]) == (0, 0), name
        assert run["queries"] > 10
        assert run["accuracy"] >= 0.5
    assert "wrong or lost answers: 0" in done.stdout
