import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
import tiny

from research import UserError, checkpoint, compute, parallel, record, train
from research.data import splits
from research.data.arrays import Arrays
from research.data.splits import Examples
from research.experiment import EarlyStop, Target
from research.models.lstm import LSTMConfig
from research.models.mlp import MLPConfig
from research.modules import merged
from research.optim import Optax
from research.parallel import Parallel
from research.setup import Setup, prepare
from research.tasks import BinaryClassify

FAMILIES = [tiny.mlp, tiny.lstm, tiny.transformer, tiny.resnet, tiny.vit]
ONE, EIGHT = tiny.ONE, jax.devices()


def bits(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.asarray(leaf).tobytes() for leaf in leaves]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(family, tmp_path):
    first, again, other = (
        tiny.final_state(family(seed=seed), tmp_path / name)
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert bits(first) == bits(again)
    assert tiny.rows(tmp_path / "a") == tiny.rows(tmp_path / "b")
    assert bits(first.params) != bits(other.params)


@pytest.mark.parametrize("family", [*FAMILIES, tiny.packed])
def test_resumed_equals_uninterrupted_bit_for_bit(family, tmp_path):
    asked = {"ema": 0.9, "eval_every": 4, "early_stop": EarlyStop(patience=9)}
    whole = tiny.final_state(family(steps=12, **asked), tmp_path / "whole")
    tiny.final_state(family(steps=5, **asked), tmp_path / "parts")
    parts = tiny.final_state(family(steps=12, save_every=7, **asked), tmp_path / "parts")
    assert bits(whole) == bits(parts)
    last = [row for row in tiny.rows(tmp_path / "parts") if row["step"] > 5]
    assert last == [row for row in tiny.rows(tmp_path / "whole") if row["step"] > 5]
    seen = [(row["step"], row["split"]) for row in tiny.rows(tmp_path / "parts")]
    assert len(seen) == len(set(seen))
    assert "continued with steps = 12, before 5" in (tmp_path / "parts/log.txt").read_text()


def test_rows_after_the_checkpoint_of_a_crash_are_replaced(tmp_path, monkeypatch):
    tiny.final_state(tiny.mlp(), tmp_path / "whole")
    feed = Setup.feed

    def crash(*args):
        yield from itertools.islice(feed(*args), 10)
        raise KeyboardInterrupt

    experiment = tiny.mlp(save_every=4)
    setup = prepare(experiment, ONE)
    monkeypatch.setattr(Setup, "feed", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(setup, tmp_path / "run", quiet=True)
    assert tiny.rows(tmp_path / "run")[-1]["step"] == 9
    monkeypatch.setattr(Setup, "feed", feed)
    tiny.final_state(experiment, tmp_path / "run")
    assert tiny.rows(tmp_path / "run") == tiny.rows(tmp_path / "whole")


def test_eight_devices_train_as_one_does(tmp_path):
    experiment = tiny.mlp(optimizer=tiny.sgd(0.1, clip_norm=1.0), ema=0.5)
    one = tiny.final_state(experiment, tmp_path / "one")
    spread = dataclasses.replace(experiment, parallel=Parallel(fsdp=4, tensor=2))
    eight = tiny.final_state(spread, tmp_path / "eight", EIGHT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, eight)
    losses = [[row["loss"] for row in tiny.rows(tmp_path / name)] for name in ("one", "eight")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_run_moves_to_other_devices(tmp_path):
    tiny.final_state(tiny.mlp(steps=6), tmp_path)
    state = tiny.final_state(tiny.mlp(steps=12, parallel=Parallel(fsdp=8)), tmp_path, EIGHT)
    assert state.step == 12


def test_a_checkpoint_goes_from_mesh_to_mesh_bit_for_bit(tmp_path):
    wanted = tiny.final_state(tiny.transformer(steps=1), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints"
    spreads = [
        (Parallel(fsdp=8), EIGHT),
        (Parallel(fsdp=4, tensor=2), EIGHT),
        (Parallel(context=4, replica=2), EIGHT),
        (Parallel(pipeline=2, fsdp=2, microbatches=2), EIGHT[:4]),
        (Parallel(), ONE),
    ]
    for i, (spread, devices) in enumerate(spreads):
        setup = prepare(tiny.transformer(parallel=spread), devices)
        step, state = checkpoint.read(path, None, setup.abstract, setup.shardings)
        assert step == 1
        for array, place in zip(*map(jax.tree.leaves, (state, setup.shardings)), strict=True):
            assert array.sharding.is_equivalent_to(place, array.ndim)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), wanted)
        path = tmp_path / str(i)  # the next mesh reads what this one wrote
        with checkpoint.Checkpoints(path, keep=None) as saved:
            saved.save(step, state, 0.0)


@pytest.mark.parametrize("family", [*FAMILIES, tiny.packed])
def test_the_loss_falls(family, tmp_path):
    tiny.final_state(family(steps=40), tmp_path)
    losses = [row["loss"] for row in tiny.rows(tmp_path) if row["split"] == "train"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


@pytest.mark.parametrize(("batch_size", "examples"), [(None, 64), (16, 16), (1, 1)])
def test_full_batch_mini_batch_and_single_example(batch_size, examples, tmp_path):
    setup = prepare(tiny.mlp(batch_size=batch_size, steps=3, log_every=1), ONE)
    assert [len(b.at(i)["inputs"]) for i, b in enumerate(setup.feed(0, 3))] == [examples] * 3
    train.train(setup, tmp_path, quiet=True)
    assert [r["step"] for r in tiny.rows(tmp_path) if r["split"] == "train"] == [1, 2, 3]


@dataclasses.dataclass(frozen=True)
class Fixed:
    train: object
    validation: object

    def load(self):
        return {"train": Examples(self.train), "validation": Examples(self.validation)}


class Asked(Examples):
    """Rows that keep which steps they were asked for."""

    def batch(self, step, *args):
        self.asked.append(step)
        return super().batch(step, *args)


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (5, 9), (4, 4)])
def test_a_run_is_fed_its_own_steps_alone(start, stop):
    setup = prepare(tiny.mlp(), ONE)
    split = Asked(setup.splits["train"].rows)
    object.__setattr__(split, "asked", [])
    setup.splits["train"] = split
    assert setup.together == 256
    split.asked.clear()
    assert len(list(setup.feed(start, stop))) == stop - start
    assert split.asked == list(range(start, stop))


@pytest.mark.parametrize(("family", "devices"), [(tiny.mlp, ONE), (tiny.lstm, EIGHT)])
def test_batches_placed_many_at_once_are_those_placed_one_by_one(
    family, devices, tmp_path, monkeypatch
):
    def trained(name, together):
        monkeypatch.setattr(splits, "together", lambda *_: together)
        setup = prepare(family(steps=4, log_every=1), devices)
        tiny.final_state(setup.experiment, tmp_path / name, devices)  # it continues in mid-block
        state = tiny.final_state(family(steps=9, log_every=1), tmp_path / name, devices)
        fed = list(setup.feed(2, 9))
        if together > 1:
            assert len({id(block) for block in fed}) == -(-7 // together)
            fed = [jax.jit(parallel.Block.at)(block, step) for step, block in enumerate(fed, 2)]
        for key, array in fed[0].items():
            assert array.sharding.is_equivalent_to(parallel.batched(setup.mesh), array.ndim), key
        losses = [row["loss"] for row in tiny.rows(tmp_path / name) if "loss" in row]
        return jax.device_get(fed), jax.device_get(state.params), losses

    batches, *single = trained("single", 1)
    taken, *found = trained("together", 3)
    jax.tree.map(np.testing.assert_array_equal, taken, batches)
    # A program that takes them out of a block may round otherwise.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, single)


def plain(family, **fields):
    """Without dropout, which draws anew for each part of a batch."""
    e = family(**{"optimizer": tiny.sgd(0.1, l2=0.1)} | fields)
    if hasattr(e.model, "dropout"):
        e = dataclasses.replace(e, model=dataclasses.replace(e.model, dropout=0.0))
    return e


def stepped(experiment, devices=ONE, steps=2, weights=None):
    """The state after some steps, and the metrics of the last."""
    setup = prepare(experiment, devices)
    state, step = setup.initial(), setup.step()
    for i in range(steps):
        batch = setup.splits["train"].batch(i, setup.batch_size, 0)
        if weights is not None:
            batch["weights"] = weights.astype(np.float32)
        state, metrics = step(state, parallel.put(batch, setup.mesh), setup.root)
    return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize("family", [tiny.mlp, tiny.lstm, tiny.transformer, tiny.packed])
def test_a_batch_in_parts_is_the_batch(family):
    """The parameters, the optimizer's state, the carry of every row, and the metrics."""
    whole = stepped(plain(family))
    parts = stepped(plain(family, accumulate=4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    hits = [found[1]["accuracy"] for found in (whole, parts)]
    assert hits[0] == hits[1]
    spread = stepped(plain(family, accumulate=2), EIGHT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, spread)


def test_parts_count_by_their_weights():
    weights = np.arange(16.0) % 5
    weights[3::4] = 0  # a part that counts nothing
    whole, parts = (stepped(plain(tiny.mlp, accumulate=n), weights=weights) for n in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    assert parts[1]["accuracy"].weight == weights.sum()


def test_the_gradient_of_sam_is_taken_in_parts_too():
    sam = tiny.sgd(0.1, sam_rho=0.5)
    whole, parts = (stepped(plain(tiny.mlp, optimizer=sam, accumulate=n)) for n in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_cost_what_the_batch_does(family):
    counts = []
    for n in (1, 4):
        setup = prepare(family(accumulate=n), ONE)
        counts.append(compute.count(setup.step().trace(*setup.abstract_example())))
    assert counts[0].matmul == counts[1].matmul
    assert counts[1].exact


def test_parts_go_through_running_statistics_in_turn_and_draw_their_own_dropout():
    state, _ = stepped(tiny.norm(accumulate=2, optimizer=tiny.sgd(0.0)), steps=1)
    batch = prepare(tiny.norm(), ONE).splits["train"].batch(0, 16, 0)["inputs"]
    first, second = batch[::2].mean(0), batch[1::2].mean(0)
    np.testing.assert_allclose(
        state.model_state["norm"]["mean"], 0.25 * first + 0.5 * second, atol=1e-6
    )
    same = tiny.Points().load()["train"].rows
    twice = {k: np.repeat(v[:8], 2, axis=0) for k, v in same.items()}  # both parts are alike
    setup = prepare(tiny.mlp(accumulate=2), ONE)
    both = parallel.put(twice | {"weights": np.ones(16, np.float32)}, setup.mesh)
    _, metrics = setup.step()(setup.initial(), both, setup.root)
    setup = prepare(tiny.mlp(batch_size=8), ONE)
    one = {k: v[::2] for k, v in twice.items()} | {"weights": np.ones(8, np.float32)}
    _, alone = setup.step()(setup.initial(), parallel.put(one, setup.mesh), setup.root)
    assert not np.isclose(metrics["loss"].total, 2 * alone["loss"].total, rtol=1e-3)


def test_a_run_in_parts_resumes_bit_for_bit(tmp_path):
    whole = tiny.final_state(tiny.lstm(steps=6, accumulate=2), tmp_path / "whole")
    tiny.final_state(tiny.lstm(steps=3, accumulate=2), tmp_path / "parts")
    parts = tiny.final_state(tiny.lstm(steps=6, accumulate=2), tmp_path / "parts")
    assert bits(whole) == bits(parts)


def test_one_sgd_step_is_the_gradient_by_hand(tmp_path):
    state = tiny.final_state(tiny.scale(steps=1, optimizer=tiny.sgd(0.1)), tmp_path)
    x = tiny.Identity().load()["train"].rows["inputs"]
    gradient = (2 * (0.5 * x - 2 * x) * x).mean(0) / 5  # of the mean over 16 rows of 5
    np.testing.assert_allclose(state.params["w"], 0.5 - 0.1 * gradient, rtol=1e-6)
    row = tiny.rows(tmp_path)[0]
    np.testing.assert_allclose(row["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(row["loss"], ((1.5 * x) ** 2).mean(), rtol=1e-6)
    assert row["learning_rate"] == np.float32(0.1)


def test_penalties_join_the_gradient_and_not_the_reported_loss(tmp_path):
    plain, l1, l2 = (
        (tiny.final_state(tiny.scale(steps=1, optimizer=o), tmp_path / n), tiny.rows(tmp_path / n))
        for n, o in [
            ("plain", tiny.sgd(0.1)),
            ("l1", tiny.sgd(0.1, l1=0.3)),
            ("l2", tiny.sgd(0.1, l2=0.3)),
        ]
    )
    moved = plain[0].params["w"]
    np.testing.assert_allclose(l1[0].params["w"], moved - 0.1 * 0.3, rtol=1e-5)
    np.testing.assert_allclose(l2[0].params["w"], moved - 0.1 * 0.3 * 0.5, rtol=1e-5)
    assert plain[1][0]["loss"] == l1[1][0]["loss"] == l2[1][0]["loss"]


def test_the_moving_average_is_that_of_the_parameters(tmp_path):
    setup = prepare(tiny.scale(ema=0.75, optimizer=tiny.sgd(0.1)), ONE)
    step, state = setup.step(), setup.initial()
    average = np.full(5, 0.5)
    for i in range(3):
        batch = setup.splits["train"].batch(i, 16, 0)
        state, _ = step(state, parallel.put(batch, setup.mesh), setup.root)
        average = 0.75 * average + 0.25 * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], average, rtol=1e-6)
    found = setup.evaluate(state, "validation")
    assert found["validation"]["loss"] < found["validation_ema"]["loss"]


def test_running_statistics_are_state_and_evaluation_uses_them(tmp_path):
    setup = prepare(tiny.norm(batch_size=None, steps=1, optimizer=tiny.sgd(0.0)), ONE)
    state = setup.initial()
    x = setup.splits["train"].rows["inputs"]
    batch = parallel.put(setup.splits["train"].batch(0, 64, 0), setup.mesh)
    state, _ = setup.step()(state, batch, setup.root)
    mean, variance = 0.5 * x.mean(0), 0.5 + 0.5 * x.var(0)  # momentum 0.5 from 0 and 1
    np.testing.assert_allclose(state.model_state["norm"]["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(state.model_state["norm"]["var"], variance, rtol=1e-5)
    rows = setup.splits["validation"].rows
    head = jax.device_get(state.params["head"])
    logits = (rows["inputs"] - mean) / np.sqrt(variance + 1e-5) @ head["kernel"] + head["bias"]
    right = (logits.argmax(1) == rows["targets"]).mean()
    found = setup.evaluate(state, "validation")["validation"]["accuracy"]
    assert found == pytest.approx(right)


def test_a_text_is_evaluated_in_as_many_streams_as_are_asked_for():
    found = {}
    for size in (None, 1):
        setup = prepare(tiny.lstm(eval_batch_size=size), ONE)
        state = setup.initial()
        found[size] = setup.evaluate(state, "validation")["validation"]["loss"]
    tokens = setup.splits["validation"].tokens
    with merged(setup.graph, state.params, state.model_state, training=False) as model:
        logits, _ = model(tokens[None, :-1], carry=model.initial_carry(1))
    alone = optax.softmax_cross_entropy_with_integer_labels(logits[0], tokens[1:]).mean()
    assert found[1] == pytest.approx(float(alone), rel=1e-5)
    assert found[None] != pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("size", [8, 32, 256])
def test_metrics_do_not_depend_on_how_many_rows_are_evaluated_at_once(size):
    both = [prepare(tiny.mlp(eval_batch_size=n), EIGHT) for n in (None, size)]
    assert both[1].eval_batch_size == size
    found = [setup.evaluate(setup.initial(), "validation") for setup in both]
    assert found[0]["validation"] == pytest.approx(found[1]["validation"], rel=1e-5)


def test_a_class_that_training_never_has_is_said():
    data = tiny.mlp().data.load()
    train, rows = data["train"].rows, data["validation"].rows
    few = {k: v[train["targets"] != 2] for k, v in train.items()}
    source = Arrays(train=few, validation=dict(rows))
    with pytest.raises(UserError, match="validation has class 2, which train never has"):
        prepare(tiny.mlp(data=source, batch_size=8), ONE)
    bad = dict(rows, bad=rows["targets"] == 2)
    prepare(tiny.mlp(data=Fixed(few, bad), batch_size=8), ONE)


def test_rows_that_are_evaluated_at_once_divide_over_the_devices():
    with pytest.raises(UserError, match="eval_batch_size 12 does not divide over 8 devices"):
        prepare(tiny.mlp(eval_batch_size=12), EIGHT)


def test_buffers_are_donated():
    setup = prepare(tiny.mlp(), ONE)
    state = setup.initial()
    kept = jax.tree.leaves(state)
    setup.step()(state, setup.example()[1], setup.root)
    assert all(leaf.is_deleted() for leaf in kept)


def test_an_example_in_outline_has_the_shapes_and_places_of_a_real_one():
    setup = prepare(tiny.mlp(parallel=parallel.Parallel(fsdp=2)))
    outline, real = (
        jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), example)
        for example in (setup.abstract_example(), setup.example())
    )
    assert outline == real
    assert not [a for a in jax.tree.leaves(setup.abstract_example()) if isinstance(a, jax.Array)]


def test_metrics_of_a_step_are_fetched_while_the_next_one_runs(tmp_path, monkeypatch):
    events = []
    feed = Setup.feed
    setup = prepare(tiny.mlp(steps=4), ONE)

    def seen(*args):
        for batch in feed(*args):
            events.append("start")
            yield batch

    monkeypatch.setattr(Setup, "evaluate", lambda *_: {"validation": {"loss": 0.0}})
    monkeypatch.setattr(Setup, "feed", seen)
    monkeypatch.setattr(record.Recorder, "progress", lambda _, step, loss: events.append(step))
    train.train(setup, tmp_path, quiet=True)
    assert events == ["start", "start", 1, "start", 2, "start", 3, 4]


def test_an_accidental_transfer_in_the_loop_is_an_error(tmp_path, monkeypatch):
    setup = prepare(tiny.mlp(), ONE)
    example = setup.example()
    monkeypatch.setattr(setup.__class__, "example", lambda _: example)
    monkeypatch.setattr(train.parallel, "put", lambda batch, mesh: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.train(setup, tmp_path, quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run_unsaved(tmp_path):
    setup = prepare(tiny.mlp(data=tiny.Points(bad=True), batch_size=64), ONE)
    with pytest.raises(FloatingPointError, match="the loss is nan by step 1"):
        train.train(setup, tmp_path, quiet=True)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked:
    """tiny.Points, with a share of the rows of each split bad."""

    train: float = 0.0
    validation: float = 0.0

    def load(self):
        found = {}
        for name, split in tiny.Points().load().items():
            bad = np.arange(len(split)) < getattr(self, name) * len(split)
            inputs = np.where(bad[:, None], np.float32(0), split.rows["inputs"])
            found[name] = Examples({**split.rows, "inputs": inputs, "bad": bad})
        return found


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_of_bad_rows_alone_teaches_nothing_and_is_counted(parts, tmp_path):
    e = tiny.mlp(
        data=Marked(train=0.9), batch_size=2, accumulate=parts, steps=8, optimizer=tiny.sgd(0.1)
    )
    setup = prepare(e, ONE)
    train.train(setup, tmp_path / "run", quiet=True)
    rows = [row for row in tiny.rows(tmp_path / "run") if row["split"] == "train"]
    empty = [row for row in rows if row["bad"] == 1]
    assert 0 < len(empty) < len(rows)
    for row in empty:
        assert row["loss"] == row["grad_norm"] == 0
    assert all(row["loss"] > 0 for row in rows if row["bad"] < 1)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_of_bad_rows_alone_is_said(split):
    with pytest.raises(UserError, match=f"every row of the {split} split is bad"):
        prepare(tiny.mlp(data=Marked(**{split: 1.0})), ONE)


def test_an_evaluation_that_finds_bad_rows_alone_is_said():
    setup = prepare(tiny.mlp(), ONE)
    rows = dict(setup.splits["validation"].rows)
    setup.splits["validation"] = Examples({**rows, "bad": np.ones(21, bool)})
    with pytest.raises(UserError, match="every row of a split is bad"):
        setup.evaluate(setup.initial(), "validation")


def test_an_empty_split_is_said():
    @dataclasses.dataclass(frozen=True)
    class Empty:
        def load(self):
            rows = {"inputs": np.zeros((0, 5), np.float32), "targets": np.zeros(0, np.int32)}
            return {**tiny.Points().load(), "test": Examples(rows)}

    with pytest.raises(UserError, match="the test split is empty"):
        prepare(tiny.mlp(data=Empty()), ONE)


def test_early_stopping_ends_the_run_for_good(tmp_path):
    stop = EarlyStop(patience=2, metric="accuracy", goal="max")
    experiment = tiny.mlp(steps=50, eval_every=3, early_stop=stop, optimizer=tiny.sgd(0.0))
    state = tiny.final_state(experiment, tmp_path)
    assert state.step == 9  # the first evaluation is the best, and two do not improve on it
    assert train.run.summary(tmp_path).early
    (tmp_path / "summary.json").unlink()
    assert tiny.final_state(experiment, tmp_path).step == 9


BEST = EarlyStop(metric="loss", keep_best=True)


def worse(**fields):
    """Learns at first and diverges later: the best evaluation is in the middle."""
    schedule = Optax(
        "linear_schedule", {"init_value": 0.02, "end_value": 60.0, "transition_steps": 24}
    )
    return tiny.mlp(eval_every=2, early_stop=BEST, optimizer=tiny.sgd(schedule), **fields)


def test_a_run_is_judged_by_its_best_checkpoint(tmp_path):
    target = Target(metric="loss", value=9.9, split="train", goal="min")
    setup = prepare(worse(steps=23, keep=1, ema=0.5, target=target), ONE)
    summary = train.train(setup, tmp_path, quiet=True)
    seen = {r["step"]: r["loss"] for r in tiny.rows(tmp_path) if r["split"] == "validation"}
    best = min(seen, key=seen.get)
    assert best < 20
    assert summary.best == best
    assert summary.step == 23
    assert summary.metrics["validation"]["loss"] == seen[best]
    with checkpoint.Checkpoints(tmp_path / "checkpoints", None) as saved:
        assert saved.steps() == [best, 23]
        state, _ = saved.restore(best, setup.abstract, setup.shardings)
    assert setup.evaluate(state, "train")["train"] == summary.metrics["train"]
    assert summary.reached == summary.metrics["train"]["loss"]
    again = train.train(setup, tmp_path, quiet=True)
    assert again == summary


def test_the_best_checkpoint_outlives_an_interruption(tmp_path):
    fields = {"keep": 1, "save_every": 5}
    whole = tiny.final_state(worse(steps=22, **fields), tmp_path / "whole")
    for steps in (3, 11, 17, 22):
        parts = tiny.final_state(worse(steps=steps, **fields), tmp_path / "parts")
    assert bits(whole) == bits(parts)
    ends = [train.run.summary(tmp_path / name) for name in ("whole", "parts")]
    assert ends[0].best == ends[1].best
    assert ends[0].metrics == ends[1].metrics


def test_early_stopping_watches_the_moving_average_when_asked(tmp_path):
    stop = EarlyStop(patience=50, metric="loss", ema=True)
    state = tiny.final_state(tiny.mlp(ema=0.9, eval_every=3, early_stop=stop), tmp_path)
    seen = [r["loss"] for r in tiny.rows(tmp_path) if r["split"] == "validation_ema"]
    assert state.stop["best"] == np.float32(min(seen))


def test_the_moving_average_is_a_target(tmp_path):
    target = Target(metric="accuracy", value=0.0, split="train_ema")
    found = train.train(prepare(tiny.mlp(ema=0.9, target=target), ONE), tmp_path, quiet=True)
    assert found.reached == found.metrics["train_ema"]["accuracy"]


def test_a_watched_metric_that_the_split_leaves_undefined_is_said(tmp_path):
    model = MLPConfig(features=5, sizes=(1,))
    stop = EarlyStop(patience=1, metric="auc", goal="max")
    given = {"model": model, "task": BinaryClassify(), "data": OneClass()}
    setup = prepare(tiny.mlp(eval_every=2, early_stop=stop, **given), ONE)
    with pytest.raises(UserError, match=r"early_stop\.metric: auc is undefined on validation"):
        train.train(setup, tmp_path, quiet=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneClass:
    """Targets of one class alone."""

    def load(self):
        x = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
        split = Examples({"inputs": x, "targets": np.ones(16, np.int32)})
        return {"train": split, "validation": split}


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    target = Target(metric="accuracy", value=0.0, split="validation")
    first = train.train(prepare(tiny.mlp(target=target), ONE), tmp_path, quiet=True)
    assert first.met
    monkeypatch.setattr(checkpoint, "Checkpoints", None)
    setup = prepare(tiny.mlp(target=dataclasses.replace(target, value=1.01)), ONE)
    again = train.train(setup, tmp_path, quiet=True)
    assert again.met is False
    assert again.metrics == first.metrics


def test_the_carry_is_saved_and_matters(tmp_path):
    state = tiny.final_state(tiny.lstm(steps=6), tmp_path)
    assert np.abs(state.carry[0][1]).max() > 0
    assert state.carry[0][1].shape == (16, 8)


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (
            tiny.mlp(model=MLPConfig(features=4, sizes=(3,))),
            r"the model does not take the data's inputs, float32\[16, 5\]",
        ),
        (
            tiny.mlp(model=MLPConfig(features=5, sizes=(2,))),
            "train: targets run from 0 to 2, and the model gives 2 logits",
        ),
        (
            tiny.lstm(model=LSTMConfig(vocab=6, outputs=7)),
            "train: tokens run to 6, and model.vocab is 6",
        ),
        (
            tiny.lstm(model=LSTMConfig(vocab=7, outputs=7, head="sequence")),
            r"NextToken cannot judge outputs of \[16, 7\]: ",
        ),
        (tiny.mlp(batch_size=65), "batch_size 65 exceeds the 64 training examples"),
        (tiny.mlp(batch_size=12), "batch_size 12 does not divide over 8 devices"),
        (
            tiny.mlp(accumulate=3),
            "batch_size 16 does not divide into accumulate = 3 parts over 8 devices; "
            "nearest that does: 24",
        ),
        (tiny.mlp(eval_split="test"), "the data has no split 'test'; known: train, validation"),
        (
            tiny.mlp(target=Target(metric="acuracy", value=1.0, split="train")),
            "target.metric: no metric 'acuracy'; did you mean accuracy?",
        ),
        (
            tiny.mlp(eval_every=1, early_stop=EarlyStop(patience=1, metric="mse")),
            "early_stop.metric: no metric 'mse'; known: accuracy, loss, ece",
        ),
        (
            tiny.transformer(data=tiny.Words(stream=True)),
            "Transformer keeps no state between batches",
        ),
        (
            tiny.lstm(data=tiny.Documents()),
            "packed rows of several documents, and Recurrent cannot tell documents apart",
        ),
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_is_made(experiment, message):
    with pytest.raises(UserError, match=message):
        prepare(experiment)


def test_a_checkpoint_is_the_state_of_its_step_although_the_next_step_overwrites_it(tmp_path):
    wide = MLPConfig(features=5, sizes=(700, 700, 3))
    experiment = tiny.mlp(model=wide, steps=5, save_every=1, keep=9)
    setup = prepare(experiment, ONE)
    train.train(setup, tmp_path, quiet=True)
    state = setup.initial()
    step = jax.jit(lambda *args: train.train_step(setup, *args))  # nothing is donated
    for i in range(5):
        batch = parallel.put(setup.splits["train"].batch(i, 16, 0), setup.mesh)
        state, _ = step(state, batch, setup.root)
        path = tmp_path / "checkpoints"
        _, saved = checkpoint.read(path, i + 1, setup.abstract, setup.shardings)
        jax.tree.map(np.testing.assert_array_equal, state, saved)


def test_a_last_update_that_spoils_the_parameters_is_not_saved(tmp_path):
    experiment = tiny.mlp(steps=1, optimizer=tiny.sgd(1e38))
    with pytest.raises(FloatingPointError):
        train.train(prepare(experiment, ONE), tmp_path, quiet=True)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    better = tiny.mlp(steps=1)  # nothing was trained, so that the folder takes another config
    assert train.train(prepare(better, ONE), tmp_path, quiet=True).step == 1


def test_judging_a_finished_run_by_another_split_repeats_no_row_and_keeps_its_speed(tmp_path):
    first = train.train(prepare(tiny.mlp(), ONE), tmp_path, quiet=True)
    for split in ("train", "validation"):
        target = Target(metric="accuracy", value=0.1, split=split)
        found = train.train(prepare(tiny.mlp(target=target), ONE), tmp_path, quiet=True)
        assert found.steps_per_second == first.steps_per_second
    rows = [(row["step"], row["split"]) for row in tiny.rows(tmp_path)]
    assert rows.count((12, "validation")) == 1
    assert "target" in (tmp_path / "log.txt").read_text()
    assert '"split": "validation"' in (tmp_path / "config.json").read_text()


def test_going_on_takes_the_old_summary_away_first(tmp_path, monkeypatch):
    train.train(prepare(tiny.mlp(steps=4), ONE), tmp_path, quiet=True)
    monkeypatch.setattr(train.parallel, "put", None)
    with pytest.raises(TypeError):
        train.train(prepare(tiny.mlp(steps=8), ONE), tmp_path, quiet=True)
    with pytest.raises(UserError, match="has not finished"):
        train.run.summary(tmp_path)


def test_dropout_draws_from_other_keys_than_the_parameters():
    setup = prepare(tiny.mlp(), ONE)
    drawn = []
    real = jax.random.fold_in

    def spy(key, data):
        drawn.append((np.asarray(jax.random.key_data(key)).tobytes(), int(data)))
        return real(key, data)

    root = jax.random.key(0)
    with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "fold_in", spy)
        train.init(setup, root, {})
    assert (np.asarray(jax.random.key_data(root)).tobytes(), 0) in drawn
    assert (np.asarray(jax.random.key_data(root)).tobytes(), 1) not in drawn
