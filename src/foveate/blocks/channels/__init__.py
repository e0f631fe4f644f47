"""Channel mixers, one file each."""

from foveate.blocks.channels import gated, none
