"""Inversion and editing with rectified flows: methods, sharing of attention, models and pipelines as editors."""

from .apply import edit, invert
from .by_inversion import RFEdit
from .pipelines import of_pipeline
from .sharing import Sharing

__all__ = ["RFEdit", "Sharing", "edit", "invert", "of_pipeline"]
