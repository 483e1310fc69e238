"""Metrics over a split, summed exactly."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from research import UserError, parallel
from research.data import splits
from research.modules import merged
from research.tasks import skipped


class Report(NamedTuple):
    """What an evaluation of a split found."""

    metrics: dict[str, float]
    tables: dict[str, list[Any]]
    """What is no number, such as a confusion matrix."""


class Evaluator:
    """Evaluates parameters on splits; compiles once per shape of batch."""

    def __init__(
        self, graph: nnx.GraphDef, task: Any, mesh: Mesh, in_turn: bool = False, parts: int = 1
    ) -> None:
        """in_turn: whether devices have stretches of a sequence in turn, as `ring` says. parts: of
        a device's rows in a pipeline."""
        self.task, self.mesh = task, mesh

        @jax.jit
        def step(params: Any, model_state: Any, carry: Any, batch: Any) -> Any:
            if in_turn:
                batch, _ = parallel.in_order(batch, mesh)
            settle = parallel.settled(mesh, parts=parts)
            with merged(graph, params, model_state, training=False, settle=settle) as model:
                outputs, carry = task.outputs(model, batch, None, carry)
            kept = task.gather(outputs, batch)
            # Whole on every device, so that any process can read all rows.
            kept = jax.lax.with_sharding_constraint(kept, parallel.replicated(mesh))
            return task.score(outputs, batch) | skipped(batch), kept, carry

        self.step = step

    def __call__(
        self, params: Any, model_state: Any, carry: Any, split: splits.Split, batch_size: int
    ) -> Report:
        """The task's summary and tables over every example of a split, each counted once.

        A metric that the split leaves undefined, as AUC is of one class, is left out.
        carry: any carry of the batch's size; the first batch resets it. Raises UserError where no
        example has any weight.
        """
        results = []
        batches = split.evaluation(batch_size, parallel.share(self.mesh, batch_size))
        for batch in splits.prefetched(batches, split.threads):
            placed = parallel.put(batch, self.mesh)
            *found, carry = self.step(params, model_state, carry, placed)
            results.append(found)
        scores, kept = zip(*jax.device_get(results), strict=True)
        if not any(weight for _, weight in (batch["loss"] for batch in scores)):
            raise UserError("every row of a split is bad: there is nothing to evaluate on")
        means = self.task.summary(mean(scores))
        if not kept[0]:
            return Report(means, {})
        arrays = {name: np.concatenate([batch[name] for batch in kept]) for name in kept[0]}
        further = self.task.gathered(arrays)
        defined = {name: value for name, value in further.items() if not math.isnan(value)}
        return Report(means | defined, self.task.tables(arrays))


def mean(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over batches, from each batch's (total, weight) pairs, added in double precision.

    0 where there is no weight, as in a batch whose every row is bad. The loss comes first: jit has
    sorted the names.
    """

    def add(name: str, i: int) -> float:
        return math.fsum(float(batch[name][i]) for batch in results)

    names = sorted(results[0], key=lambda name: name != "loss")
    return {name: add(name, 0) / (add(name, 1) or 1) for name in names}


def names(task: Any, score: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """The metrics that an evaluation gives, from the shapes of `score` and `gather`."""
    further = {k: np.zeros(v.shape, v.dtype) for k, v in kept.items()}
    found = task.summary(dict.fromkeys(score, 1.0))
    return [*found, *(task.gathered(further) if further else {})]
