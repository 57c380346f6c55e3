"""Random streams are functions of their coordinates and of nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from dsr_jax.core import rng


def test_rows_depend_on_their_own_index_only() -> None:
    key = rng.stream_key(3, "noise", step=7)
    whole = rng.normal_per_sample(rng.sample_keys(key, np.arange(8)), (2, 3))
    part = rng.normal_per_sample(rng.sample_keys(key, np.array([5, 2])), (2, 3))
    np.testing.assert_array_equal(part, np.asarray(whole)[[5, 2]])


def test_seed_stream_step_and_index_all_matter() -> None:
    samples = {
        tuple(np.asarray(rng.uniform_per_sample(rng.sample_keys(key, np.array([index])))))
        for key in (
            rng.stream_key(0, "noise", 0),
            rng.stream_key(1, "noise", 0),
            rng.stream_key(0, "time", 0),
            rng.stream_key(0, "noise", 1),
        )
        for index in (0, 1)
    }
    assert len(samples) == 8


def test_step_may_be_traced() -> None:
    traced = jax.jit(lambda step: rng.uniform_per_sample(rng.stream_key(0, "x", step)[None]))(4)
    np.testing.assert_array_equal(traced, rng.uniform_per_sample(rng.stream_key(0, "x", 4)[None]))


def test_normals_are_standard() -> None:
    keys = rng.sample_keys(rng.stream_key(0, "noise"), np.arange(512))
    samples = np.asarray(rng.normal_per_sample(keys, (64,)))
    assert abs(samples.mean()) < 0.02 and abs(samples.std() - 1) < 0.02


NUMBERS = """
import jax, numpy as np
from dsr_jax.core import rng
from dsr_jax.core.provenance import provenance
from dsr_jax.parallel.processes import start_processes
start_processes()
key = rng.stream_key(3, "noise", 1)
print(np.asarray(rng.normal_per_sample(rng.sample_keys(key, np.arange(3)), (5,))).tobytes().hex())
print(np.asarray(jax.random.normal(rng.root_key(1), (7, 3))).tobytes().hex())
print(np.asarray(jax.random.normal(jax.random.key(1), (7, 3))).tobytes().hex())
print(provenance()["random_generator"])
"""


def test_the_environment_does_not_change_the_generator() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", NUMBERS],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **environment},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        for environment in (
            {},
            {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0"},
        )
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0][-1] == "threefry2x32, partitionable"


def test_keys_are_of_one_generator_whatever_the_default() -> None:
    with jax.default_prng_impl("rbg"):
        key = rng.stream_key(0, "noise")
    assert str(jax.random.key_impl(key)) == rng.GENERATOR
