"""Pictures of training runs and of trajectories on the sphere, with Matplotlib."""
