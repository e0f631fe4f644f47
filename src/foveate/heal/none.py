"""No healing: the yardstick for every other way."""

from foveate.heal.base import Heal, HealReport, Job, way


@way("none")
class NoHeal(Heal):
    """The model stays as the change left it.

    Example:
        >>> import foveate as fv
        >>> from foveate.heal import heal
        >>> heal(fv.tiny("llama"), fv.tiny("llama"), "none").tokens
        0
    """

    claim = "a model without healing shows what a change costs"

    def run(self, job: Job) -> HealReport:
        return HealReport(str(self))
