"""``python -m adi`` is ``adi``."""

from adi.cli.app import main

main()
