"""`python -m scripts.inspect_curvature`: where in a stack trajectories bend, which family bends them, and by what."""
