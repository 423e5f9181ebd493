"""Networks: their parameters, snapshots of them, and undoing what happened to them."""
