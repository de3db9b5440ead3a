"""XLA's own compilers for a TPU v5e and an H100, on a machine that has neither.

The libraries that drive those devices (libtpu, JAX's CUDA plugin) hold the compilers, and compile for a device that is
only described. What they print is what would run there.
"""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

__all__ = ["CHIPS", "Chip", "Program", "chip_of", "compiled", "lowered", "topology"]

PyTree = Any
H100 = Path(__file__).with_name("h100.txtpb")


class Chip(NamedTuple):
    """What is compiled for."""

    key: str
    title: str
    wheel: str  # what has to be installed


class Program(NamedTuple):
    """A compiled step."""

    text: str  # the optimized HLO
    temporaries: int  # bytes


CHIPS = {
    "tpu": Chip("tpu", "TPU v5e", "jax[tpu]"),
    "gpu": Chip("gpu", "H100", "jax[cuda12]"),
}


def chip_of(key: str) -> Any:
    """The described device, one chip of it."""
    return topology(key, {"tpu": "v5e:2x2", "gpu": "1x1x1"}[key])[0]


def topology(key: str, shape: str) -> np.ndarray:
    """The described devices."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a machine in the cloud
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile: none runs anything
    from jax.experimental import topologies

    if key == "tpu":
        return np.array(topologies.get_topology_desc(shape, platform="tpu").devices)
    from jax._src import xla_bridge  # JAX finds the plugin by itself only where a driver is

    logging.getLogger(xla_bridge.__name__).setLevel(logging.CRITICAL)  # it logs what is caught here
    try:
        xla_bridge.discover_pjrt_plugins()
    except Exception as error:  # XLA has an exception of its own here
        if "ALREADY_EXISTS" not in str(error):
            raise
    described = topologies.get_topology_desc("h100", platform="cuda", target_config=H100.read_text(), topology=shape)
    return np.array(described.devices)


def compiled(function: Any, arguments: PyTree, chip: Any) -> Program:
    """Compiles `function` for one chip, its first two arguments donated; `arguments` are shapes."""
    there = SingleDeviceSharding(chip)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), arguments)
    program = lowered(function, arguments).compile()
    return Program(program.as_text(), program.memory_analysis().temp_size_in_bytes)


def lowered(function: Any, arguments: PyTree) -> Any:
    """Traced, its first two arguments donated; `arguments` are shapes with shardings."""
    return jax.jit(function, donate_argnums=(0, 1)).lower(*arguments)
