"""Language models: loading them, and the anatomy, which says where each family keeps its parts."""

from foveate.models.anatomy import Anatomy, Family, LayerParts, anatomy, families, register_family

__all__ = ["Anatomy", "Family", "LayerParts", "anatomy", "families", "register_family"]
