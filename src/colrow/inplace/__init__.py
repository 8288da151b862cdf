"""Any ``nn.Module`` made tensor-parallel in place.

``capture`` runs the model once and keeps what each module was called with; ``probe`` finds, with
gradients, which outputs of one layer reach which inputs of another; ``atoms`` makes from that the
pieces that cannot be torn and gives them to the ranks; ``simulate`` runs every rank's part in one
process and ``prove`` compares it with the whole; ``modules`` are the layers that take over;
``api`` puts it together.
"""
