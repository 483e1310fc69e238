"""Who the processes of a run are, one on a host, and their coming together before jax starts.

Written on jax's own finding of clusters, which starts no process alone and ends, without a name,
where one is absent.
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax._src import cloud_tpu_init, clusters

from research import UserError


class Cluster(NamedTuple):
    """Who the processes are, of which this is one."""

    address: str
    """host:port of process 0, where it serves the others."""
    processes: int
    process: int
    devices: list[int] | None
    """The host's GPUs that are this process's; None: all."""


def found(environment: Mapping[str, str], seconds: float) -> Cluster | None:
    """What the environment says of several processes; None: there is one.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it
    wherever they are set; one process asks for no others. Otherwise jax finds it out: from SLURM,
    Open MPI, mpi4py, Kubernetes or a TPU's host, for which it may wait. Raises UserError for half
    of it.
    """
    method = _launcher(environment)
    asked: dict[str, Any] = {
        "JAX_COORDINATOR_ADDRESS": environment.get("JAX_COORDINATOR_ADDRESS"),
        "JAX_NUM_PROCESSES": _number(environment, "JAX_NUM_PROCESSES"),
        "JAX_PROCESS_ID": _number(environment, "JAX_PROCESS_ID"),
    }
    if asked["JAX_NUM_PROCESSES"] == 1 or (method is None and set(asked.values()) == {None}):
        return None
    devices = None
    if method is not None and None in asked.values():
        *known, devices = _detected(list(asked.values()), method, seconds)
        if method == "tpu" and known[1] is None:  # nothing tells of other hosts
            return None
        asked = dict(zip(asked, known, strict=True))
    address, processes, process = asked.values()
    if processes == 1:
        return None
    for name, value in asked.items():
        if value is None:
            raise UserError(f"several processes are asked for, and {name} is not set")
    if not re.search(r":\d+$", str(address)):
        raise UserError(f"JAX_COORDINATOR_ADDRESS must be host:port, not {address!r}")
    if not 0 <= process < processes:
        raise UserError(f"JAX_PROCESS_ID {process} is none of {processes} processes, from 0")
    return Cluster(address, processes, process, None if _alone(environment) else devices)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is not None and not value.isdecimal():
        raise UserError(f"{name} must be a number, not {value!r}")
    return None if value is None else int(value)


def _launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, as far as its environment tells."""

    def several(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    if several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment:  # by srun
        return "slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "ompi"
    if several("PMI_SIZE"):  # MPICH's and Intel's mpirun
        return "mpi4py"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "kubernetes"
    # A TPU's host, by what jax found on the PCI bus: one of several, or the only one.
    return "tpu" if cloud_tpu_init.running_in_cloud_tpu_vm else None


def _detected(known: list[Any], method: str, seconds: float) -> Any:
    detect: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params
    # jax asks mpi4py only where it is told to.
    asked = method if method == "mpi4py" else None
    return detect(*known, None, asked, int(seconds))


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether it is its host's only process: jax would give it one GPU, and it is to have all."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    local = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get("MPI_LOCALNRANKS")
    return bool(re.fullmatch(r"1(\(x\d+\))?", tasks)) or local == "1"


def named(processes: list[int], count: int) -> str:
    names = ", ".join(map(str, processes))
    return f"process{'es' if len(processes) > 1 else ''} {names} of {count}"


def absence(absent: list[int], processes: int, what: str, seconds: float) -> str:
    return f"{named(absent, processes)} did not come to {what} within {seconds:g} s"


def gather(cluster: Cluster, seconds: float) -> None:
    """Returns when all processes have come to the first one's port, which is then free again.

    Raises UserError, naming those that are absent, where not all have come in time.
    """
    host, _, port = cluster.address.rpartition(":")
    if cluster.process == 0:
        wrong = _receive(int(port), cluster.processes, seconds)
    else:
        told = _report(host.strip("[]"), int(port), cluster.process, seconds)
        wrong = absence([0], cluster.processes, "the start", seconds) if told is None else told
    if wrong:
        raise UserError(wrong)


def _receive(port: int, processes: int, seconds: float) -> str:
    """Waits for all others, and tells those who came what is wrong; empty: nothing."""
    deadline = time.monotonic() + seconds
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)
    except OSError as error:
        return f"process 0 cannot listen on port {port}: {error.strerror}"
    wrong, came = "", list[int]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        callers = []
        while len(came) < processes - 1 and not wrong and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # late, or a stranger
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(5)
                number = int(caller.recv(16))
                callers.append(caller)
                if number in came:
                    wrong = f"two processes say that they are process {number}"
                came.append(number)
        if absent := sorted(set(range(1, processes)) - set(came)):
            wrong = wrong or absence(absent, processes, "the start", seconds)
        for caller in callers:
            with contextlib.suppress(OSError):
                caller.sendall(f"{json.dumps(wrong)}\n".encode())
                caller.recv(1)  # until it has closed: a port is free at once where others close
    return wrong


def _report(host: str, port: int, process: int, seconds: float) -> str | None:
    """Comes to the first process, and returns what it says is wrong; None: it is absent."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as caller:
                caller.sendall(str(process).encode())
                caller.settimeout(left + 5)
                return str(json.loads(caller.makefile().readline()))
        except (OSError, ValueError):  # it does not listen yet, or was another server
            time.sleep(0.1)
    return None
