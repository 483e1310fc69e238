"""Energy by counters: read through Zeus from files as Linux has them, and their absence."""

import sys

import jax
import pytest

from research.bench import counters

CPU = jax.local_devices()[0]


def test_without_zeus_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    assert counters.find(CPU) == (None, "Zeus is not installed: pip install 'ergon[energy]'")


def test_a_device_that_zeus_does_not_know_has_none():
    class TPU:
        platform = "tpu"

    assert counters.find(TPU()) == (None, "tpu has no energy counters that Zeus reads")


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    """A folder that Zeus reads as Linux's, with a package and its memory; and what counts them on,
    in joules."""
    pytest.importorskip("zeus", reason="the extra energy is not installed")
    from zeus.device import cpu
    from zeus.device.cpu import rapl

    package = tmp_path / "intel-rapl" / "intel-rapl:0"
    zones = {package: "package-0", package / "intel-rapl:0:0": "dram"}
    for zone, name in zones.items():
        zone.mkdir(parents=True)
        for file, content in {"name": name, "max_energy_range_uj": "262143328850"}.items():
            (zone / file).write_text(content)
        (zone / "energy_uj").write_text("1000000")
    monkeypatch.setattr(rapl, "RAPL_DIR", str(tmp_path / "intel-rapl"))
    monkeypatch.setattr(cpu, "_cpus", None)
    rapl.rapl_is_available.cache_clear()

    def count(zone, joules):
        path = list(zones)[zone] / "energy_uj"
        path.write_text(str(int(path.read_text()) + round(1e6 * joules)))

    yield count
    rapl.rapl_is_available.cache_clear()


def test_a_packages_and_its_memorys_joules_are_of_the_steps(rapl):
    meter, _ = counters.find(CPU)
    asked = []

    def steps(seconds):
        asked.append(seconds)
        rapl(0, 30.0)
        rapl(1, 5.0)
        return 7

    joules, how = meter.joules_per_step(steps)
    assert joules == pytest.approx(35 / 7)
    assert asked == [counters.WINDOW]
    assert how.startswith("1 CPU package and memory, other programs' work on them included; not")
    assert "7 steps in a window of" in how


def test_counters_that_stand_still_are_no_figure(rapl):
    meter, _ = counters.find(CPU)
    joules, how = meter.joules_per_step(lambda seconds: 7)
    assert joules is None
    assert how.startswith("the counters did not move in 0.0 s: 1 CPU package and memory")


def test_without_counters_it_says_so(monkeypatch, tmp_path):
    pytest.importorskip("zeus", reason="the extra energy is not installed")
    from zeus.device import cpu
    from zeus.device.cpu import rapl

    monkeypatch.setattr(rapl, "RAPL_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(cpu, "_cpus", None)
    rapl.rapl_is_available.cache_clear()
    assert counters.find(CPU) == (None, "the host shows no RAPL counters to this process")
