"""colrow and its peers, timed alternately on the same weights, shapes, threads and cores."""
