"""mimetic: masked image modeling on your own images, from shards to an exported backbone."""

__version__ = "0.1.0"
