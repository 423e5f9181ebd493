"""Ways to differentiate an inner problem."""
