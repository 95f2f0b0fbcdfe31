"""Inversion and editing with rectified flows: methods, sharing of attention, models and pipelines as editors."""

from .by_inversion import RFEdit
from .apply import edit, invert
from .pipelines import of_pipeline
from .sharing import Sharing

__all__ = ["RFEdit", "Sharing", "edit", "invert", "of_pipeline"]
