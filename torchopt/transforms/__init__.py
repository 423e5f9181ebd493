"""Transformations that are no optimizers by themselves: scaling, decay, clipping, momentum, masks."""
