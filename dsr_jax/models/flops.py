"""Multiply-accumulates (MACs) of the parts that denoisers share.

Only matmuls are counted; norms, softmax and element-wise work are not. A network's
`forward_flops` is twice the sum of its parts. XLA's own count cannot replace this: it counts a
scanned block once.

Source: paper, table of GFLOPs (reproduced exactly); spec denoiser 4.
"""


def block_macs(
    length: int,
    *,
    hidden: int,
    mlp_hidden: int,
    use_swiglu: bool,
    conditions: int = 1,
    condition_width: int = 0,
    extra_keys: int = 0,
    gated: int = 0,
) -> int:
    """MACs of one transformer block on one sample; the number of heads does not matter.

    Args:
      length: Tokens L.
      hidden: Width D.
      mlp_hidden: Hidden units M of the feed-forward layer.
      use_swiglu: Three matrices in the feed-forward layer, otherwise two.
      conditions: Number of different conditions: 1, or L where each token has its own.
      condition_width: Width Z of a condition; 0 for D.
      extra_keys: Learned keys and values besides those of the tokens.
      gated: Registers behind a gate: attention runs a second time, without them.
    """
    matrices = 3 if use_swiglu else 2
    keys = length + extra_keys
    attended = keys + (keys - gated if gated else 0)
    projections = length * (4 * hidden**2 + matrices * hidden * mlp_hidden)
    modulation = 6 * conditions * hidden * (condition_width or hidden)
    return projections + 2 * length * attended * hidden + modulation


def time_macs(hidden: int, features: int) -> int:
    """MACs of the two-layer MLP that maps `features` sines and cosines of the time to a width."""
    return features * hidden + hidden**2


def final_layer_macs(
    tokens: int, hidden: int, outputs: int, conditions: int = 1, condition_width: int = 0
) -> int:
    """MACs of the modulated output projection.

    Args:
      tokens: Patch tokens N.
      hidden: Width D.
      outputs: Numbers per token.
      conditions: Number of different conditions: 1, or N where each token has its own.
      condition_width: Width Z of a condition; 0 for D.
    """
    return tokens * hidden * outputs + 2 * conditions * hidden * (condition_width or hidden)
