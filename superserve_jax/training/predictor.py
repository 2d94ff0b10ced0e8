"""Predicts the validation accuracies of subnets from the subnets that were evaluated.

Evaluating a subnet takes a large part of a second or more, and a prediction takes milliseconds. So a search under
constraints can compare thousands of subnets and evaluate only the best ones (Once-for-All, Cai et al., ICLR 2020).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from superserve_jax import errors
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig

LEAST = 10  # networks to learn from
_FOLDS = 10
_FLOOR = 0.005  # added to the fraction of errors before its logarithm, which would be infinite for no errors


class AccuracyPredictor:
    """A kernel ridge regression of the logarithm of the fraction of errors.

    Its features are the logarithms of all sizes of a subnet (channels, and whether a block is kept), the depth of each stage,
    and the logarithms of FLOPs, parameters and normalised channels. The kernel is Laplacian, because accuracy saturates: the
    step from few channels to some matters more than the step to many. Cross-validation chooses its scale and the strength of
    the regularisation.

    Args:
      config: the family's config.
      accuracies: the measured accuracies of at least ten different networks, as fractions.

    Attributes:
      rmse: root mean squared error for subnets that were held out (10 folds). Subnets of equal sizes are the same network, so
        they are held out together.
      kendall_tau: rank correlation of these predictions with the measured accuracies; 0 if all are equal.

    Raises:
      ConfigError: there are too few networks.
    """

    def __init__(self, config: FamilyConfig, accuracies: Mapping[Subnet, float]):
        # Imported here: it takes over a second, and other searches do not need it.
        from sklearn import compose, kernel_ridge, model_selection, pipeline, preprocessing

        self._config = config
        self._space = config.space()
        features, measured = self._features(list(accuracies)), np.array(list(accuracies.values()))
        networks, of_network = np.unique(features, axis=0, return_inverse=True) if accuracies else ([], None)
        if len(networks) < LEAST:
            raise errors.ConfigError(
                f"the accuracy predictor needs {LEAST} or more evaluated networks, got {len(networks)}; evaluate more subnets"
            )
        scale = 1 / features.shape[1]
        regression = model_selection.GridSearchCV(
            kernel_ridge.KernelRidge(kernel="laplacian"),
            {"alpha": [1e-3, 1e-2, 1e-1], "gamma": [0.2 * scale, 0.5 * scale, scale]},
            cv=3,
        )
        log_errors = preprocessing.FunctionTransformer(_log_errors, inverse_func=_accuracies)
        self._model = compose.TransformedTargetRegressor(
            pipeline.make_pipeline(preprocessing.StandardScaler(), regression),
            transformer=pipeline.make_pipeline(log_errors, preprocessing.StandardScaler()),
        )
        folds = model_selection.GroupKFold(min(_FOLDS, len(networks)), shuffle=True, random_state=0)
        unseen = np.asarray(
            model_selection.cross_val_predict(self._model, features, measured, cv=folds, groups=of_network), np.float64
        )
        self._held_out = dict(zip(map(tuple, features.tolist()), unseen.tolist(), strict=True))
        self.rmse = float(np.sqrt(np.mean((unseen - measured) ** 2)))
        is_flat = np.ptp(unseen) < 1e-9 or np.ptp(measured) == 0
        tau: Any = scipy.stats.kendalltau(unseen, measured)[0]
        self.kendall_tau = 0.0 if is_flat else float(tau)
        self._model.fit(features, measured)

    def __call__(self, subnet_list: Sequence[Subnet]) -> list[float]:
        """The predicted accuracies of subnets, as fractions."""
        return self._model.predict(self._features(subnet_list)).tolist() if subnet_list else []

    def unseen(self, subnet_list: Sequence[Subnet]) -> list[float]:
        """The predicted accuracies of subnets, each by a regression that has not seen the network."""
        features = map(tuple, self._features(subnet_list).tolist())
        return [self._held_out.get(of, value) for of, value in zip(features, self(subnet_list), strict=True)]

    def _features(self, subnet_list: Sequence[Subnet]) -> np.ndarray:
        return np.array([self._features_of(s) for s in subnet_list])

    def _features_of(self, subnet: Subnet) -> list[float]:
        sizes = self._config.sizes(subnet)
        channels = sum(self._config.norm_sizes(sizes).values())
        costs = (self._config.flops(subnet), self._config.num_params(subnet), channels)
        depths = [sum(subnet.gates[b] for b in stage) for stage in self._space.stages]
        return [*depths, *np.log1p([*sizes.values(), *costs]).tolist()]


def _log_errors(accuracies: np.ndarray) -> np.ndarray:
    return np.log(1 + _FLOOR - accuracies)


def _accuracies(log_errors: np.ndarray) -> np.ndarray:
    return np.clip(1 + _FLOOR - np.exp(log_errors), 0, 1)
