"""Measures: tensors in, records out. No paths, no printing, no plotting."""
