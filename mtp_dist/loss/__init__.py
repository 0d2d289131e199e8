"""Training loss of the prediction heads."""
