"""Accuracy of subnets on labelled examples, and baselines for texts. The masked program runs all subnets."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from superserve_jax.dtypes import ComputeDtype
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.programs import Params, Program
from superserve_jax.supernets.supernet import Norm, SuperNet
from superserve_jax.training.data import DatasetLike


def accuracy(
    model: SuperNet,
    subnet_list: Iterable[Subnet],
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    norm: Norm = "own",
) -> list[float]:
    """Top-1 accuracy of each subnet, as a fraction. The arguments are those of `correct`."""
    return [float(hits.mean()) for hits, _ in correct(model, subnet_list, batches, norm=norm)]


def correct(
    model: SuperNet,
    subnet_list: Iterable[Subnet],
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    norm: Norm = "own",
    compute_dtype: ComputeDtype = "float32",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each subnet whether it classifies each example correctly, bool (N,), and the labels, int32 (N,).

    Args:
      model: a SuperNet with statistics for each subnet; with `norm="shared"`, the largest subnet's are enough.
      subnet_list: the subnets.
      batches: starts a pass over the data. Its batches have equal shapes and hold "inputs", "label" and "weight" (0 for
        padding).
      norm: whose statistics to use, see `SuperNet.statistics_of`.
      compute_dtype: the dtype to compute in, see `dtypes`.
    """
    program, params = programs.masked(model.config), programs.cast(model.params, compute_dtype)
    for subnet in subnet_list:
        statistics = program.pad_statistics(model.statistics_of(subnet, norm=norm), subnet)
        active = program.active(subnet)
        found = [
            (_hits(program, params, b["inputs"], b["label"], statistics, active), b["label"], b["weight"]) for b in batches()
        ]
        hits, labels, weights = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*found, strict=True))
        yield hits[weights > 0], labels[weights > 0]


def text_baselines(dataset: DatasetLike, *, limit: int = 20_000) -> dict[str, float]:
    """Test accuracies of two baselines for texts. They see at most a bag of words, not the order of the words.

    Args:
      dataset: a dataset of texts.
      limit: both baselines learn from the first `limit` training examples.

    Returns:
      Accuracies, as fractions: "majority class" always answers the most frequent training label, and "logistic regression on
      token counts" is scikit-learn's.
    """
    import sklearn.linear_model  # takes over a second

    inputs, labels = dataset.arrays("train", limit)
    test_inputs, test_labels = dataset.arrays("test")
    regression = sklearn.linear_model.LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about convergence; the result is close enough for a baseline
        regression.fit(_token_counts(dataset, inputs), labels)
    majority = np.bincount(labels).argmax()
    return {
        "majority class": float(np.mean(test_labels == majority)),
        "logistic regression on token counts": float(regression.score(_token_counts(dataset, test_inputs), test_labels)),
    }


def _token_counts(dataset: DatasetLike, inputs: np.ndarray) -> scipy.sparse.csr_matrix:
    """How often each token occurs in each input. The two texts of a pair are counted separately, padding is not counted."""
    assert dataset.vocabulary is not None
    size = len(dataset.vocabulary.tokens)
    ids, types = (inputs[..., 0], inputs[..., 1]) if inputs.ndim == 3 else (inputs, np.zeros_like(inputs))
    examples, positions = np.nonzero(ids != dataset.vocabulary.pad_id)
    tokens = (ids + size * types)[examples, positions]
    return scipy.sparse.csr_matrix((np.ones(len(examples)), (examples, tokens)), (len(inputs), 2 * size))


@functools.partial(jax.jit, static_argnums=0)
def _hits(program: Program, params: Params, images, labels, statistics, active) -> jax.Array:
    """Whether each image is correctly classified, bool (B,)."""
    return jnp.argmax(program.infer(params, images, statistics, active), -1) == labels
