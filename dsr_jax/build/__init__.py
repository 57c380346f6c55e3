"""Builds the objects that a config names; the only package that imports all others.

Only commands and runs call these functions.
"""

from dsr_jax.build.decoder import make_decoder_parts as make_decoder_parts
from dsr_jax.build.decoder import make_decoder_state as make_decoder_state
from dsr_jax.build.decoder import make_loss_settings as make_loss_settings
from dsr_jax.build.decoder import make_reconstruct as make_reconstruct
from dsr_jax.build.decoding import make_decoding_space as make_decoding_space
from dsr_jax.build.denoiser import make_model as make_model
from dsr_jax.build.denoiser import restore_converted as restore_converted
from dsr_jax.build.denoiser import start_from as start_from
from dsr_jax.build.experiment import batch_records as batch_records
from dsr_jax.build.experiment import global_batches as global_batches
from dsr_jax.build.experiment import jit_step as jit_step
from dsr_jax.build.experiment import make_denoise_fn as make_denoise_fn
from dsr_jax.build.experiment import make_mesh as make_mesh
from dsr_jax.build.experiment import make_objective as make_objective
from dsr_jax.build.experiment import make_optimizer as make_optimizer
from dsr_jax.build.experiment import make_rules as make_rules
from dsr_jax.build.experiment import make_source as make_source
from dsr_jax.build.experiment import make_space as make_space
from dsr_jax.build.experiment import make_step as make_step
from dsr_jax.build.experiment import make_time_sampler as make_time_sampler
from dsr_jax.build.experiment import make_token_weights as make_token_weights
from dsr_jax.build.experiment import set_precision as set_precision
from dsr_jax.build.experiment import skip_batches as skip_batches
from dsr_jax.build.experiment import xla_options as xla_options
from dsr_jax.build.fitting import make_fitting_step as make_fitting_step
from dsr_jax.build.greedy import write_answers as write_answers
from dsr_jax.build.guide import find_guide as find_guide
from dsr_jax.build.guide import weights_digest as weights_digest
from dsr_jax.build.remat import has_policy as has_policy
from dsr_jax.build.remat import policy_configs as policy_configs
from dsr_jax.build.remat import with_remat as with_remat
from dsr_jax.build.sampler import compile_sampler as compile_sampler
from dsr_jax.build.sampler import make_sampler as make_sampler
from dsr_jax.build.sampler import sampler_settings as sampler_settings
from dsr_jax.build.sampler import sampling_batch as sampling_batch
from dsr_jax.build.sampler import sampling_recipe as sampling_recipe
from dsr_jax.build.state import abstract_params as abstract_params
from dsr_jax.build.state import init_params as init_params
from dsr_jax.build.state import make_state as make_state
from dsr_jax.build.state import shard_state as shard_state
from dsr_jax.build.text_to_image import encode_prompts as encode_prompts
from dsr_jax.build.text_to_image import start_from_language as start_from_language
