"""Shards in, shards out: safetensors files read and written by byte range."""
