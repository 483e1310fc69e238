"""Metrics over a split, summed exactly."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from research import parallel
from research.data import splits
from research.modules import merged


class Evaluator:
    """Evaluates parameters on splits; compiles once per shape of batch."""

    def __init__(self, graph: nnx.GraphDef, task: Any, mesh: Mesh) -> None:
        self.task, self.mesh = task, mesh

        @jax.jit
        def step(params: Any, model_state: Any, carry: Any, batch: Any) -> Any:
            with merged(graph, params, model_state, training=False) as model:
                return task(model, batch, None, carry)[1]

        self.step = step

    def __call__(
        self, params: Any, model_state: Any, carry: Any, split: splits.Split, batch_size: int
    ) -> dict[str, float]:
        """The task's summary over every example of a split, each counted once.

        carry: any carry of the batch's size; the first batch resets it.
        """
        results = []
        for batch in splits.prefetched(split.evaluation(batch_size), split.threads):
            metrics, carry = self.step(params, model_state, carry, parallel.put(batch, self.mesh))
            results.append(metrics)
        return self.task.summary(mean(jax.device_get(results)))


def mean(results: list[Mapping[str, Any]]) -> dict[str, float]:
    """Means over batches, from each batch's (total, weight) pairs, added in double precision.

    The loss comes first: jit has sorted the names.
    """

    def add(name: str, i: int) -> float:
        return math.fsum(float(batch[name][i]) for batch in results)

    names = sorted(results[0], key=lambda name: name != "loss")
    return {name: add(name, 0) / add(name, 1) for name in names}
