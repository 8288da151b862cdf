"""What colrow sends between ranks: the collectives, their engines and the ledger that counts them.

Import the modules themselves: ``comm.ledger`` needs no torch, ``comm.collectives`` does.
"""
