"""From text to windows, from windows to hidden states, from hidden states to moments."""
