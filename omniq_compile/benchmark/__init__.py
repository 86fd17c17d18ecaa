"""What ``omniq bench`` measures: variants of a block beside one another, and suites of them."""
