"""A search for the settings of a training run, on the validation split."""
