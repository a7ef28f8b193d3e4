"""Safetensors shards, read and written by byte range."""
