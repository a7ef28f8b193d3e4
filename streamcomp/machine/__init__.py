"""This computer: its memory, device and speed, set up by one ``with`` that puts it all back."""
