"""A table of a network's parameters: names, shapes, dtypes, sizes."""

from clu import parameter_overview

from dsr_jax.core.typing import Params


def parameter_table(params: Params) -> str:
    """Returns the table as text, one row per array and the total below it.

    Args:
      params: Arrays or `ShapeDtypeStruct`s.
    """
    return parameter_overview.get_parameter_overview(params, include_stats=False)
