"""A miniature on which methods differ: rows of digits, and base models that mostly guess. See `prepare`."""

from mssr.data.chains.task import ChainsSettings, prepare

__all__ = ["ChainsSettings", "prepare"]
