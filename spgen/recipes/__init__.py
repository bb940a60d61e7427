"""Published methods in a few lines each: sparse weights in `weights`, active neurons and channels in `activations`."""
