"""What a notebook shows: one short line for a model, a server, a subnet and a reply. And their defaults."""

import numpy as np
import pytest
from fakes import WAIT_S, always, fake, serve, x
from tiny import TINY, random_images, random_params

import superserve_jax as ss
from superserve_jax import errors
from superserve_jax.serving.options import check_options
from superserve_jax.supernets.supernet import SuperNet


def test_a_model_shows_family_path_subnets_accuracies_and_classes(export):
    assert repr(export) == f"<Model ofa_resnet from {export.path}: 1 subnets with accuracies 0.5 to 0.5, 3 classes>"
    params = sum(p.size for p in random_params(TINY).values())
    assert repr(SuperNet(TINY, random_params(TINY))) == f"<SuperNet ofa_resnet: {params:,} parameters, 0 calibrated subnets>"


def test_a_call_without_a_subnet_runs_the_largest(tiny, export):
    images = random_images(TINY, 2)
    assert tiny.largest == TINY.space().largest()
    np.testing.assert_array_equal(tiny(images), tiny(images, TINY.space().largest()))
    assert export.largest == export.subnets[-1] != TINY.space().largest()
    np.testing.assert_array_equal(export(images), export(images, export.subnets[-1]))


def test_a_subnet_shows_its_gates_and_choices_in_one_short_line():
    subnet = ss.Subnet((1, 0, 1), (("expand", (0.5, 0.5, 1.0)), ("heads", (3,))))
    assert repr(subnet) == "Subnet(gates 101, expand 0.5x2 1.0, heads 3)"
    with pytest.raises(errors.SubnetError, match=r"must be tuples, got \[1, 0\] and \(\)"):
        ss.Subnet([1, 0])


def test_a_server_shows_subnets_workers_state_and_counts():
    with serve(policy=always(1)) as server:
        assert repr(server).startswith("<Server of engines: 3 subnets with accuracies 0.7 to 0.8")
        assert repr(server).endswith(", open on fake:0, no queries yet>")
        server.submit(x(5)).result(WAIT_S)
        server.close()
        assert repr(server).endswith(", closed, 1 arrived, 1 met>")


def test_a_reply_has_the_name_of_its_class_from_the_engine():
    engine = fake()
    engine.class_names = ("cat", "dog")
    with serve(engine, policy=always(1)) as server:
        reply = server.submit(x(5)).result(WAIT_S)
    assert (reply.label, reply.class_names) == ("cat", ("cat", "dog"))  # the output is (5.0, 1)
    assert repr(reply).startswith("Reply(output=(5.0, 1), accuracy=0.75, met_slo=True, latency_ms=")
    logits = reply._replace(output=np.float32([0.1, 0.9]))
    assert repr(logits).startswith("Reply(label='dog', ")
    assert logits._replace(class_names=()).label == 1


@pytest.mark.parametrize(("given", "meant"), [("slo", "slo_ms"), ("batch_size", "batch_sizes"), ("device", "devices")])
def test_an_unknown_option_fails_at_once_with_the_nearest_name(given, meant):
    with pytest.raises(errors.UnknownNameError, match=f"unknown option '{given}': did you mean '{meant}'"):
        ss.Server("digits", **{given: 1})
    with pytest.raises(errors.UnknownNameError, match="unknown option 'batch_sizes'; known"):
        check_options({"batch_sizes": (1,)})
