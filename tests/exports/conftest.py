import pytest
from small_exports import IMAGES, TEXTS, WORDS, write


@pytest.fixture(scope="module", params=["images", pytest.param("texts", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """A small export. Tests may change its files, if they change them back."""
    config, words = {"images": (IMAGES, None), "texts": (TEXTS, WORDS)}[request.param]
    return write(tmp_path_factory.mktemp("exports") / request.param, config, words)
