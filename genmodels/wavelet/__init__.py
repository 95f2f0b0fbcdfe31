"""Orthogonal wavelet packets, and models of physical fields built scale by scale on them."""
