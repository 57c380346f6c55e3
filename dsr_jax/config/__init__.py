"""Experiment configs: every key with its default, loading and checks, and the papers' recipes."""

from ml_collections import ConfigDict as ConfigDict

from dsr_jax.config.checks import architecture as architecture
from dsr_jax.config.checks import check as check
from dsr_jax.config.checks import has_text as has_text
from dsr_jax.config.checks import hints as hints
from dsr_jax.config.checks import precision_recipe as precision_recipe
from dsr_jax.config.checks import trains_decoder as trains_decoder
from dsr_jax.config.denoisers import use_denoiser as use_denoiser
from dsr_jax.config.loading import apply_overrides as apply_overrides
from dsr_jax.config.loading import choose as choose
from dsr_jax.config.loading import from_json as from_json
from dsr_jax.config.loading import load as load
from dsr_jax.config.loading import load_file as load_file
from dsr_jax.config.loading import load_run as load_run
from dsr_jax.config.loading import parse_arg as parse_arg
from dsr_jax.config.schema import base_config as base_config
from dsr_jax.config.schema import to_json as to_json
