"""How a changed model recovers: bias compensation, LoRA, distillation from the original, relations of its attention."""

from foveate.heal import bias, distill, lora, minilm, none
from foveate.heal.base import HEALS, Heal, HealReport, heal, way

__all__ = ["HEALS", "Heal", "HealReport", "bias", "distill", "heal", "lora", "minilm", "none", "way"]
