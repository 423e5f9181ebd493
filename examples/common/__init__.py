"""What the examples share."""

#: What installs everything that an example may say it needs.
EXTRA = 'pip install "torchopt[examples]"'
