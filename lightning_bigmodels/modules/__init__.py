"""The LightningModules that users name in YAML, one architecture family per file."""

from lightning_bigmodels.modules.transformer import CausalLanguageModel

__all__ = ["CausalLanguageModel"]
