"""How a loop is differentiated by computing its steps again."""
