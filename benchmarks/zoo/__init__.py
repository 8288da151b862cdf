"""Every architecture of transformers, split and compared with the whole: ``colrow zoo``."""
