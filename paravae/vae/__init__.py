"""The VAE: planning, ranks, blending, networks, engines, and the parallel decode that composes them."""
