"""The paper's models and their named configurations."""

from .image_configurations import IMAGE_CONFIGURATIONS, MDEQConfiguration, find_image_configuration
from .language_configurations import CONFIGURATIONS, LanguageModelConfiguration, find_configuration
from .mdeq import MDEQClassifier, MDEQOutput, MDEQSegmenter, segmentation_loss
from .transformer import DEQTransformerLM, LanguageModelOutput, TransformerXL

__all__ = [
    "CONFIGURATIONS",
    "IMAGE_CONFIGURATIONS",
    "DEQTransformerLM",
    "LanguageModelConfiguration",
    "LanguageModelOutput",
    "MDEQClassifier",
    "MDEQConfiguration",
    "MDEQOutput",
    "MDEQSegmenter",
    "TransformerXL",
    "find_configuration",
    "find_image_configuration",
    "segmentation_loss",
]
