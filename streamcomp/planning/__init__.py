"""Bytes and seconds of each step, before it runs and after."""
