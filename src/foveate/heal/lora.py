"""LoRA: few new weights learn beside the student's own, and are added to them in the end."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foveate.errors import FoveateError
from foveate.heal.base import way
from foveate.heal.distill import Distilled
from foveate.methods import Paper
from foveate.models.anatomy import anatomy


@way("lora")
class LoraHeal(Distilled):
    """Low-rank adapters by PEFT, trained with the losses of `distill`, then merged: W + alpha / rank * B A (eq. 3).

    The healed model has no adapters and the parameters it had. All other weights stay as they are.

    Fields:
        rank: of each adapter.
        alpha: the adapters are scaled by alpha / rank.
        targets: `all` linear maps of the layers, or names of them with a slash between: `q/k/v/o/gate/up/down` (also
            `qkv`, `gate_up`, where a model has these).

    Example:
        >>> import foveate as fv
        >>> from foveate.heal import heal
        >>> teacher, student = fv.tiny("llama"), fv.tiny("llama", seed=1)
        >>> spec = "lora:rank=4,targets=q/v,tokens=1k,batch=4,length=32,data=samples,lr=1e-3"
        >>> heal(student, teacher, spec, progress=False).tokens
        1024
    """

    paper = Paper("LoRA: Low-Rank Adaptation of Large Language Models", 2021, "https://arxiv.org/abs/2106.09685")
    claim = "adapters of a low rank heal with far fewer trained weights, and cost nothing once merged"

    rank: int = 16
    alpha: float = 32.0
    targets: str = "all"
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.alpha <= 0:
            raise FoveateError(f"{self}: rank must be at least 1, and alpha above 0.")

    def wrapped(self, student: PreTrainedModel) -> PreTrainedModel:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise FoveateError("healing with lora needs the package peft: pip install 'foveate[heal]'.") from error
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=self._paths(student),
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=anatomy(student).family == "gpt2",
        )
        wrapped: Any = get_peft_model(student, config)
        return wrapped

    def unwrapped(self, student: PreTrainedModel) -> None:
        whole: Any = student
        whole.merge_and_unload()
        whole.get_base_model()._hf_peft_config_loaded = False

    def _paths(self, student: PreTrainedModel) -> list[str]:
        """Paths of the linear maps that get an adapter, from the model."""
        names = {id(module): path for path, module in student.named_modules()}
        parts = anatomy(student)
        found: list[str] = []
        if self.targets == "all":
            for layer in parts.layers:
                for module in layer.module.modules():
                    if isinstance(module, nn.Linear | Conv1D) and cast(Tensor, module.weight).is_floating_point():
                        found.append(names[id(module)])
        else:
            roles = [role.strip() for role in self.targets.split("/")]
            known = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
            if wrong := [role for role in roles if role not in known]:
                raise FoveateError(
                    f"{self}: there are no linear maps called {wrong[0]!r}: give some of {'/'.join(known)}."
                )
            for layer in parts.layers:
                maps = (getattr(layer, role) for role in roles)
                found += [names[id(m)] for m in maps if isinstance(m, nn.Linear | Conv1D)]
        if not found:
            raise FoveateError(f"{self}: the model has no such linear maps: give targets=all, or heal with distill.")
        return found
