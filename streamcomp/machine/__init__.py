"""This computer: its memory, device and speed, configured by one ``with`` that restores it."""
