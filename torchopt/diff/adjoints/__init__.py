"""Ways to differentiate a loop, each an object that is handed to it."""
