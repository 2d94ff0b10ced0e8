"""Accuracy of subnets over labelled examples, by the masked program (one compilation for all of them), and baselines."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import Norm, SuperNet
from superserve_jax.training.data import Dataset


def accuracy(
    model: SuperNet,
    subnet_list: Sequence[Subnet],
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    norm: Norm = "own",
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[float]:
    """Top-1 accuracy of each subnet, as a fraction.

    Args:
      model: with statistics for each subnet (for the largest, where `norm` is "shared").
      subnet_list: the subnets.
      batches: makes a fresh pass over the data: batches of equal shape with "inputs", "label" and "weight" (0 for padding).
      norm: whose statistics to use, see `SuperNet.row`.
      progress: wraps the iteration over subnets, for a progress bar.
    """
    program = programs.masked(model.config)
    result = []
    for subnet in progress(subnet_list):
        row, active = program.pad_statistics(model.statistics_of(subnet, norm=norm), subnet), program.active(subnet)
        counts = [_hits(program, model.params, b["inputs"], b["label"], b["weight"], row, active) for b in batches()]
        hits, total = np.sum(np.array(counts, np.float64), 0)
        result.append(float(hits / total))
    return result


def text_baselines(dataset: Dataset, *, limit: int = 20_000) -> dict[str, float]:
    """Test accuracies, as fractions, that a model of texts has to beat: they know what stands there, but not in which order.

    Args:
      dataset: one of texts.
      limit: training examples, the first ones, that both learn from.

    Returns:
      {"majority class": the most frequent training label, "logistic regression on token counts": scikit-learn's}
    """
    import sklearn.linear_model  # takes over a second

    inputs, labels = dataset.arrays("train", limit)
    test_inputs, test_labels = dataset.arrays("test")
    regression = sklearn.linear_model.LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at this size it is close enough to its limit
        regression.fit(_token_counts(dataset, inputs), labels)
    majority = np.bincount(labels).argmax()
    return {
        "majority class": float(np.mean(test_labels == majority)),
        "logistic regression on token counts": float(regression.score(_token_counts(dataset, test_inputs), test_labels)),
    }


def _token_counts(dataset: Dataset, inputs: np.ndarray) -> scipy.sparse.csr_matrix:
    """How often each token is in each input, the two texts of a pair counted apart; padding is not."""
    assert dataset.vocabulary is not None
    size = len(dataset.vocabulary.tokens)
    ids, types = (inputs[..., 0], inputs[..., 1]) if inputs.ndim == 3 else (inputs, np.zeros_like(inputs))
    rows, columns = np.nonzero(ids != dataset.vocabulary.pad_id)
    tokens = (ids + size * types)[rows, columns]
    return scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, tokens)), (len(inputs), 2 * size))


@functools.partial(jax.jit, static_argnums=0)
def _hits(program, params, images, labels, weights, row, active) -> tuple[jax.Array, jax.Array]:
    """(weight of the images that were answered right, weight of all)."""
    right = jnp.argmax(program.infer(params, images, row, active), -1) == labels
    return jnp.sum(right * weights), jnp.sum(weights)
