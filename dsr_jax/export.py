"""Writes a run's denoiser as the original's checkpoint: `python -m dsr_jax.export --workdir=RUN`.

    python -m dsr_jax.export --workdir=runs/rae_dit_xl --out=ep-last.pt
    python -m dsr_jax.export --workdir=runs/rae_dit_xl --out=converted/rae_dit_xl

Writes the EMA weights that the run samples with, or those of --ema. An --out that ends in .pt, .pth
or .safetensors becomes a file under the original's names, which its code loads strictly; any other
a folder such as `python -m dsr_jax.convert` writes, which sample and train
(config.train.init_from) read.
"""

from collections.abc import Sequence
from pathlib import Path

from dsr_jax.build.from_run import load_denoiser
from dsr_jax.convert.converter import require_converter
from dsr_jax.convert.families import export_denoiser
from dsr_jax.convert.files import check_new_file, check_new_folder, save_converted, save_state
from dsr_jax.convert.text_models import export_text_model
from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.models.registry import TEXT_TO_IMAGE

_FILES = (".pt", ".pth", ".safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__, "python -m dsr_jax.export")
    parser.add_argument("--workdir", required=True, help="the run's folder")
    parser.add_argument("--out", required=True, help="new file, or new folder")
    parser.add_argument(
        "--checkpoint-step", type=int, help="step of the checkpoint; default: the newest"
    )
    parser.add_argument(
        "--ema", help="decay of the EMA weights, or none for the weights without EMA"
    )
    args = parser.parse_args(argv)
    to_file = Path(args.out).suffix in _FILES
    (check_new_file if to_file else check_new_folder)(args.out)
    model, params, record, _ = load_denoiser(args.workdir, args.checkpoint_step, args.ema)
    if to_file and record["family"] == TEXT_TO_IMAGE:
        save_state(args.out, export_text_model(params, record), ("model",))
    elif to_file:
        state = export_denoiser(params, record)
        save_state(args.out, state, require_converter(type(model)).entries)
    else:
        save_converted(args.out, params, record)
    print(f"{record['source']}, {record['entry']} -> {args.out}")


if __name__ == "__main__":
    run_main(main)
