"""The room of what stands round token mixers: norm placements, channel mixers, ways to stack layers."""

from foveate.blocks import channels, norms, stacks

__all__ = ["channels", "norms", "stacks"]
