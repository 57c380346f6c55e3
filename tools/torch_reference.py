"""LightningDiT and its training step in plain PyTorch, as a reference for benchmarks and tests.

Parameters have the official names, so that the state dict is what `dsr_jax.convert` writes.
Written from the specification (denoiser 1, 5 and 8), in eager mode, with the fused attention of the
official code and PyTorch's fused AdamW. Needs torch.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """`x / rms(x)` in float32, times a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension."""
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * inverse).type_as(x) * self.weight


class Rope(nn.Module):
    """Rotary position embedding of a square grid that follows unrotated tokens.

    Args:
      head_dim: Channels of a head; a multiple of 4.
      grid: Number of tokens along one side.
      num_prefix: Number of unrotated tokens in front.
    """

    def __init__(self, head_dim: int, grid: int, num_prefix: int = 0) -> None:
        super().__init__()
        half = head_dim // 2
        frequencies = 10000.0 ** -(torch.arange(0, half, 2).float() / half)
        angles = (torch.arange(grid).float()[:, None] * frequencies).repeat_interleave(2, dim=1)
        rows = angles[:, None].expand(grid, grid, half)
        columns = angles[None].expand(grid, grid, half)
        table = torch.cat([rows, columns], dim=-1).reshape(grid**2, head_dim)
        table = torch.cat([torch.zeros(num_prefix, head_dim), table])
        self.register_buffer("freqs_cos", table.cos(), persistent=False)
        self.register_buffer("freqs_sin", table.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates the interleaved pairs of [B, H, L, K]."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    """Multi-head self-attention through PyTorch's fused kernel."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Maps [B, L, D] to [B, L, D]."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(rope(q), rope(k), v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)` with `a, b = w12(x)`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scales and shifts tokens [B, L, D] by vectors [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulation(width: int, count: int) -> nn.Sequential:
    """Returns the layers that map a condition to `count` modulation vectors."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


class Block(nn.Module):
    """Attention and feed-forward, each between a modulated norm and a gated residual."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor, rope: Rope) -> Tensor:
        """Maps tokens [B, L, D] to [B, L, D]."""
        vectors = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors
        mixed = self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rope)
        x = x + gate_attn.unsqueeze(1) * mixed
        mixed = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x + gate_mlp.unsqueeze(1) * mixed


class PatchEmbed(nn.Module):
    """Patch embedding: a strided convolution."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, h, w] to tokens [B, N, D]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbed(nn.Module):
    """Learned Fourier features of t, then a two-layer MLP."""

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(num_frequencies))
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Maps t [B] to [B, D]."""
        angles = t[:, None] * self.W * 2 * math.pi
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class LabelEmbed(nn.Module):
    """Label embedding: one row per class, and one for "no class"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Maps labels [B] to [B, D]."""
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Modulated norm and projection to pixels."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Maps tokens [B, N, D] to [B, N, features]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TorchLightningDiT(nn.Module):
    """LightningDiT as published: RMSNorm, SwiGLU, rope, no q/k norm; optionally registers.

    Position tables and registers are placeholders until weights are loaded.

    Args:
      input_size: Side of the square input.
      patch_size: Side p of a patch.
      in_channels: Channels C of the input.
      hidden_size: Width D.
      depth: Number of blocks.
      num_heads: Attention heads.
      mlp_ratio: Hidden units of the feed-forward per unit of width, before SwiGLU's two thirds.
      num_classes: Classes K; label K means "no class".
      num_registers: Register tokens R, 0 for none.
      register_start: First block that sees them.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        num_registers: int,
        register_start: int,
    ) -> None:
        super().__init__()
        grid, head_dim = input_size // patch_size, hidden_size // num_heads
        hidden = int(2 / 3 * int(hidden_size * mlp_ratio))
        self.patch_size, self.grid = patch_size, grid
        self.num_registers, self.register_start = num_registers, register_start
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimeEmbed(hidden_size)
        self.y_embedder = LabelEmbed(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2, hidden_size))
        self.feat_rope = Rope(head_dim, grid)
        if num_registers:
            self.register_tokens = nn.Parameter(torch.randn(1, num_registers, hidden_size))
            self.register_pos_embed = nn.Parameter(torch.zeros(1, num_registers, hidden_size))
            self.feat_rope_incontext = Rope(head_dim, grid, num_registers)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, hidden) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Maps x [B, C, h, w], t [B] and labels [B] to [B, C, h, w]."""
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(labels)
        rope = self.feat_rope
        for i, block in enumerate(self.blocks):
            if self.num_registers and i == self.register_start:
                registers = self.register_tokens + self.register_pos_embed
                tokens = torch.cat([registers.expand(len(x), -1, -1), tokens], dim=1)
                rope = self.feat_rope_incontext
            tokens = block(tokens, condition, rope)
        out = self.final_layer(tokens[:, self.num_registers :], condition)
        p, grid = self.patch_size, self.grid
        out = out.reshape(len(x), grid, grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(len(x), -1, grid * p, grid * p)


class RandomInputs(NamedTuple):
    """Random inputs of a training step.

    Attributes:
      t: [B] times.
      x0: [B, C, h, w] noise.
      labels: [B] labels, some replaced by "no class".
    """

    t: Tensor
    x0: Tensor
    labels: Tensor


class Trainer:
    """Training with AdamW on the velocity loss of the linear path, with EMA weights.

    Args:
      model: The network.
      lr: Learning rate.
      betas: Decay rates of AdamW's moments.
      ema_decay: Decay of the EMA weights.
      label_dropout: Fraction of labels replaced by `null_label`.
      null_label: Label of "no class".
      forward: The network as a step runs it, such as compiled; None for the network itself.
    """

    def __init__(
        self,
        model: TorchLightningDiT,
        *,
        lr: float,
        betas: tuple[float, float],
        ema_decay: float,
        label_dropout: float,
        null_label: int,
        forward: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model, self.ema = model, copy.deepcopy(model).requires_grad_(False)
        self.forward = forward or model
        self.ema_decay = ema_decay
        self.label_dropout, self.null_label = label_dropout, null_label
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=betas, weight_decay=0.0, fused=True
        )

    def sample(self, x1: Tensor, labels: Tensor) -> RandomInputs:
        """Samples logit-normal times, noise, and which labels are dropped."""
        dropped = torch.rand(len(x1), device=x1.device) < self.label_dropout
        labels = torch.where(dropped, self.null_label, labels)
        times = torch.randn(len(x1), device=x1.device).sigmoid()
        return RandomInputs(times, torch.randn_like(x1), labels)

    def step(self, x1: Tensor, labels: Tensor, inputs: RandomInputs | None = None) -> Tensor:
        """Runs one step and returns its loss, which a GPU may still be computing.

        Args:
          x1: [B, C, h, w] data.
          labels: [B] labels.
          inputs: Random inputs of the step; None samples them.
        """
        t, x0, labels = inputs or self.sample(x1, labels)
        at = t[:, None, None, None]
        out = self.forward((1 - at) * x1 + at * x0, t, labels)
        loss = F.mse_loss(out, x0 - x1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            pairs = list(self.ema.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(*pairs, weight=1 - self.ema_decay)
        return loss.detach()


@torch.no_grad()
def sample_euler(
    model: Callable[..., Tensor],
    noise: Tensor,
    labels: Tensor,
    times: Sequence[float],
    guidance: float,
    null_label: int,
) -> Tensor:
    """Returns samples [n, C, h, w]: Euler steps along `times` from noise, with guidance."""
    x = noise
    both = torch.cat([labels, torch.full_like(labels, null_label)])
    for now, then in zip(times[:-1], times[1:], strict=True):
        t = torch.full((len(both),), now, device=x.device)
        velocity = model(torch.cat([x, x]), t, both)
        conditional, unconditional = velocity.chunk(2)
        x = x + (then - now) * (unconditional + guidance * (conditional - unconditional))
    return x
