"""Fusion of a pair: intensities, colour, the engine. Importing this package needs the standard library only."""
