"""What everything stands on: trees, numerics, values, and the words of errors."""
