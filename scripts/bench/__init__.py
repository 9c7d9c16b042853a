"""Speed against named peers: `python -m scripts.bench`, `make bench`."""
