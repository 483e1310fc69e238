"""Splits, by tokens and rows that are their own positions."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from research import UserError
from research.data import splits
from research.data.packed import pack
from research.data.splits import Examples, Streams, Windows

# Sizes of a stream, a window and a batch, from one prediction to many, dividing and not.
SIZES = list(itertools.product([2, 3, 9, 24, 25, 26, 41], [1, 4, 8], [1, 3, 8]))


def rows(n):
    return Examples({"inputs": np.arange(n), "targets": 10 * np.arange(n)})


def every(batches):
    return [batches[i] for i in range(len(batches))]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


SPLITS = [
    rows(10),
    Windows(np.arange(50), 5),
    Streams(np.arange(50), 5),
    pack(np.arange(50), np.array([0, 3, 7, 20, 22, 33, 50]), 5),
]
ids = ["examples", "windows", "streams", "packed"]


@pytest.mark.parametrize("split", SPLITS, ids=ids)
def test_batches_are_a_function_of_seed_and_step(split):
    asked = [(step, seed) for step in (7, 0, 3, 1) for seed in (1, 0)]
    first = {ask: split.batch(ask[0], 4, ask[1]) for ask in asked}
    for step, seed in sorted(asked, reverse=True):
        fresh = type(split)(*vars(split).values())
        for again in (fresh, fresh, split):
            assert same(again.batch(step, 4, seed), first[step, seed])
    assert not same(first[0, 0], first[1, 0])
    streams = isinstance(split, Streams)  # the text's own order, whatever the seed
    assert same(first[0, 0], first[0, 1]) == streams


@pytest.mark.parametrize("split", SPLITS, ids=ids)
@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_processes_are_the_batch(split, processes):
    size = 8 // processes
    parts = [slice(i * size, (i + 1) * size) for i in range(processes)]

    def joined(batches):
        return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}

    for step in (0, 3):
        whole = split.batch(step, 8, 1)
        assert same(joined([split.batch(step, 8, 1, part) for part in parts]), whole)
    shares = [every(split.evaluation(8, part)) for part in parts]
    for whole, *found in zip(every(split.evaluation(8)), *shares, strict=True):
        assert same(joined(found), whole)


@pytest.mark.parametrize("split", SPLITS, ids=ids)
def test_bad_rows_keep_their_places(split):
    if isinstance(split, Examples):
        marked = Examples({**split.rows, "bad": np.arange(len(split)) % 3 == 0})
    else:
        marked = dataclasses.replace(split, bad=np.arange(50) % 3 == 0)
    batches = [(s.batch(2, 4, 0), *every(s.evaluation(4))) for s in (split, marked)]
    seen = 0
    for plain, found in zip(*batches, strict=True):
        assert all(np.array_equal(found[k], plain[k]) for k in plain if k != "weights")
        np.testing.assert_array_equal(found["weights"], np.where(found["bad"], 0, plain["weights"]))
        assert not np.any(found["bad"] & (plain["weights"] == 0))  # padding is none
        name = "targets" if found["weights"].ndim == 2 else "inputs"
        there = plain["weights"] == 1
        np.testing.assert_array_equal(found["bad"][there], found[name][there] % 3 == 0)
        seen += found["bad"].sum()
    assert seen


@pytest.mark.parametrize("batch_size", [3, 4, 9])
def test_an_epoch_is_a_permutation_of_all_rows(batch_size):
    def stream(seed):
        batches = [rows(10).batch(step, batch_size, seed) for step in range(20)]
        for batch in batches:
            assert batch["inputs"].shape == (batch_size,)
            np.testing.assert_array_equal(batch["targets"], 10 * batch["inputs"])
            np.testing.assert_array_equal(batch["weights"], np.ones(batch_size, np.float32))
        return np.concatenate([b["inputs"] for b in batches])[:60].reshape(6, 10)

    for seed in (0, 1):
        np.testing.assert_array_equal(np.sort(stream(seed)), np.tile(np.arange(10), (6, 1)))
    orders = [tuple(epoch) for seed in (0, 1) for epoch in stream(seed)]
    assert len(set(orders)) == 12


def test_a_batch_of_all_rows_has_them_in_order():
    for step in (0, 5):
        batch = rows(10).batch(step, 10, 1)
        np.testing.assert_array_equal(batch["inputs"], np.arange(10))
        found = splits.stacked(rows(10), step, 3, 10, 1)
        assert all(same({k: v[i] for k, v in found.items()}, batch) for i in range(3))


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 16])
def test_evaluation_gives_every_row_once(batch_size):
    batches = every(rows(7).evaluation(batch_size))
    assert all(v.shape == (batch_size,) for b in batches for v in b.values())
    inputs, targets, weights = (
        np.concatenate([b[k] for b in batches]) for k in ("inputs", "targets", "weights")
    )
    np.testing.assert_array_equal(inputs[weights == 1], np.arange(7))
    np.testing.assert_array_equal(targets[weights == 1], 10 * np.arange(7))
    np.testing.assert_array_equal(weights, np.arange(len(weights)) < 7)
    assert len(weights) < 7 + batch_size


def test_training_windows_lie_anywhere_inside_the_text():
    split = Windows(np.arange(20), 5)
    starts = set()
    for step in range(40):
        batch = split.batch(step, 16, seed=3)
        starts |= set(batch["inputs"][:, 0])
        np.testing.assert_array_equal(
            batch["inputs"], batch["inputs"][:, :1] + np.arange(5), strict=False
        )
        np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
        assert batch["weights"].shape == (16, 5)
        assert batch["weights"].min() == 1
    assert starts == set(range(15))


@pytest.mark.parametrize(("tokens", "length", "batch_size"), SIZES)
def test_windows_evaluate_every_token_but_the_first_once(tokens, length, batch_size):
    batches = every(Windows(np.arange(tokens), length).evaluation(batch_size))
    assert all(b["inputs"].shape == (batch_size, length) for b in batches)
    counted = np.concatenate([b["weights"] for b in batches]) == 1
    inputs = np.concatenate([b["inputs"] for b in batches])[counted]
    targets = np.concatenate([b["targets"] for b in batches])[counted]
    np.testing.assert_array_equal(targets, np.arange(1, tokens))
    np.testing.assert_array_equal(inputs, np.arange(tokens - 1))
    # All padding is at the end, and less than a batch of it.
    assert counted.ravel()[: tokens - 1].all()
    assert counted.size - (tokens - 1) < batch_size * length
    assert set(np.unique(np.concatenate([b["weights"] for b in batches]))) <= {0, 1}


@pytest.mark.parametrize(("tokens", "length", "batch_size"), SIZES)
def test_streams_continue_row_by_row(tokens, length, batch_size):
    split = Streams(np.arange(tokens), length)
    if tokens - 1 < batch_size * length:
        with pytest.raises(UserError):
            split.check(batch_size)
        return
    split.check(batch_size)
    batches = [split.batch(step, batch_size, seed=0) for step in range(60)]
    starts = [step for step, batch in enumerate(batches) if batch["reset"].any()]
    epoch = batches[: starts[1]]
    before = np.full(batch_size, -2)
    for batch in batches:
        inputs = batch["inputs"]
        assert inputs.shape == batch["weights"].shape == (batch_size, length)
        assert batch["weights"].min() == 1
        np.testing.assert_array_equal(batch["targets"], inputs + 1)
        np.testing.assert_array_equal(np.diff(inputs), 1)
        np.testing.assert_array_equal(batch["reset"], inputs[:, 0] != before + 1)
        before = inputs[:, -1]
    # Each epoch is the same, counts no token twice, and leaves out less than a batch.
    for step, batch in enumerate(batches):
        assert same(batch, epoch[step % len(epoch)])
    targets = np.concatenate([b["targets"].ravel() for b in epoch])
    assert len(set(targets)) == len(targets)
    assert tokens - 1 - len(targets) < batch_size * length


@pytest.mark.parametrize(("tokens", "length", "batch_size"), SIZES)
def test_streams_evaluate_every_token_but_the_first_once(tokens, length, batch_size):
    batches = every(Streams(np.arange(tokens), length).evaluation(batch_size))
    assert [b["reset"].tolist() for b in batches] == [
        [i == 0] * batch_size for i in range(len(batches))
    ]
    inputs, targets, weights = (
        np.concatenate([b[k] for b in batches], axis=1) for k in ("inputs", "targets", "weights")
    )
    counted = weights == 1
    assert set(np.unique(weights)) <= {0, 1}
    np.testing.assert_array_equal(np.sort(targets[counted]), np.arange(1, tokens))
    np.testing.assert_array_equal(inputs[counted], targets[counted] - 1)
    # A row counts from its start, without holes, so that its carry has read what comes before.
    for row, count in zip(inputs, counted.sum(axis=1), strict=True):
        np.testing.assert_array_equal(row[:count], row[0] + np.arange(count))
    assert (np.sort(counted)[:, ::-1] == counted).all()


@pytest.mark.parametrize("split", SPLITS, ids=ids)
def test_batches_have_the_dtypes_that_are_promised(split):
    tokens = type(split) is not Examples
    for batch in (split.batch(0, 4, 0), split.evaluation(4)[0], every(split.evaluation(4))[-1]):
        assert batch["weights"].dtype == np.float32
        assert not tokens or batch["inputs"].dtype == batch["targets"].dtype == np.int32
        assert "reset" not in batch or batch["reset"].dtype == bool


@pytest.mark.parametrize("split", SPLITS, ids=ids)
def test_evaluation_is_a_sequence_with_an_end(split):
    batches = split.evaluation(4)
    assert len(list(itertools.islice(batches, 99))) == len(batches)
    for outside in (-1, len(batches)):
        with pytest.raises(IndexError):
            batches[outside]
    for threads in (0, 2):
        assert all(map(same, splits.prefetched(batches, threads), batches))
        assert len(list(splits.prefetched(batches, threads))) == len(batches)


@pytest.mark.parametrize(
    ("split", "examples"),
    [(rows(7), 7), (Windows(np.arange(9), 4), 8), (Streams(np.arange(9), 4), 8)],
)
def test_length_is_the_examples_that_evaluation_counts(split, examples):
    assert len(split) == examples == sum(b["weights"].sum() for b in every(split.evaluation(3)))


class Asked:
    """A split that keeps what it was asked."""

    threads = 0

    def __init__(self):
        self.calls = []

    def batch(self, step, batch_size, seed, part):
        self.calls.append((step, batch_size, seed))
        return {"inputs": np.array([step])}


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (17, 29), (4, 4)])
def test_training_asks_for_its_own_steps_only(start, stop):
    split = Asked()
    steps = [int(b["inputs"][0]) for b in splits.training(split, 8, 3, start, stop)]
    assert steps == list(range(start, stop))
    assert sorted(set(split.calls)) == [(step, 8, 3) for step in range(start, stop)]


def test_so_many_batches_are_made_at_once_as_there_are_threads():
    together = threading.Barrier(7)

    def made(i):
        together.wait(timeout=60)
        return {"inputs": np.array([i])}

    found = splits.prefetched(splits.Lazy(made, 7), threads=7)
    assert [int(batch["inputs"][0]) for batch in found] == list(range(7))


INTERRUPTED = """
import os, signal, sys
import numpy as np
from research.data import splits

asked = getattr(signal, sys.argv[1])
signal.signal(asked, lambda number, frame: None)
split = splits.Examples({"inputs": np.arange(8), "targets": np.arange(8)})
for step, _ in enumerate(splits.training(split, 4, 0, 0, 2000, workers=1)):
    if step == 2:
        os.killpg(0, asked)
    if step == 1000:
        break
print(step)
"""


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_signal_to_every_process_ends_no_worker(signal):
    # As Ctrl-C does, and clusters that end a job; the run wants to save first.
    found = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, signal],
        start_new_session=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path.cwd())},
    )
    assert found.stdout == "1000\n", found.stderr


KILLED = """
import multiprocessing, os, signal
import numpy as np
from research.data import splits

split = splits.Examples({"inputs": np.arange(8), "targets": np.arange(8)})
feed = splits.training(split, 4, 0, 0, 2000, workers=1)
next(feed)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_a_run_that_is_killed():
    found = subprocess.run(
        [sys.executable, "-c", KILLED],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path.cwd())},
    )
    (worker,) = found.stdout.split()

    def ended():
        try:
            return pathlib.Path("/proc", worker, "stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    deadline = time.monotonic() + 60
    while not ended():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("split", SPLITS, ids=ids)
def test_stacked_batches_are_the_batches_of_their_steps(split):
    for first, count in ((0, 1), (2, 7)):  # 10 rows: an epoch ends in the midst of a batch
        found = splits.stacked(split, first, count, 4, 1)
        for i in range(count):
            assert same({k: v[i] for k, v in found.items()}, split.batch(first + i, 4, 1))


def test_stacked_batches_are_what_a_split_of_ones_own_gives():
    class Late(Examples):
        def batch(self, step, *args):
            return super().batch(step + 3, *args)

    split = Late(rows(10).rows)
    found = splits.stacked(split, 0, 2, 4, 1)
    assert same({k: v[0] for k, v in found.items()}, split.batch(0, 4, 1))


def test_small_batches_in_memory_are_made_together():
    def asked(nbytes, threads=0, workers=0):
        split = types.SimpleNamespace(threads=threads)
        return splits.together(split, {"inputs": np.zeros(nbytes, np.uint8)}, workers)

    assert [asked(n) for n in (1, 2**12, 2**16, 2**19 + 1, 2**30)] == [256, 256, 16, 1, 1]
    assert asked(1, threads=1) == asked(1, workers=1) == 1


def test_rows_of_arrays_in_another_order_are_theirs():
    turned = np.arange(10 * 3).reshape(3, 10).T
    split = Examples({"inputs": turned, "targets": np.arange(10)})
    batch = split.batch(1, 4, 0)
    np.testing.assert_array_equal(batch["inputs"], turned[batch["targets"]])


def test_rows_of_a_map_of_a_file_are_plain_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(9))
    split = Examples({"inputs": np.load(tmp_path / "x.npy", mmap_mode="r")})
    assert type(split.batch(0, 4, 0)["inputs"]) is np.ndarray


@pytest.mark.parametrize("split", SPLITS, ids=ids)
def test_training_from_a_step_is_the_tail_of_training(split):
    whole = list(splits.training(split, 4, 0, 0, 12))
    tail = list(splits.training(split, 4, 0, 5, 12))
    assert len(tail) == 7
    assert all(map(same, tail, whole[5:]))


@pytest.mark.parametrize(
    ("split", "largest", "message"),
    [
        (rows(7), 7, "batch_size 8 exceeds the 7 training examples"),
        (Streams(np.arange(41), 5), 8, "41 tokens: 9 streams of at least 5 need 46"),
    ],
)
def test_check_says_how_much_is_needed(split, largest, message):
    split.check(largest)
    with pytest.raises(UserError, match=message):
        split.check(largest + 1)


def test_check_of_windows_says_how_much_is_needed():
    Windows(np.arange(6), 5).check(100)
    with pytest.raises(UserError, match="5 tokens: a window of 5 needs 6"):
        Windows(np.arange(5), 5).check(1)


def test_fingerprint_tells_data_apart_and_nothing_else():
    x, y = np.arange(6, dtype=np.int32), np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)

    def mark(train=(("inputs", x), ("targets", y)), name="train"):
        return splits.fingerprint({name: Examples(dict(train)), "test": rows(3)})

    changed = x.copy()
    changed[5] += 1
    marks = [
        mark(),
        mark(name="training"),
        mark((("inputs", changed), ("targets", y))),
        mark((("inputs", x.view(np.uint32)), ("targets", y))),
        mark((("inputs", x.astype(np.int64)), ("targets", y))),
        mark((("inputs", x.reshape(2, 3)), ("targets", y))),
        mark((("inputs", x.reshape(3, 2)), ("targets", y))),
        mark((("images", x), ("targets", y))),
        mark((("inputs", y), ("targets", x))),
        mark((("inputs", x),)),
        splits.fingerprint({"test": Examples({"inputs": x, "targets": y}), "train": rows(3)}),
    ]
    assert len(set(marks)) == len(marks)
    assert (
        mark()
        == mark((("targets", y), ("inputs", x)))
        == mark((("inputs", x.copy()), ("targets", y)))
    )
    assert mark() == mark((("inputs", x), ("targets", np.asfortranarray(y))))
    train, test = Examples({"inputs": x, "targets": y}), rows(3)
    assert mark() == splits.fingerprint({"test": test, "train": train})


@pytest.mark.parametrize("kind", [Windows, Streams])
def test_fingerprint_of_tokens(kind):
    tokens = np.arange(9, dtype=np.int32)
    marks = {splits.fingerprint({"train": kind(t, 4)}) for t in (tokens, tokens[:-1], tokens + 1)}
    assert len(marks) == 3
