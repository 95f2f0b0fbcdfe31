"""Inversion and editing with rectified flows: methods, sharing of attention, models and pipelines as editors."""
