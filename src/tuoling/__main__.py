"""`python -m tuoling` is `tuoling`."""

from tuoling.cli.main import main

main()
