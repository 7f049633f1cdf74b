"""Print one graph on its way through the passes: python examples/print_graphs.py [block]"""

from __future__ import annotations

import sys

import torch
from torch import fx, nn
from torch.nn import functional

from pab_fx import PABConfig, rewrite, specialize


class Attention(nn.Module):
    """Self-attention of tokens [B, S, D] with one head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_out(functional.scaled_dot_product_attention(query, key, value))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.ff = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm(hidden_states))
        return hidden_states + self.ff(hidden_states)


def stages() -> dict[str, str]:
    """The graph as Python code, by the name of the stage."""
    block = Block().eval().requires_grad_(False)
    captured = fx.symbolic_trace(block)
    rewritten = rewrite(captured, PABConfig(spatial_attention_block_skip_range=2))
    found = {
        "captured": captured,
        "rewritten": rewritten,
        "rewritten, the computing branch": rewritten.pab_compute_0,
        "rewritten, the reading branch": rewritten.pab_read_0,
        "specialized, computing": specialize(rewritten, reuse=()),
        "specialized, reusing": specialize(rewritten, reuse={"spatial"}),
    }
    return {name: str(gm.code).strip() for name, gm in found.items()}


if __name__ == "__main__":
    for name, code in stages().items():
        if len(sys.argv) < 2 or sys.argv[1] in name:
            print(f"# {name}\n{code}\n")
