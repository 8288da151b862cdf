"""Any ``nn.Module`` made tensor-parallel in place. Each room imports only from those to its left.

``observe`` (what a model does when it runs) <- ``find`` (what can be split, and the proof) <-
``apply`` (how a split is carried out) <- ``weights`` (reading, making up and saving them) <- here:
``analysis`` finds everything, ``split`` carries it out, ``check`` compares, ``api`` is the entry.
"""
