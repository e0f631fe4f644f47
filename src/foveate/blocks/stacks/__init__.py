"""Ways to stack layers, one file each."""

from foveate.blocks.stacks import block_to_local, plain
