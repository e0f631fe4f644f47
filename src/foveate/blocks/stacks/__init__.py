"""Ways to stack layers, one file each."""

from foveate.blocks.stacks import plain
