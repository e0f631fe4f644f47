"""Channel mixers, one file each."""

from foveate.blocks.channels import duo, gated, mlp, moe, none
