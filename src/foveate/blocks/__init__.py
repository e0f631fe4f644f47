"""What stands round token mixers: norm placements, channel mixers, ways to stack layers. One file each."""

from foveate.blocks import channels, norms, stacks
