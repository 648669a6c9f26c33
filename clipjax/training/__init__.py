"""One run: preflight, state, step, loop."""
