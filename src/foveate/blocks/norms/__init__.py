"""Norm placements, one file each."""

from foveate.blocks.norms import post, pre
