"""The bundled looped GPT: its model, the passes through it, and decoding."""

from haltkit.models.gpt.model import LoopedGPT

__all__ = ["LoopedGPT"]
