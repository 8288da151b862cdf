"""Random models, layouts and batches, split over real ranks and compared with the unsplit model.

``make fuzz`` or ``python -m tests.fuzz --help``. A case is plain data, drawn from (seed, kind,
number) alone, so that one line repeats it. ``kinds`` has a file for each kind of case: what can
vary, and how split and whole are compared; ``pool`` runs a case on ranks and judges what came back;
``shrink`` makes a case that failed small; ``campaign`` goes on until its time is over.
"""
