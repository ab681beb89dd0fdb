"""How good a run is: clusterings, matching to classes, scores, CRF, and looks while training."""
