"""Training: `State`, `train_step` and the loop, `train`."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from research import checkpoint, compute, hosts, local, parallel, run, timing
from research.evaluate import mean
from research.gradient import gradients
from research.init_from import replaced
from research.modules import variables
from research.tasks import Mean

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
    clients: Any
    """Optimizer states of clients that train by themselves, split over devices as they are."""
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
        clients=local.start(setup, params) if e.local.active else None,
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

    clients = state.clients
    if e.local.active:
        grads, clients, (metrics, model_state, carry) = local.together(setup, state, batch, key)
    else:
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
    rate = e.optimizer.learning_rate(state.step * e.local.steps)
    known = {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
    metrics |= {k: Mean(v, jnp.ones(())) for k, v in known.items() if v is not None}
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        clients=clients,
        carry=carry,
        ema=ema,
    )
    return state, metrics


def train(
    setup: "Setup", workdir: pathlib.Path, profile: int = 0, quiet: bool = False
) -> run.Summary:
    """Trains in a run directory, from its newest checkpoint where it has one.

    profile: steps to trace for xprof, after two that warm up. quiet: print nothing.

    Raises UserError before anything is created where `workdir` holds another run, and
    FloatingPointError where the loss is not finite. On SIGTERM or SIGINT, in any process, it saves
    and raises SystemExit.
    """
    e = setup.experiment
    known = hosts.decided(lambda: run.opening(workdir, e, setup.fingerprint))
    hosts.check_alike(known["asked"], run.asked(e, setup.fingerprint))
    if known["finished"]:
        return run.Summary(**known["finished"])
    news, new = known["news"], known["new"]
    loaded = setup.load() if new else None
    hosts.meet("the run")
    started = hosts.decided(lambda: run.start(workdir, e, setup.fingerprint, new, setup.files))
    run.check_shared(workdir, started)
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
        trace = stack.enter_context(timing.Trace(workdir / "profile", profile * (hosts.me() == 0)))
        agreed = stack.enter_context(hosts.agreement())
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
            found = dict(hosts.decided(lambda: run.evaluated(workdir, step)))
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
            signal = agreed(step, asked.signal)
            if not (to_evaluate or to_save or signal):
                continue
            report(*pending)
            pending = None
            if to_evaluate:
                state = setup.judge(state, evaluate(step, state, e.eval_split))
                over = e.early_stop.over(state.stop)
                to_save |= e.early_stop.best(state.stop) == step
            if to_save or signal:
                save(step, state)
            if signal:
                saved.wait()
                log.message(f"stopped by signal {signal} at step {step}; saved")
                raise SystemExit(128 + signal)
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
