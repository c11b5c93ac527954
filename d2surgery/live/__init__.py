"""Adapters in running torch models."""
