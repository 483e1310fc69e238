"""Training: `State`, `train_step` and the loop, `train`."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research import checkpoint, compute, draws, modules, parallel, run, timing
from research.evaluate import mean
from research.init_from import replaced
from research.modules import merged, variables
from research.tasks import Mean, skipped

if TYPE_CHECKING:
    from research.setup import Setup


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All that continues a run: pytrees of arrays, None for what was not asked for."""

    step: Any
    """int32: updates done."""
    params: Any
    model_state: Any
    """The module's other variables, such as running statistics."""
    opt_state: Any
    carry: Any
    """A recurrent model's state between batches, split over devices as they are."""
    ema: Any
    """The moving average of the parameters."""
    stop: Any
    """Early stopping: the best value so far, its step, and the evaluations since."""


def init(setup: "Setup", root: jax.Array, given: Mapping[str, jax.Array]) -> State:
    """The state before the first step; traced, so that every array is made where it belongs.

    given: parameters and running statistics to start from, by path; the others are initialised.
    """
    e = setup.experiment
    model: Any = e.model.make(nnx.Rngs(params=jax.random.fold_in(root, 0)))
    params, model_state = (replaced(part, given) for part in variables(model))
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=setup.optimizer.init(params),
        carry=model.initial_carry(setup.batch_size) if setup.carries else None,
        ema=None if e.ema is None else jax.tree.map(jnp.copy, params),
        stop=e.early_stop.start() if e.early_stop.watches else None,
    )


def train_step(
    setup: "Setup", state: State, batch: Any, root: jax.Array
) -> tuple[State, dict[str, Any]]:
    """One update: (state, batch, root key) -> (the next state, the metrics of the batch).

    batch: the step's, or the block that it is in.
    """
    e = setup.experiment
    if isinstance(batch, parallel.Block):
        batch = batch.at(state.step)
    # Apart from the keys of the parameters, which are derived from another branch of the root.
    key = jax.random.fold_in(jax.random.fold_in(root, 1), state.step)

    grads, (metrics, model_state, carry) = gradients(setup, state, state.params, batch, key)
    if e.optimizer.sam_rho is not None:
        with jax.named_scope("optimizer"):
            there = e.optimizer.perturbed(state.params, grads)
        grads, _ = gradients(setup, state, there, batch, key)
    with jax.named_scope("optimizer"):
        updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if e.ema is not None:
            ema = optax.incremental_update(params, ema, 1 - e.ema)
    rate = e.optimizer.learning_rate(state.step)
    known = {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
    metrics |= {k: Mean(v, jnp.ones(())) for k, v in known.items() if v is not None}
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        carry=carry,
        ema=ema,
    )
    return state, metrics


def gradients(setup: "Setup", state: State, params: Any, batch: Any, key: jax.Array) -> Any:
    """The gradient at `params`, and (metrics, model state, carry) after the batch."""
    e = setup.experiment
    axes = setup.axes_apart
    if setup.in_turn:
        batch, order = parallel.in_order(batch, setup.mesh)
        key = draws.of_steps(key, order.tolist())

    def loss_of(params: Any, model_state: Any, carry: Any, batch: Any, key: jax.Array) -> Any:
        params = e.optimizer.held(params)
        with merged(
            setup.graph,
            params,
            model_state,
            training=True,
            frozen=e.optimizer.frozen,
            settle=parallel.settled(setup.mesh, axes),
        ) as model:
            loss, (metrics, carry) = e.task(model, batch, nnx.Rngs(dropout=key), carry)
        _, model_state = variables(model)
        metrics = metrics | skipped(batch)
        loss += e.optimizer.penalty(params)
        if e.accumulate > 1:  # a loss is a mean: by its weight, that the sum is the whole batch's
            loss *= metrics["loss"].weight
        return loss, (metrics, model_state, carry)

    if setup.mesh.shape["fsdp"] > 1:
        loss_of = jax.checkpoint(loss_of, policy=modules.keep)

    def grad(*given: Any) -> Any:
        grads, rest = jax.grad(loss_of, has_aux=True)(*given)
        # A sum over parts would otherwise be placed anew for each.
        return parallel.constrained(grads, setup.shardings.params, axes), rest

    given = params, state.model_state, state.carry, batch, key
    if e.accumulate == 1:
        return jax.grad(loss_of, has_aux=True)(*given)
    summed = functools.partial(accumulated, grad, e.accumulate)
    if axes:
        rows = setup.batch_size // parallel.copies(setup.mesh) // e.accumulate
        summed = apart(summed, setup.mesh, axes, rows)
    (total, metrics), model_state, carry = summed(*given)
    weight = jnp.maximum(metrics["loss"].weight, 1e-9)
    grads = jax.tree.map(lambda t, p: (t / weight).astype(p.dtype), total, params)
    return grads, (metrics, model_state, carry)


def accumulated(
    grad: Any, n: int, params: Any, model_state: Any, carry: Any, batch: Any, key: jax.Array
) -> Any:
    """Sums over n parts of a batch, (gradients, metrics), and the model state and carry after it.

    Part i has rows i, i + n, ...: each device keeps to the rows that it has.
    """

    def parts(x: jax.Array) -> jax.Array:
        return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)

    def whole(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def zeros(p: jax.Array) -> jax.Array:
        return jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))

    def add(so_far: Any, part: Any) -> Any:
        total, model_state = so_far
        batch, carry, key = part
        grads, (metrics, model_state, carry) = grad(params, model_state, carry, batch, key)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
        return (total, model_state), (metrics, carry)

    given = *jax.tree.map(parts, (batch, carry)), jax.random.split(key, n)
    before = jax.tree.map(zeros, params), model_state
    (total, model_state), (metrics, carry) = jax.lax.scan(add, before, given)
    metrics, carry = jax.tree.map(lambda x: x.sum(0), metrics), jax.tree.map(whole, carry)
    return (total, metrics), model_state, carry


def apart(summed: Any, mesh: Mesh, axes: tuple[str, ...], rows: int) -> Any:
    """`accumulated` on each device by itself, of its own rows, and one sum over devices at the end.

    Written for all devices as one, the sum over them is in the loop: XLA for CPU, TPU and CUDA
    leaves it there, once a part. rows: of a part, on one device.
    """

    def alone(params: Any, model_state: Any, carry: Any, batch: Any, key: jax.Array) -> Any:
        first = jax.lax.axis_index(axes) * rows
        key = draws.of_rows(key, first, rows)
        sums, model_state, carry = summed(params, model_state, carry, batch, key)
        return jax.lax.psum(sums, axes), model_state, carry

    split, same = P(axes), P()
    return jax.shard_map(
        alone,
        mesh=mesh,
        in_specs=(same, same, split, split, same),
        out_specs=(same, same, split),
        axis_names=set(axes),
        # A model may start a loop from zeros, which this would ask to be marked.
        check_vma=False,
    )


def train(
    setup: "Setup", workdir: pathlib.Path, profile: int = 0, quiet: bool = False
) -> run.Summary:
    """Trains in a run directory, from its newest checkpoint where it has one.

    profile: steps to trace for xprof, after two that warm up. quiet: print nothing.

    Raises UserError before anything is created where `workdir` holds another run, and
    FloatingPointError where the loss is not finite. On SIGTERM or SIGINT it saves and raises
    SystemExit.
    """
    e = setup.experiment
    parallel.refuse_several()
    news = run.check(workdir, e, setup.fingerprint)
    if finished := run.finished(workdir, e, news):
        return finished
    new = not checkpoint.steps(workdir / "checkpoints")
    loaded = setup.load() if new else None
    run.start(workdir, e, setup.fingerprint, new, setup.files)
    if loaded is not None:
        run.write_json(workdir, "init_from.json", loaded.json())
        news = [*news, loaded.line()]
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(checkpoint.Checkpoints(workdir / "checkpoints", e.keep))
        start, before = saved.latest() or 0, 0.0
        clock = timing.Clock()
        with clock.aside("compile"):
            traced = setup.step().trace(*setup.example())
            step_fn = traced.lower().compile()
            ledger = compute.report(
                traced, compiled=step_fn, mesh=setup.mesh, reference=setup.reference()
            )
            run.write_json(workdir, "compute.json", ledger.json())
            if start:
                state, before = saved.restore(start, setup.abstract, setup.shardings)
            else:
                state = setup.initial(loaded)
        log = stack.enter_context(run.recorder(workdir, e, start, ledger.count.model_flops, quiet))
        trace = stack.enter_context(timing.Trace(workdir / "profile", profile))
        asked = stack.enter_context(checkpoint.stop_requested())
        for line in (*setup.notes, *news, ledger.line()):
            log.message(line)

        def report(step: int, metrics: Any) -> None:
            values = mean([jax.device_get(metrics)])
            clock.lap()
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"the loss is {values['loss']} by step {step}")
            log.progress(step, values["loss"])
            if step % e.log_every == 0:
                log.write(step, "train", e.task.summary(values), before + clock.seconds)

        def evaluate(step: int, state: State, split: str) -> dict[str, dict[str, float]]:
            with clock.aside("evaluate"):
                found = setup.evaluate(state, split)
            for name, values in found.items():
                log.write(step, name, values, before + clock.seconds)
            return found

        def finals(step: int, state: State, names: list[str]) -> dict[str, dict[str, float]]:
            found = run.evaluated(workdir, step)
            for split in names:
                if split not in found:
                    found |= evaluate(step, state, split)
            return found

        def save(step: int, state: State) -> None:
            with clock.aside("save"):
                saved.save(step, state, before + clock.seconds, e.early_stop.best(state.stop))

        step, pending = start, None
        over = e.early_stop.over(state.stop)
        stop = start if over else e.steps
        clock.restart()
        for step, batch in enumerate(setup.feed(start, stop), start + 1):
            trace.before()
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch, setup.root)
                # Of the step before, while this one runs; not of every one where steps are short.
                if pending and (due(pending[0], e.log_every) or clock.since_lap > 0.1):
                    report(*pending)
            pending = step, metrics
            trace.after(metrics)
            to_evaluate, to_save = due(step, e.eval_every), due(step, e.save_every)
            if not (to_evaluate or to_save or asked.signal):
                continue
            report(*pending)
            pending = None
            if to_evaluate:
                state = setup.judge(state, evaluate(step, state, e.eval_split))
                over = e.early_stop.over(state.stop)
                to_save |= e.early_stop.best(state.stop) == step
            if to_save or asked.signal:
                save(step, state)
            if asked.signal:
                saved.wait()
                log.message(f"stopped by signal {asked.signal} at step {step}; saved")
                raise SystemExit(128 + asked.signal)
            if over:
                log.message(f"stopped early at step {step}")
                break
        if pending is not None:
            report(*pending)
        best = e.early_stop.best(state.stop)
        final = finals(step, state, e.final_splits if best in (None, step) else [e.eval_split])
        if step > start:
            ledger = ledger.after(clock.seconds / (step - start))
            run.write_json(workdir, "compute.json", ledger.json())
            for line in ledger.reached():
                log.message(line)
        save(step, state)  # last, so that a state whose metrics are not finite is not kept
        if best not in (None, step):
            saved.wait()
            state, _ = saved.restore(best, setup.abstract, setup.shardings)
            final = finals(best, state, e.final_splits)
            log.message(f"the best evaluation was at step {best}: the run is judged by it")
    summary = run.Summary(
        name=workdir.name,
        parameters=setup.parameters,
        data=type(e.data).__name__,
        step=step,
        early=bool(over),
        best=best,
        metrics=final,
        seconds=before + clock.seconds,
        steps_per_second=step / (before + clock.seconds),
        apart=clock.apart,
        flops_per_step=ledger.count.model_flops,
        flops_qualifier=ledger.count.qualifier,
        mfu=ledger.mfu.value,
        mfu_of=ledger.rates[0].source if ledger.rates else None,
    )
    return run.finish(workdir, summary, e.target)


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
