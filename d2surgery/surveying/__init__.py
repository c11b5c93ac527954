"""Measures over every module of an adapter."""
