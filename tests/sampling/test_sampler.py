"""Drawing batches: exact on a denoiser with a known answer, the same in any batch and mesh."""

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
from dsr_jax.sampling.sampler import SamplerSettings, make_draw_fn, make_sample_fn

SHAPE = (2, 3, 1)
NULL = 10
INDICES = np.arange(100, 116, dtype=np.uint32)
LABELS = np.arange(16, dtype=np.int32) % 10

SDE = SamplerSettings(method="sde-euler", num_points=4, guidance=1.5)


def decode(variables, latents):
    return latents * variables


def make(settings, apply_fn, sharding=None, prediction="data"):
    objective = make_objective("linear", prediction)
    draw = make_draw_fn(
        apply_fn,
        objective,
        settings,
        decode,
        latent_shape=SHAPE,
        null_label=NULL,
        sharding=sharding,
    )
    return make_sample_fn(draw, sharding)


def by_label(params, x, t, labels):
    """Predicts data that depend on the label alone."""
    return jnp.zeros_like(x) + params[labels][:, None, None, None]


def by_noise(params, x, t, labels):
    """Predicts data that depend on the state, so that noise reaches the image."""
    return params * jnp.tanh(x) + labels[:, None, None, None] / 50


def draw(settings, apply_fn=by_noise, params=0.3, indices=INDICES, labels=LABELS, **kwargs):
    samples = make(settings, apply_fn, **kwargs)(params, jnp.float32(1.0), indices, labels)
    return np.asarray(samples.images), np.asarray(samples.finite)


def test_euler_ends_at_the_predicted_data():
    """The last step of data prediction lands on the prediction (spec denoiser 6.1)."""
    table = jnp.append((jnp.arange(10.0) + 0.5) / 255, 0.0)
    images, finite = draw(SamplerSettings(time_shift=3.0, num_points=8), by_label, table)
    assert images.shape == (16, *SHAPE) and images.dtype == np.uint8 and finite.all()
    assert (images == LABELS[:, None, None, None]).all()


@pytest.mark.parametrize(("interval", "factor"), [((0.0, 1.0), 2.5), ((0.5, 1.0), 1.0)])
def test_guidance_moves_away_from_the_null_label_within_the_interval(interval, factor):
    """With null at 10 levels, guided = 10 + scale * (label - 10); what counts is the last step."""
    table = jnp.append(10.0 + 4 * jnp.arange(10.0), 10.0) / 255
    settings = SamplerSettings(guidance=2.5, interval=interval, uint8="round", num_points=6)
    images, _ = draw(settings, by_label, table)
    want = 10 + factor * 4 * LABELS
    assert (images == want[:, None, None, None]).all()


def draw_decoded(settings, apply_fn, prediction, decode, variables, channels=1):
    """Images by another decoder, of latents with so many channels."""
    draw = make_draw_fn(
        apply_fn,
        make_objective("linear", prediction),
        settings,
        decode,
        latent_shape=(2, 3, channels),
        null_label=NULL,
    )
    table = jnp.append(10.0 + 4 * jnp.arange(10.0), 10.0)
    return np.asarray(make_sample_fn(draw)(table, variables, INDICES, LABELS).images)


def test_guidance_of_some_channels_leaves_the_others_conditional():
    settings = SamplerSettings(guidance=2.5, guidance_channels=1, uint8="round", num_points=6)
    scale = lambda variables, latents: latents / 255  # noqa: E731
    images = draw_decoded(settings, by_label, "data", scale, None, channels=3)
    assert (images[..., 0] == (10 + 10 * LABELS)[:, None, None]).all()
    assert (images[..., 1:] == (10 + 4 * LABELS)[:, None, None, None]).all()


@pytest.mark.parametrize(("time_range", "length"), [((0.0, 1.0), 1.0), ((), 0.999)])
def test_the_range_of_times_decides_how_far_velocities_go(time_range, length):
    """One step along a velocity of 1, from the noise that the indices say."""
    keys = sample_keys(stream_key(0, "sample_noise"), INDICES)
    noise = normal_per_sample(keys, SHAPE)
    ahead = lambda params, x, t, labels: jnp.ones_like(x)  # noqa: E731
    way = lambda noise, latents: (noise - latents) * 100.05 / 255  # noqa: E731
    settings = SamplerSettings(num_points=2, time_range=time_range)
    images = draw_decoded(settings, ahead, "velocity", way, noise)
    assert (images == int(length * 100.05)).all()


@pytest.mark.parametrize("method", ["euler", "dopri5", "sde-heun"])
def test_method_draws_what_the_index_says_in_any_batch(method):
    sample = make(SamplerSettings(method=method, num_points=4), by_noise)

    def images(places, shift=0):
        return np.asarray(sample(0.3, 1.0, INDICES[places] + shift, LABELS[places]).images, int)

    everyone = np.arange(16)
    drawn = images(everyone)
    assert len(np.unique(drawn)) > 10
    assert (images(everyone, shift=1) != drawn).any()
    order = np.array([5, 3, 15])
    assert np.abs(images(order) - drawn[order]).max() <= 1


@pytest.fixture(scope="module")
def drawn_alone():
    return draw(SDE)[0]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_images_do_not_depend_on_the_mesh(shape, drawn_alone):
    mesh = make_mesh(MeshShape(*shape), jax.devices()[:8])
    spread, finite = draw(SDE, sharding=batch_sharding(mesh, make_rules("fsdp")))
    assert np.abs(spread.astype(int) - drawn_alone).max() <= 1
    assert (spread != drawn_alone).mean() < 0.01 and finite.all()


def test_noise_depends_on_the_seed():
    images = [draw(SamplerSettings(num_points=3, seed=seed))[0] for seed in (0, 1)]
    assert (images[0] != images[1]).any()


def test_velocity_prediction_follows_the_flow():
    """dx/dt = (x - c) / t leads to c, up to the noise left at the grid's end, t = 0.001."""

    def towards(table, x, t, labels):
        return (x - by_label(table, x, t, labels)) / t[:, None, None, None]

    table = jnp.append((20 * jnp.arange(10.0) + 10) / 255, 0.0)
    images, _ = draw(SamplerSettings(num_points=4), towards, table, prediction="velocity")
    assert np.abs(images.astype(int) - (20 * LABELS + 10)[:, None, None, None]).max() <= 1


def test_sampling_starts_with_noise_of_the_paths_scale():
    """A network that predicts no velocity leaves the noise as it was."""
    draw = make_draw_fn(
        lambda params, x, t, labels: jnp.zeros_like(x),
        make_objective("linear", "velocity", noise_scale=0.1),
        SamplerSettings(num_points=2, uint8="round"),
        lambda variables, latents: 0.5 + latents,
        latent_shape=SHAPE,
        null_label=NULL,
    )
    images = make_sample_fn(draw)({}, {}, INDICES, LABELS).images
    keys = sample_keys(stream_key(0, "sample_noise"), INDICES)
    want = np.clip(0.5 + 0.1 * normal_per_sample(keys, SHAPE), 0, 1)
    np.testing.assert_array_equal(images, np.round(255 * want))


def test_samples_that_are_not_finite_are_told():
    table = jnp.append(jnp.where(jnp.arange(10.0) == 3, jnp.nan, 0.5), 0.0)
    _, finite = draw(SamplerSettings(num_points=3), by_label, table)
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
    with pytest.raises(ConfigError, match="method 'leapfrog'.*\n.*sde-euler"):
        SamplerSettings(method="leapfrog")
    with pytest.raises(ConfigError, match="uint8 mode 'floor'"):
        SamplerSettings(uint8="floor")
    with pytest.raises(ConfigError, match="num_points=1"):
        make(SamplerSettings(num_points=1), by_label)
