"""Image files as queries of a server on engines of this process: they are decoded in `submit`."""

import numpy as np
import pytest
from fakes import PROFILE, WAIT_S, always
from pictures import file_of, png

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.serving.server import Server


def serve(shape, **options):
    return Server.from_engines([FakeEngine(PROFILE, input_shape=shape, **options)], PROFILE, policy=always(0), slo_ms=1e4)


def test_the_bytes_of_a_file_and_an_array_give_the_same_answer():
    with serve((8, 8, 3), input_dtype=np.uint8) as s:
        replies = [s.submit(x).result(WAIT_S) for x in (png(7), np.full((8, 8, 3), 7, np.uint8))]
    assert [r.output for r in replies] == [(7, 0), (7, 0)]


@pytest.mark.parametrize("x", [b"", b"GIF89a", png(7)[:40]])
def test_other_bytes_are_refused_at_once(x):
    with serve((8, 8, 3), input_dtype=np.uint8) as s, pytest.raises(errors.InputError, match=r"bytes"):
        s.submit(x)


@pytest.mark.parametrize("shape", [(), (8,), (8, 4, 3), (8, 8, 2)])
def test_a_server_without_square_images_takes_no_files(shape):
    with serve(shape, input_dtype=np.uint8) as s, pytest.raises(errors.InputError, match=r"expected \("):
        s.submit(png(7))


def test_files_are_decoded_here_unless_all_engines_decode_them():
    engines = [FakeEngine(PROFILE, input_shape=(8, 8, 3), input_dtype=np.uint8, name=f"fake:{i}") for i in range(2)]
    engines[0].decodes = True
    with Server.from_engines(engines, PROFILE, policy=always(0), slo_ms=1e4) as s:
        replies = [s.submit(png(7)).result(WAIT_S) for _ in range(8)]
    assert [r.output for r in replies] == [(7, 0)] * 8


def test_a_file_that_is_larger_than_its_pixels_is_decoded_here():
    engine = FakeEngine(PROFILE, input_shape=(8, 8, 3), input_dtype=np.uint8)
    engine.decodes = True
    file = file_of(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    with Server.from_engines([engine], PROFILE, policy=always(0), slo_ms=1e4) as s:
        assert s.inputs.check(file).shape == (8, 8, 3)
        assert s.inputs.check(png(7)).ndim == 1
