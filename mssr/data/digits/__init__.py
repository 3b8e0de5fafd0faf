"""The embedded task: questions about two handwritten digits, with a small base model. See `prepare`."""

from mssr.data.digits.task import DigitsSettings, prepare
from mssr.data.digits.warmstart import WarmStartSettings

__all__ = ["DigitsSettings", "WarmStartSettings", "prepare"]
