"""List the peak numbers of accelerators in one table, with its sources."""

import dataclasses

from cosmo.engine.base.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak numbers of one device as JAX counts devices; None: not known.

    `hbm_bytes` can be used by a program. `link_bytes_per_second` is received from all neighbours
    together: over a TPU's interconnect, a GPU's NVLink.
    """

    name: str
    matmul_flops: float | None  # bfloat16, a second, dense
    hbm_bytes: int | None
    hbm_bytes_per_second: float | None
    link_bytes_per_second: float | None
    device_kind: str  # as JAX spells it
    chip_config: str | None = None  # of libtpu, where not the default
    fuses_attention: bool = False  # whether it runs `fused_attention`


# TPUs: cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e}, per chip; halved for v2 and v3, whose
# chips are two devices. v4 and v5p chips are one device of two cores ("megacore"). Interconnect:
# half of the documented bidirectional bandwidth; v2 and v3, 4 links of 496 and 656 Gbit/s a
# direction (Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural
# networks"), v4, 6 links of 50 GB/s (Jouppi et al. 2023, "TPU v4"). HBM: libtpu 0.0.42,
# as its compiler names it when a program needs more.
# Kernels on v2 and v3 have no product of bfloat16 (Mosaic's error E2001).
# GPUs: NVIDIA's data sheets of A100 SXM 80 GB, H100 SXM and H200 SXM; NVLink, one direction; of
# their memory, a tenth is left to the driver, the runtime and fragmentation.
CHIPS = {
    "v2": Chip("TPU v2", 22.5e12, int(7.48 * GIB), 350e9, 124e9, "TPU v2"),
    "v3": Chip("TPU v3", 61.5e12, int(15.48 * GIB), 450e9, 164e9, "TPU v3"),
    "v4": Chip("TPU v4", 275e12, int(30.75 * GIB), 1200e9, 300e9, "TPU v4", "megacore", True),
    "v5e": Chip("TPU v5e", 197e12, int(15.75 * GIB), 819e9, 200e9, "TPU v5 lite", None, True),
    "v5p": Chip("TPU v5p", 459e12, int(95.74 * GIB), 2765e9, 600e9, "TPU v5", None, True),
    "v6e": Chip("TPU v6e", 918e12, int(31.25 * GIB), 1638e9, 400e9, "TPU v6 lite", None, True),
    "a100": Chip("A100 80GB", 312e12, int(0.9 * 80e9), 2039e9, 300e9, "NVIDIA A100-SXM4-80GB"),
    "h100": Chip("H100", 989e12, int(0.9 * 80e9), 3350e9, 450e9, "NVIDIA H100 80GB HBM3"),
    "h200": Chip("H200", 989e12, int(0.9 * 141e9), 4800e9, 450e9, "NVIDIA H200"),
    "cpu": Chip("CPU", None, None, None, None, "cpu"),
}
TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e")
GPUS = ("a100", "h100", "h200")


def by_kind(device_kind: str) -> Chip | None:
    """Return the chip that JAX calls `device_kind`, None if the table has it not."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device_kind), None)


def parse_topology(text: str) -> tuple[str, str]:
    """Return (chip, shape): ("v3", "4x4") for "v3:4x4". Raises UserError with examples."""
    name, _, shape = text.partition(":")
    numbers = shape.split("x")
    if name not in CHIPS or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise UserError(
            f"topology {text}: give a TPU slice in chips (v3:4x4 is a v3-32, v4:2x2x4, v5e:4x4, "
            f"v5p:2x2x2, v6e:2x4), GPUs (h100:8) or CPU devices (cpu:8); known are "
            f"{', '.join(CHIPS)}",
            setting="topology",
        )
    if name not in TPUS and len(numbers) != 1:
        raise UserError(
            f"topology {text}: give a number of devices, such as {name}:8", setting="topology"
        )
    return name, shape
