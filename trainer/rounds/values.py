# SPDX-License-Identifier: Apache-2.0
"""How good weights are, as they train and as a device answers: measured once each."""

from collections.abc import Callable

from torch import nn

from edge_runtime.formats.weights import Weights
from edge_runtime.update.metrics import Metric
from trainer.data.samples import Samples
from trainer.export.int8 import DeviceNetwork
from trainer.rounds.deployment import Deployment
from trainer.rounds.loop import evaluate
from trainer.rounds.objective import Judge


class Values:
    """The judge's metric of weights, on validation and on test samples."""

    def __init__(
        self,
        judge: Judge,
        validation: Samples,
        test: Samples,
        network: Callable[[Weights], nn.Module],
        deployment: Deployment,
    ) -> None:
        """Know nothing yet.

        Args:
            judge: Its metric is measured.
            validation: Prepared samples, which choose.
            test: Prepared samples, which are reported.
            network: Builds what trains, with these weights.
            deployment: Says how devices compute.
        """
        self._judge, self._validation, self._test = judge, validation, test
        self._network, self._deployment = network, deployment
        self._known: dict[tuple[str, str], float] = {}  # by fingerprint and samples

    def know(self, weights: Weights, **values: float) -> None:
        """Take values, on ``validation`` or ``test``, that need no measuring."""
        for which, value in values.items():
            self._known[weights.fingerprint, which] = value

    def known(self, weights: Weights) -> float | None:
        """Return the value on validation where it was measured."""
        return self._known.get((weights.fingerprint, "validation"))

    def on_validation(self, weights: Weights) -> float:
        """Return the value that chooses: of weights as they train."""
        return self._of(weights, "validation", self._network, self._validation)

    def on_test(self, weights: Weights) -> float:
        """Return the value that is reported: as a device answers."""
        return self._of(weights, "test", self._on_device, self._test)

    def int8_cost(self, weights: Weights) -> dict[str, float]:
        """Return what shows int8's cost: validation on the device, test as trained."""
        device, network = self._on_device(weights), self._network(weights)
        name, judge = self._judge.name, self._judge
        return {
            f"device_val_{name}": evaluate(device, self._validation, judge),
            f"float_test_{name}": evaluate(network, self._test, judge),
        }

    def golden(self, weights: Weights, metric: Metric, count: int) -> float:
        """Return a devices' metric on the first samples, which they have."""
        judge = Judge(metric.name, metric.higher, metric)
        return evaluate(self._on_device(weights), self._validation[:count], judge)

    def _on_device(self, weights: Weights) -> nn.Module:
        """Return what answers as a device with these weights."""
        form, graph = self._deployment.form, self._deployment.graph
        if form.is_int8:
            return DeviceNetwork(graph, form.encode(weights))
        return self._network(weights)

    def _of(
        self,
        weights: Weights,
        which: str,
        build: Callable[[Weights], nn.Module],
        samples: Samples,
    ) -> float:
        key = weights.fingerprint, which
        if key not in self._known:
            self._known[key] = evaluate(build(weights), samples, self._judge)
        return self._known[key]
