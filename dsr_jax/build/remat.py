"""What the backward pass recomputes: policies by a config's keys."""

from typing import TypeVar

import flax.linen as nn

from dsr_jax.config import ConfigDict, has_text, trains_decoder
from dsr_jax.core.errors import ConfigError
from dsr_jax.models.blocks import REMAT_POLICIES
from dsr_jax.models.registry import config_fields, denoiser_class

AUTO = "auto"

Network = TypeVar("Network", bound=nn.Module)


def first_policy(key: str, value: str) -> str:
    """Returns the policy of a network that is built without a device: the fastest for "auto".

    Args:
      key: The config's key, for the message.
      value: Its value.

    Raises:
      ConfigError: If the policy's name is unknown.
    """
    if value not in (AUTO, *REMAT_POLICIES):
        known = ", ".join((AUTO, *REMAT_POLICIES))
        raise ConfigError(f"config.{key}={value!r} is unknown", f"choose from {known}")
    return next(iter(REMAT_POLICIES)) if value == AUTO else value


def has_policy(config: ConfigDict) -> bool:
    """Whether the config's denoiser has a field `remat`, which those of others may lack."""
    return "remat" in config_fields(denoiser_class(config.model.name))


def _auto_keys(config: ConfigDict) -> list[str]:
    """Returns the keys "section.remat" that are "auto", of the networks that a run trains."""
    if trains_decoder(config):
        sections = ["decoder"]
    else:
        sections = ["model"] * has_policy(config) + ["language"] * has_text(config)
    return [f"{name}.remat" for name in sections if config[name].remat == AUTO]


def remat_policies(config: ConfigDict) -> tuple[str, ...]:
    """Returns the policies that `with_remat` may set in a run, the fastest first."""
    known = tuple(REMAT_POLICIES)
    return known if _auto_keys(config) else known[:1]


def with_remat(config: ConfigDict, network: Network, policy: str) -> Network:
    """Returns a network, or the networks within a text-to-image one, with another policy.

    Args:
      config: Experiment config: what it names a policy for keeps it.
      network: The trained network.
      policy: The policy in place of "auto".
    """
    keys, fields = _auto_keys(config), vars(network)
    if not has_text(config):
        return network.clone(remat=policy) if keys else network
    parts = {"model.remat": "denoiser", "language.remat": "language"}
    return network.clone(**{parts[key]: fields[parts[key]].clone(remat=policy) for key in keys})


def policy_configs(config: ConfigDict) -> list[ConfigDict]:
    """Returns the config with each policy that a denoiser's run may use, the fastest first."""
    found, keys = [], _auto_keys(config)
    for policy in remat_policies(config):
        found.append(config.copy_and_resolve_references())
        found[-1].update_from_flattened_dict(dict.fromkeys(keys, policy))
    return found
