"""Trains an autoencoder's decoder: `python -m dsr_jax.train_decoder --config=... --workdir=...`.

The encoder is frozen; the decoder learns from L1, LPIPS and a discriminator (stage 1 of RAE). Any
key of the config can be set behind it, as in `--config.gan.weight=0.0`. The same command continues
a run that was stopped. The run's folder holds config.json, provenance.json, metrics.jsonl,
checkpoints/, samples/ with images above their reconstructions and, at the end, summary.json and
decoder_STEP/, which config.space.decoder reads.
"""

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from dsr_jax import build
from dsr_jax.build.decoder import DecoderParts
from dsr_jax.config import ConfigDict
from dsr_jax.core.cli import run_main
from dsr_jax.core.trees import count_params
from dsr_jax.data.classes import DataDescription, describe
from dsr_jax.parallel import shardings
from dsr_jax.parallel.device_memory import FreeBytes, free_bytes
from dsr_jax.runs.decoder_evaluation import Reconstructions
from dsr_jax.runs.folder import add_to_provenance
from dsr_jax.runs.runner import TrainingJob, run_command
from dsr_jax.training.decoder_state import DecoderState
from dsr_jax.training.decoder_step import DecoderStep, make_decoder_step
from dsr_jax.training.loop import Hook
from dsr_jax.training.state import make_reshard


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns the exit status."""
    return run_command(argv, make_job, "python -m dsr_jax.train_decoder", __doc__)


def make_job(config: ConfigDict, workdir: Path, free_memory: FreeBytes = free_bytes) -> TrainingJob:
    """Builds a decoder's training.

    Args:
      config: Experiment config.
      workdir: The run's folder.
      free_memory: Memory that the step may allocate on each device.

    Raises:
      DsrError: If what the config names does not exist or does not fit.
    """
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    parts = build.make_decoder_parts(config, mesh, rules)
    optimizer = build.make_optimizer(config)
    source = build.make_source(config, random_crops=True)
    data = describe(source)
    sharding = shardings.batch_sharding(mesh, rules)
    abstract, init = build.make_decoder_state(config, parts, optimizer, mesh, rules)
    settings = build.make_loss_settings(config)

    def make_step(policy: str) -> DecoderStep:
        return make_decoder_step(
            parts.with_remat(config, policy).networks,
            settings,
            optimizer,
            seed=config.seed,
            reshard=make_reshard(abstract),
        )

    step = build.make_fitting_step(
        config,
        make_step,
        abstract,
        sharding,
        lambda choice: add_to_provenance(workdir, {"remat": choice.to_json()}),
        free_memory,
    )
    reconstructions = Reconstructions(
        config,
        workdir,
        build.make_reconstruct(config, parts),
        parts.variables,
        parts.decoder.config,
        sharding,
    )
    return TrainingJob(
        summary_text=_run_summary(config, parts, abstract, data, mesh),
        mesh=mesh,
        abstract=abstract,
        init=init,
        step=lambda state, batch: step(state, batch, parts.variables),
        batches=build.global_batches(config, source, sharding),
        records=build.batch_records(config, source),
        hooks=[Hook(config.sample.every_steps, reconstructions.report)],
        finish=reconstructions.finish,
        data=data,
    )


def _run_summary(
    config: ConfigDict, parts: DecoderParts, state: DecoderState, data: DataDescription, mesh: Mesh
) -> str:
    """Returns the run summary, in a few lines."""
    sizes, gan = parts.decoder.config, config.gan
    losses = ["L1"]
    if parts.lpips is not None:
        losses.append(f"{config.lpips.weight:g} LPIPS")
    if state.discriminator is not None:
        losses.append(
            f"{gan.weight:g} GAN from step {gan.generator_start:,} (its discriminator, "
            f"{count_params(state.discriminator.params):,} parameters, "
            f"from {gan.discriminator_start:,})"
        )
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"decoder: {count_params(state.params):,} parameters, depth {sizes.depth}, latents "
        f"{sizes.grid} x {sizes.grid} x {sizes.latent_channels} to {sizes.image_size} pixels\n"
        f"losses: {' + '.join(losses)}\n"
        f"data: {data['source']}, {data['images']:,} images; mesh: {axes}"
    )


if __name__ == "__main__":
    run_main(main)
