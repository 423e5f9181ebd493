"""What the site generates from the code: pages, links and formulas."""
