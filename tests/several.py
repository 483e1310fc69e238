"""What test_hosts.py does in each of several processes: several.py DEED [ARGUMENT ...]."""

import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from research import UserError, checkpoint, command, hosts
from research.experiment import EarlyStop
from research.init_from import InitFrom, flat
from research.parallel import Parallel
from research.setup import prepare
from research.train import train

MESHES = {"data": Parallel(data=4), "fsdp": Parallel(data=2, fsdp=2)}


def experiment(mesh, **fields):
    """Dropout, an average and a best checkpoint, over 4 devices."""
    import tiny  # late: it asks for devices, before which processes must have joined

    rule = EarlyStop(metric="loss", keep_best=True, patience=5)
    given = {"steps": 8, "eval_every": 4, "ema": 0.9, "early_stop": rule}
    return tiny.mlp(**{"parallel": MESHES[mesh]} | given | fields)


def whole(tree):
    """Arrays by path, each of all processes."""

    def gathered(x):
        return x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)

    return {name: np.asarray(gathered(x)) for name, x in flat(tree).items()}


def keep(path, arrays):
    if jax.process_index() == 0:
        np.savez(path, **arrays)


def trained(folder, other=""):
    """Trains on either mesh; then reads, and starts from, what other processes have trained."""
    folder = pathlib.Path(folder)
    for mesh in MESHES:
        train(prepare(experiment(mesh)), folder / mesh)
    if not other:
        return
    for mesh, another in zip(MESHES, reversed(MESHES), strict=True):
        there, setup = pathlib.Path(other) / mesh, prepare(experiment(another))
        _, state = checkpoint.read(there / "checkpoints", None, setup.abstract, setup.shardings)
        keep(folder / f"{mesh}_read.npz", whole(state))
        fresh = prepare(experiment(another, init_from=InitFrom(path=str(there))))
        keep(folder / f"{mesh}_init.npz", whole(fresh.initial(fresh.load()).params))


def failing():
    """A mistake that process 1 alone sees, while process 0 is in a collective."""
    if jax.process_index() == 1:
        raise UserError("no disk")
    multihost_utils.process_allgather(np.ones(3))


def broken():
    """A defect of all."""
    raise RuntimeError("a defect")


def diverged(folder):
    """The loss is not finite, in all."""
    import tiny

    train(prepare(experiment("fsdp", optimizer=tiny.sgd(1e30))), pathlib.Path(folder) / "run")


def late():
    """Process 1 does not come to a meeting."""
    if hosts.me() == 1:
        time.sleep(60)
    hosts.meet("a meeting")


def killed():
    """Process 1 is no more, in a collective."""
    multihost_utils.process_allgather(np.ones(3))
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    multihost_utils.process_allgather(np.ones(3))


def unshared(folder):
    """Each has a disk of its own."""
    from research import run

    run.check_shared = lambda *given, check=run.check_shared: check(*given, seconds=1)
    train(prepare(experiment("data")), pathlib.Path(folder) / str(jax.process_index()))


def missing_file(folder):
    """What init_from names is there for process 0 alone."""
    setup = prepare(experiment("data", init_from=InitFrom(path="run")))
    os.chdir(folder if hosts.me() == 0 else "/")
    train(setup, pathlib.Path(folder) / "new")


def main():
    deed, *given = sys.argv[1:]
    with command.one_line_errors(), hosts.session():
        globals()[deed](*given)


if __name__ == "__main__":
    main()
