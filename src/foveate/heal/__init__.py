"""How a changed model recovers: bias compensation, LoRA, distillation from the original, relations of its attention."""

from foveate.heal import distill, none, processes
from foveate.heal.base import HEALS, Heal, HealReport, heal, way

__all__ = ["HEALS", "Heal", "HealReport", "distill", "heal", "none", "processes", "way"]
