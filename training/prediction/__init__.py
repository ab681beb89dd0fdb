"""Photographs of any size to class maps, pictures and pseudo-labels: the parts of `training.predict`."""
