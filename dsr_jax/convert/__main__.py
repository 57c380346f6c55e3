"""Converts checkpoints: `python -m dsr_jax.convert lightningdit --source ep-0000080.pt --out DIR`.

The folder then holds params.safetensors and conversion.json, which python -m dsr_jax.sample reads.
`export` goes the other way, to a torch state dict under the original's names.
"""

import argparse
from collections.abc import Sequence

from dsr_jax.convert.clip import FAMILY as CLIP
from dsr_jax.convert.clip import add_clip_command, clip_rules, load_clip
from dsr_jax.convert.converter import require_converter
from dsr_jax.convert.decoder import FAMILY as DECODER
from dsr_jax.convert.decoder import add_decoder_command, decoder_rules
from dsr_jax.convert.discriminator import FAMILY as DISCRIMINATOR
from dsr_jax.convert.discriminator import add_discriminator_command, export_backbone
from dsr_jax.convert.encoders import FAMILIES, encoder_rules
from dsr_jax.convert.families import add_denoiser_commands, export_denoiser
from dsr_jax.convert.files import check_new_file, load_converted, save_state
from dsr_jax.convert.hub import add_encoder_commands, config_of_record
from dsr_jax.convert.inception import FAMILY as INCEPTION
from dsr_jax.convert.inception import add_inception_command, inception_rules, network_of_record
from dsr_jax.convert.lpips import FAMILY as LPIPS
from dsr_jax.convert.lpips import add_lpips_command, lpips_rules
from dsr_jax.convert.rules import flax_to_torch
from dsr_jax.convert.sdvae import FAMILY as SDVAE
from dsr_jax.convert.sdvae import add_vae_command, export_vae
from dsr_jax.convert.statistics import add_statistics_command
from dsr_jax.convert.text_models import FAMILIES as TEXT_FAMILIES
from dsr_jax.convert.text_models import add_text_commands, export_text_model
from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.models.decoder import DecoderConfig
from dsr_jax.models.registry import denoiser_class


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns the exit status."""
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


def export(args: argparse.Namespace) -> None:
    """Writes a converted model as a torch or safetensors state dict."""
    check_new_file(args.out)
    params, record = load_converted(args.source)
    entries: Sequence[str] = ("ema",)
    if record["family"] in FAMILIES:
        state = flax_to_torch(params, encoder_rules(config_of_record(record)))
    elif record["family"] == SDVAE:
        state = export_vae(params, record)
    elif record["family"] == DECODER:
        state = flax_to_torch(params, decoder_rules(DecoderConfig(**record["model"])))
    elif record["family"] == DISCRIMINATOR:
        state = export_backbone(params, record)
    elif record["family"] == LPIPS:
        state = flax_to_torch(params, lpips_rules(tuple(record["model"]["channels"])))
    elif record["family"] == CLIP:
        state = flax_to_torch(params, clip_rules(load_clip(args.source)[0]))
    elif record["family"] in TEXT_FAMILIES:
        state, entries = export_text_model(params, record), ("model",)
    elif record["family"] == INCEPTION:
        state, entries = flax_to_torch(params, inception_rules(network_of_record(record))), ()
    else:
        state = export_denoiser(params, record)
        # Whichever of a checkpoint's entries the original reads, it finds these weights.
        entries = require_converter(denoiser_class(record["family"])).entries
    save_state(args.out, state, entries)
    print(f"{args.source} -> {args.out}: {len(state)} tensors")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "python -m dsr_jax.convert")
    families = parser.add_subparsers(required=True, metavar="FAMILY")
    add_denoiser_commands(families)
    add_encoder_commands(families)
    add_decoder_command(families)
    add_vae_command(families)
    add_lpips_command(families)
    add_discriminator_command(families)
    add_inception_command(families)
    add_clip_command(families)
    add_text_commands(families)
    add_statistics_command(families)
    back = families.add_parser("export", help="a converted folder, back to the original's names")
    back.add_argument("--source", required=True, help="converted folder")
    back.add_argument("--out", required=True, help="new .pt or .safetensors file")
    back.set_defaults(run=export)
    return parser


if __name__ == "__main__":
    run_main(main)
