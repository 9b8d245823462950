"""ClinicalFMamba: CNN-Mamba fusion of two registered neuro-images.

The engine behind the 3D Slicer extension of the same name. It knows nothing of Slicer: arrays and
geometry in, arrays and geometry out. Importing this package needs the standard library only; what
computes imports torch, numpy and SimpleITK where it needs them.

Shape letters used in every docstring: B batch, C channels, D depth (slices), H height (rows),
W width (columns), L tokens, N state size, E inner channels of a Mamba layer, K scan directions.

Research use only, not for diagnosis.
"""

__version__ = "0.1.0"

NOTICE = "Research use only, not for diagnosis."
