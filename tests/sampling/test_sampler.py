"""Sampling batches: exact on a denoiser with a known answer, the same in any batch and mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.parallel.axes import make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.shardings import batch_sharding
from dsr_jax.sampling.sampler import ArraySampler, SamplerSettings, make_device_sampler

SHAPE = (2, 3, 1)
NULL = 10
INDICES = np.arange(100, 116, dtype=np.uint32)
LABELS = np.arange(16, dtype=np.int32) % 10

SDE = SamplerSettings(method="sde-euler", num_points=4, guidance=1.5)


def decode(variables, latents):
    return latents * variables


def make(settings, apply_fn, sharding=None, prediction="data", guide_fn=None, guide=None):
    objective = make_objective("linear", prediction)
    device_sampler = make_device_sampler(
        apply_fn,
        objective,
        settings,
        decode,
        latent_shape=SHAPE,
        null_label=NULL,
        guide_fn=guide_fn,
        sharding=sharding,
    )
    return ArraySampler(device_sampler, guide, sharding)


def by_label(params, x, t, labels):
    """Predicts data that depend on the label alone."""
    return jnp.zeros_like(x) + params[labels][:, None, None, None]


def by_noise(params, x, t, labels):
    """Predicts data that depend on the state, so that noise reaches the image."""
    return params * jnp.tanh(x) + labels[:, None, None, None] / 50


def sample(settings, apply_fn=by_noise, params=0.3, indices=INDICES, labels=LABELS, **kwargs):
    samples = make(settings, apply_fn, **kwargs)(params, jnp.float32(1.0), indices, labels)
    return np.asarray(samples.images), np.asarray(samples.finite)


def test_euler_ends_at_the_predicted_data():
    """The last step of data prediction lands on the prediction (spec denoiser 6.1)."""
    table = jnp.append((jnp.arange(10.0) + 0.5) / 255, 0.0)
    images, finite = sample(SamplerSettings(time_shift=3.0, num_points=8), by_label, table)
    assert images.shape == (16, *SHAPE) and images.dtype == np.uint8 and finite.all()
    assert (images == LABELS[:, None, None, None]).all()


@pytest.mark.parametrize(("interval", "factor"), [((0.0, 1.0), 2.5), ((0.5, 1.0), 1.0)])
def test_guidance_moves_away_from_the_null_label_within_the_interval(interval, factor):
    """With null at 10 levels, guided = 10 + scale * (label - 10); what counts is the last step."""
    table = jnp.append(10.0 + 4 * jnp.arange(10.0), 10.0) / 255
    settings = SamplerSettings(guidance=2.5, interval=interval, uint8="round", num_points=6)
    images, _ = sample(settings, by_label, table)
    want = 10 + factor * 4 * LABELS
    assert (images == want[:, None, None, None]).all()


def sample_decoded(settings, apply_fn, prediction, decode, variables, channels=1):
    """Images by another decoder, of latents with so many channels."""
    device_sampler = make_device_sampler(
        apply_fn,
        make_objective("linear", prediction),
        settings,
        decode,
        latent_shape=(2, 3, channels),
        null_label=NULL,
    )
    table = jnp.append(10.0 + 4 * jnp.arange(10.0), 10.0)
    return np.asarray(ArraySampler(device_sampler)(table, variables, INDICES, LABELS).images)


def test_guidance_of_some_channels_leaves_the_others_conditional():
    settings = SamplerSettings(guidance=2.5, guidance_channels=1, uint8="round", num_points=6)
    scale = lambda variables, latents: latents / 255  # noqa: E731
    images = sample_decoded(settings, by_label, "data", scale, None, channels=3)
    assert (images[..., 0] == (10 + 10 * LABELS)[:, None, None]).all()
    assert (images[..., 1:] == (10 + 4 * LABELS)[:, None, None, None]).all()


@pytest.mark.parametrize(("time_range", "length"), [((0.0, 1.0), 1.0), ((), 0.999)])
def test_the_range_of_times_decides_how_far_velocities_go(time_range, length):
    """One step along a velocity of 1, from the noise of the indices."""
    keys = sample_keys(stream_key(0, "sample_noise"), INDICES)
    noise = normal_per_sample(keys, SHAPE)
    ahead = lambda params, x, t, labels: jnp.ones_like(x)  # noqa: E731
    way = lambda noise, latents: (noise - latents) * 100.05 / 255  # noqa: E731
    settings = SamplerSettings(num_points=2, time_range=time_range)
    images = sample_decoded(settings, ahead, "velocity", way, noise)
    assert (images == int(length * 100.05)).all()


@pytest.mark.parametrize("method", ["euler", "dopri5", "sde-heun"])
def test_a_sample_depends_on_its_index_and_not_on_its_batch(method):
    sampler = make(SamplerSettings(method=method, num_points=4), by_noise)

    def images(rows, shift=0):
        return np.asarray(sampler(0.3, 1.0, INDICES[rows] + shift, LABELS[rows]).images, int)

    everyone = np.arange(16)
    first = images(everyone)
    assert len(np.unique(first)) > 10
    assert (images(everyone, shift=1) != first).any()
    order = np.array([5, 3, 15])
    assert np.abs(images(order) - first[order]).max() <= 1


@pytest.fixture(scope="module")
def on_one_device():
    return sample(SDE)[0]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_images_do_not_depend_on_the_mesh(shape, on_one_device):
    mesh = make_mesh(MeshShape(*shape), jax.devices()[:8])
    split, finite = sample(SDE, sharding=batch_sharding(mesh, make_rules("fsdp")))
    assert np.abs(split.astype(int) - on_one_device).max() <= 1
    assert (split != on_one_device).mean() < 0.01 and finite.all()


def test_noise_depends_on_the_seed():
    images = [sample(SamplerSettings(num_points=3, seed=seed))[0] for seed in (0, 1)]
    assert (images[0] != images[1]).any()


def test_velocity_prediction_follows_the_flow():
    """dx/dt = (x - c) / t leads to c, up to the noise left at the grid's end, t = 0.001."""

    def towards(table, x, t, labels):
        return (x - by_label(table, x, t, labels)) / t[:, None, None, None]

    table = jnp.append((20 * jnp.arange(10.0) + 10) / 255, 0.0)
    images, _ = sample(SamplerSettings(num_points=4), towards, table, prediction="velocity")
    assert np.abs(images.astype(int) - (20 * LABELS + 10)[:, None, None, None]).max() <= 1


def test_sampling_starts_with_noise_of_the_paths_scale():
    """A network that predicts no velocity leaves the noise as it was."""
    device_sampler = make_device_sampler(
        lambda params, x, t, labels: jnp.zeros_like(x),
        make_objective("linear", "velocity", noise_scale=0.1),
        SamplerSettings(num_points=2, uint8="round"),
        lambda variables, latents: 0.5 + latents,
        latent_shape=SHAPE,
        null_label=NULL,
    )
    images = ArraySampler(device_sampler)({}, {}, INDICES, LABELS).images
    keys = sample_keys(stream_key(0, "sample_noise"), INDICES)
    want = np.clip(0.5 + 0.1 * normal_per_sample(keys, SHAPE), 0, 1)
    np.testing.assert_array_equal(images, np.round(255 * want))


def test_samples_that_are_not_finite_are_marked():
    table = jnp.append(jnp.where(jnp.arange(10.0) == 3, jnp.nan, 0.5), 0.0)
    _, finite = sample(SamplerSettings(num_points=3), by_label, table)
    assert (finite == (LABELS != 3)).all()


def test_recipe_holds_what_has_an_effect():
    assert SamplerSettings().recipe() == {
        "method": "euler",
        "num_points": 50,
        "guidance": 1.0,
        "time_shift": 1.0,
        "seed": 0,
        "uint8": "truncate",
    }
    assert "interval" in SamplerSettings(guidance=2.0).recipe()
    assert "open_interval" in SamplerSettings(guidance=2.0, open_interval=True).recipe()
    assert "guidance_channels" in SamplerSettings(guidance=2.0, guidance_channels=3).recipe()
    assert SamplerSettings(time_range=(0.0, 1.0)).recipe()["time_range"] == (0.0, 1.0)
    assert "rtol" in SamplerSettings(method="dopri5").recipe()
    assert "last_step" in SamplerSettings(method="sde-heun").recipe()


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match="method='leapfrog'.*\n.*sde-euler.*package.module"):
        SamplerSettings(method="leapfrog")
    with pytest.raises(ConfigError, match="uint8='floor'"):
        SamplerSettings(uint8="floor")
    with pytest.raises(ConfigError, match="num_points=1"):
        make(SamplerSettings(num_points=1), by_label)
    with pytest.raises(ConfigError, match=r"interval=\(0.9,\)"):
        SamplerSettings(interval=(0.9,))


def test_autoguidance_leads_away_from_the_guide():
    """guide + scale * (model - guide), with the model at 10 + 4 label and the guide at 8 levels."""
    table = jnp.append(10.0 + 4 * jnp.arange(10.0), 10.0) / 255
    settings = SamplerSettings(guidance=1.5, uint8="round", num_points=6)
    guide = jnp.full(11, 8.0) / 255
    images, _ = sample(settings, by_label, table, guide_fn=by_label, guide=guide)
    want = 8 + 1.5 * (2 + 4 * LABELS)
    assert (images == want[:, None, None, None]).all()


@pytest.mark.parametrize("method", ["euler", "sde-euler"])
def test_the_compiled_sampler_moves_nothing_between_devices_for_guidance(method):
    """On 8 devices, only the flags of finite samples are gathered."""
    mesh = make_mesh(MeshShape(8, 1, 1), jax.devices()[:8])
    sharding = batch_sharding(mesh, make_rules("fsdp"))
    programs = {}
    for scale in (1.0, 2.5):
        device_sampler = make_device_sampler(
            by_noise,
            make_objective("linear", "data"),
            SamplerSettings(method=method, num_points=4, guidance=scale, interval=(0.1, 0.9)),
            decode,
            latent_shape=SHAPE,
            null_label=NULL,
            sharding=sharding,
        )
        rows = [
            jax.ShapeDtypeStruct((16,), dtype, sharding=sharding) for dtype in ("uint32", "int32")
        ]
        program = device_sampler.lower(0.3, None, 1.0, *rows).compile().as_text()
        programs[scale] = re.findall(
            r"= (\S+) (all-\w+|collective-permute|reduce-scatter)", program
        )
    assert programs[2.5] == programs[1.0]
    assert all(shape.startswith("pred") for shape, _ in programs[1.0]), programs


def test_a_sampler_from_outside_the_package(tmp_path, monkeypatch):
    (tmp_path / "own_sampler.py").write_text(
        "import jax.numpy as jnp\n"
        "def one_step(problem):\n"
        "    t = jnp.broadcast_to(problem.grid[0], problem.noise.shape[:1])\n"
        "    return problem.objective.data(problem.predict(problem.noise, t), problem.noise, t)\n"
        "text = 'no sampler'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    table = jnp.append((jnp.arange(10.0) + 0.5) / 255, 0.0)
    settings = SamplerSettings(method="own_sampler:one_step", num_points=2)
    images, finite = sample(settings, by_label, table)
    assert (images == LABELS[:, None, None, None]).all() and finite.all()
    recipe = settings.recipe()
    assert recipe["method"] == "own_sampler:one_step" and "rtol" in recipe
    with pytest.raises(ConfigError, match="own_sampler:text' is a str"):
        SamplerSettings(method="own_sampler:text")
    with pytest.raises(ConfigError, match="'own_sampler' has no 'two_steps'"):
        SamplerSettings(method="own_sampler:two_steps")


def test_noise_and_state_are_made_within_the_program():
    """No argument is of a sample's size, so that there is no buffer to donate."""
    params = jnp.zeros(1000)
    sampler = make(SamplerSettings(num_points=4), lambda params, x, *_: params[0] * x)
    program = sampler.compile(params, jnp.float32(1.0), 16)
    arguments = program.memory_analysis().argument_size_in_bytes
    assert arguments <= params.nbytes + 4 + 16 * (INDICES.itemsize + LABELS.itemsize)
    samples = sampler.with_program(program)(params, jnp.float32(1.0), INDICES, LABELS)
    want = sampler(params, jnp.float32(1.0), INDICES, LABELS)
    assert (np.asarray(samples.images) == np.asarray(want.images)).all()
