"""Norm placements, one file each."""

from foveate.blocks.norms import ln_scaling, mix_ln, peri_ln, post, pre, sandwich
