"""This computer: its memory, device and speed, and one ``with`` that sets it up and puts it back."""
