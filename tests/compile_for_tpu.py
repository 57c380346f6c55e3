"""Compiles a config's training step for TPUs that are not there, with the compiler in libtpu.

A script, since the compiler reads its environment once per process:

    python compile_for_tpu.py TOPOLOGY configs/digits.py [--config.KEY=VALUE ...]

It prints one JSON object: what the compiled program needs and what it does.
"""

import json
import os
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental.topologies import get_topology_desc

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.shardings import batch_sharding

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def compile_step(topology: str, config: configs.ConfigDict) -> dict[str, Any]:
    """Compiles; returns bytes and FLOPs of one device, and how often each collective occurs."""
    # What "auto" means on a TPU; here it would see the machine that compiles.
    config.model.attention = "xla"
    devices = get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh, rules = build.make_mesh(config, devices), build.make_rules(config)
    space, variables = build.make_space(config)
    model = build.make_model(config, space, Constrain(rules, mesh))
    optimizer = build.make_optimizer(config)
    abstract, _ = build.make_state(config, model, space, optimizer, mesh, rules)
    sharding, data = batch_sharding(mesh, rules), config.data
    kinds = {
        "image": ((data.image_size, data.image_size, data.channels), np.uint8),
        "label": ((), np.int32),
        "index": ((), np.uint32),
    }
    batch = {
        name: jax.ShapeDtypeStruct((data.global_batch, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in kinds.items()
    }
    step = build.make_step(config, model, space, optimizer)
    compiled = (
        build.jit_step(step, abstract, sharding, mesh).lower(abstract, batch, variables).compile()
    )
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)),
        "flops": compiled.cost_analysis()["flops"],
        "forward_flops": build.forward_flops(model),
        "collectives": {
            name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES
        },
        "bfloat16_products": len(re.findall(r"= bf16\[[^\n]* (?:convolution|dot|fusion)\(", text)),
    }


def main() -> None:
    """Runs as a script; see the module's docstring."""
    _, topology, path, *overrides = sys.argv
    config = configs.load(path, overrides)
    build.set_precision(config)
    print(json.dumps(compile_step(topology, config)))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Otherwise libtpu asks the metadata server of a TPU virtual machine, and waits for it.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    main()
