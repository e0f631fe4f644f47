"""No channel mixer."""

from __future__ import annotations

from foveate.backbone import Channel, Shape, channel


@channel("no-channel")
class NoChannel(Channel):
    """Layers are token mixers alone, as in Mamba."""

    claim = "leaves all work to the token mixer"

    def build(self, shape: Shape) -> None:
        return None
