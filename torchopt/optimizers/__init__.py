"""One file per algorithm: the rule, the recipe, the named classes of the two object APIs."""
