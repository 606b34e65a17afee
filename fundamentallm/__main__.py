"""``python -m fundamentallm``."""

from fundamentallm.cli import main

main()
