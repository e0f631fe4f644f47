"""Token mixers: how tokens exchange information. One file each."""

from foveate.mixers import linear, softmax
