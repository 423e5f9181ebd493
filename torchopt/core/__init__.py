"""The centre: transformations, their hyperparameters and slots, states, and the engine."""
