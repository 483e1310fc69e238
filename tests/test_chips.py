"""The accelerators' figures against arithmetic and each other; matching; the peak of a dtype."""

import math
import re

import jax
import pytest

from research.compute import chips

CHIPS = chips.chips()

KINDS = {
    "TPU v2": "tpu-v2",
    "TPU v3": "tpu-v3",
    "TPU v4": "tpu-v4",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5e": "tpu-v5e",
    "TPU v5": "tpu-v5p",
    "TPU v5p": "tpu-v5p",
    "TPU v6 lite": "tpu-v6e",
    "TPU v6e": "tpu-v6e",
    "TPU7x": "tpu-v7",
    "TPU v7x": "tpu-v7",
    "Tesla V100-SXM2-16GB": "v100-sxm2-16gb",
    "Tesla V100-SXM2-32GB": "v100-sxm2-32gb",
    "Tesla V100-PCIE-16GB": "v100-pcie-16gb",
    "Tesla V100-PCIE-32GB": "v100-pcie-32gb",
    "Tesla V100S-PCIE-32GB": "v100s-pcie-32gb",
    "Tesla T4": "t4",
    "NVIDIA A100-SXM4-40GB": "a100-sxm4-40gb",
    "A100-SXM4-40GB": "a100-sxm4-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb",
    "A100-SXM-80GB": "a100-sxm4-80gb",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA RTX A6000": "rtx-a6000",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200-sxm",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200-96gb",
    "NVIDIA GH200 144G HBM3e": "gh200-144gb",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB300": "gb300",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000-workstation",
    "AMD Instinct MI210": "mi210",
    "AMD Instinct MI250": "mi250",
    "AMD Instinct MI250X": "mi250x",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI300X OAM": "mi300x",
    "AMD Instinct MI325X": "mi325x",
    "AMD Instinct MI350X": "mi350x",
    "AMD Instinct MI355X": "mi355x",
}

STRANGERS = [
    "",
    "cpu",
    "METAL",
    "TPU",
    "TPU v1",
    "TPU v4 lite",
    "TPU v5 lite pod",
    "TPU v6",
    "TPU7",
    "TPU8t",
    "tpu v4",
    "NVIDIA",
    "NVIDIA A100",
    "NVIDIA A100X",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100-SXM4-80GB MIG 7g.80gb",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H100",
    "NVIDIA H800",
    "NVIDIA H20",
    "NVIDIA A800-SXM4-80GB",
    "NVIDIA A10M",
    "NVIDIA A30",
    "NVIDIA A40",
    "NVIDIA L40",
    "NVIDIA L4 ",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA RTX A6000 Laptop GPU",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    "NVIDIA RTX 6000D",
    "Quadro RTX 6000",
    "NVIDIA B100",
    "NVIDIA B300A",
    "NVIDIA GB10",
    "NVIDIA GH200",
    "Tesla V100-SXM2-32GB-LS",
    "Tesla V100-SXM3-32GB",
    "Tesla V100-DGXS-32GB",
    "Tesla P100-SXM2-16GB",
    "gfx90a:sramecc+:xnack-",
    "gfx942",
    "gfx950:sramecc+:xnack-",
    "AMD Instinct MI250X / MI250",
    "AMD Instinct MI300A",
    "AMD Instinct MI308X",
    "AMD Instinct MI350X VF",
    "AMD Radeon PRO W7900",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_one_chip(kind):
    assert chips.match(kind) is CHIPS[KINDS[kind]]
    matching = [
        key for key, chip in CHIPS.items() if any(re.fullmatch(k, kind) for k in chip.kinds)
    ]
    assert matching == [KINDS[kind]]


@pytest.mark.parametrize("kind", STRANGERS)
def test_neighbours_and_slices_are_none(kind):
    assert chips.match(kind) is None


def test_every_chip_has_a_kind_here():
    assert set(KINDS.values()) == set(CHIPS)


def test_platform():
    h200, tpu, amd = (chips.match(k) for k in ("NVIDIA H200", "TPU v4", "AMD Instinct MI300X"))
    assert chips.match("NVIDIA H200", "gpu") is chips.match("NVIDIA H200", "cuda") is h200
    assert chips.match("TPU v4", "tpu") is tpu
    assert chips.match("AMD Instinct MI300X", "rocm") is amd
    for kind, platform in (("NVIDIA H200", "tpu"), ("TPU v4", "gpu"), ("NVIDIA H200", "rocm")):
        assert chips.match(kind, platform) is None


def test_memory():
    """What drivers report, XLA's three quarters of it; not halves, doubles, partitions."""
    for kind, mebibytes in (
        ("NVIDIA H100 80GB HBM3", 81559),
        ("NVIDIA H200", 143771),
        ("NVIDIA B200", 183359),
        ("NVIDIA GH200 480GB", 97871),
        ("NVIDIA A10G", 23028),
        ("Tesla T4", 15360),
        ("NVIDIA GeForce RTX 4090", 24564),
        ("TPU v5 lite", 16 * 1024),
        ("TPU v3", 16 * 1024),
        ("AMD Instinct MI250X", 64 * 1024),
    ):
        whole = mebibytes * 2**20
        for had in (whole, whole * 3 // 4):
            assert chips.match(kind, memory_bytes=had) is chips.match(kind) is not None
        for had in (0, whole // 8, whole // 2, whole * 2):
            assert chips.match(kind, memory_bytes=had) is None


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_row_is_whole(chip):
    assert chip.vendor in ("Google", "NVIDIA", "AMD")
    assert chip.kinds
    assert re.search(r"https://\S+\.\S+", chip.source)
    assert re.fullmatch(r"20\d\d(-\d\d(-\d\d)?)?", chip.date)
    assert not chip.note or chip.note.endswith(".")
    for figure in (
        *chip.peaks.values(),
        chip.memory_bytes,
        chip.memory_bandwidth,
        *(
            f
            for f in (
                chip.interconnect_bandwidth,
                chip.host_bandwidth,
                chip.network_bandwidth,
                chip.power_watts,
                chip.sparse_bfloat16,
            )
            if f is not None
        ),
    ):
        assert figure > 0
        assert math.isfinite(figure)
    assert chip.interconnect or not chip.interconnect_bandwidth
    assert chip.host or not chip.host_bandwidth
    assert (chip.power_watts is None) or chip.vendor != "Google"
    assert 4e9 < chip.memory_bytes < 1e12
    assert 1e11 < chip.memory_bandwidth < 1e13
    assert set(chip.peaks) <= {
        *("float64", "float64_tensor", "float32", "float32_tensor", "tf32"),
        *("bfloat16", "float16", "float8", "int8"),
    }


def test_names_are_distinct():
    assert len({chip.name for chip in CHIPS.values()}) == len(CHIPS)
    assert chips.chips() is CHIPS


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_narrower_is_no_slower(chip):
    have = chip.peaks
    order = ["float64", "float32", "tf32", "bfloat16", "float8"]
    rates = [have[dtype] for dtype in order if dtype in have]
    assert rates == sorted(rates)
    assert have.get("float16", 0) == have.get("bfloat16", have.get("float16", 0)) or (
        chip.vendor == "Google"
    )
    for dtype in ("float32", "float64"):
        assert have.get(f"{dtype}_tensor", math.inf) >= have.get(dtype, 0)
    if chip is not CHIPS["b300"]:
        assert have.get("int8", math.inf) >= have.get("bfloat16", 0)
    if chip.vendor == "NVIDIA" and "bfloat16" in have:
        assert "tf32" in have
        # Printed to three digits at the worst.
        assert have["tf32"] == pytest.approx(have["bfloat16"] / 2, rel=0.02)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_dense(chip):
    if chip.sparse_bfloat16:
        assert chip.peaks["bfloat16"] == pytest.approx(chip.sparse_bfloat16 / 2, rel=0.015)
    elif chip.vendor == "NVIDIA":
        assert "bfloat16" not in chip.peaks


@pytest.mark.parametrize(
    ("key", "dtype", "tera"),
    [
        ("h100-sxm", "bfloat16", 989.4),
        ("h100-sxm", "float8", 1978.9),
        ("h100-sxm", "tf32", 494.7),
        ("h100-pcie", "bfloat16", 756),
        ("h100-nvl", "bfloat16", 835.5),
        ("h200-sxm", "bfloat16", 989.5),
        ("a100-sxm4-40gb", "bfloat16", 312),
        ("b200", "bfloat16", 2250),
        ("gb200", "bfloat16", 2500),
        ("l4", "bfloat16", 121),
        ("a10", "bfloat16", 125),
        ("a10g", "bfloat16", 70),
        ("t4", "float16", 65),
        ("v100-sxm2-16gb", "float16", 125),
        ("rtx-3090", "bfloat16", 71),
        ("rtx-4090", "bfloat16", 165.2),
        ("rtx-5090", "bfloat16", 209.5),
        ("mi300x", "bfloat16", 1307.4),
        ("tpu-v4", "bfloat16", 275),
        ("tpu-v5e", "bfloat16", 197),
        ("tpu-v5p", "bfloat16", 459),
        ("tpu-v6e", "bfloat16", 918),
        ("tpu-v3", "bfloat16", 123),
        ("tpu-v7", "bfloat16", 2307),
        ("tpu-v7", "float8", 4614),
        ("mi250x", "bfloat16", 383),
    ],
)
def test_published(key, dtype, tera):
    assert CHIPS[key].chip_peaks[dtype] == tera * 1e12


def test_devices_of_a_chip():
    two = {key for key, chip in CHIPS.items() if chip.devices_per_chip == 2}
    assert two == {"tpu-v2", "tpu-v3", "tpu-v7", "mi250", "mi250x"}
    assert {c.devices_per_chip for c in CHIPS.values()} == {1, 2}
    for chip in CHIPS.values():
        number, unit = chip.memory.split()
        whole = int(number) * {"GB": 10**9, "GiB": 2**30}[unit]
        assert chip.memory_bytes * chip.devices_per_chip == whole
        for dtype, flops in chip.peaks.items():
            assert chip.chip_peaks[dtype] == flops * chip.devices_per_chip
    v3 = CHIPS["tpu-v3"]
    assert (v3.peaks["bfloat16"], v3.memory_bandwidth) == (61.5e12, 450e9)
    assert (v3.memory_bytes, v3.interconnect_bandwidth) == (16 * 2**30, 280e9)
    assert CHIPS["mi250"].power_watts == 250


# Multiprocessors, their FLOP/cycle and their boost clock in MHz; a fused multiply-add is two.
@pytest.mark.parametrize(
    ("key", "dtype", "units", "each", "clock"),
    [
        ("v100-sxm2-16gb", "float32", 80, 128, 1530),
        ("v100-sxm2-16gb", "float16", 80, 1024, 1530),
        ("t4", "float32", 40, 128, 1590),
        ("t4", "float16", 40, 1024, 1590),
        ("a100-sxm4-40gb", "float32", 108, 128, 1410),
        ("a100-sxm4-40gb", "tf32", 108, 1024, 1410),
        ("a100-sxm4-40gb", "bfloat16", 108, 2048, 1410),
        ("a100-sxm4-40gb", "int8", 108, 4096, 1410),
        ("a100-sxm4-40gb", "float64_tensor", 108, 128, 1410),
        ("a10", "bfloat16", 72, 1024, 1695),
        ("a10g", "float32", 80, 256, 1710),
        ("a10g", "bfloat16", 80, 512, 1710),
        ("rtx-a6000", "bfloat16", 84, 1024, 1800),
        ("rtx-3090", "float32", 82, 256, 1695),
        ("rtx-3090", "bfloat16", 82, 512, 1695),
        ("l4", "float32", 58, 256, 2040),
        ("l4", "bfloat16", 58, 1024, 2040),
        ("l40s", "bfloat16", 142, 1024, 2520),
        ("rtx-6000-ada", "bfloat16", 142, 1024, 2505),
        ("rtx-4090", "bfloat16", 128, 512, 2520),
        ("rtx-4090", "float8", 128, 1024, 2520),
        ("rtx-4090", "int8", 128, 2048, 2520),
        ("rtx-5090", "float32", 170, 256, 2407),
        ("rtx-5090", "bfloat16", 170, 512, 2407),
        ("rtx-pro-6000-workstation", "float32", 188, 256, 2617),
        ("rtx-pro-6000-workstation", "bfloat16", 188, 1024, 2617),
        ("h100-sxm", "float32", 132, 256, 1980),
        ("h100-sxm", "bfloat16", 132, 4096, 1830),
        ("h100-sxm", "float8", 132, 8192, 1830),
        ("h100-pcie", "float32", 114, 256, 1755),
        ("h100-nvl", "float32", 132, 256, 1785),
        ("b200", "float32", 148, 256, 1965),
        ("gb200", "float32", 152, 256, 2062),
        ("mi210", "bfloat16", 104, 1024, 1700),
        ("mi250", "bfloat16", 104, 1024, 1700),  # one of two dies
        ("mi250x", "bfloat16", 110, 1024, 1700),
        ("mi300x", "bfloat16", 304, 2048, 2100),
        ("mi300x", "float8", 304, 4096, 2100),
        ("mi350x", "bfloat16", 256, 4096, 2200),
        ("mi355x", "bfloat16", 256, 4096, 2400),
        # Matrix units of a JAX device, 128 x 128 multiply-adds each.
        ("tpu-v2", "bfloat16", 1, 2 * 128 * 128, 700),
        ("tpu-v3", "bfloat16", 2, 2 * 128 * 128, 940),
        ("tpu-v4", "bfloat16", 8, 2 * 128 * 128, 1050),
        ("tpu-v5e", "bfloat16", 4, 2 * 128 * 128, 1500),
        ("tpu-v5p", "bfloat16", 8, 2 * 128 * 128, 1750),
    ],
)
def test_first_principles(key, dtype, units, each, clock):
    assert CHIPS[key].peaks[dtype] == pytest.approx(units * each * clock * 1e6, rel=0.02)


# Bits of the memory's bus, Gbit/s of each.
@pytest.mark.parametrize(
    ("key", "bits", "rate"),
    [
        ("t4", 256, 10),
        ("rtx-3090", 384, 19.5),
        ("rtx-4090", 384, 21),
        ("rtx-5090", 512, 28),
        ("rtx-a6000", 384, 16),
        ("a100-sxm4-40gb", 5120, 2.43),
        ("h100-nvl", 6016, 5.238),
        ("mi210", 4096, 3.2),
        ("mi250x", 4096, 3.2),
        ("mi300x", 8192, 5.2),
        ("mi325x", 8192, 6),
        ("mi355x", 8192, 8),
    ],
)
def test_memory_bandwidth(key, bits, rate):
    assert CHIPS[key].memory_bandwidth == pytest.approx(bits / 8 * rate * 1e9, rel=0.025)


def test_tpu_passes():
    v5e = CHIPS["tpu-v5e"]
    one, three, six = (197e12, "1"), (197e12 / 3, "3"), (197e12 / 6, "6")
    for asked, (flops, passes) in {
        None: one,
        "BF16_BF16_F32": one,
        "HIGH": three,
        "BF16_BF16_F32_X3": three,
        "bfloat16_bfloat16_float32_X3": three,
        "highest": six,
        "BF16_BF16_F32_X6": six,
    }.items():
        words = f"float32 in {passes} bfloat16 pass" + ("es" if passes > "1" else "")
        assert chips.peak(v5e, "float32", asked) == (flops, words)
    for asked in ("F32_F32_F32", "TF32_TF32_F32", "nonsense", "HIGH+HIGHEST"):
        assert chips.peak(v5e, "float32", asked) is None
    for asked in (None, "highest"):
        assert chips.peak(v5e, "bfloat16", asked) == (197e12, "bfloat16")
    assert chips.peak(v5e, "int8") == chips.peak(v5e, "uint8") == (393e12, "int8")
    for dtype in ("float8_e4m3fn", "float16", "float64", "complex64", "int32"):
        assert chips.peak(v5e, dtype) is None
    assert chips.peak(CHIPS["tpu-v7"], "float8_e4m3fn") == (2307e12, "float8")


def test_nvidia_passes():
    h200, v100 = CHIPS["h200-sxm"], CHIPS["v100-sxm2-16gb"]
    tf32 = 494.5e12, "float32 in 1 TensorFloat-32 pass"
    for asked in (None, "default", "HIGH", "tensorfloat32", "bfloat16", "TF32_TF32_F32"):
        assert chips.peak(h200, "float32", asked) == tf32
    for asked in ("highest", "float32", "F32_F32_F32"):
        assert chips.peak(h200, "float32", asked) == (67e12, "float32 without matrix units")
    threefold = 494.5e12 / 3, "float32 in 3 TensorFloat-32 passes"
    assert chips.peak(h200, "float32", "TF32_TF32_F32_X3") == threefold
    assert chips.peak(h200, "float32", "BF16_BF16_F32")[0] == 989.5e12
    assert chips.peak(h200, "float64") == (67e12, "float64 on matrix units")
    assert chips.peak(h200, "float8_e5m2") == (1979e12, "float8")
    for asked in (None, "highest"):
        assert chips.peak(v100, "float32", asked) == (15.7e12, "float32 without matrix units")
    assert chips.peak(v100, "bfloat16") is None
    assert chips.peak(v100, "float32", "BF16_BF16_F32") is None
    assert chips.peak(v100, "float64") == (7.8e12, "float64")
    assert chips.peak(CHIPS["gb300"], "float32", "highest") is None
    for name in ("tf32", "float32_tensor", "float64_tensor"):
        assert chips.peak(h200, name) is None


def test_amd_passes():
    for key, flops in (("mi300x", 163.4e12), ("mi250x", 47.85e12)):
        for asked in (None, "high", "highest"):
            assert chips.peak(CHIPS[key], "float32", asked) == (flops, "float32 on matrix units")
        assert chips.peak(CHIPS[key], "float32", "TF32_TF32_F32") is None


def test_precisions_are_those_of_jax():
    """Every name that jax takes is read as jax reads it."""
    for chip in (CHIPS["tpu-v4"], CHIPS["h100-sxm"], CHIPS["mi300x"], CHIPS["t4"]):
        for name in ("default", "fastest", "bfloat16", "high", "bfloat16_3x", "tensorfloat32"):
            level = jax.lax.Precision(name).name
            assert chips.peak(chip, "float32", name) == chips.peak(chip, "float32", level)
        for name in ("highest", "float32"):
            assert jax.lax.Precision(name) is jax.lax.Precision.HIGHEST
            assert chips.peak(chip, "float32", name) == chips.peak(chip, "float32", "HIGHEST")
        for preset in jax.lax.DotAlgorithmPreset:
            found = chips.peak(chip, "float32", preset.name)
            assert found is None or found[0] > 0


def test_this_machine():
    """A CPU is no accelerator."""
    device = jax.devices()[0]
    assert chips.match(device.device_kind, device.platform) is None
