"""Fusion metrics and baseline fusions."""
