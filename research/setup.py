"""An experiment made ready to run: checked against its data, traced in outline, placed."""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from research import UserError, evaluate, flash, parallel, record, train
from research.data import splits
from research.data.outline import Outline
from research.data.splits import Batch
from research.evaluate import Report
from research.experiment import AVERAGED, Experiment, Source, did_you_mean, value
from research.init_from import Loaded, flat, load
from research.modules import compute_in, merged, only_norms_change, variables
from research.parallel import Parallel
from research.tasks import Classify, NextToken


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """Everything that training, evaluation and the ledger share; no parameter exists yet."""

    experiment: Experiment
    splits: Mapping[str, splits.Split]
    files: Mapping[str, str]
    """Texts that a run keeps beside its config, by name: the data's vocabulary, or its scales."""
    notes: Sequence[str]
    """What the log says of the data."""
    batch_size: int
    mesh: Mesh
    model: nnx.Module
    """Its arrays in outline."""
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    first: Batch
    """Batch 0 of training, of all processes, in the host's memory."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the data."""
        return splits.fingerprint(self.splits)

    @functools.cached_property
    def root(self) -> jax.Array:
        """The key that parameters, and each step's dropout, are derived from."""
        return parallel.replicate(jax.random.key(self.experiment.seed), self.mesh)

    @functools.cached_property
    def abstract(self) -> train.State:
        return jax.eval_shape(functools.partial(train.init, self, given={}), self._abstract_root)

    @functools.cached_property
    def _abstract_root(self) -> jax.ShapeDtypeStruct:
        key = jax.eval_shape(lambda: jax.random.key(self.experiment.seed))
        return _placed(key, parallel.replicated(self.mesh))

    @functools.cached_property
    def shardings(self) -> train.State:
        placed = parallel.place(self.abstract, self.mesh)
        split = {
            part: jax.tree.map(lambda _: parallel.batched(self.mesh), getattr(self.abstract, part))
            for part in ("clients", "carry")
        }
        return dataclasses.replace(placed, **split)

    @property
    def carries(self) -> bool:
        """Whether rows continue from batch to batch, and the model with them."""
        return "reset" in self.first

    @property
    def parameters(self) -> int:
        return sum(p.size for p in jax.tree.leaves(self.abstract.params))

    @functools.cached_property
    def axes_apart(self) -> tuple[str, ...]:
        """Axes over which copies of the model go through the parts of a batch by themselves and add
        up once, where nothing is asked of a batch as a whole; none: they add up after each part."""
        e, sizes = self.experiment, self.mesh.shape
        able = e.task.rows_apart() and only_norms_change(self.model)
        able &= sizes["fsdp"] == sizes["context"] == sizes["pipeline"] == 1
        return parallel.row_axes(self.mesh) if e.accumulate > 1 and able else ()

    @functools.cached_property
    def in_turn(self) -> bool:
        """Whether devices have stretches of a sequence in turn, as `ring` says."""
        causal = any(getattr(module, "causal", False) for _, module in nnx.iter_modules(self.model))
        return causal and self.mesh.shape["context"] > 1

    def load(self) -> Loaded | None:
        """What `init_from` names, read and checked against the model. Raises UserError."""
        return load(self.experiment.init_from, self.abstract.params, self.abstract.model_state)

    def initial(self, loaded: Loaded | None = None) -> train.State:
        """The state before the first step, every array made where it belongs."""
        init = jax.jit(functools.partial(train.init, self), out_shardings=self.shardings)
        given = {} if loaded is None else dict(loaded.arrays)
        places = flat(self.shardings.params) | flat(self.shardings.model_state)
        return init(self.root, parallel.spread(given, {name: places[name] for name in given}))

    def step(self) -> Any:
        """The jitted step: (state, what `feed` gives, root) -> (state, metrics).

        The state is donated.
        """
        step = functools.partial(train.train_step, self)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    def scaled(self, over: Parallel, devices: Sequence[jax.Device], times: int) -> "Setup":
        """The same on other devices with so many times the rows, for its program alone: the rows
        are not there. Raises UserError as `prepare` does of a mesh."""
        rows = self.batch_size * times
        first = {k: np.broadcast_to(v[:1], (rows, *v.shape[1:])) for k, v in self.first.items()}
        # What is evaluated is no part of the program.
        e = dataclasses.replace(self.experiment, parallel=over, eval_batch_size=None)
        mesh = over.mesh(rows, devices, _fitting(e, self.model, first["inputs"], rows))
        _check_mesh(e, self.model, first["inputs"], rows, mesh.shape)
        model = nnx.clone(self.model)
        for module in _attending(model):
            if isinstance(module.attention_fn, flash.Flash):
                module.attention_fn = module.attention_fn._replace(mesh=mesh)
        return dataclasses.replace(
            self,
            experiment=e,
            mesh=mesh,
            batch_size=rows,
            first=first,
            model=model,
            graph=nnx.graphdef(model),
        )

    def reference(self) -> Any:
        """The step traced on one device, by XLA's attention, where its mathematics is written
        otherwise; None: it is not."""
        spread = not self.mesh.shape["context"] == self.mesh.shape["pipeline"] == 1
        if not spread and self.experiment.attention == "xla":
            return None
        one = Parallel().mesh(self.batch_size, self.mesh.devices.reshape(-1)[:1].tolist())
        model = nnx.clone(self.model)
        for module in _attending(model):
            module.attention_fn = getattr(module.attention_fn, "plain", module.attention_fn)
        alone = dataclasses.replace(self, mesh=one, model=model, graph=nnx.graphdef(model))
        return alone.step().trace(*alone.abstract_example())

    def abstract_example(self) -> tuple[train.State, Any, Any]:
        """Arguments to lower `step` with, all as shapes: the state, a batch, the root key.

        Nothing is put on a device: the mesh may be of devices that are not there.
        """
        # Through jax for its dtypes: int64 becomes int32.
        batch = jax.eval_shape(lambda batch: batch, self._fed)
        places = jax.tree.broadcast(parallel.fed(batch, self.mesh), batch)
        placed = jax.tree.map(_placed, (self.abstract, batch), (self.shardings, places))
        return *placed, self._abstract_root

    def example(self) -> tuple[train.State, Any, jax.Array]:
        """The same, with a real batch and the real root key."""
        state, _, _ = self.abstract_example()
        fed, part = self._fed, self._part
        if isinstance(fed, parallel.Block):
            ours = {k: v[:, part] for k, v in fed.batches.items()}
            return state, parallel.put(parallel.Block(fed.first, ours), self.mesh), self.root
        return state, parallel.put({k: v[part] for k, v in fed.items()}, self.mesh), self.root

    @functools.cached_property
    def _part(self) -> slice:
        """The rows of a batch that this process reads."""
        return parallel.share(self.mesh, self.batch_size)

    @property
    def together(self) -> int:
        """Batches that are made and placed at once."""
        return splits.together(self.splits["train"], self.first, self.experiment.workers)

    @property
    def _fed(self) -> Any:
        """What the first step takes of all processes, in the host's memory."""
        if self.together == 1:
            return self.first
        many = {k: np.broadcast_to(v, (self.together, *v.shape)) for k, v in self.first.items()}
        return parallel.Block(np.int32(0), many)

    def _block(self, first: int, count: int, room: int) -> parallel.Block:
        """The batches of `count` steps, the last of them repeated where there is room."""
        e, train = self.experiment, self.splits["train"]
        found = splits.stacked(train, first, count, self.batch_size, e.seed, self._part)
        if count < room:
            places = np.minimum(np.arange(room), count - 1)
            found = {k: v[places] for k, v in found.items()}
        return parallel.Block(np.int32(first), found)

    def feed(self, start: int, stop: int) -> Iterator[Any]:
        """What each of the steps from `start` to `stop` takes: its batch, on the devices, or the
        block in which it is.

        Small batches of arrays in memory are made and placed many at once: one by one they take
        a small model's step, of 0.1 ms, a third longer on a CPU whose cores it needs.
        """
        e = self.experiment
        if (room := self.together) > 1:
            for first in range(start, stop, room):
                count = min(room, stop - first)
                block = parallel.put(self._block(first, count, room), self.mesh)
                yield from itertools.repeat(block, count)
        else:
            train = self.splits["train"]
            batches = splits.training(
                train, self.batch_size, e.seed, start, stop, e.workers, self._part
            )
            for batch in batches:
                yield parallel.put(batch, self.mesh)

    def judge(self, state: train.State, rows: Mapping[str, Mapping[str, float]]) -> train.State:
        """The state after early stopping has seen an evaluation of `eval_split`."""
        if state.stop is None:
            return state
        e, rule = self.experiment, self.experiment.early_stop
        row = e.eval_split + (AVERAGED if rule.ema else "")
        found = value(rows, row, rule.metric, "early_stop.metric")
        stop = rule.after(jax.device_get(state.stop), found, int(state.step))
        return dataclasses.replace(state, stop=parallel.spread(stop, self.shardings.stop))

    @property
    def eval_batch_size(self) -> int:
        return self.experiment.eval_batch_size or self.batch_size

    @functools.cached_property
    def eval_carry(self) -> Any:
        """Zeros, of a model that carries its state, for each row that is evaluated at once."""
        if not self.carries:
            return None

        def make() -> Any:
            model: Any = self.experiment.model.make(nnx.Rngs(0))
            return model.initial_carry(self.eval_batch_size)

        return jax.jit(make, out_shardings=parallel.batched(self.mesh))()

    @functools.cached_property
    def _evaluator(self) -> evaluate.Evaluator:
        e = self.experiment
        return evaluate.Evaluator(self.graph, e.task, self.mesh, self.in_turn, e.parallel.parts)

    def judged(self, state: train.State) -> Any:
        """The parameters to evaluate and to keep: those of training, or the optimizer's average."""
        return self.experiment.outer.eval_params(state.opt_state, state.params)

    def evaluate(self, state: train.State, split: str) -> dict[str, dict[str, float]]:
        """Metrics by row: `split`, and "`split`_ema" where parameters are averaged.

        Raises UserError for a split that the data does not have.
        """
        return {row: metrics for row, (metrics, _) in self.report(state, split).items()}

    def report(self, state: train.State, split: str) -> dict[str, Report]:
        """The same, with the tables that are no metrics."""
        rows = {split: self.judged(state)}
        rows |= {} if state.ema is None else {split + AVERAGED: state.ema}
        examples = find(self.splits, split)
        return {
            row: self._evaluator(
                params, state.model_state, self.eval_carry, examples, self.eval_batch_size
            )
            for row, params in rows.items()
        }


def _placed(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def prepare(experiment: Experiment, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Reads the data, builds the mesh and traces the model on a batch, computing nothing.

    devices: the mesh's (default: all there are).

    Raises UserError where data, model, task and devices do not fit one another.
    """
    record.require(experiment.tracker)
    data = experiment.data.load()
    for name in ("train", *experiment.final_splits):
        find(data, name)
    for name, split in data.items():
        arrays = split.arrays()
        if not len(split):
            raise UserError(f"the {name} split is empty")
        if "bad" in arrays and arrays["bad"].all():
            raise UserError(f"every row of the {name} split is bad")
    if isinstance(experiment.task, Classify):
        _check_classes(data)
    batch_size = experiment.batch_size or len(data["train"])
    data["train"].check(batch_size)
    shares, clients = getattr(data["train"], "shares", None), experiment.local.clients
    if experiment.local.active and shares is not None and len(shares) != clients:
        raise UserError(
            f"local.clients {clients} is not data.clients {len(shares)}: every client has one share"
        )
    first = data["train"].batch(0, batch_size, experiment.seed)
    model = nnx.eval_shape(lambda: experiment.model.make(nnx.Rngs(0)))
    divided = experiment, model, first["inputs"], batch_size
    mesh = experiment.parallel.mesh(batch_size, devices, _fitting(*divided))
    if experiment.precision != "float32":
        compute_in(model, jnp.dtype(experiment.precision))
    optimizers = {"optimizer": experiment.optimizer}
    if experiment.local.active:
        optimizers["local.outer"] = experiment.outer
    for field, optimizer in optimizers.items():
        try:
            optimizer.check(variables(model)[0])
        except ValueError as error:
            raise UserError(f"{field}: {error}") from None
    if "reset" in first and not hasattr(model, "initial_carry"):
        raise UserError(
            f"data gives rows that continue from batch to batch, and {type(model).__name__} keeps "
            f"no state between batches (it has no initial_carry): set {_alone(experiment.data)}"
        )
    _check_mesh(*divided, mesh.shape)
    if experiment.attention == "flash":
        _flash(experiment, model, mesh)
    if "segments" in first and "segments" not in inspect.signature(model.__call__).parameters:
        raise UserError(
            f"data gives packed rows of several documents, and {type(model).__name__} cannot tell "
            "documents apart (it takes no segments): take a model that can, such as a Transformer "
            "decoder, or rows that are not packed"
        )
    if getattr(experiment.model, "bidirectional", False):
        _check_direction(experiment, "reset" in first)
    setup = Setup(
        experiment=experiment,
        splits=data,
        files=getattr(data, "files", {}),
        notes=getattr(data, "notes", ()),
        batch_size=batch_size,
        mesh=mesh,
        model=model,
        graph=nnx.graphdef(model),
        optimizer=experiment.outer.make(),
        first=first,
    )
    tensor = mesh.shape["tensor"]
    if tensor > 1 and not any("tensor" in s.spec for s in jax.tree.leaves(setup.shardings.params)):
        raise UserError(
            f"parallel.tensor {tensor}: no rule of parallel.RULES splits a parameter of "
            f"{type(model).__name__}, whose shapes it divides"
        )
    outputs = _outputs(setup)
    for name, split in data.items():
        try:
            _check_vocabulary(experiment, split.arrays())
            experiment.task.check(outputs, split.arrays())
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    try:
        score, kept = jax.eval_shape(
            lambda *given: (experiment.task.score(*given), experiment.task.gather(*given)),
            outputs,
            first,
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        task, shape = type(experiment.task).__name__, list(outputs.shape)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{task} cannot judge outputs of {shape}: {reason}") from error
    metrics = evaluate.names(experiment.task, score, kept)
    for field, wanted in experiment.watched.items():
        if wanted not in metrics:
            raise UserError(f"{field}: no metric {wanted!r}{did_you_mean(wanted, metrics)}")
    return setup


def _check_mesh(
    experiment: Experiment,
    model: Any,
    inputs: np.ndarray,
    batch_size: int,
    sizes: Mapping[str, int],
) -> None:
    """Raises UserError where the batches, the clients or the model do not divide over the axes of
    a mesh."""
    if experiment.parallel.microbatches is not None and sizes["pipeline"] == 1:
        raise UserError("parallel.microbatches needs parallel.pipeline of 2 or more stages")
    if experiment.attention == "flash" and sizes["context"] > 1:
        raise flash.Unsuited("with parallel.context a ring is in its place")
    if experiment.attention == "flash" and sizes["pipeline"] > 1:
        raise flash.Unsuited("not with parallel.pipeline")
    copies = parallel.copies(sizes)
    parallel.check_divides("eval_batch_size", experiment.eval_batch_size or batch_size, copies)
    if heads := _heads(experiment.model):
        _check_axis("tensor", sizes, *heads)
    parts = experiment.accumulate * copies
    if batch_size % parts:
        raise UserError(
            f"batch_size {batch_size} does not divide into accumulate = {experiment.accumulate} "
            f"parts over {copies} devices; "
            f"nearest that does: {parallel.nearest(batch_size, parts)}"
        )
    _check_local(experiment, batch_size, sizes)
    if sizes["context"] > 1:
        _check_context(model, inputs, sizes["context"])
    if sizes["pipeline"] > 1:
        _check_pipeline(experiment, model, batch_size, sizes)


def _fitting(
    experiment: Experiment, model: Any, inputs: np.ndarray, batch_size: int
) -> Callable[[Mapping[str, int]], bool]:
    """Whether `_check_mesh` lets a mesh of such sizes pass."""

    def fits(sizes: Mapping[str, int]) -> bool:
        spread = dataclasses.replace(experiment.parallel, **sizes)
        e = dataclasses.replace(experiment, parallel=spread)
        try:
            _check_mesh(e, model, inputs, batch_size, sizes)
        except UserError:
            return False
        return True

    return fits


def _check_axis(axis: str, sizes: Mapping[str, int], field: str, size: int) -> None:
    """Raises UserError where an axis of the mesh does not divide what it is to split."""
    parts, devices = sizes[axis], math.prod(sizes.values())
    if size % parts:
        below = next(n for n in range(parts - 1, 0, -1) if size % n == devices % n == 0)
        raise UserError(
            f"{field} {size} does not divide over parallel.{axis} {parts}; nearest that do: "
            f"parallel.{axis} {below}, or {field} {parallel.nearest(size, parts)}"
        )


def _heads(model: Any) -> tuple[str, int] | None:
    """The field of a model that says how many key heads it has, and their number."""
    for field in ("kv_heads", "heads"):
        if (heads := getattr(model, field, None)) is not None:
            return f"model.{field}", heads
    return None


def _check_local(experiment: Experiment, batch_size: int, sizes: Mapping[str, int]) -> None:
    local, copies = experiment.local, parallel.copies(sizes)
    if not local.active:
        return
    for axis in ("pipeline", "fsdp", "context", "tensor"):
        if sizes[axis] > 1:
            raise UserError(
                f"parallel.{axis} {sizes[axis]}: a device has whole clients (local.clients "
                f"{local.clients}); spread them over replica and data"
            )
    parallel.check_divides("local.clients", local.clients, copies)
    parts = local.clients * local.steps
    if batch_size % parts:
        raise UserError(
            f"batch_size {batch_size} does not divide into {local.steps} steps of "
            f"{local.clients} clients; nearest that does: {parallel.nearest(batch_size, parts)}"
        )


def _attending(model: nnx.Module) -> list[Any]:
    """The modules whose attention another may be put in the place of."""
    return [module for _, module in nnx.iter_modules(model) if hasattr(module, "attention_fn")]


def _flash(experiment: Experiment, model: Any, mesh: Mesh) -> None:
    """Puts the attention of these devices in its place. Raises flash.Unsuited where it does not
    compute a model's, and where they have none."""
    platform = mesh.devices.flat[0].platform
    dots = getattr(experiment.model, "remat", None) == "dots"
    reasons = {
        f"{type(model).__name__} has no attention": not _attending(model),
        f"GPUs and TPUs have it, and the devices are {platform}": platform not in flash.KERNELS,
        "it computes in bfloat16: set precision bfloat16": experiment.precision != "bfloat16",
        "its own products are none that model.remat dots keeps: set none or full": dots,
        "not with local.clients": experiment.local.active,
    }
    for reason, holds in reasons.items():
        if holds:
            raise flash.Unsuited(reason)
    kernel = flash.KERNELS[platform]
    for module in _attending(model):
        module.attention_fn = flash.Flash(kernel, mesh, parallel.BATCH[0], module.attention_fn)


def _check_context(model: Any, inputs: np.ndarray, size: int) -> None:
    name = type(model).__name__
    if not _attending(model):
        raise UserError(f"parallel.context {size}: {name} has no attention that shares a sequence")
    if inputs.ndim != 2 or getattr(model, "token", None) is not None:
        raise UserError(
            f"parallel.context {size}: {name} attends to more than the data's tokens; "
            "a Transformer decoder, or an encoder of tokens without a class token, can share them"
        )
    if inputs.shape[1] % (2 * size):
        raise UserError(
            f"parallel.context {size}: rows of {inputs.shape[1]} tokens do not divide into "
            f"{2 * size} stretches, two a device"
        )


def _check_pipeline(
    experiment: Experiment, model: Any, batch_size: int, sizes: Mapping[str, int]
) -> None:
    stages, parts = sizes["pipeline"], experiment.parallel.parts
    asked = f"parallel.pipeline {stages}: "
    for axis in ("context", "tensor"):
        if sizes[axis] > 1:
            raise UserError(
                f"{asked}not together with parallel.{axis}; with replica, data and fsdp"
            )
    if not (hasattr(model, "loop_fn") and model.scan):
        raise UserError(
            f"{asked}stages are of a Transformer's scanned layers (model.scan True), and "
            f"{type(model).__name__} has none"
        )
    layers = getattr(experiment.model, "layers", stages)
    _check_axis("pipeline", sizes, "model.layers", layers)
    least = math.lcm(parts, stages) * parallel.copies(sizes)
    rows = {"batch_size": batch_size // experiment.accumulate}
    rows |= {"eval_batch_size": experiment.eval_batch_size or batch_size}
    for field, size in rows.items():
        if size % least:
            raise UserError(
                f"{asked}{field} {size} does not divide into {parts} parallel.microbatches of "
                f"rows on each of {parallel.copies(sizes)} devices; "
                f"nearest that does: {parallel.nearest(size, least)}"
            )


def _outputs(setup: Setup) -> jax.ShapeDtypeStruct:
    """The shape of what the model gives for a batch."""
    task = setup.experiment.task

    def call(state: train.State, batch: Any) -> Any:
        with merged(setup.graph, state.params, state.model_state, training=False) as model:
            return task.outputs(model, batch, None, state.carry)[0]

    state = setup.abstract
    try:
        return jax.eval_shape(call, state, setup.first)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        given = setup.first["inputs"]
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the model does not take the data's inputs, {given.dtype}{list(given.shape)}: {reason}"
        ) from error


def _check_direction(experiment: Experiment, carries: bool) -> None:
    """A model that reads from both ends knows what is to be predicted, and has nothing to carry."""
    if carries:
        raise UserError(
            "data gives rows that continue from batch to batch, which a bidirectional model "
            f"cannot: set {_alone(experiment.data)}, or model.bidirectional to False"
        )
    if isinstance(experiment.task, NextToken):
        raise UserError(
            "a bidirectional model reads the tokens that NextToken asks it to predict: "
            "set model.bidirectional to False"
        )


def _alone(data: Source) -> str:
    """The setting by which rows do not continue from batch to batch."""
    data = data.data if isinstance(data, Outline) else data
    return "data.rows to windows" if hasattr(data, "rows") else "data.stream to False"


def _check_classes(data: Mapping[str, splits.Split]) -> None:
    """Raises UserError where a split has a class that training never sees."""
    seen = {}
    for name, split in data.items():
        arrays = split.arrays()
        targets = arrays.get("targets")
        if targets is None or len(targets) != len(split):  # decoded as they are read: not known
            continue
        good = targets[~arrays["bad"]] if "bad" in arrays else targets
        seen[name] = set(np.unique(good).tolist())
    for name, classes in seen.items():
        if missing := sorted(classes - seen.get("train", classes)):
            raise UserError(f"{name} has class {missing[0]}, which train never has")


def _check_vocabulary(experiment: Experiment, arrays: Mapping[str, np.ndarray]) -> None:
    """An embedding gives NaN, and says nothing, for a token that it does not have."""
    vocab, tokens = getattr(experiment.model, "vocab", None), arrays.get("tokens")
    tokens = arrays.get("inputs") if tokens is None else tokens
    if vocab is None or tokens is None or not np.issubdtype(tokens.dtype, np.integer):
        return
    if int(tokens.max()) >= vocab:
        raise UserError(f"tokens run to {tokens.max()}, and model.vocab is {vocab}")


def find(data: Mapping[str, splits.Split], split: str) -> splits.Split:
    if split not in data:
        raise UserError(f"the data has no split {split!r}{did_you_mean(split, list(data))}")
    return data[split]
