"""The card of a saved model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Story:
    """x"""


def card(story: Story) -> str:
    return ""
