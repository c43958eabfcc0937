"""Let `python -m scimlora` do what the command `scimlora` does."""
from scimlora.cli import main

main()
