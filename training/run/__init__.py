"""One run: the loop, its step and state, its folder and log."""
