"""Bytes on disk: headers, tensors, model directories, where adapter files are, and what is written."""
