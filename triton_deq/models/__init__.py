"""The paper's models and their named configurations."""

from .configurations import CONFIGURATIONS, LanguageModelConfiguration, find_configuration
from .transformer import DEQTransformerLM, LanguageModelOutput, TransformerXL

__all__ = [
    "CONFIGURATIONS",
    "DEQTransformerLM",
    "LanguageModelConfiguration",
    "LanguageModelOutput",
    "TransformerXL",
    "find_configuration",
]
