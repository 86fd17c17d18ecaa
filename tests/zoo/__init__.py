"""Every transformer class of diffusers in a tiny size: recipes, and the tests that walk them."""
